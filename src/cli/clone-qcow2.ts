/** A clone's disk as a qcow2 file, by qemu-img: by itself, or as what differs from a raw file. */
import { fsync, openSync, closeSync } from 'node:fs';
import { link, rm } from 'node:fs/promises';
import { promisify } from 'node:util';
import { asGridError, GridError } from '../core/errors.ts';
import { firstLine, runQemuImg, shareDone } from '../store/index.ts';

const syncFile = promisify(fsync);

interface Watch {
  readonly signal?: AbortSignal;
  /** Of qemu-img's own measure of the work, a share of 100. */
  readonly onProgress?: (done: number, total: number) => void;
}

/**
 * Under another name until it is whole and durable; a failure or a cancel leaves nothing. Throws exists, no-space,
 * unsupported (no qemu-img), closed, local-io.
 */
export async function exportQcow2(
  disk: string,
  target: string,
  backing: string | undefined,
  watch: Watch,
): Promise<void> {
  const partial = `${target}.partial`;
  const run = async (...args: string[]) => {
    const result = await runQemuImg(args, `the export to ${target}`, watch.signal, (piece) => {
      const share = shareDone(piece);
      if (share !== undefined) watch.onProgress?.(Math.round(100 * share), 100);
    });
    if (result.code === 0) return;
    const code = result.stderr.includes('No space left') ? 'no-space' : 'local-io';
    throw new GridError(code, `qemu-img ${args[0]} failed: ${firstLine(result)}`);
  };
  try {
    if (backing === undefined) {
      await run('convert', '-p', '-f', 'raw', '-O', 'qcow2', disk, partial);
    } else {
      // An overlay over the clone itself, which then takes in whatever the other backing file has not.
      await run('create', '-q', '-f', 'qcow2', '-b', disk, '-F', 'raw', partial);
      await run('rebase', '-p', '-f', 'qcow2', '-b', backing, '-F', 'raw', partial);
    }
    const fd = openSync(partial, 'r');
    await syncFile(fd).finally(() => closeSync(fd));
    // Unlike rename(2), link(2) refuses a name that is there.
    await link(partial, target);
  } catch (error) {
    throw asGridError(error, `cannot export to ${target}`);
  } finally {
    await rm(partial, { force: true });
  }
}
