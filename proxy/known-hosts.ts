/**
 * known_hosts as OpenSSH writes it (sshd(8), "SSH_KNOWN_HOSTS FILE FORMAT"): plain, `[host]:port` and hashed
 * names (|1|salt|HMAC-SHA1), wildcards, negation, @revoked. @cert-authority lines are passed over: ssh2 has no
 * host certificates. A line that cannot be read is passed over too, it never makes a key trusted.
 */
import { createHash, createHmac, timingSafeEqual } from 'node:crypto';
import { readFileSync } from 'node:fs';
import { errnoOf, GridError } from '../src/core/errors.ts';

/** One key that a file knows for a host. */
export interface KnownKey {
  /** e.g. ssh-ed25519 */
  readonly type: string;
  /** The key as it travels (RFC 4253, section 6.6). */
  readonly blob: Buffer;
  readonly revoked: boolean;
}

/** As `ssh-keygen -l` prints it: SHA256 and unpadded base64. */
export function fingerprintOf(blob: Uint8Array): string {
  return 'SHA256:' + createHash('sha256').update(blob).digest('base64').replace(/=+$/, '');
}

/** The type name inside a key blob; undefined when it is not one. */
export function keyTypeOf(blob: Buffer): string | undefined {
  if (blob.length < 4) return undefined;
  const length = blob.readUInt32BE(0);
  if (length < 1 || length > 64 || blob.length < 4 + length) return undefined;
  return blob.toString('latin1', 4, 4 + length);
}

/** How known_hosts names a host: alone for port 22, `[host]:port` otherwise. */
export function hostName(host: string, port: number): string {
  const lower = host.toLowerCase();
  return port === 22 ? lower : `[${lower}]:${port}`;
}

/** The keys that `text` knows for a host, in its order. */
export function parseKnownHosts(text: string, host: string, port: number): KnownKey[] {
  const name = hostName(host, port);
  const keys: KnownKey[] = [];
  for (const line of text.split('\n')) {
    const words = line.trim().split(/[ \t]+/);
    if (words[0] === '' || words[0]!.startsWith('#')) continue;
    const marker = words[0]!.startsWith('@') ? words.shift() : undefined;
    if (marker !== undefined && marker !== '@revoked') continue;
    const [hosts, type, base64] = words;
    if (hosts === undefined || type === undefined || base64 === undefined) continue;
    if (!hostMatches(hosts, name)) continue;
    const blob = Buffer.from(base64, 'base64');
    if (keyTypeOf(blob) !== type) continue;
    keys.push({ type, blob, revoked: marker === '@revoked' });
  }
  return keys;
}

function hostMatches(patterns: string, name: string): boolean {
  if (patterns.startsWith('|')) return hashMatches(patterns, name);
  return matchesPatterns(patterns.toLowerCase(), name);
}

function hashMatches(field: string, name: string): boolean {
  const [, version, salt, expected] = field.split('|');
  if (version !== '1' || salt === undefined || expected === undefined) return false;
  const actual = createHmac('sha1', Buffer.from(salt, 'base64')).update(name).digest();
  const wanted = Buffer.from(expected, 'base64');
  return wanted.length === actual.length && timingSafeEqual(wanted, actual);
}

/** ssh_config(5) PATTERNS, a comma-separated list: `*`, `?`, and `!` which forbids whatever else matches. */
export function matchesPatterns(patterns: string, name: string): boolean {
  let matched = false;
  for (const item of patterns.split(',')) {
    const negated = item.startsWith('!');
    if (!globMatches(negated ? item.slice(1) : item, name)) continue;
    if (negated) return false;
    matched = true;
  }
  return matched;
}

/** Greedy match with one step back: linear in practice, quadratic at worst, for patterns from outside. */
function globMatches(pattern: string, text: string): boolean {
  let p = 0;
  let t = 0;
  let star = -1;
  let resume = 0;
  while (t < text.length) {
    if (pattern[p] === '*') {
      star = p++;
      resume = t;
    } else if (p < pattern.length && (pattern[p] === '?' || pattern[p] === text[t])) {
      p++;
      t++;
    } else if (star >= 0) {
      p = star + 1;
      t = ++resume;
    } else return false;
  }
  while (pattern[p] === '*') p++;
  return p === pattern.length;
}

/** Host-key algorithms that this client speaks, the preferred first, each with the key type it uses. */
const ALGORITHMS = [
  ['ssh-ed25519', 'ssh-ed25519'],
  ['ecdsa-sha2-nistp256', 'ecdsa-sha2-nistp256'],
  ['ecdsa-sha2-nistp384', 'ecdsa-sha2-nistp384'],
  ['ecdsa-sha2-nistp521', 'ecdsa-sha2-nistp521'],
  ['rsa-sha2-512', 'ssh-rsa'],
  ['rsa-sha2-256', 'ssh-rsa'],
] as const;

export type HostKeyAlgorithm = (typeof ALGORITHMS)[number][0];

/** What is trusted for one host, and the judgement over the key that it shows. */
export class HostKeyPolicy {
  readonly #host: string;
  readonly #port: number;
  readonly #pinned: string | undefined;
  readonly #known: KnownKey[];
  readonly #files: readonly string[];

  /** Reads the files now; one that is not there knows nothing. Throws bad-request on a malformed fingerprint. */
  constructor(host: string, port: number, options: { files: readonly string[]; fingerprint?: string }) {
    this.#host = host;
    this.#port = port;
    this.#files = options.files;
    this.#known = options.files.flatMap((file) => parseKnownHosts(readIfThere(file), host, port));
    if (options.fingerprint !== undefined) {
      if (!/^SHA256:[A-Za-z0-9+/]{43}=?$/.test(options.fingerprint)) {
        throw new GridError(
          'bad-request',
          `'${options.fingerprint}' is not a host key fingerprint: write SHA256:… as ssh-keygen -l prints it`,
        );
      }
      this.#pinned = options.fingerprint.replace(/=$/, '');
    }
  }

  /** Algorithms to offer: those first whose keys we know, so that a host with several shows one we can check. */
  algorithms(): HostKeyAlgorithm[] {
    const types = new Set(this.#known.filter((key) => !key.revoked).map((key) => key.type));
    const known = ALGORITHMS.filter(([, type]) => types.has(type));
    const others = ALGORITHMS.filter(([, type]) => !types.has(type));
    return [...known, ...others].map(([algorithm]) => algorithm);
  }

  /** Undefined when the key is the host's; else the error that says what was seen and what to do. */
  judge(blob: Buffer): GridError | undefined {
    const seen = fingerprintOf(blob);
    const type = keyTypeOf(blob) ?? 'unknown type';
    const name = hostName(this.#host, this.#port);
    const revoked = this.#known.some((key) => key.revoked && key.blob.equals(blob));
    if (revoked) {
      return new GridError(
        'host-key',
        `the ssh host key of ${name} (${type} ${seen}) is marked @revoked: do not use it`,
      );
    }
    if (this.#pinned !== undefined) {
      if (this.#pinned === seen) return undefined;
      return new GridError(
        'host-key',
        `the ssh host key of ${name} is ${type} ${seen}, not the expected ${this.#pinned}; ` +
          `if the host's key has really changed, give --host-key ${seen}`,
      );
    }
    const trusted = this.#known.filter((key) => !key.revoked);
    if (trusted.some((key) => key.blob.equals(blob))) return undefined;
    const port = this.#port === 22 ? '' : `-p ${this.#port} `;
    const scan = `ssh-keyscan ${port}${this.#host} >> ${this.#files[0] ?? '~/.ssh/known_hosts'}`;
    if (trusted.length > 0) {
      return new GridError(
        'host-key',
        `the ssh host key of ${name} has changed: it shows ${type} ${seen}, known is ` +
          `${trusted.map((key) => `${key.type} ${fingerprintOf(key.blob)}`).join(', ')}; somebody may be in between. ` +
          `If the change is right, remove the old key with ssh-keygen -R '${name}' and add the new one with ${scan}`,
      );
    }
    return new GridError(
      'host-key',
      `the ssh host key of ${name} is not known: it shows ${type} ${seen}; check that with its administrator, ` +
        `then either give --host-key ${seen} or run ${scan}`,
    );
  }
}

function readIfThere(file: string): string {
  try {
    return readFileSync(file, 'utf8');
  } catch (error) {
    if (errnoOf(error) === 'ENOENT' || errnoOf(error) === 'ENOTDIR') return '';
    throw new GridError('host-key', `cannot read the known host keys in ${file}`, { cause: error });
  }
}
