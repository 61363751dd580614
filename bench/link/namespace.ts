/**
 * Hosts that exist only for a bench: network namespaces of this process. A namespace has no name and no process of
 * its own; a descriptor that this process holds keeps it alive, so whatever ends the bench, SIGKILL too, takes the
 * namespaces with all their devices away.
 *
 * setns(2) moves the calling thread, here the main thread: sockets that Node makes afterwards and processes that it
 * starts belong to the namespace entered. Threads of libuv's pool stay where they were, which only concerns look-ups
 * of host names; benches use addresses.
 */
import { closeSync, openSync, writeFileSync } from 'node:fs';
import koffi from 'koffi';
import { GridError } from '../../src/core/errors.ts';
import { SystemError } from '../../src/core/linux.ts';
import { runProgram } from '../peers/program.ts';

const libc = koffi.load('libc.so.6');
const cUnshare = libc.func('int unshare(int flags)');
const cSetns = libc.func('int setns(int fd, int type)');

/** linux/sched.h */
const CLONE_NEWNET = 0x40000000;

/** Enters the network namespace that `fd` is open on, for the calling thread and what it starts. */
export function enterNamespace(fd: number): void {
  if (cSetns(fd, CLONE_NEWNET) < 0) throw new SystemError('setns', koffi.errno());
}

export class Namespace {
  readonly name: string;
  readonly fd: number;

  private constructor(name: string, fd: number) {
    this.name = name;
    this.fd = fd;
  }

  /** The one that the calling thread is in. */
  static current(name: string): Namespace {
    return new Namespace(name, openSync('/proc/thread-self/ns/net', 'r'));
  }

  /** A new one, its loopback up, without IPv6 (whose greetings nobody asked for would cross the links). The caller
   * stays where it is. Throws denied for other users than root. */
  static async create(name: string): Promise<Namespace> {
    const home = Namespace.current('home');
    try {
      if (cUnshare(CLONE_NEWNET) < 0) {
        const error = new SystemError('unshare', koffi.errno());
        throw new GridError('denied', 'only root can make network namespaces; `--link relay` needs none', {
          cause: error,
        });
      }
      const made = Namespace.current(name);
      try {
        // /proc/sys/net shows the namespace of whoever opens it.
        writeFileSync('/proc/sys/net/ipv6/conf/all/disable_ipv6', '1');
        writeFileSync('/proc/sys/net/ipv6/conf/default/disable_ipv6', '1');
        // What TCP learnt of the path in one run must not help the next.
        writeFileSync('/proc/sys/net/ipv4/tcp_no_metrics_save', '1');
      } finally {
        enterNamespace(home.fd);
      }
      await made.run(() => runProgram(['ip', 'link', 'set', 'lo', 'up']));
      return made;
    } finally {
      home.close();
    }
  }

  /** What iproute2 takes for a namespace's name. */
  get path(): string {
    return `/proc/${process.pid}/fd/${this.fd}`;
  }

  /** Moves the calling thread in, for good. */
  enter(): void {
    enterNamespace(this.fd);
  }

  /** Runs the synchronous part of `body` inside: a process that it spawns, a socket that it makes belongs there. */
  run<T>(body: () => T): T {
    const before = Namespace.current('before');
    enterNamespace(this.fd);
    try {
      return body();
    } finally {
      enterNamespace(before.fd);
      before.close();
    }
  }

  /** Stays inside while all of `body` runs. Nothing else of this process may go on meanwhile. */
  async stay<T>(body: () => Promise<T>): Promise<T> {
    const before = Namespace.current('before');
    enterNamespace(this.fd);
    try {
      return await body();
    } finally {
      enterNamespace(before.fd);
      before.close();
    }
  }

  /** Lets go of it; it ends with the last process inside. */
  close(): void {
    closeSync(this.fd);
  }
}
