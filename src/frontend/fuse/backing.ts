/**
 * FUSE passthrough (Linux 6.9): the kernel reads a file that is wholly on this host from its backing file itself,
 * and no request reaches us. Wants CAP_SYS_ADMIN and a backing file on a file system that is not stacked itself.
 *
 * An inode that is open through the page cache cannot be opened as passthrough, nor the other way, nor with a second
 * backing file: such an open fails with EIO. So the choice belongs to the shared image behind all opens of one node
 * (nodes.ts) and holds until the last of them is released. Whatever is refused here means reads by our own workers.
 * O_DIRECT then wants the alignment that the backing file's own disk wants.
 */
import { errnoOf } from '../../core/errors.ts';
import { ioctl } from '../../core/linux.ts';
import type { Image } from '../../core/image.ts';

const FUSE_DEV_IOC_BACKING_OPEN = 0x4010e501;
const FUSE_DEV_IOC_BACKING_CLOSE = 0x4004e502;

/** What an image is read from by the kernel, for as long as it is open. */
export interface Backing {
  readonly id: number;
  /** Gives the id and the claim back. */
  close(): void;
}

export class BackingFiles {
  readonly #sessionFd: number;
  readonly #log: (message: string) => void;
  /** Errnos that were logged: the same refusal comes at every open. */
  readonly #told = new Set<string>();
  #off = false;

  constructor(sessionFd: number, log: (message: string) => void) {
    this.#sessionFd = sessionFd;
    this.#log = log;
  }

  /** The backing of an image that is wholly here; undefined where workers have to serve it. */
  async claim(image: Image): Promise<Backing | undefined> {
    if (this.#off || image.writable) return undefined;
    let claimed;
    try {
      claimed = await image.claimWhole?.();
    } catch (error) {
      this.#log(`an image cannot be read by passthrough: ${String(error)}`);
    }
    if (!claimed) return undefined;
    const id = this.#open(claimed.fd);
    if (id === undefined) {
      claimed.release();
      return undefined;
    }
    return this.#backing(id, claimed);
  }

  /** The backing that another process opened for this image: the kernel has the file, we keep it from eviction. */
  async adopt(image: Image, id: number): Promise<Backing> {
    const claimed = await image.claimWhole?.({ held: true });
    if (!claimed) this.#log('an image that the kernel reads by itself is not whole here any more');
    return this.#backing(id, claimed);
  }

  #backing(id: number, claimed: { release(): void } | undefined): Backing {
    return {
      id,
      close: () => {
        this.#close(id);
        claimed?.release();
      },
    };
  }

  /* {i32 fd, u32 flags 0, u64 0} */
  #open(fd: number): number | undefined {
    const argument = Buffer.alloc(16);
    argument.writeInt32LE(fd, 0);
    try {
      return ioctl(this.#sessionFd, FUSE_DEV_IOC_BACKING_OPEN, argument);
    } catch (error) {
      const errno = errnoOf(error) ?? 'unknown';
      // ELOOP: this file lies on a stacked file system; another may not.
      if (errno !== 'ELOOP') this.#off = true;
      if (!this.#told.has(errno)) this.#log(`no passthrough: the kernel refused a backing file (${errno})`);
      this.#told.add(errno);
      return undefined;
    }
  }

  #close(id: number): void {
    try {
      ioctl(this.#sessionFd, FUSE_DEV_IOC_BACKING_CLOSE, new Uint8Array(Uint32Array.of(id).buffer));
    } catch {
      // The connection is gone, and all its ids with it.
    }
  }
}
