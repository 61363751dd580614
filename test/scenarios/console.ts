/** A guest's serial console, for tests. */
import net from 'node:net';

/** Says a line on a serial console and waits for the answer. */
export function ask(socketPath: string, line: string, answer: RegExp): Promise<string> {
  return new Promise((resolve, reject) => {
    const socket = net.connect(socketPath);
    let text = '';
    const timer = setTimeout(
      () => socket.destroy(new Error(`no answer to '${line}', only: ${text}`)),
      20_000,
    );
    socket.on('connect', () => socket.write(`${line}\n`));
    socket.on('data', (part) => {
      text += part.toString('utf8');
      const match = answer.exec(text);
      if (match) {
        socket.end();
        resolve(match[0]);
      }
    });
    socket.on('error', reject);
    socket.on('close', () => clearTimeout(timer));
  });
}
