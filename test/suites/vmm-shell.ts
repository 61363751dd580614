/** A guest's root shell, for the suites of machines. */
import type { Socket } from 'node:net';
import type { Machine } from '../../src/core/machine.ts';
import { connectSocket } from '../../src/vmm/index.ts';

/** The root shell on a machine's console. */
export class Shell {
  readonly #socket: Socket;
  #text = '';

  private constructor(socket: Socket) {
    this.#socket = socket;
    socket.on('data', (bytes: Buffer) => (this.#text += bytes.toString()));
    socket.on('error', () => undefined);
  }

  static async open(machine: Machine): Promise<Shell> {
    return new Shell(await connectSocket(machine.consoleSocket));
  }

  send(line: string): void {
    this.#socket.write(line + '\n');
  }

  /** What the console says after `line` was typed, up to the first match. The shell may not listen yet: again. */
  async ask(line: string, answer: RegExp): Promise<string> {
    this.#text = '';
    const deadlineMs = performance.now() + 20_000;
    for (let turn = 0; performance.now() < deadlineMs; turn++) {
      if (turn % 100 === 0) this.send(line);
      const match = answer.exec(this.#text);
      if (match !== null) return match[1] ?? match[0];
      await new Promise((resolve) => setTimeout(resolve, 20));
    }
    throw new Error(`no answer to ${line}; the console said ${JSON.stringify(this.#text.slice(-500))}`);
  }

  close(): void {
    this.#socket.destroy();
  }
}
