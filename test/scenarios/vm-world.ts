/** What the scenarios of VMs share: the small guest in a store, and what its memory alone knows. */
import assert from 'node:assert/strict';
import { randomBytes } from 'node:crypto';
import { readFileSync } from 'node:fs';
import { setTimeout as sleep } from 'node:timers/promises';
import type { BuiltGuest } from '../../bench/guest/build.ts';
import { ask } from './console.ts';
import type { World } from './world.ts';

export interface Vm {
  readonly id: string;
  readonly pid: number;
  readonly image: string;
  readonly clone: string;
  readonly state: string;
  readonly reason?: string;
  readonly consoleSocket: string;
  readonly consoleLog: string;
  readonly timeline: { clonedMs: number; startedMs: number; readyMs: number };
}

export interface Suspended {
  readonly id: string;
  readonly memoryWrittenBytes: number;
  readonly pausedMs: number;
}

/** Makes a world's store, with the small guest in it as `small:1`, which answers on its second serial port. */
export function importSmall(world: World): Promise<BuiltGuest> {
  return world.storeWithGuest('--label', 'boot.answers=ttyS1');
}

/** Gives the guest something that only its memory has: its shell has it as $N. */
export async function setNonce(vm: Vm): Promise<string> {
  const nonce = randomBytes(8).toString('hex');
  await ask(vm.consoleSocket, `N=${nonce}; echo set-$((6*7))`, /set-42/);
  return nonce;
}

export async function nonceOf(vm: Vm): Promise<string> {
  return (await ask(vm.consoleSocket, 'echo "=$N="', /=(\w+)=/)).slice(1, -1);
}

/** The pid of the proxy that has taken over from `pid`. */
export async function untilAnother(world: World, pid: number): Promise<number> {
  for (const endMs = performance.now() + 120_000; performance.now() < endMs; await sleep(100)) {
    const { code, stdout } = await world.run('proxy', 'status', '--json');
    const now = code === 0 ? (JSON.parse(stdout) as { pid: number }).pid : pid;
    if (now !== pid) return now;
  }
  return pid;
}

/** kill -9 of the proxy alone; resolves when its successor answers. */
export async function killProxy(world: World): Promise<void> {
  const { pid } = await world.json<{ pid: number }>('proxy', 'status');
  process.kill(pid, 'SIGKILL');
  assert.notEqual(await untilAnother(world, pid), pid);
}

/** Bytes of a process that are its own: what it wrote to what it has mapped, and its anonymous memory. */
export function anonymousBytes(pid: number): number {
  const text = readFileSync(`/proc/${pid}/smaps_rollup`, 'utf8');
  return 1024 * Number(/^Anonymous:\s+(\d+) kB$/m.exec(text)![1]);
}

/** Bytes of the machine's memory that are its own by now: of the private mapping of its image. */
export function dirtyMemoryBytes(pid: number): number {
  const parts = readFileSync(`/proc/${pid}/smaps`, 'utf8').split(/^(?=[0-9a-f]+-[0-9a-f]+ )/m);
  return parts
    .filter((part) => /^.*\/(?:memory|disk)\.raw\n/.test(part))
    .reduce((sum, part) => sum + 1024 * Number(/^Anonymous:\s+(\d+) kB$/m.exec(part)![1]), 0);
}
