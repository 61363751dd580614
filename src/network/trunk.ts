/**
 * A trunk: one network between two hosts, over any reliable stream (a channel of the ssh tunnel, an upgraded http
 * request). Who may open it is the tunnel's matter; the greeting makes sure that both ends mean the same network.
 *
 *   magic    8   "GVNTRNK1"
 *   length   u16 big-endian, of the JSON that follows
 *   JSON         { "network": …, "host": … }
 *   frames       as in frames.ts, both ways, until the stream ends
 */
import type { Duplex } from 'node:stream';
import { GridError } from '../core/errors.ts';
import { NAME_LENGTH_MAX } from '../core/limits.ts';

const MAGIC = Buffer.from('GVNTRNK1');
const HEAD_BYTES = MAGIC.length + 2;
const JSON_BYTES_MAX = 1024;
/** A tunnel that is there carries a greeting within this. */
const GREETING_MS = 15_000;

export interface Greeting {
  readonly network: string;
  readonly host: string;
}

export function greetingBytes(greeting: Greeting): Buffer {
  const json = Buffer.from(JSON.stringify(greeting));
  const head = Buffer.alloc(HEAD_BYTES);
  MAGIC.copy(head);
  head.writeUInt16BE(json.length, MAGIC.length);
  return Buffer.concat([head, json]);
}

/** The greeting at the start of `bytes` and where it ends; undefined when more is to come. Throws bad-format. */
export function parseGreeting(bytes: Buffer): { greeting: Greeting; end: number } | undefined {
  const there = Math.min(bytes.length, MAGIC.length);
  if (bytes.compare(MAGIC, 0, there, 0, there) !== 0)
    throw new GridError('bad-format', 'what came by the trunk is no greeting of a trunk');
  if (bytes.length < HEAD_BYTES) return undefined;
  const length = bytes.readUInt16BE(MAGIC.length);
  if (length > JSON_BYTES_MAX) throw new GridError('bad-format', `a trunk's greeting of ${length} bytes`);
  const end = HEAD_BYTES + length;
  if (bytes.length < end) return undefined;
  let value: unknown;
  try {
    value = JSON.parse(bytes.toString('utf8', HEAD_BYTES, end));
  } catch (cause) {
    throw new GridError('bad-format', "a trunk's greeting is not JSON", { cause });
  }
  const { network, host } = (value ?? {}) as Partial<Record<keyof Greeting, unknown>>;
  if (typeof network !== 'string' || typeof host !== 'string' || host.length > NAME_LENGTH_MAX)
    throw new GridError('bad-format', "a trunk's greeting names no network and host");
  return { greeting: { network, host }, end };
}

/**
 * Greets and waits for the other's greeting. Resolves with it and with what came behind it; the stream is paused then.
 * Throws bad-format, denied (another network), timeout, tunnel-lost; the stream is destroyed then.
 */
export async function greet(stream: Duplex, own: Greeting): Promise<{ other: Greeting; rest: Buffer }> {
  stream.write(greetingBytes(own));
  let bytes = Buffer.alloc(0);
  try {
    return await new Promise((resolve, reject) => {
      const timer = setTimeout(
        () => reject(new GridError('timeout', `no greeting on the trunk within ${GREETING_MS / 1000} s`)),
        GREETING_MS,
      );
      const finish = (settle: () => void) => {
        clearTimeout(timer);
        stream.off('data', onData);
        stream.off('close', onClose);
        settle();
      };
      const onClose = () =>
        finish(() => reject(new GridError('tunnel-lost', 'the trunk ended before its greeting')));
      const onData = (piece: Buffer) => {
        bytes = Buffer.concat([bytes, piece]);
        try {
          const found = parseGreeting(bytes);
          if (found === undefined) return;
          if (found.greeting.network !== own.network) {
            throw new GridError(
              'denied',
              `the trunk is for network '${found.greeting.network}', not '${own.network}'`,
            );
          }
          stream.pause();
          finish(() => resolve({ other: found.greeting, rest: bytes.subarray(found.end) }));
        } catch (error) {
          finish(() => reject(error));
        }
      };
      stream.on('error', () => {});
      stream.once('close', onClose);
      stream.on('data', onData);
    });
  } catch (error) {
    stream.destroy();
    throw error;
  }
}
