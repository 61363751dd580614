/** What kill.test.ts and its child process share. */
export const BASE = '9'.repeat(64);
export const SIZE_BYTES = 6 * 1024 * 1024;

export type RecordLine =
  | { readonly ready: true }
  | { readonly begin: { readonly offset: number; readonly length: number; readonly stamp: number } }
  | { readonly done: number };

/** Smaller than the disk, no zeros. */
export function baseContent(): Buffer {
  return Buffer.alloc(5 * 1024 * 1024 + 1000, 0xbb);
}
