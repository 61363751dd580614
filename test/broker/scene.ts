/** What tests of the broker begin with: a broker with hosts of their names, for one test or for all of a suite. */
import { randomUUID } from 'node:crypto';
import { after, before } from 'node:test';
import type { BrokerClient } from '../../src/agent/broker-client.ts';
import type { ImageInfo, JobInfo, VmInfo } from '../../src/broker/index.ts';
import type { LeaseTimes } from '../../src/broker/loads.ts';
import type { HostFacts, OfferedVersion } from '../../src/core/grid.ts';
import { Cable, Databases, eventually, startBroker, TestHost, version } from './harness.ts';
import type { BrokerOptions, DIALECTS, Running } from './harness.ts';

export const DEBIAN = [version('debian', '12', { os: 'debian', kernel: '6.1.0', 'library.libc': '2.36' })];

export interface Scene {
  readonly running: Running;
  readonly user: BrokerClient;
  readonly hosts: TestHost[];
  readonly vm: (which: string) => Promise<VmInfo>;
  /** A job that has ended. */
  readonly settled: (id: string) => Promise<JobInfo>;
  /** One VM that runs. */
  readonly request: (body?: object) => Promise<VmInfo>;
  /** What is done to a VM, until that is over. */
  readonly act: (which: string, verb: string, body?: object) => Promise<JobInfo>;
  readonly hostOf: (vm: VmInfo) => TestHost;
}

/** A broker with hosts named so, and a user who asks. All of it is ended with `stack`. */
export async function scene(
  stack: AsyncDisposableStack,
  databases: Databases,
  names: readonly string[],
  leaseTimes: LeaseTimes = { leaseMs: 20_000, marginMs: 10_000 },
  factsOf: (name: string) => Partial<HostFacts> = () => ({}),
): Promise<Scene> {
  const database = await databases.fresh();
  const running = await startBroker(database, databases.folder, { leaseTimes });
  stack.defer(() => running.close());
  const token = (await running.broker.access.create('hosts', 'agent')).token;
  const hosts: TestHost[] = [];
  const store = new Map<string, string>();
  for (const name of names) {
    const host = new TestHost(
      `${name}-${databases.dialect}`,
      databases.folder,
      DEBIAN,
      factsOf(name),
    ).connectBy(await Cable.to(running.socket, databases.folder), token);
    host.machines.store = store;
    stack.defer(() => host.close());
    hosts.push(host);
  }
  const user = await running.as('ada');
  await eventually(async () => {
    const images = await user.call<ImageInfo[]>('GET', '/v1/images');
    return names.length === 0 || images[0]?.hosts === names.length;
  });
  const settled = (id: string) =>
    eventually(async () => {
      const now = await user.call<JobInfo>('GET', `/v1/jobs/${id}`);
      return now.state !== 'running' && now;
    });
  return {
    running,
    user,
    hosts,
    settled,
    vm: (which) => user.call<VmInfo>('GET', `/v1/vms/${which}`),
    async request(body = {}) {
      const { id } = await user.call<JobInfo>('POST', '/v1/vms', { image: 'debian', ...body });
      return (await settled(id)).vms[0]!;
    },
    async act(which, verb, body = {}) {
      const { id } = await user.call<JobInfo>('POST', `/v1/vms/${which}/${verb}`, body, {
        headers: { 'idempotency-key': randomUUID() },
      });
      return settled(id);
    },
    hostOf: (vm) => hosts.find(({ facts }) => facts.host === vm.host)!,
  };
}

/** One broker with the hosts `north` and `south`, which offer the same and share a store, for all tests of a suite. */
export function northAndSouth(
  dialect: (typeof DIALECTS)[number],
  versions: readonly OfferedVersion[],
  options: BrokerOptions = {},
): { readonly hosts: readonly TestHost[]; readonly running: Running } {
  const databases = new Databases(dialect);
  const hosts: TestHost[] = [];
  let running: Running | undefined;
  before(async () => {
    await databases.start();
    running = await startBroker(await databases.fresh(), databases.folder, options);
    const { token } = await running.broker.access.create('hosts', 'agent');
    const store = { contents: new Map<string, string>(), checkpoints: new Map() };
    const checkpoints = new Map<string, string>();
    for (const name of ['north', 'south']) {
      const host = new TestHost(name, databases.folder, [...versions]);
      host.machines.volumes.store = store;
      host.machines.store = checkpoints;
      hosts.push(host.connectBy(await Cable.to(running.socket, databases.folder), token));
    }
    const looker = await running.as('looker');
    // By each of them: a host is listed before it has told what it offers, and gets no machine until then.
    await eventually(async () => {
      const images = await looker.call<ImageInfo[]>('GET', '/v1/images');
      return images.length === versions.length && images.every((image) => image.hosts === hosts.length);
    });
    await eventually(async () => (await looker.call<unknown[]>('GET', '/v1/hosts')).length === hosts.length);
  });
  after(async () => {
    for (const host of hosts) await host.close();
    await running?.close();
    await databases.stop();
  });
  return {
    hosts,
    get running() {
      return running!;
    },
  };
}
