/**
 * The one error class and the one table of codes.
 *
 * Every failure that a person or another part of the program can meet is a `GridError`. Match on `code`,
 * never on the text; the original error travels in `cause`. `blame` says who failed, and it alone decides
 * whether something is retried or failed over (`retryable`). Each protocol maps the codes to its own numbers
 * with `satisfies Record<ErrorCode, number>`, so a new code does not compile until every protocol answers it.
 */

/** Who failed: whoever called us, the way to the far side, the far side itself, this host's disk, or the data. */
export type Blame = 'caller' | 'tunnel' | 'origin' | 'local' | 'data' | 'bug';

interface CodeInfo {
  readonly blame: Blame;
  /** One sentence for the README's table: what it means and what to do. */
  readonly help: string;
}

/** Codes in the order of the README's table (a test compares the two). */
export const ERROR_CODES = {
  'bad-request': {
    blame: 'caller',
    help: 'An argument or request is malformed; the message says which. Correct it.',
  },
  'not-found': {
    blame: 'caller',
    help: 'No such image, tag, clone, VM or file. List what there is with the `ls` verbs.',
  },
  exists: { blame: 'caller', help: 'The name is taken. Choose another, or remove what holds it.' },
  'in-use': {
    blame: 'caller',
    help: 'A mount point, cache folder, clone or VM is held by somebody; the message says by whom.',
  },
  'read-only': { blame: 'caller', help: 'A write to an image. Write to a clone of it instead.' },
  'no-permission': {
    blame: 'caller',
    help: 'A file or folder is not open to this user. Change its permissions, or run as its owner.',
  },
  'no-space': {
    blame: 'local',
    help: 'The disk or a quota is full. Free space; nothing was lost and no restart is needed.',
  },
  'local-io': { blame: 'local', help: 'A local file or device failed. See `cause`; check the disk.' },
  unsupported: {
    blame: 'local',
    help: 'This host lacks something (FUSE, QEMU, a package). `gridvfs doctor` says what to install.',
  },
  'bad-format': {
    blame: 'data',
    help: 'A file is not what it should be: truncated, foreign, or damaged. The message names it.',
  },
  'newer-format': {
    blame: 'data',
    help: 'A store, cache or layer was written by a newer gridvfs. Upgrade this one.',
  },
  corrupt: {
    blame: 'data',
    help: 'Bytes do not match their digest. They were not used; run `gridvfs store verify` at the origin.',
  },
  'wrong-base': {
    blame: 'data',
    help: 'A layer or checkpoint belongs to another base image; the message has both digests.',
  },
  unreachable: {
    blame: 'tunnel',
    help: 'The source does not answer. Check address and network; reads wait and then fail with this.',
  },
  'tunnel-lost': {
    blame: 'tunnel',
    help: 'The connection broke in the middle. It is made again; reads go on.',
  },
  'host-key': {
    blame: 'origin',
    help: 'The ssh host key is unknown or not the expected one. Check the fingerprint before you trust it.',
  },
  denied: {
    blame: 'origin',
    help: 'The far side refused our key or request. Check the identity and its authorized_keys.',
  },
  'origin-failed': { blame: 'origin', help: 'The source answered with an error of its own. See its log.' },
  'vm-failed': {
    blame: 'local',
    help: 'A virtual machine did not start, died, or did not answer in time. The message has its last words.',
  },
  timeout: { blame: 'tunnel', help: 'No answer within the bound that the message names.' },
  closed: {
    blame: 'caller',
    help: 'The thing was closed or the operation cancelled while it was under way.',
  },
  bug: { blame: 'bug', help: 'An invariant of gridvfs itself does not hold. Please report it with the log.' },
} as const satisfies Record<string, CodeInfo>;

export type ErrorCode = keyof typeof ERROR_CODES;

export class GridError extends Error {
  readonly code: ErrorCode;

  /** `message` is one sentence that names the thing and, where there is one, the way on. */
  constructor(code: ErrorCode, message: string, options?: { cause?: unknown }) {
    super(message, options);
    this.name = 'GridError';
    this.code = code;
  }

  get blame(): Blame {
    return ERROR_CODES[this.code].blame;
  }
}

/** Whether trying again, or another source, can help: the way or the origin failed, or it sent wrong bytes. */
export function worthAnotherSource(error: unknown): boolean {
  if (!(error instanceof GridError)) return false;
  return error.blame === 'tunnel' || error.blame === 'origin' || error.code === 'corrupt';
}

/** The errno name of a system error, e.g. 'ENOENT'; undefined for anything else. */
export function errnoOf(error: unknown): string | undefined {
  if (typeof error !== 'object' || error === null || !('code' in error)) return undefined;
  return typeof error.code === 'string' ? error.code : undefined;
}

const BY_ERRNO: Partial<Record<string, ErrorCode>> = {
  ENOENT: 'not-found',
  ENOTDIR: 'not-found',
  EEXIST: 'exists',
  EBUSY: 'in-use',
  EROFS: 'read-only',
  EACCES: 'no-permission',
  EPERM: 'no-permission',
  EISDIR: 'bad-request',
  ENAMETOOLONG: 'bad-request',
  ENOSPC: 'no-space',
  EDQUOT: 'no-space',
  ECONNREFUSED: 'unreachable',
  ENOTFOUND: 'unreachable',
  EHOSTUNREACH: 'unreachable',
  ENETUNREACH: 'unreachable',
  ETIMEDOUT: 'unreachable',
  ECONNRESET: 'tunnel-lost',
  EPIPE: 'tunnel-lost',
};

/**
 * Any thrown value as a GridError: GridErrors unchanged, system errors by their errno (`fallback` where the
 * table has none), everything else as `fallback`. `doing` starts the sentence: "cannot open /x: …".
 */
export function asGridError(error: unknown, doing: string, fallback: ErrorCode = 'local-io'): GridError {
  if (error instanceof GridError) return error;
  const errno = errnoOf(error);
  const code = (errno !== undefined ? BY_ERRNO[errno] : undefined) ?? fallback;
  const reason = error instanceof Error ? error.message : String(error);
  return new GridError(code, `${doing}: ${reason}`, { cause: error });
}

/** An assertion of our own invariants; for anything the outside can cause, throw the fitting code instead. */
export function invariant(condition: unknown, what: string): asserts condition {
  if (!condition) throw new GridError('bug', `invariant does not hold: ${what}`);
}
