/**
 * `gridvfs bench scale`: 1…N clones started at once on one host with an empty cache, and 1…N hosts, each with an empty
 * cache of its own, started at once behind one origin and one link. What the origin sends, when the first and the last
 * guest is ready, processor time of the service; and a model fitted to the hosts' points (lib/model.ts), three at least, that says what
 * 100 and 1,000 hosts would see: a prediction, and called one.
 *
 * All guests run on this one machine, so with many of them its processor, not the service, decides when the last one is ready.
 */
import { rm } from 'node:fs/promises';
import path from 'node:path';
import { parseArgs } from 'node:util';
import type { VmStatus } from '../src/agent/vm-record.ts';
import { bytesText, table } from '../src/cli/kit.ts';
import { isRoot } from '../src/core/linux.ts';
import { createQemu } from '../src/vmm/index.ts';
import { cpuSecondsOf, dropPageCache, hostFacts } from './lib/facts.ts';
import { fitScale, predictSeconds } from './lib/model.ts';
import type { ScaleModel } from './lib/model.ts';
import { check, printPromises, promise, recordOf, writeRecord } from './lib/record.ts';
import type { Promised, Row } from './lib/record.ts';
import { abortOnSignals, failed, IMAGE, orInterrupted, prepareScene, say } from './lib/scene.ts';
import type { Scene } from './lib/scene.ts';
import { mountProxy, READY_TIMEOUT_MS } from './lib/starts.ts';
import type { MountedProxy } from './lib/starts.ts';
import { EMULATORS, parseLink } from './link/network.ts';

const LINK = 'wan';
const PREDICTED_HOSTS = [1, 10, 100, 1000];
/** A line through two points fits always and says nothing. */
const POINTS_MIN = 3;

function options() {
  const { values } = parseArgs({
    options: {
      guest: { type: 'string', default: 'small' },
      clones: { type: 'string', default: '1,2,4,8' },
      hosts: { type: 'string', default: '1,2,4' },
      wan: { type: 'string', default: '30ms,100mbit' },
      link: { type: 'string' },
      check: { type: 'boolean', default: false },
      json: { type: 'string' },
    },
  });
  const guest = (['small', 'debian'] as const).find((name) => name === values.guest);
  if (guest === undefined) throw new RangeError(`--guest ${values.guest}: write small or debian`);
  const emulator = EMULATORS.find((name) => name === (values.link ?? (isRoot() ? 'packets' : 'relay')));
  if (emulator === undefined) throw new RangeError(`--link ${values.link}: write ${EMULATORS.join(' or ')}`);
  const counts = (name: 'clones' | 'hosts') => {
    const list = values[name] === 'none' ? [] : values[name].split(',').map(Number);
    if (list.some((count) => !Number.isSafeInteger(count) || count < 1 || count > 64))
      throw new RangeError(
        `--${name} ${values[name]}: write whole numbers from 1 to 64, with commas, or none`,
      );
    return list.toSorted((a, b) => a - b);
  };
  const hosts = counts('hosts');
  if (emulator === 'relay' && hosts.some((count) => count > 1))
    throw new RangeError('--link relay has one host: write --hosts 1 or none');
  return {
    guest,
    emulator,
    clones: counts('clones'),
    hosts,
    links: [parseLink(LINK, values.wan)],
    asked: { wan: values.wan },
    check: values.check,
    json: values.json,
  };
}

/** `count` VMs on each of `hosts` hosts, all asked for at once over empty caches. */
async function startMany(scene: Scene, hosts: number, count: number) {
  await using stack = new AsyncDisposableStack();
  const proxies: MountedProxy[] = [];
  for (let host = 0; host < hosts; host++) {
    const cache = `cache-scale-${host}`;
    stack.defer(() => rm(path.join(scene.folder, cache), { recursive: true, force: true }));
    proxies.push(await mountProxy(stack, scene, { link: LINK, cache, host }));
  }
  dropPageCache(scene.folder);
  const proxyCpu = () => proxies.reduce((sum, { pid }) => sum + cpuSecondsOf(pid), 0);
  const before = {
    proxy: proxyCpu(),
    server: cpuSecondsOf(scene.serverPid),
    bytes: (await scene.network.carried(LINK)).toHostsBytes,
  };
  const startedMs = performance.now();
  const readySeconds = await orInterrupted(
    scene.signal,
    Promise.all(
      proxies.flatMap(({ client }) =>
        Array.from({ length: count }, async () => {
          const vm = await client.call<VmStatus>('POST', '/v1/vms', { image: IMAGE });
          await client.call('GET', `/v1/vms/${vm.id}/ready?timeoutMs=${READY_TIMEOUT_MS}`);
          return (performance.now() - startedMs) / 1000;
        }),
      ),
    ),
  );
  const figures = {
    firstReadySeconds: Math.min(...readySeconds),
    lastReadySeconds: Math.max(...readySeconds),
    originBytes: (await scene.network.carried(LINK)).toHostsBytes - before.bytes,
    proxyCpuSeconds: proxyCpu() - before.proxy,
    serverCpuSeconds: cpuSecondsOf(scene.serverPid) - before.server,
  };
  for (const { client } of proxies) {
    const vms = await client.call<VmStatus[]>('GET', '/v1/vms');
    await Promise.all(vms.map(({ id }) => client.call('POST', `/v1/vms/${id}/stop`, { graceMs: 0 })));
  }
  return figures;
}

type Figures = Awaited<ReturnType<typeof startMany>>;

interface ScaleRow extends Row, Figures {
  readonly count: number;
}

function rowOf(kind: 'clones' | 'hosts', count: number, figures: Figures, first: Figures): ScaleRow {
  return {
    case: kind,
    subject: `${count} ${kind}`,
    count,
    value: figures.lastReadySeconds,
    unit: 's',
    ratio: figures.lastReadySeconds / first.lastReadySeconds,
    originBytesRatio: figures.originBytes / first.originBytes,
    runs: [figures.lastReadySeconds],
    ...figures,
  };
}

function print(rows: readonly ScaleRow[], model: ScaleModel | undefined): void {
  const text = table(
    [
      ...['AT ONCE', 'FIRST READY', 'LAST READY', 'FROM THE ORIGIN', 'TO ONE'],
      ...['PROXIES CPU', 'SERVER CPU'],
    ],
    rows.map((row) => [
      row.subject,
      row.firstReadySeconds.toFixed(2),
      row.lastReadySeconds.toFixed(2),
      bytesText(row.originBytes),
      Number(row['originBytesRatio']).toFixed(3),
      row.proxyCpuSeconds.toFixed(2),
      row.serverCpuSeconds.toFixed(2),
    ]),
  );
  process.stdout.write(`\n${text}\n`);
  if (!model) return;
  const { a, b, rSquared } = model.measured;
  process.stdout.write(
    `\nmeasured hosts, which share this machine's processor: last ready = ${a.toFixed(2)} s + ${b.toFixed(2)} s × hosts (R² ${rSquared.toFixed(2)})\n` +
      `PREDICTION for hosts with processors of their own: ${PREDICTED_HOSTS.map((hosts) => `${hosts}: ${predictSeconds(model, hosts).toFixed(1)} s`).join(', ')}\n` +
      `  ${model.aloneSeconds.toFixed(2)} s + hosts × the larger of ${bytesText(model.bytesPerHost)} ÷ link and ${model.serverCpuSecondsPerHost.toFixed(3)} s of the origin's processor\n`,
  );
}

async function main(): Promise<void> {
  const settings = options();
  const signal = abortOnSignals();
  const { accelerator, usable, reason } = await createQemu({ accelerator: 'auto' }).probe();
  if (!usable) throw new Error(`no VM can run here: ${reason ?? 'no reason given'}`);
  await using stack = new AsyncDisposableStack();
  const { guest, emulator, links } = settings;
  const host = hostFacts(accelerator ?? 'tcg');
  const scene = await prepareScene(stack, {
    ...{ guest, emulator, links, signal },
    hosts: Math.max(1, ...settings.hosts),
  });
  const rows: ScaleRow[] = [];
  const run = async (kind: 'clones' | 'hosts', count: number) => {
    signal.throwIfAborted();
    const figures = await startMany(scene, kind === 'hosts' ? count : 1, kind === 'clones' ? count : 1);
    rows.push(rowOf(kind, count, figures, rows.find((row) => row.case === kind) ?? figures));
    say(
      `${String(count).padStart(2)} ${kind}: last ready after ${figures.lastReadySeconds.toFixed(2)} s, ${bytesText(figures.originBytes)} from the origin`,
    );
  };
  for (const count of settings.clones) await run('clones', count);
  for (const count of settings.hosts) await run('hosts', count);
  const points = rows.filter((row) => row.case === 'hosts').map((row) => ({ ...row, hosts: row.count }));
  const model = points.length < POINTS_MIN ? undefined : fitScale(points, links[0]!.bitsPerSecond);
  if (points.length > 0 && !model)
    say(`no prediction: it needs ${POINTS_MIN} counts of hosts (--hosts), and there are ${points.length}`);
  print(rows, model);
  const most = rows.findLast((row) => row.case === 'clones');
  const promises: Promised[] =
    most === undefined || most.count === 1
      ? []
      : [
          promise(
            `${most.count} clones at once: origin bytes to one clone's`,
            Number(most['originBytesRatio']),
            1.05,
          ),
        ];
  printPromises(promises);
  if (settings.json !== undefined) {
    await writeRecord(settings.json, {
      ...recordOf('scale', scene, settings.asked, host),
      rows,
      promises,
      ...(model === undefined
        ? {}
        : {
            model,
            predictions: PREDICTED_HOSTS.map((hosts) => ({ hosts, seconds: predictSeconds(model, hosts) })),
          }),
    });
  }
  if (settings.check) check(promises);
}

try {
  await main();
} catch (error) {
  failed('bench scale', error);
}
