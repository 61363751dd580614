/**
 * `node bench/pull.ts`: how near the transport comes to what the link and the processor allow.
 *
 *   whole image      pulled, checked and written to a file over a long link, beside `scp` of the raw file and
 *                    `rsync -zS` of it in the same run; the limit is its compressed bytes ÷ bandwidth
 *   no link limit    bytes of the image (chunks of zeros do not count) per second over ssh, fetched and checked
 *   long fat link    how much of 1 Gbit/s at 50 ms one connection fills, built-in endpoint and stock sshd
 *   demand           99th percentile of single reads, alone and beside a whole-image prefetch at full speed
 *
 * Every far side is a process of its own behind a link of its own (bench/link). The page cache is left warm: the
 * store's disk is not what is measured.
 */
import { createHash } from 'node:crypto';
import { mkdtemp, open, rm, stat, writeFile } from 'node:fs/promises';
import os from 'node:os';
import path from 'node:path';
import { parseArgs } from 'node:util';
import { connectSource } from '../proxy/index.ts';
import type { RemoteSource } from '../proxy/index.ts';
import { table as textTable } from '../src/cli/kit.ts';
import { ChunkTable } from '../src/core/chunk-table.ts';
import { decodeChunk } from '../src/core/chunk.ts';
import { collectLess } from '../src/core/collector.ts';
import { ChunkDecoder } from '../src/core/decoder.ts';
import type { ChunkRef } from '../src/core/chunk.ts';
import { BATCH_CHUNKS_MAX, MIB } from '../src/core/limits.ts';
import { chunkLengthOf, parseManifest } from '../src/core/manifest.ts';
import { buildGuest, guestCacheFolder } from './guest/build.ts';
import { gridvfs, startService } from './lib/child.ts';
import { hostFacts, median } from './lib/facts.ts';
import { failed } from './lib/scene.ts';
import { headOf } from './lib/record.ts';
import { parseRate } from './link/units.ts';
import { runProgram } from './peers/program.ts';
import { startSshd } from './peers/sshd.ts';
import type { Sshd } from './peers/sshd.ts';

const IMAGE = 'guest:1';
const ROOT = path.resolve(import.meta.dirname, '..');
/** Calls of readChunks at once: the source bounds what is in flight, this only keeps its queue full. */
const CALLS = 3;
const DEMAND_READS = 400;

interface Row {
  readonly case: string;
  readonly subject: string;
  readonly value: number;
  readonly unit: string;
  /** To the limit, the bandwidth or the value alone; what it is to is in `case`. */
  readonly ratio?: number;
  readonly runs: readonly number[];
}

interface Scene {
  readonly folder: string;
  readonly disk: string;
  readonly store: string;
  readonly endpointPort: number;
  readonly identity: string;
  readonly fingerprint: string;
  readonly sshd: Sshd;
  readonly refs: readonly (ChunkRef & { readonly offsetBytes: number })[];
  readonly storedBytes: number;
  readonly plainBytes: number;
}

const say = (text: string) => process.stderr.write(`${text}\n`);

async function prepare(stack: AsyncDisposableStack, guestName: 'small' | 'debian'): Promise<Scene> {
  const guest = await buildGuest({
    guest: guestName,
    folder: path.join(guestCacheFolder(), guestName),
    signal: new AbortController().signal,
    progress: say,
  });
  const folder = await mkdtemp(path.join(process.env['TMPDIR'] ?? '/var/tmp', 'gridvfs-pull-'));
  stack.defer(() => rm(folder, { recursive: true, force: true }));
  const store = path.join(folder, 'store');
  await runProgram([process.execPath, path.join(ROOT, 'src/main.ts'), 'store', 'init', store]);
  await gridvfs(['store', 'import', store, guest.disk, IMAGE, '--json']);
  const sshd = await startSshd(path.join(folder, 'sshd'));
  stack.defer(() => sshd.stop());
  const server = await startService('src/main.ts', [
    ...['server', store, '--ssh', '127.0.0.1:0', '--authorized-keys', `${sshd.identity}.pub`],
    ...['--host-key', path.join(folder, 'host_key'), '--json'],
  ]);
  stack.defer(() => server.stop());
  const scene = {
    folder,
    disk: guest.disk,
    store,
    endpointPort: Number(new URL(String(server.ready['ssh'])).port),
    identity: sshd.identity,
    fingerprint: String(server.ready['fingerprint']),
    sshd,
  };
  const source = await connectEndpoint(
    { ...scene, refs: [], storedBytes: 0, plainBytes: 0 },
    scene.endpointPort,
  );
  try {
    const digest = (await source.listTags())[0]!.manifest;
    const manifest = parseManifest(await source.readManifest(digest), digest);
    const chunks = ChunkTable.parse(await source.readTable(manifest.table), manifest.table);
    const entries = [...chunks.entries()];
    const refs = entries.map(({ index, digest: chunk, storedBytes: weight }) => ({
      digest: chunk,
      storedBytes: weight,
      plainBytes: chunkLengthOf(manifest, index),
      offsetBytes: index * manifest.chunkBytes,
    }));
    const storedBytes = entries.reduce((sum, entry) => sum + entry.storedBytes, 0);
    const plainBytes = refs.reduce((sum, ref) => sum + ref.plainBytes, 0);
    return { ...scene, refs, storedBytes, plainBytes };
  } finally {
    await source.close();
  }
}

function connectEndpoint(scene: Scene, port: number): Promise<RemoteSource> {
  return connectSource(`ssh://grid@127.0.0.1:${port}${scene.store}`, {
    identityPaths: [scene.identity],
    agentSocket: '',
    hostKeyFingerprint: scene.fingerprint,
  });
}

function connectStock(scene: Scene, port: number): Promise<RemoteSource> {
  const key = Buffer.from(scene.sshd.hostKey.split(' ')[1]!, 'base64');
  const fingerprint = createHash('sha256').update(key).digest('base64').replace(/=+$/, '');
  return connectSource(`ssh://${scene.sshd.user}@127.0.0.1:${port}${scene.store}`, {
    identityPaths: [scene.identity],
    agentSocket: '',
    hostKeyFingerprint: `SHA256:${fingerprint}`,
    remoteCommand: `${process.execPath} ${path.join(ROOT, 'src/main.ts')} server --stdio`,
  });
}

/** All chunks of the image, checked; written to `file` where one is given. Resolves when all of it is there. */
async function pull(scene: Scene, source: RemoteSource, file?: string, signal?: AbortSignal): Promise<void> {
  const handle = file === undefined ? undefined : await open(file, 'w');
  // As the cache does with what nobody waits for.
  const decoder = new ChunkDecoder();
  const writes = new Set<Promise<unknown>>();
  let next = 0;
  const work = async () => {
    for (let first = next; first < scene.refs.length; first = next) {
      next += BATCH_CHUNKS_MAX;
      const refs = scene.refs.slice(first, next);
      const priority = 'prefetch' as const;
      await source.readChunks(refs, signal ? { priority, signal } : { priority }, (index, chunk) => {
        const ref = refs[index]!;
        const write = decoder
          .decode(chunk, ref)
          .then((plain) => handle?.write(plain, 0, plain.length, ref.offsetBytes));
        writes.add(write);
        write.then(
          () => writes.delete(write),
          () => undefined, // told by the wait for all of them
        );
      });
      await Promise.all(writes);
    }
  };
  try {
    await Promise.all(Array.from({ length: CALLS }, work));
  } finally {
    await decoder.close();
    await handle?.close();
  }
}

async function secondsOf(work: () => Promise<unknown>): Promise<number> {
  const startMs = performance.now();
  await work();
  return (performance.now() - startMs) / 1000;
}

/** A link in front of `port`; its near port. */
async function startLink(
  stack: AsyncDisposableStack,
  port: number,
  rtt: string,
  rate: string,
): Promise<number> {
  const relay = await startService('bench/link/main.ts', [
    ...['--listen', '127.0.0.1:0', '--to', `127.0.0.1:${port}`, '--rtt', rtt, '--rate', rate],
  ]);
  stack.defer(() => relay.stop());
  return Number(String(relay.ready['listening']).split(':').at(-1));
}

/** Times `work` with a source of its own `runs` times; the connection is made before the clock starts. */
async function timed(
  runs: number,
  connect: () => Promise<RemoteSource>,
  work: (source: RemoteSource, run: number) => Promise<unknown>,
): Promise<number[]> {
  const seconds: number[] = [];
  for (let run = 0; run < runs; run++) {
    const source = await connect();
    try {
      seconds.push(await secondsOf(() => work(source, run)));
    } finally {
      await source.close();
    }
  }
  return seconds;
}

async function wholeImage(scene: Scene, runs: number, peers: boolean): Promise<Row[]> {
  await using stack = new AsyncDisposableStack();
  const [rtt, rate] = ['30ms', '100mbit'];
  const name = `whole image, ${rtt}, ${rate}; ratio to its compressed bytes ÷ bandwidth`;
  const limit = (scene.storedBytes * 8) / parseRate(rate);
  const near = await startLink(stack, scene.endpointPort, rtt, rate);
  const file = path.join(scene.folder, 'pulled.raw');
  const rows: Row[] = [{ case: name, subject: 'limit', value: limit, unit: 's', ratio: 1, runs: [limit] }];
  const add = (subject: string, seconds: number[]) => {
    const value = median(seconds);
    rows.push({ case: name, subject, value, unit: 's', ratio: value / limit, runs: seconds });
    say(`${subject}: ${value.toFixed(2)} s, ${(value / limit).toFixed(3)} × the limit`);
  };
  add(
    'gridvfs over ssh',
    await timed(
      runs,
      () => connectEndpoint(scene, near),
      (source) => pull(scene, source, file),
    ),
  );
  await sameData(scene, file);
  if (!peers) return rows;
  const stock = await startLink(stack, scene.sshd.port, rtt, rate);
  const ssh = `ssh -i ${scene.identity} -o StrictHostKeyChecking=no -o UserKnownHostsFile=/dev/null -o LogLevel=ERROR`;
  const from = `${scene.sshd.user}@127.0.0.1:${scene.disk}`;
  const commands = {
    'rsync -zS': ['rsync', '-zS', '-e', `${ssh} -p ${stock}`, from, file],
    scp: ['scp', '-q', '-P', String(stock), ...ssh.split(' ').slice(1), from, file],
  };
  for (const [subject, command] of Object.entries(commands)) {
    say(`$ ${command.join(' ')}`);
    await rm(file, { force: true });
    add(subject, [await secondsOf(() => runProgram(command))]);
  }
  return rows;
}

/** The file has every chunk where it belongs. */
async function sameData(scene: Scene, file: string): Promise<void> {
  const [pulled, disk] = await Promise.all([open(file, 'r'), open(scene.disk, 'r')]);
  try {
    for (const ref of scene.refs) {
      const [a, b] = await Promise.all(
        [pulled, disk].map((handle) =>
          handle.read(Buffer.alloc(ref.plainBytes), 0, ref.plainBytes, ref.offsetBytes),
        ),
      );
      if (!a!.buffer.equals(b!.buffer)) throw new Error(`the pulled file differs at byte ${ref.offsetBytes}`);
    }
  } finally {
    await Promise.all([pulled.close(), disk.close()]);
  }
}

const WAYS = { 'built-in endpoint': connectEndpoint, 'stock sshd': connectStock };
const portOf = (scene: Scene, way: string) => (way === 'stock sshd' ? scene.sshd.port : scene.endpointPort);

async function noLimit(scene: Scene, runs: number): Promise<Row[]> {
  const rows: Row[] = [];
  for (const [subject, connect] of Object.entries(WAYS)) {
    const seconds = await timed(
      runs,
      () => connect(scene, portOf(scene, subject)),
      (source) => pull(scene, source),
    );
    const speeds = seconds.map((each) => scene.plainBytes / 1e6 / each);
    const value = median(speeds);
    rows.push({ case: 'no link limit, bytes of the image', subject, value, unit: 'MB/s', runs: speeds });
    say(`no link limit, ${subject}: ${value.toFixed(0)} MB/s of image`);
  }
  return rows;
}

async function longFatLink(scene: Scene, runs: number): Promise<Row[]> {
  const rows: Row[] = [];
  const [rtt, rate] = ['50ms', '1gbit'];
  for (const [subject, connect] of Object.entries(WAYS)) {
    await using stack = new AsyncDisposableStack();
    const near = await startLink(stack, portOf(scene, subject), rtt, rate);
    const seconds = await timed(
      runs,
      () => connect(scene, near),
      async (source) => {
        // Undecoded: the link is what is measured. As one image that is four times as long, for one is over in a second.
        await pullRaw({ ...scene, refs: Array.from({ length: 4 }, () => scene.refs).flat() }, source);
      },
    );
    const speeds = seconds.map((each) => (4 * scene.storedBytes * 8) / 1e6 / each);
    const value = median(speeds);
    const ratio = (value * 1e6) / parseRate(rate);
    const name = `one connection, ${rtt}, ${rate}; ratio to the bandwidth`;
    rows.push({ case: name, subject, value, unit: 'Mbit/s', ratio, runs: speeds });
    say(`${rtt} ${rate}, ${subject}: ${value.toFixed(0)} Mbit/s`);
  }
  return rows;
}

async function pullRaw(scene: Scene, source: RemoteSource): Promise<void> {
  let next = 0;
  const work = async () => {
    for (let first = next; first < scene.refs.length; first = next) {
      next += BATCH_CHUNKS_MAX;
      await source.readChunks(scene.refs.slice(first, next), { priority: 'prefetch' }, () => {});
    }
  };
  await Promise.all(Array.from({ length: CALLS }, work));
}

async function demand(scene: Scene): Promise<Row[]> {
  await using stack = new AsyncDisposableStack();
  const [rtt, rate] = ['30ms', '100mbit'];
  const near = await startLink(stack, scene.endpointPort, rtt, rate);
  const source = await connectEndpoint(scene, near);
  stack.defer(() => source.close());
  const read = async (nth: number) => {
    // A fixed walk over the image that is neither sequential nor in the order of the prefetch.
    const ref = scene.refs[(nth * 7919) % scene.refs.length]!;
    const startMs = performance.now();
    await source.readChunks([ref], { priority: 'demand' }, (_, chunk) => void decodeChunk(chunk, ref));
    return performance.now() - startMs;
  };
  const sample = async () => {
    const times: number[] = [];
    for (let nth = 0; nth < DEMAND_READS; nth++) times.push(await read(nth));
    return times.toSorted((a, b) => a - b);
  };
  await sample();
  const alone = await sample();
  const stop = new AbortController();
  let bytes = -source.statistics().bytesReceived;
  const startMs = performance.now();
  const prefetching = (async () => {
    while (!stop.signal.aborted) await pull(scene, source, undefined, stop.signal);
  })().catch((error: unknown) => {
    if (!stop.signal.aborted) throw error;
  });
  await new Promise((resolve) => setTimeout(resolve, 2000));
  const beside = await sample();
  bytes += source.statistics().bytesReceived;
  const used = (bytes * 8) / ((performance.now() - startMs) / 1000) / parseRate(rate);
  stop.abort();
  await prefetching;
  const name = `demand reads of one chunk, ${rtt}, ${rate}; ratio to p99 alone`;
  const at = (times: number[], share: number) => times[Math.floor(times.length * share)]!;
  const base = at(alone, 0.99);
  say(
    `demand alone: p50 ${at(alone, 0.5).toFixed(1)} p99 ${base.toFixed(1)} ms; beside prefetch: p50 ${at(beside, 0.5).toFixed(1)} p99 ${at(beside, 0.99).toFixed(1)} ms, link ${(100 * used).toFixed(0)} % full`,
  );
  return [
    { case: name, subject: 'p50 alone', value: at(alone, 0.5), unit: 'ms', runs: alone },
    { case: name, subject: 'p99 alone', value: base, unit: 'ms', ratio: 1, runs: alone },
    { case: name, subject: 'p50 beside prefetch', value: at(beside, 0.5), unit: 'ms', runs: beside },
    {
      case: name,
      subject: 'p99 beside prefetch',
      value: at(beside, 0.99),
      unit: 'ms',
      ratio: at(beside, 0.99) / base,
      runs: beside,
    },
    { case: name, subject: 'link in use meanwhile', value: used, unit: 'of 1', runs: [used] },
  ];
}

const CASES = ['whole', 'nolimit', 'fat', 'demand'] as const;

async function main(): Promise<void> {
  const { values } = parseArgs({
    options: {
      guest: { type: 'string', default: 'debian' },
      runs: { type: 'string', default: '3' },
      cases: { type: 'string', default: CASES.join(',') },
      'no-peers': { type: 'boolean', default: false },
      json: { type: 'string' },
    },
  });
  if (values.guest !== 'small' && values.guest !== 'debian') throw new RangeError('--guest: small or debian');
  const runs = Number(values.runs);
  if (!Number.isSafeInteger(runs) || runs < 1) throw new RangeError('--runs: a whole number of at least 1');
  const cases = new Set(values.cases.split(','));
  const unknown = [...cases].find((one) => !(CASES as readonly string[]).includes(one));
  if (unknown !== undefined) throw new RangeError(`--cases: ${CASES.join(', ')}, not ${unknown}`);
  await using stack = new AsyncDisposableStack();
  const scene = await prepare(stack, values.guest);
  const { size } = await stat(scene.disk);
  say(
    `${values.guest}: ${(size / MIB).toFixed(0)} MiB, ${(scene.plainBytes / MIB).toFixed(0)} MiB in ${scene.refs.length} chunks, ${(scene.storedBytes / MIB).toFixed(1)} MiB compressed`,
  );
  const rows: Row[] = [];
  if (cases.has('demand')) rows.push(...(await demand(scene)));
  if (cases.has('nolimit')) rows.push(...(await noLimit(scene, runs)));
  if (cases.has('fat')) rows.push(...(await longFatLink(scene, runs)));
  if (cases.has('whole')) rows.push(...(await wholeImage(scene, runs, !values['no-peers'])));
  process.stdout.write(
    textTable(
      ['CASE', 'SUBJECT', 'VALUE', 'UNIT', 'RATIO'],
      rows.map((row) => [row.case, row.subject, row.value.toFixed(2), row.unit, row.ratio?.toFixed(3) ?? '']),
    ) + '\n',
  );
  if (values.json === undefined) return;
  const image = {
    guest: values.guest,
    sizeBytes: size,
    chunks: scene.refs.length,
    plainBytes: scene.plainBytes,
    storedBytes: scene.storedBytes,
  };
  const record = { ...headOf('pull'), host: hostFacts('none'), image, rows };
  await writeFile(values.json, JSON.stringify(record, null, 2) + os.EOL);
  say(`rows written to ${values.json}`);
}

// As the program does.
collectLess();
try {
  await main();
} catch (error) {
  failed('bench pull', error);
}
