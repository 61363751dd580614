/**
 * What an order's result does to its VM and to the job that waits for it. Runs inside the transaction of the report
 * that brought it; a result that came before, or whose order was given up, does nothing.
 */
import type { Order, OrderResult } from '../core/grid.ts';
import type { Queries } from './database.ts';
import { endJob, endJobs, endVm, giveOrder, placedAs, settleOrders } from './vm-table.ts';
import type { VmRow } from './vm-table.ts';
import { isVolumeOrder, tookAttachment, tookSaves, tookVolumeResult } from './volumes.ts';

type VmOrder = Extract<Order, { vm: string }>;

/** A command in a guest that takes longer is left alone: it may run on, and nobody hears of it. */
const COMMAND_MS_MAX = 24 * 3_600_000;
/** Hosts that may fail to start a VM before it is given up. */
const FAILURES_MAX = 5;

export async function takeResult(
  tx: Queries,
  host: string,
  result: OrderResult,
  jobs: Set<string>,
): Promise<void> {
  const [order] = await tx.all<{ kind: Order['kind']; body: string; vm: string | null; job: string | null }>(
    `SELECT kind, body, vm, job FROM orders WHERE id = ? AND host = ? AND state = 'open'`,
    ...[result.order, host],
  );
  if (!order) return;
  await tx.run(
    'UPDATE orders SET state = ?, error = ?, done_ms = ? WHERE id = ?',
    ...[
      result.error ? 'failed' : 'done',
      result.error ? JSON.stringify(result.error) : null,
      Date.now(),
      result.order,
    ],
  );
  if (order.job !== null) jobs.add(order.job);
  if (order.vm === null) {
    const about = JSON.parse(order.body) as Order;
    if (isVolumeOrder(about)) return tookVolumeResult(tx, host, about, result, order.job);
    if (order.job !== null) await settleOrders(tx, order.job);
    return;
  }
  const [vm] = await tx.all<VmRow>('SELECT * FROM vms WHERE id = ? AND host = ?', order.vm, host);
  const body = JSON.parse(order.body) as VmOrder;
  if (!vm || body.vm !== placedAs(vm)) return;
  jobs.add(vm.job);
  switch (body.kind) {
    case 'run':
      await started(tx, vm, result, jobs);
      if (!result.error && body.checkpoint === undefined) await orderCommand(tx, vm);
      return;
    case 'stop':
      if (!result.error) return endVm(tx, vm, 'stopped');
      // Told again: it stays `stopping` until it is gone.
      return giveOrder(tx, host, vm.id, { ...body, id: `${body.vm}.stop.${Date.now()}` });
    case 'suspend':
      return suspended(tx, vm, body, result, jobs);
    case 'checkpoint':
      if (result.made) await tookCheckpoint(tx, vm, body.checkpoint, result.made);
      await tookSaves(tx, body.saves, result.saved, false);
      break;
    case 'command':
      await tx.run(
        'UPDATE vms SET command_result = ? WHERE id = ?',
        ...[JSON.stringify(result.error ? { error: result.error.message } : result.command), vm.id],
      );
      break;
    case 'attach':
    case 'detach':
      await tookAttachment(tx, vm, body, result);
      break;
    case 'commit':
    case 'connect':
      break;
  }
  if (order.job === null) return;
  await endJob(tx, order.job, result.error ? { error: result.error } : { result: { ...result.made } });
}

async function started(tx: Queries, vm: VmRow, result: OrderResult, jobs: Set<string>): Promise<void> {
  if (result.error) {
    if (result.error.code === 'closed' && vm.wanted === 'running') {
      // Nothing was tried: the host had no lease, or was ending. It counts against nobody.
      await tx.run(`UPDATE orders SET state = 'void' WHERE id = ?`, result.order);
      return endVm(tx, vm, 'requested', result.error.message);
    }
    const failures = vm.failures + 1;
    await tx.run('UPDATE vms SET failures = ? WHERE id = ?', failures, vm.id);
    // Another host may do better, unless the request itself is at fault.
    const hopeless = result.error.code === 'bad-request' || failures >= FAILURES_MAX;
    if (!hopeless && vm.wanted === 'running') return endVm(tx, vm, 'requested', result.error.message);
    if (vm.checkpoint === null) return endVm(tx, vm, 'failed', result.error.message);
    // What it was is in its checkpoint still.
    await tx.run(`UPDATE vms SET wanted = 'suspended', failures = 0 WHERE id = ?`, vm.id);
    for (const job of await endJobs(tx, vm.id, 'all', { error: result.error })) jobs.add(job);
    return endVm(tx, vm, 'suspended', result.error.message);
  }
  const nowMs = Date.now();
  await tx.run(
    `UPDATE vms SET state = 'running', timeline = ?, fetched_bytes = ?, failures = 0, ran_ms = ?, target = NULL, avoid = NULL
     WHERE id = ? AND state = 'placed'`,
    ...[JSON.stringify(result.timeline ?? {}), result.fetchedBytes ?? null, nowMs, vm.id],
  );
  await tx.run(
    'UPDATE usage SET fetched_bytes = ? WHERE vm = ? AND generation = ?',
    ...[result.fetchedBytes ?? null, vm.id, vm.generation],
  );
  const end = { result: { host: vm.host } };
  for (const job of await endJobs(tx, vm.id, ['resume', 'move'], end)) jobs.add(job);
}

/** What is to be run in a guest that has booted; again, where it boots again. */
async function orderCommand(tx: Queries, vm: VmRow): Promise<void> {
  if (vm.command === null) return;
  await tx.run('UPDATE vms SET command_result = NULL WHERE id = ?', vm.id);
  const placed = placedAs(vm);
  await giveOrder(tx, vm.host!, vm.id, {
    id: `${placed}.command`,
    kind: 'command',
    vm: placed,
    command: vm.command,
    timeoutMs: COMMAND_MS_MAX,
  });
}

async function tookCheckpoint(
  tx: Queries,
  vm: VmRow,
  reference: string,
  made: NonNullable<OrderResult['made']>,
): Promise<void> {
  await tx.run(
    `UPDATE vms SET checkpoint = ?, checkpoint_manifest = ?, checkpoint_ms = ?,
       checkpoint_accelerator = (SELECT accelerator FROM hosts WHERE id = ?) WHERE id = ?`,
    ...[reference, made.manifest, Date.now(), vm.host, vm.id],
  );
  await tx.run(
    'UPDATE usage SET stored_bytes = coalesce(stored_bytes, 0) + ? WHERE vm = ? AND generation = ?',
    ...[made.storedBytes, vm.id, vm.generation],
  );
}

/** It runs on where it could not be suspended. */
async function suspended(
  tx: Queries,
  vm: VmRow,
  { checkpoint, saves }: Extract<Order, { kind: 'suspend' }>,
  result: OrderResult,
  jobs: Set<string>,
): Promise<void> {
  const { error, made } = result;
  if (error || !made) {
    const reason = error ?? { code: 'bug' as const, message: 'the host named no checkpoint' };
    await tx.run(
      `UPDATE vms SET state = 'running', wanted = 'running', reason = ?, target = NULL, avoid = NULL
       WHERE id = ? AND state = 'suspending'`,
      ...[reason.message, vm.id],
    );
    const ended = await endJobs(tx, vm.id, ['suspend', 'move'], { error: reason });
    for (const job of ended) jobs.add(job);
    return;
  }
  await tookCheckpoint(tx, vm, checkpoint, made);
  await tookSaves(tx, saves, result.saved, true);
  if (vm.wanted === 'running') return endVm(tx, vm, 'requested', 'on its way to another host');
  for (const job of await endJobs(tx, vm.id, ['suspend'], { result: { ...made } })) jobs.add(job);
  return endVm(tx, vm, 'suspended');
}
