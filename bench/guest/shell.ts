/**
 * The root shell that the guests have on their first serial console, as a program uses it: a line in, the lines up to a mark
 * out. The mark is put together by the guest's shell, so that the echo of what was typed does not pass for it.
 */
import net from 'node:net';
import type { GuestName } from './build.ts';

/** Typed again after this long: a login may still be starting and have thrown away what was typed at it. */
const AGAIN_MS = 500;
const MARK = 'shell-mark';

/**
 * An application that reads much, computes and writes: packs the libraries, keeps the archive, and says its SHA-256,
 * which is the same in every run.
 */
export const APPLICATION: Record<GuestName, string> = {
  small:
    'for n in 1 2 3; do cat /bin/busybox /lib/modules/*; done | gzip -1 | tee /root/out | sha256sum; sync',
  debian: 'tar cf - -C / usr/lib/x86_64-linux-gnu 2>/dev/null | gzip -n -1 | tee /root/out | sha256sum; sync',
};

export class GuestShell {
  readonly #socket: net.Socket;
  #heard = '';
  #look: () => void = () => undefined;
  #failure: Error | undefined;

  private constructor(socket: net.Socket) {
    this.#socket = socket;
    socket.setEncoding('utf8');
    socket.on('data', (text: string) => {
      this.#heard += text;
      this.#look();
    });
    const end = (error?: Error) => {
      this.#failure = error ?? new Error('the guest is gone');
      this.#look();
    };
    socket.on('error', end);
    socket.on('close', () => end());
  }

  /** Resolves when the shell has answered once. */
  static async open(consoleSocket: string, timeoutMs: number): Promise<GuestShell> {
    const shell = new GuestShell(net.connect(consoleSocket));
    const type = () => shell.#socket.write(`echo ${MARK}'-up'\n`);
    type();
    const again = setInterval(type, AGAIN_MS);
    try {
      await shell.#until(new RegExp(`${MARK}-up\\r?\\n`), timeoutMs);
      return shell;
    } catch (error) {
      shell.close();
      throw error;
    } finally {
      clearInterval(again);
    }
  }

  /** What a command said; throws when it failed. */
  async run(command: string, timeoutMs: number): Promise<string> {
    this.#heard = '';
    this.#socket.write(`${command}; echo ${MARK}'-end' $?\n`);
    const { index, 1: status } = await this.#until(new RegExp(`${MARK}-end (\\d+)\\r?\\n`), timeoutMs);
    const said = this.#heard.slice(this.#heard.indexOf('\n') + 1, index).trim();
    if (status !== '0') throw new Error(`in the guest, ${command} failed (${status}): ${said.slice(-200)}`);
    return said;
  }

  close(): void {
    this.#socket.destroy();
  }

  #until(pattern: RegExp, timeoutMs: number): Promise<RegExpExecArray> {
    return new Promise((resolve, reject) => {
      const settle = (act: () => void) => {
        clearTimeout(timer);
        this.#look = () => undefined;
        act();
      };
      const timer = setTimeout(
        () => settle(() => reject(new Error(`the guest's shell said nothing for ${timeoutMs} ms`))),
        timeoutMs,
      );
      this.#look = () => {
        const found = pattern.exec(this.#heard);
        if (found) settle(() => resolve(found));
        else if (this.#failure) settle(() => reject(this.#failure!));
      };
      this.#look();
    });
  }
}
