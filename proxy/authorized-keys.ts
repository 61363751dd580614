/**
 * authorized_keys as sshd(8) describes it. The endpoint offers one thing only, so most options have nothing to
 * restrict; those that narrow who may come (from=, expiry-time=) are enforced, a forced command= must itself be
 * the tunnel, and a line with an option that is not understood, or with cert-authority, lets nobody in.
 */
import { statSync, readFileSync } from 'node:fs';
import net from 'node:net';
import path from 'node:path';
import { asGridError, GridError } from '../src/core/errors.ts';
import { keyTypeOf, matchesPatterns } from './known-hosts.ts';

export interface AuthorizedKey {
  readonly type: string;
  readonly blob: Buffer;
  readonly comment: string;
  /** Patterns of addresses that the key may come from. */
  readonly from?: string;
  /** The only command that the key may run. */
  readonly command?: string;
  readonly expiresMs?: number;
}

/** Options that take away what the endpoint never gives, or that have no meaning for it. */
const HARMLESS = new Set([
  'restrict',
  'agent-forwarding',
  'no-agent-forwarding',
  'port-forwarding',
  'no-port-forwarding',
  'pty',
  'no-pty',
  'user-rc',
  'no-user-rc',
  'x11-forwarding',
  'no-x11-forwarding',
  'environment',
  'permitlisten',
  'permitopen',
  'tunnel',
]);

const KEY_TYPE = /^(ssh-ed25519|ssh-rsa|ecdsa-sha2-nistp(256|384|521))$/;

/** Every line that lets somebody in; a line that is malformed or not understood lets nobody in. */
export function parseAuthorizedKeys(text: string): AuthorizedKey[] {
  return text.split('\n').flatMap((line) => parseLine(line.trim()) ?? []);
}

function parseLine(line: string): AuthorizedKey | undefined {
  if (line === '' || line.startsWith('#')) return undefined;
  let rest = line;
  let options: Map<string, string> | undefined = new Map();
  if (!KEY_TYPE.test(line.split(/[ \t]/, 1)[0]!)) {
    const end = endOfOptions(line);
    options = parseOptions(line.slice(0, end));
    rest = line.slice(end).trimStart();
  }
  const [type, base64, ...comment] = rest.split(/[ \t]+/);
  if (!options || type === undefined || base64 === undefined || !KEY_TYPE.test(type)) return undefined;
  const blob = Buffer.from(base64, 'base64');
  if (keyTypeOf(blob) !== type) return undefined;
  const from = options.get('from');
  const command = options.get('command');
  const expiry = options.get('expiry-time');
  const expiresMs = expiry === undefined ? undefined : parseExpiry(expiry);
  if (expiry !== undefined && expiresMs === undefined) return undefined;
  return {
    type,
    blob,
    comment: comment.join(' '),
    ...(from === undefined ? {} : { from }),
    ...(command === undefined ? {} : { command }),
    ...(expiresMs === undefined ? {} : { expiresMs }),
  };
}

/** The options end at the first blank outside double quotes. */
function endOfOptions(line: string): number {
  let quoted = false;
  for (let at = 0; at < line.length; at++) {
    if (line[at] === '\\' && line[at + 1] === '"') at++;
    else if (line[at] === '"') quoted = !quoted;
    else if (!quoted && (line[at] === ' ' || line[at] === '\t')) return at;
  }
  return line.length;
}

/** Undefined when an option is not understood. */
function parseOptions(text: string): Map<string, string> | undefined {
  const options = new Map<string, string>();
  const pattern = /([A-Za-z0-9-]+)(?:="((?:[^"\\]|\\"|\\)*)")?(?:,|$)/y;
  while (pattern.lastIndex < text.length) {
    const match = pattern.exec(text);
    if (!match) return undefined;
    const name = match[1]!.toLowerCase();
    const value = match[2]?.replaceAll('\\"', '"');
    if (['from', 'command', 'expiry-time'].includes(name)) {
      // As in sshd, a second command= or from= makes the line void.
      if (value === undefined || options.has(name)) return undefined;
      options.set(name, value);
    } else if (!HARMLESS.has(name)) return undefined;
  }
  return options;
}

/** YYYYMMDD[HHMM[SS]][Z] in local time, or UTC with Z. */
function parseExpiry(text: string): number | undefined {
  const match = /^(\d{4})(\d\d)(\d\d)(?:(\d\d)(\d\d)(\d\d)?)?(Z?)$/.exec(text);
  if (!match) return undefined;
  const [, year, month, day, hour = '00', minute = '00', second = '00', zone] = match;
  const ms = Date.parse(`${year}-${month}-${day}T${hour}:${minute}:${second}${zone}`);
  return Number.isNaN(ms) ? undefined : ms;
}

/** Whether `key` may be used from `address` at `nowMs`. */
export function mayUse(key: AuthorizedKey, address: string, nowMs: number): boolean {
  if (key.expiresMs !== undefined && nowMs >= key.expiresMs) return false;
  return key.from === undefined || addressMatches(key.from, address.replace(/^::ffff:(?=\d+\.)/, ''));
}

function addressMatches(list: string, address: string): boolean {
  let matched = false;
  for (const item of list.toLowerCase().split(',')) {
    const negated = item.startsWith('!');
    const pattern = negated ? item.slice(1) : item;
    const hit = pattern.includes('/') ? inNetwork(pattern, address) : matchesPatterns(pattern, address);
    if (hit && negated) return false;
    matched ||= hit;
  }
  return matched;
}

function inNetwork(cidr: string, address: string): boolean {
  const [prefix, bits] = cidr.split('/');
  const family = net.isIP(prefix!);
  const length = Number(bits);
  if (family === 0 || bits === '' || !Number.isInteger(length) || length < 0) return false;
  if (length > (family === 4 ? 32 : 128) || net.isIP(address) !== family) return false;
  const block = new net.BlockList();
  const kind = family === 4 ? 'ipv4' : 'ipv6';
  block.addSubnet(prefix!, length, kind);
  return block.check(address, kind);
}

/** Refuses at the start of a server what would let nobody in: a private key, or a file without any public one. */
export function checkAuthorizedKeys(file: string): void {
  if (readAuthorizedKeys(file).length > 0) return;
  if (/-----BEGIN [A-Z ]*PRIVATE KEY-----/.test(readFileSync(file, 'utf8'))) {
    throw new GridError(
      'bad-request',
      `${file} is a private key, which belongs to the proxy's host: name the file with the public one (${path.basename(file)}.pub)`,
    );
  }
  throw new GridError(
    'bad-request',
    `${file} has no public key that may be used, so it would let nobody in: add the line of a .pub file`,
  );
}

/**
 * The file's keys, read anew for each connection so that a removed line counts at once. Throws denied when the
 * file is missing, or writable by others than its owner: then anybody could let himself in.
 */
export function readAuthorizedKeys(file: string): AuthorizedKey[] {
  try {
    const { mode } = statSync(file);
    if ((mode & 0o022) !== 0) {
      throw new GridError('denied', `${file} can be written by others: run chmod go-w on it`);
    }
    return parseAuthorizedKeys(readFileSync(file, 'utf8'));
  } catch (error) {
    throw asGridError(error, `cannot read the authorized keys (--authorized-keys) in ${file}`, 'denied');
  }
}
