#!/usr/bin/env node
/**
 * What `npm run demo`, `npm test` and the others call: plain JavaScript for any Node from 20 on, because it runs
 * before TypeScript, dependencies or the pinned Node exist. Installs what is missing (Debian packages, npm
 * packages, among them the pinned Node), then hands over to the pinned Node. A second run with everything in
 * place costs a few tens of milliseconds.
 */
import { spawnSync } from 'node:child_process';
import { createHash } from 'node:crypto';
import { existsSync, readFileSync, rmSync, writeFileSync } from 'node:fs';
import path from 'node:path';
import { PACKAGES } from './packages.mjs';

const ROOT = path.resolve(import.meta.dirname ?? path.dirname(new URL(import.meta.url).pathname), '..', '..');
const PINNED_NODE = path.join(ROOT, 'node_modules', '.bin', 'node');
const IS_ROOT = process.getuid?.() === 0;

/**
 * The tests have a mount namespace of their own, with the propagation that systemd gives a host: what a test unmounts
 * goes in the namespaces that mmdebstrap and others made meanwhile as well, and a crash leaves no mount on the host.
 */
const TESTS = ['unshare', '--mount', '--propagation', 'shared', PINNED_NODE, 'test/run.ts'];

const VERBS = {
  setup: { packages: ['node', 'run', 'test'], command: () => [PINNED_NODE, '--version'] },
  demo: {
    packages: ['node', 'run'],
    root: true,
    command: (args) => [PINNED_NODE, 'src/main.ts', 'demo', ...args],
  },
  check: { packages: ['node'], command: () => ['sh', 'src/setup/check.sh'] },
  test: {
    packages: ['node', 'run', 'test'],
    root: true,
    command: (args) => [...TESTS, ...args],
  },
  'test:long': {
    packages: ['node', 'run', 'test'],
    root: true,
    command: (args) => [...TESTS, '--long', ...args],
  },
};

function say(text) {
  process.stderr.write(`setup: ${text}\n`);
}

function fail(text) {
  process.stderr.write(`setup: ${text}\n`);
  process.exit(1);
}

function run(command, args, options = {}) {
  const result = spawnSync(command, args, { stdio: ['ignore', 2, 2], cwd: ROOT, ...options });
  if (result.error) return { status: 127, reason: result.error.message };
  return { status: result.status ?? 128, reason: `exit status ${result.status ?? result.signal}` };
}

function missingPackages(names) {
  const answer = spawnSync('dpkg-query', ['-W', '-f=${Package} ${db:Status-Status}\n', ...names], {
    encoding: 'utf8',
  });
  if (answer.error)
    fail(
      'dpkg-query not found: the packages this needs are named for Debian 12; install them by hand: ' +
        names.join(' '),
    );
  const installed = new Set(
    answer.stdout.split('\n').flatMap((line) => (line.endsWith(' installed') ? [line.split(' ')[0]] : [])),
  );
  return names.filter((name) => !installed.has(name));
}

/** Daemons that come with a package (sshd for the tests) are not started and not enabled by us. */
function withoutStartingDaemons(asRoot, names, install) {
  const policy = '/usr/sbin/policy-rc.d';
  // One that an interrupted run of ours left is ours too.
  const ours = !existsSync(policy) || readFileSync(policy, 'utf8').includes('gridvfs setup');
  if (ours)
    run(
      ...asRoot('sh', [
        '-c',
        `printf '#!/bin/sh\\n# gridvfs setup: gone when the installation is done\\nexit 101\\n' > ${policy} && chmod 755 ${policy}`,
      ]),
    );
  try {
    return install();
  } finally {
    if (ours) run(...asRoot('rm', ['-f', policy]));
    for (const [name, unit] of [
      ['openssh-server', 'ssh'],
      ['nginx-light', 'nginx'],
    ]) {
      if (names.includes(name) && existsSync('/run/systemd/system')) {
        run(...asRoot('systemctl', ['disable', '--now', unit]), { stdio: 'ignore' });
      }
    }
  }
}

function installDebianPackages(groups) {
  const names = missingPackages([...new Set(groups.flatMap((group) => PACKAGES[group]))]);
  if (names.length === 0) return;
  say(`installing Debian packages: ${names.join(' ')}`);
  const asRoot = (command, args) => (IS_ROOT ? [command, args] : ['sudo', [command, ...args]]);
  if (!IS_ROOT && spawnSync('sudo', ['-V']).error) {
    fail(`not root and no sudo: ask your administrator for\n  apt-get install ${names.join(' ')}`);
  }
  const env = { ...process.env, DEBIAN_FRONTEND: 'noninteractive' };
  const install = () =>
    run(
      ...asRoot('apt-get', [
        '-q',
        '-y',
        '-o',
        'DPkg::Lock::Timeout=300',
        'install',
        '--no-install-recommends',
        ...names,
      ]),
      { env },
    );
  const result = withoutStartingDaemons(asRoot, names, () => {
    const update = run(...asRoot('apt-get', ['-q', 'update']), { env });
    if (update.status !== 0) say(`apt-get update: ${update.reason}; trying with the lists that are there`);
    return install();
  });
  if (result.status !== 0) fail(`apt-get install failed (${result.reason}); see its messages above`);
}

function installNpmPackages() {
  const stampFile = path.join(ROOT, 'node_modules', '.gridvfs-installed');
  const stamp = createHash('sha256')
    .update(readFileSync(path.join(ROOT, 'package-lock.json')))
    .digest('hex');
  if (existsSync(PINNED_NODE) && existsSync(stampFile) && readFileSync(stampFile, 'utf8') === stamp) return;
  say('installing npm packages (among them the pinned Node)');
  rmSync(stampFile, { force: true });
  const result = run('npm', ['ci', '--no-audit', '--no-fund', '--ignore-scripts', '--loglevel=error']);
  if (result.status !== 0) fail(`npm ci failed (${result.reason}); see its messages above`);
  if (!existsSync(PINNED_NODE))
    fail(
      `no pinned Node for ${process.platform}-${process.arch} in node_modules; this runs on Linux x64 and arm64`,
    );
  writeFileSync(stampFile, stamp);
}

// The terminal's Ctrl-C reaches the programs that this one starts; they end or clean up and decide the exit code,
// so this process only waits, and puts back what it changed.
for (const signal of ['SIGINT', 'SIGTERM', 'SIGHUP']) process.on(signal, () => {});

const [verbName, ...args] = process.argv.slice(2);
const verb = VERBS[verbName ?? ''];
if (!verb) fail(`usage: node src/setup/run.mjs ${Object.keys(VERBS).join('|')} [arguments]`);
if (process.platform !== 'linux') fail(`gridvfs runs on Linux; this is ${process.platform}`);
if (verb.packages.length > 0) installDebianPackages(verb.packages);
installNpmPackages();

let [command, ...commandArgs] = verb.command(args);
if (verb.root && !IS_ROOT) {
  say('this part mounts file systems: going on with sudo');
  commandArgs = ['--preserve-env=PATH,HOME,CI,GRIDVFS_GUEST_CACHE', command, ...commandArgs];
  command = 'sudo';
}
const env = { ...process.env, PATH: `${path.join(ROOT, 'node_modules', '.bin')}:${process.env.PATH ?? ''}` };
const { spawn } = await import('node:child_process');
const child = spawn(command, commandArgs, { cwd: ROOT, stdio: 'inherit', env });
process.on('SIGTERM', () => child.kill('SIGTERM'));
child.on('error', (error) => fail(`cannot start ${command}: ${error.message}`));
child.on('exit', (code, signal) => process.exit(code ?? (signal === 'SIGINT' ? 130 : 143)));
