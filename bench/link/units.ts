/** Times and rates as people write them on a command line: 30ms, 1.5s, 100mbit, 1gbit, none. */

const MS_PER_UNIT: Record<string, number> = { us: 0.001, ms: 1, s: 1000, min: 60_000 };
const BITS_PER_UNIT: Record<string, number> = { bit: 1, kbit: 1e3, mbit: 1e6, gbit: 1e9 };

/** Milliseconds of `30ms`, `1.5s`, `500us`, `0`. Throws a RangeError that names the text. */
export function parseDuration(text: string): number {
  if (text === '0') return 0;
  const match = /^(\d+(?:\.\d+)?)(us|ms|s|min)$/.exec(text);
  if (!match) throw new RangeError(`'${text}' is not a duration: write for example 30ms or 1.5s`);
  return Number(match[1]) * MS_PER_UNIT[match[2]!]!;
}

/** Bits per second of `100mbit`, `1gbit`, `64kbit`; Infinity for `none`. Throws a RangeError. */
export function parseRate(text: string): number {
  if (text === 'none') return Infinity;
  const match = /^(\d+(?:\.\d+)?)(bit|kbit|mbit|gbit)(?:\/s)?$/i.exec(text);
  const rate = match ? Number(match[1]) * BITS_PER_UNIT[match[2]!.toLowerCase()]! : 0;
  if (!(rate > 0)) throw new RangeError(`'${text}' is not a rate: write for example 100mbit, 1gbit or none`);
  return rate;
}

/** `HOST:PORT`, `[v6]:PORT`. Throws a RangeError. */
export function parseAddress(text: string): { host: string; port: number } {
  const match = /^(?:\[([0-9a-fA-F:.]+)\]|([^:\s]+)):(\d{1,5})$/.exec(text);
  const port = Number(match?.[3]);
  if (!match || port > 65_535) throw new RangeError(`'${text}' is not an address: write HOST:PORT`);
  return { host: (match[1] ?? match[2])!, port };
}
