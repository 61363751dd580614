/** Puts a proxy's agent under a broker: the options of `mount` and `proxy run`, and what the link is told of the host. */
import { readFileSync } from 'node:fs';
import os from 'node:os';
import path from 'node:path';
import { randomBytes } from 'node:crypto';
import { BrokerClient, readToken } from '../agent/broker-client.ts';
import { BrokerLink } from '../agent/broker-link.ts';
import type { Clones } from '../agent/clones.ts';
import { LABEL_SHELL, runInGuest } from '../agent/guest-command.ts';
import { joinStreams, openConsole, openGuestStream } from '../agent/guest-stream.ts';
import type { GridVolumes } from '../agent/grid-volumes.ts';
import type { LinkMachines } from '../agent/broker-orders.ts';
import type { Checkpoints } from '../agent/checkpoints.ts';
import type { Machines } from '../agent/machines.ts';
import type { Spending } from '../agent/vm-spending.ts';
import type { Digest } from '../core/bytes.ts';
import { asGridError, GridError } from '../core/errors.ts';
import type { OfferedVersion } from '../core/grid.ts';
import { CHECKPOINT_IMAGE, CONSOLE_PORT, VOLUME_IMAGE } from '../core/grid.ts';
import { MIB } from '../core/limits.ts';
import { isName } from '../core/manifest.ts';
import type { Manifest, Tag } from '../core/manifest.ts';
import { createQemu } from '../vmm/index.ts';
import type { HostSegments } from './segments.ts';

export interface BrokerOptions {
  readonly url: string;
  readonly tokenFile: string;
  readonly caFile?: string;
  /** How the broker calls this host; its own name when left out. */
  readonly hostName?: string;
  readonly networks: readonly string[];
  /** What guests may have; most of the memory when left out. */
  readonly guestMemoryBytes?: number;
}

/** What the link needs of the proxy's parts. */
export interface LinkedProxy {
  readonly machines: Machines;
  readonly checkpoints: Checkpoints;
  readonly gridVolumes: GridVolumes;
  readonly spending: Spending;
  readonly clones: Clones;
  /** The disk of a VM, as it is now, as a new version in the source. */
  readonly commit: (
    clone: string,
    request: { reference: string; labels: Readonly<Record<string, string>> },
  ) => Promise<{ digest: string; newStoredBytes: number }>;
  readonly segments: HostSegments;
  readonly accelerator: 'auto' | 'kvm' | 'tcg';
  readonly stateFolder: string;
  readonly source: string;
  readonly cache: {
    status(): Promise<{
      readonly images: readonly { readonly manifest: Digest; readonly presentBytes: number }[];
      readonly fetchedStoredBytes: number;
    }>;
    listTags(): Promise<readonly Tag[]>;
    readManifest(digest: Digest): Promise<Manifest>;
    warm(manifest: Digest, options: object): Promise<unknown>;
  };
  resolve(reference: string): Promise<{ digest: Digest; manifest: Manifest }>;
}

/** Kept for the host and the file service: guests' page cache, the proxy, its workers. */
const HOST_MEMORY_BYTES = 512 * MIB;
const HOST_MEMORY_SHARE = 0.1;
/** Guests wait most of their time: this many of their processors share one of the host's. */
const VCPUS_PER_CPU = 4;

/** Throws bad-request for options that cannot be right; whether the broker answers is seen later, in the log. */
export async function linkToBroker(
  options: BrokerOptions,
  proxy: LinkedProxy,
  log: (line: string) => void,
): Promise<BrokerLink> {
  const host =
    options.hostName ??
    os
      .hostname()
      .toLowerCase()
      .replaceAll(/[^a-z0-9._-]/g, '-');
  for (const name of [host, ...options.networks]) {
    if (!isName(name)) {
      throw new GridError('bad-request', `'${String(name)}' cannot be the name of a host or network`);
    }
  }
  const client = new BrokerClient({
    url: options.url,
    token: readToken(options.tokenFile),
    ...(options.caFile === undefined ? {} : { ca: readCa(options.caFile) }),
  });
  const { usable, accelerator, reason } = await createQemu({ accelerator: proxy.accelerator, log }).probe();
  proxy.segments.connect((network) =>
    client.upgrade(
      `/v1/agent/trunks/${encodeURIComponent(network)}?host=${encodeURIComponent(host)}`,
      'gridvfs-trunk',
    ),
  );
  const memoryBytes = os.totalmem();
  const { cache } = proxy;
  let known: ReadonlyMap<Digest, Manifest> = new Map();
  return new BrokerLink({
    client,
    facts: {
      host,
      incarnation: randomBytes(8).toString('hex'),
      vcpus: os.availableParallelism(),
      memoryBytes,
      guestMemoryBytes: Math.max(
        0,
        options.guestMemoryBytes ?? Math.floor(memoryBytes * (1 - HOST_MEMORY_SHARE) - HOST_MEMORY_BYTES),
      ),
      guestVcpus: VCPUS_PER_CPU * os.availableParallelism(),
      ...(accelerator === undefined ? {} : { accelerator }),
      ...(usable ? {} : { unusable: reason ?? 'no machine can run here' }),
      virtual: false,
      networks: options.networks,
      source: proxy.source,
    },
    machines: machinesOf(proxy),
    volumes: proxy.gridVolumes,
    async cache() {
      const status = await cache.status();
      const present = new Map(status.images.map((image) => [image.manifest, image.presentBytes]));
      const warmBytes: Record<string, number> = {};
      for (const [digest, { parts }] of known) {
        const bytes = [digest, ...Object.values(parts)].reduce(
          (sum, one) => sum + (present.get(one) ?? 0),
          0,
        );
        if (bytes > 0) warmBytes[digest] = bytes;
      }
      return {
        warmBytes,
        fetchedBytes: status.fetchedStoredBytes,
      };
    },
    spent: () => proxy.spending.all(),
    async versions() {
      const { versions, manifests } = await offered(cache);
      known = manifests;
      return versions;
    },
    async warm(image) {
      const { digest, manifest } = await proxy.resolve(image);
      for (const part of new Set([...Object.values(manifest.parts), digest])) await cache.warm(part, {});
    },
    async connect(vm, port, stream) {
      const { machine } = proxy.machines.find(vm);
      const { stream: near, past } =
        port === CONSOLE_PORT
          ? await openConsole(machine)
          : { stream: await openGuestStream(machine, port), past: undefined };
      try {
        const route = `/v1/agent/streams/${stream}?host=${encodeURIComponent(host)}`;
        const far = await client.upgrade(route, 'gridvfs-stream');
        if (past !== undefined) far.write(past);
        joinStreams(near, far);
      } catch (error) {
        near.destroy();
        throw error;
      }
    },
    file: path.join(proxy.stateFolder, 'broker-vms.json'),
    log,
  });
}

/** The agent's machines as the link sees them: those that run and those that are suspended are one list. */
function machinesOf({
  machines,
  checkpoints,
  clones,
  cache,
  gridVolumes,
  commit,
}: LinkedProxy): LinkMachines {
  const status = (id: string) => (checkpoints.has(id) ? checkpoints.status(id) : machines.status(id));
  return {
    list: () => [...machines.list(), ...checkpoints.list()],
    run: (request) => machines.run(request),
    runFrom: (checkpoint, name) => gridVolumes.runFrom(checkpoint, name),
    status,
    async execute(id, command, timeoutMs) {
      const { machine, record } = machines.find(id);
      const { base } = clones.get(record.clone);
      const { labels } = await cache.readManifest(base);
      return runInGuest(machine, labels[LABEL_SHELL], command, timeoutMs);
    },
    ready: (id, timeoutMs) => machines.ready(id, timeoutMs),
    stop: (id, graceMs) => (checkpoints.has(id) ? checkpoints.discard(id) : machines.stop(id, graceMs)),
    suspend: (id) => checkpoints.suspend(id),
    resume: (id) => checkpoints.resume(id),
    publish: (id, reference, saves, over) => gridVolumes.publish(id, reference, saves, over),
    commit: (id, reference, labels) => commit(status(id).clone, { reference, labels }),
  };
}

function readCa(file: string): Buffer {
  try {
    return readFileSync(file);
  } catch (error) {
    throw asGridError(error, `cannot read ${file}`);
  }
}

async function offered(
  cache: LinkedProxy['cache'],
): Promise<{ versions: OfferedVersion[]; manifests: Map<Digest, Manifest> }> {
  const versions: OfferedVersion[] = [];
  const manifests = new Map<Digest, Manifest>();
  for (const { name, version, manifest: digest } of await cache.listTags()) {
    const manifest = await cache.readManifest(digest);
    manifests.set(digest, manifest);
    if (CHECKPOINT_IMAGE.test(name) || VOLUME_IMAGE.test(name)) continue;
    versions.push({
      name,
      version,
      manifest: digest,
      kind: manifest.kind,
      sizeBytes: manifest.sizeBytes,
      labels: manifest.labels,
      ...(manifest.parent === undefined ? {} : { parent: manifest.parent }),
      created: manifest.created,
    });
  }
  return { versions, manifests };
}
