/**
 * The link emulator as a process of its own:
 *   node bench/link/main.ts --listen 127.0.0.1:0 --to 127.0.0.1:22 --rtt 30ms --rate 100mbit
 * Prints {"listening":"HOST:PORT"} when it is ready, and on SIGTERM or SIGINT the bytes of each direction. Lines on
 * stdin are faults: `cut`, `stall 5s`, `restore`, `bytes`; each is answered with a line.
 */
import { createInterface } from 'node:readline';
import { parseArgs } from 'node:util';
import { LinkRelay } from './relay.ts';
import type { LinkOptions } from './relay.ts';
import { parseAddress, parseDuration, parseRate } from './units.ts';

const print = (line: Record<string, unknown>) => process.stdout.write(JSON.stringify(line) + '\n');

function options(): LinkOptions {
  try {
    const { values } = parseArgs({
      options: {
        listen: { type: 'string', default: '127.0.0.1:0' },
        to: { type: 'string' },
        rtt: { type: 'string', default: '0' },
        rate: { type: 'string', default: 'none' },
      },
    });
    if (values.to === undefined) throw new RangeError('--to HOST:PORT is missing');
    return {
      listen: parseAddress(values.listen),
      to: parseAddress(values.to),
      rttMs: parseDuration(values.rtt),
      bitsPerSecond: parseRate(values.rate),
    };
  } catch (error) {
    process.stderr.write(`link: ${(error as Error).message}\n`);
    return process.exit(2);
  }
}

const relay = await LinkRelay.start(options()).catch((error: Error) => {
  process.stderr.write(`link: ${error.message}\n`);
  process.exit(1);
});

async function obey(line: string): Promise<void> {
  const [verb, argument] = line.trim().split(/\s+/);
  if (verb === '') return;
  try {
    if (verb === 'cut') await relay.cut();
    else if (verb === 'stall') relay.stall(parseDuration(argument ?? ''));
    else if (verb === 'restore') await relay.restore();
    else if (verb !== 'bytes') throw new RangeError(`'${verb}' is not one of cut, stall, restore, bytes`);
    print({ done: verb, ...relay.bytes() });
  } catch (error) {
    print({ failed: line, reason: (error as Error).message });
  }
}

const lines = createInterface({ input: process.stdin });
let obeyed = Promise.resolve();
lines.on('line', (line) => {
  obeyed = obeyed.then(() => obey(line));
});

let stopping = false;
async function stop(): Promise<void> {
  if (stopping) return;
  stopping = true;
  lines.close();
  await relay.close();
  print({ ...relay.bytes() });
  process.exit(0);
}
for (const signal of ['SIGTERM', 'SIGINT'] as const) process.on(signal, () => void stop());

const { host, port } = relay.address;
print({ listening: `${host}:${port}` });
