/** A guest's serial console, for tests. */
import net from 'node:net';

const AGAIN_MS = 5_000;
const LATE_MS = 30_000;

/** Says a line on a serial console and waits for the answer; again when the shell did not listen yet. */
export function ask(
  socketPath: string,
  line: string,
  answer: RegExp,
  { lateMs = LATE_MS, againMs = AGAIN_MS } = {},
): Promise<string> {
  return new Promise((resolve, reject) => {
    const socket = net.connect(socketPath);
    let text = '';
    const say = () => socket.write(`${line}\n`);
    const again = setInterval(say, againMs);
    const late = setTimeout(() => socket.destroy(new Error(`no answer to '${line}', only: ${text}`)), lateMs);
    socket.on('connect', say);
    socket.on('data', (part) => {
      text += part.toString('utf8');
      const match = answer.exec(text);
      if (!match) return;
      socket.destroy();
      resolve(match[0]);
    });
    socket.on('error', reject);
    socket.on('close', () => {
      clearTimeout(late);
      clearInterval(again);
      reject(new Error(`the console closed before an answer to '${line}': ${text}`));
    });
  });
}
