/** The verbs, each group loaded only when it is called: `gridvfs --help` and a plain call start quickly. */
import { readFileSync } from 'node:fs';
import type { Command } from 'commander';
import { verb } from './kit.ts';

interface Group {
  readonly summary: string;
  load(): Promise<Command>;
}

const GROUPS: Record<string, Group> = {
  demo: {
    summary: 'the main job, end to end, with the table of cold and warm starts',
    load: async () => (await import('./bench.ts')).demoVerb(),
  },
  store: {
    summary: 'make stores, import images, list, verify',
    load: async () => (await import('./store.ts')).storeVerbs(),
  },
  server: {
    summary: 'serve a store to other hosts, through ssh or http',
    load: async () => (await import('./server.ts')).serverVerb(),
  },
  mount: {
    summary: "start this host's proxy in the background and mount a source's images",
    load: async () => (await import('./mount.ts')).mountVerb(),
  },
  umount: {
    summary: 'unmount and stop the proxy',
    load: async () => (await import('./mount.ts')).umountVerb(),
  },
  proxy: {
    summary: 'run a proxy in the foreground, show or stop running ones',
    load: async () => (await import('./proxy.ts')).proxyVerbs(),
  },
  cache: {
    summary: 'what this host keeps of its images: look, fetch ahead, pin, evict, check',
    load: async () => (await import('./cache.ts')).cacheVerbs(),
  },
  clone: {
    summary: 'make, list and remove clones',
    load: async () => (await import('./clone.ts')).cloneVerbs(),
  },
  vm: {
    summary: 'run, list and stop VMs over clones',
    load: async () => (await import('./vm.ts')).vmVerbs(),
  },
  broker: {
    summary: 'several hosts behind one front end: ask for machines, not for hosts',
    load: async () => (await import('./broker.ts')).brokerVerbs(),
  },
  volume: {
    summary: 'data volumes of your own behind a broker: they stay when machines go',
    load: async () => (await import('./volume.ts')).volumeVerbs(),
  },
  workspace: {
    summary: 'machines together: on one virtual network, suspended, moved and ended by one command',
    load: async () => (await import('./workspace.ts')).workspaceVerbs(),
  },
  bench: {
    summary: 'measure cold and warm instantiation',
    load: async () => (await import('./bench.ts')).benchVerbs(),
  },
  doctor: {
    summary: 'what this host can do, and what to install',
    load: async () => (await import('./doctor.ts')).doctorVerb(),
  },
};

export function version(): string {
  const text = readFileSync(new URL('../../package.json', import.meta.url), 'utf8');
  return (JSON.parse(text) as { version: string }).version;
}

/** The whole command for this argv. */
export async function program(argv: readonly string[]): Promise<Command> {
  const root = verb('gridvfs', 'Grid virtual file system: hosts mount VM images instead of copying them.', [
    'gridvfs demo',
    'gridvfs store import /srv/store debian-12.qcow2 debian:12',
    'gridvfs mount ssh://images.example.org/srv/store /mnt/grid',
    'gridvfs vm run debian:12',
  ])
    .version(version())
    .enablePositionalOptions();
  const called = argv[2] === 'help' ? argv[3] : argv[2];
  for (const [name, group] of Object.entries(GROUPS)) {
    root.addCommand(name === called ? await group.load() : verb(name, group.summary));
  }
  return root;
}
