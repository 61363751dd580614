/** Who is let in and who is believed: host keys, client keys, what the built-in endpoint refuses, what a stock
 * sshd without gridvfs looks like. Held against OpenSSH's own clients and server. */
import assert from 'node:assert/strict';
import { execFile, execFileSync, spawn } from 'node:child_process';
import { appendFileSync, chmodSync, readFileSync, statSync, writeFileSync } from 'node:fs';
import net from 'node:net';
import path from 'node:path';
import { promisify } from 'node:util';
import { after, before, describe, test } from 'node:test';
import { connectSource, createServer, createSshEndpoint } from '../../proxy/index.ts';
import type { ConnectOptions } from '../../proxy/index.ts';
import { fingerprintOf } from '../../proxy/known-hosts.ts';
import { openStore } from '../../src/store/index.ts';
import { freePort } from '../../src/core/ports.ts';
import {
  clientOptions,
  failsWith,
  keygen,
  makeGround,
  openDescriptors,
  serveSsh,
  startSshd,
  until,
} from './kit.ts';
import type { Ground, Serving, Sshd } from './kit.ts';

let ground: Ground;
let serving: Serving;
let sshd: Sshd;
let port: number;

before(async () => {
  ground = await makeGround({ sizeBytes: 1 << 20, seed: 3, chunkBytes: 65536 });
  serving = await serveSsh(ground);
  port = serving.endpoint.address.port;
  sshd = await startSshd(ground);
});

after(async () => {
  await serving.close();
  await sshd.stop();
  ground.remove();
});

/** Connects, lists, closes. */
async function visit(url: string, options: ConnectOptions): Promise<void> {
  const source = await connectSource(url, options);
  try {
    assert.equal((await source.listTags()).length, 1);
  } finally {
    await source.close();
  }
}

const trusting = (): ConnectOptions => clientOptions(ground, serving.endpoint.fingerprint);

describe('host keys', () => {
  test('an unknown key is refused with its fingerprint and the way on', async () => {
    writeFileSync(ground.knownHosts, '');
    const error = await failsWith(connectSource(serving.url, clientOptions(ground)), 'host-key', /not known/);
    assert.ok(error.message.includes(serving.endpoint.fingerprint));
    assert.ok(error.message.includes(`ssh-keyscan -p ${port} 127.0.0.1`));
  });

  test('what ssh-keyscan finds is enough, plain and hashed', async () => {
    for (const hash of [[], ['-H']]) {
      const scan = await promisify(execFile)('ssh-keyscan', [...hash, '-p', String(port), '127.0.0.1']);
      writeFileSync(ground.knownHosts, scan.stdout);
      await visit(serving.url, clientOptions(ground));
    }
  });

  test('a changed key is refused, with both fingerprints', async () => {
    const other = readFileSync(`${ground.otherKey}.pub`, 'utf8').split(' ').slice(0, 2).join(' ');
    writeFileSync(ground.knownHosts, `[127.0.0.1]:${port} ${other}\n`);
    const error = await failsWith(connectSource(serving.url, clientOptions(ground)), 'host-key', /changed/);
    assert.ok(error.message.includes(serving.endpoint.fingerprint));
    assert.ok(error.message.includes(fingerprintOf(Buffer.from(other.split(' ')[1]!, 'base64'))));
  });

  test('a pinned fingerprint is enough, another one is refused', async () => {
    writeFileSync(ground.knownHosts, '');
    await visit(serving.url, trusting());
    const wrong = clientOptions(ground, `SHA256:${'A'.repeat(43)}`);
    await failsWith(connectSource(serving.url, wrong), 'host-key', /expected/);
  });

  test('a host with keys of several types shows the one that is known', async () => {
    const rsa = path.join(ground.folder, 'rsa_host_key');
    keygen(rsa, '-t', 'rsa', '-b', '2048');
    const freshPort = await freePort();
    const config = path.join(ground.folder, 'two_keys_config');
    writeFileSync(
      config,
      `Port ${freshPort}\nListenAddress 127.0.0.1\nHostKey ${sshd.hostKey}\nHostKey ${rsa}\nPidFile none\nUsePAM no\n` +
        `AuthorizedKeysFile ${ground.authorizedKeys}\nStrictModes no\n`,
    );
    const child = spawn('/usr/sbin/sshd', ['-D', '-f', config], { stdio: 'ignore' });
    try {
      const key = readFileSync(`${rsa}.pub`, 'utf8').split(' ').slice(0, 2).join(' ');
      writeFileSync(ground.knownHosts, `[127.0.0.1]:${freshPort} ${key}\n`);
      await answers(freshPort);
      await visit(`ssh://root@127.0.0.1:${freshPort}${ground.fixture.storeFolder}`, {
        ...clientOptions(ground),
        remoteCommand: sshd.remoteCommand,
      });
    } finally {
      child.kill('SIGTERM');
    }
  });

  test("the endpoint's own key is made once, with mode 0600, and not used when it is open to others", async () => {
    assert.equal(statSync(ground.hostKey).mode & 0o777, 0o600);
    const printed = execFileSync('ssh-keygen', ['-l', '-f', ground.hostKey], { encoding: 'utf8' });
    assert.equal(printed.split(' ')[1], serving.endpoint.fingerprint);
    const again = await serveSsh(ground);
    assert.equal(again.endpoint.fingerprint, serving.endpoint.fingerprint);
    await again.close();
    chmodSync(ground.hostKey, 0o644);
    const store = await openStore(ground.fixture.storeFolder);
    const server = createServer(store);
    const options = {
      server,
      hostKeyPath: ground.hostKey,
      authorizedKeysPath: ground.authorizedKeys,
      listen: { host: '127.0.0.1', port: 0 },
    };
    await failsWith(createSshEndpoint(options), 'denied', /chmod 600/);
    chmodSync(ground.hostKey, 0o600);
    await failsWith(createSshEndpoint({ ...options, listen: { host: '127.0.0.1', port } }), 'in-use');
    const absent = path.join(ground.folder, 'absent');
    await failsWith(createSshEndpoint({ ...options, authorizedKeysPath: absent }), 'not-found', /absent/);
    await server.close();
    await store.close();
  });
});

async function answers(onPort: number): Promise<void> {
  let up = false;
  for (let i = 0; i < 200 && !up; i++) {
    up = await new Promise<boolean>((resolve) => {
      const socket = net.connect(onPort, '127.0.0.1');
      socket.once('data', () => (socket.destroy(), resolve(true)));
      socket.once('error', () => setTimeout(() => resolve(false), 25));
    });
  }
  assert.ok(up, 'the server answers');
}

describe('client keys', () => {
  test('a key that is not in authorized_keys is denied, with the keys that were tried', async () => {
    for (const url of [serving.url, `ssh://root@127.0.0.1:${sshd.port}/x`]) {
      const options = { ...trusting(), identityPaths: [ground.otherKey] };
      const hostKeyFingerprint = url === serving.url ? serving.endpoint.fingerprint : sshdFingerprint();
      const error = await failsWith(connectSource(url, { ...options, hostKeyFingerprint }), 'denied');
      assert.ok(error.message.includes(ground.otherKey), error.message);
    }
  });

  test('no key at all, a missing file and an encrypted key are denied with the reason', async () => {
    await failsWith(connectSource(serving.url, { ...trusting(), identityPaths: [] }), 'denied', /--identity/);
    const missing = { ...trusting(), identityPaths: ['/nowhere/id'] };
    await failsWith(connectSource(serving.url, missing), 'denied', /\/nowhere\/id cannot be read/);
    const locked = path.join(ground.folder, 'id_locked');
    execFileSync('ssh-keygen', ['-q', '-t', 'ed25519', '-N', 'secret', '-f', locked]);
    await failsWith(
      connectSource(serving.url, { ...trusting(), identityPaths: [locked] }),
      'denied',
      /ssh-agent/,
    );
  });

  test('a key in the agent does', async () => {
    const agentSocket = path.join(ground.folder, 'agent');
    const agent = spawn('ssh-agent', ['-D', '-a', agentSocket], { stdio: 'ignore' });
    try {
      const add = () => {
        try {
          execFileSync('ssh-add', ['-q', ground.key], {
            env: { ...process.env, SSH_AUTH_SOCK: agentSocket },
            stdio: 'ignore',
          });
          return true;
        } catch {
          return false;
        }
      };
      await until(add, 'the agent has the key');
      await visit(serving.url, { ...trusting(), identityPaths: [], agentSocket });
      // Others first, as many as there are attempts less one.
      await visit(serving.url, { ...trusting(), identityPaths: [ground.otherKey], agentSocket });
    } finally {
      agent.kill('SIGTERM');
    }
  });

  test('RSA and ECDSA keys are let in by their own lines, and a removed line counts at once', async () => {
    const before = readFileSync(ground.authorizedKeys);
    for (const [name, ...args] of [
      ['id_rsa', '-t', 'rsa', '-b', '2048'],
      ['id_ecdsa', '-t', 'ecdsa'],
    ] as const) {
      const file = path.join(ground.folder, name);
      keygen(file, ...args);
      const options = { ...trusting(), identityPaths: [file] };
      await failsWith(connectSource(serving.url, options), 'denied');
      appendFileSync(ground.authorizedKeys, readFileSync(`${file}.pub`));
      await visit(serving.url, options);
      writeFileSync(ground.authorizedKeys, before);
      await failsWith(connectSource(serving.url, options), 'denied');
    }
  });

  test('a forced command other than the tunnel, a foreign from= and an unknown option never widen anything', async () => {
    const before = readFileSync(ground.authorizedKeys, 'utf8');
    try {
      writeFileSync(ground.authorizedKeys, `command="rsync --server" ${before}`);
      await failsWith(connectSource(serving.url, trusting()), 'origin-failed', /not offered/);
      writeFileSync(
        ground.authorizedKeys,
        `command="gridvfs server --stdio ${ground.fixture.storeFolder}",restrict ${before}`,
      );
      await visit(`ssh://gridvfs@127.0.0.1:${port}/elsewhere`, trusting());
      for (const options of ['from="10.0.0.0/8"', 'future-option', 'expiry-time="20200101"']) {
        writeFileSync(ground.authorizedKeys, `${options} ${before}`);
        await failsWith(connectSource(serving.url, trusting()), 'denied');
      }
      writeFileSync(ground.authorizedKeys, `from="127.0.0.0/8" ${before}`);
      await visit(serving.url, trusting());
    } finally {
      writeFileSync(ground.authorizedKeys, before);
    }
  });
});

function sshdFingerprint(): string {
  return fingerprintOf(Buffer.from(readFileSync(`${sshd.hostKey}.pub`, 'utf8').split(' ')[1]!, 'base64'));
}

/** OpenSSH's client against the endpoint. */
function openssh(
  program: string,
  args: readonly string[],
  input = '',
): { status: number | null; text: string } {
  const scan = `[127.0.0.1]:${port} ${serving.endpoint.publicKey}\n`;
  const known = path.join(ground.folder, 'openssh_known_hosts');
  writeFileSync(known, scan);
  const options = [
    ...['-F', 'none', '-i', ground.key, '-o', 'IdentitiesOnly=yes', '-o', 'BatchMode=yes'],
    ...['-o', `UserKnownHostsFile=${known}`, '-o', 'ConnectTimeout=5'],
  ];
  try {
    const stdout = execFileSync(program, [...options, ...args], {
      input,
      stdio: ['pipe', 'pipe', 'pipe'],
      timeout: 10_000,
      encoding: 'utf8',
    });
    return { status: 0, text: stdout };
  } catch (error) {
    const { status, stdout, stderr } = error as { status: number | null; stdout: string; stderr: string };
    return { status, text: stdout + stderr };
  }
}

describe('the built-in endpoint', () => {
  const p = () => ['-p', String(port)];
  // The client and the endpoint cannot share a process: execFileSync stops this one. So the endpoint runs in another.
  let child: ReturnType<typeof spawn>;

  before(async () => {
    await serving.close();
    child = spawn(
      process.execPath,
      [
        path.resolve(import.meta.dirname, 'endpoint-server.ts'),
        ground.fixture.storeFolder,
        ground.hostKey,
        ground.authorizedKeys,
        String(port),
      ],
      { stdio: 'ignore' },
    );
    await answers(port);
  });

  after(async () => {
    const gone = new Promise((resolve) => child.once('exit', resolve));
    child.kill('SIGKILL');
    await gone;
    serving = await serveSsh(ground, undefined, port);
  });

  test('serves HTTP to any ssh client that gives the command', () => {
    const request = 'GET /v1/ HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n';
    for (const command of [
      `gridvfs server --stdio ${ground.fixture.storeFolder}`,
      'gridvfs server / --stdio',
    ]) {
      const { text } = openssh('ssh', [...p(), 'gridvfs@127.0.0.1', command], request);
      assert.match(text, /^HTTP\/1\.1 200 OK[^]*"protocol":1/);
    }
  });

  test('refuses a shell, a terminal and other commands with a line and a status', () => {
    for (const [args, line] of [
      [['gridvfs@127.0.0.1'], /a shell is not offered here/],
      [['gridvfs@127.0.0.1', 'id'], /this command is not offered here/],
      [['gridvfs@127.0.0.1', 'gridvfs server --stdio /etc'], /the path "\/etc" is not offered here/],
      [['gridvfs@127.0.0.1', 'gridvfs server --stdio /; id'], /this command is not offered here/],
    ] as const) {
      const { status, text } = openssh('ssh', [...p(), ...args]);
      assert.equal(status, 1, text);
      assert.match(text, line);
      assert.doesNotMatch(text, /uid=/);
    }
  });

  test('refuses a terminal', () => {
    const { status, text } = openssh('ssh', [...p(), '-tt', 'gridvfs@127.0.0.1']);
    assert.notEqual(status, 0);
    assert.match(text, /PTY allocation request failed/);
  });

  test('refuses sftp and scp', () => {
    const sftp = openssh('sftp', ['-P', String(port), '-b', '-', 'gridvfs@127.0.0.1'], 'ls /\n');
    assert.notEqual(sftp.status, 0);
    assert.doesNotMatch(sftp.text, /etc/);
    const scp = openssh('scp', ['-P', String(port), '-O', 'gridvfs@127.0.0.1:/etc/passwd', ground.folder]);
    assert.notEqual(scp.status, 0);
  });

  test('refuses forwarding of ports and of the standard streams', () => {
    const forwarded = openssh('ssh', [...p(), '-W', `127.0.0.1:${sshd.port}`, 'gridvfs@127.0.0.1'], 'x');
    assert.notEqual(forwarded.status, 0);
    assert.doesNotMatch(forwarded.text, /SSH-2\.0-OpenSSH/);
    const remote = openssh('ssh', [
      ...p(),
      '-o',
      'ExitOnForwardFailure=yes',
      '-N',
      '-R',
      '0:127.0.0.1:1',
      'gridvfs@127.0.0.1',
    ]);
    assert.match(remote.text, /forwarding failed/);
  });

  test('refuses passwords and keys that it does not know', () => {
    const password = openssh('ssh', [
      ...p(),
      '-o',
      'PreferredAuthentications=password,keyboard-interactive',
      'gridvfs@127.0.0.1',
    ]);
    assert.match(password.text, /Permission denied \(publickey\)/);
  });
});

describe('bounds of the endpoint', () => {
  test('connections that do not log in are few, and do not keep others out for ever', async () => {
    const idle: net.Socket[] = [];
    try {
      let refused = 0;
      for (let i = 0; i < 20; i++) {
        const socket = net.connect(port, '127.0.0.1');
        socket.on('error', () => {});
        socket.once('close', () => refused++);
        socket.resume();
        idle.push(socket);
      }
      await until(() => refused === 4, 'four of twenty are refused');
      await failsWith(connectSource(serving.url, trusting()), 'unreachable');
      for (const socket of idle) socket.destroy();
      await until(() => refused === 20, 'all are gone');
      await visit(serving.url, trusting());
    } finally {
      for (const socket of idle) socket.destroy();
    }
  });

  test('bytes that are no ssh, or end in the middle, harm nobody', async () => {
    for (const bytes of [
      'GET / HTTP/1.1\r\n\r\n',
      'SSH-2.0-x\r\n' + '\xff'.repeat(4000),
      'SSH-1.5-old\r\n',
      '',
    ]) {
      const socket = net.connect(port, '127.0.0.1');
      socket.on('error', () => {});
      socket.resume();
      socket.end(Buffer.from(bytes, 'latin1'));
      await new Promise((resolve) => socket.once('close', resolve));
    }
    await visit(serving.url, trusting());
  });
});

describe('addresses and far sides', () => {
  test('a port where nothing listens is unreachable at once', async () => {
    const startMs = Date.now();
    await failsWith(
      connectSource(`ssh://x@127.0.0.1:${await freePort()}/`, trusting()),
      'unreachable',
      /refused/i,
    );
    await failsWith(connectSource(`http://127.0.0.1:${await freePort()}/`), 'unreachable', /refused/i);
    assert.ok(Date.now() - startMs < 2000);
  });

  test('a far side that accepts and says nothing is unreachable within the bound', async () => {
    const silent = net
      .createServer((socket) => void socket.on('error', () => {}).resume())
      .listen(0, '127.0.0.1');
    await new Promise((resolve) => silent.once('listening', resolve));
    const at = `127.0.0.1:${(silent.address() as net.AddressInfo).port}`;
    for (const url of [`ssh://x@${at}/`, `http://${at}/`, `https://${at}/`]) {
      const startMs = Date.now();
      await failsWith(connectSource(url, { ...trusting(), connectTimeoutMs: 400 }), 'unreachable');
      assert.ok(Date.now() - startMs < 1500, `${url} took ${Date.now() - startMs} ms`);
    }
    await new Promise((resolve) => silent.close(resolve));
  });

  test('a name that does not resolve is unreachable', async () => {
    await failsWith(connectSource('ssh://x@host.invalid/', trusting()), 'unreachable');
  });

  test('malformed addresses are refused as bad-request and a password is not repeated', async () => {
    for (const url of [
      '',
      '/srv/store',
      'ftp://host/x',
      'ssh://',
      'ssh:///path',
      'http://',
      'ssh://h/%zz',
      'ssh://h/a%0ab',
    ]) {
      await failsWith(connectSource(url, trusting()), 'bad-request');
    }
    for (const url of ['ssh://me:secret@host/x', 'http://me:secret@host/x']) {
      const error = await failsWith(connectSource(url, trusting()), 'bad-request');
      assert.doesNotMatch(error.message, /secret/);
    }
    await failsWith(connectSource(serving.url, { ...trusting(), channels: 0 }), 'bad-request');
  });

  test('a path that the endpoint does not serve is refused with its words', async () => {
    const url = `ssh://x@127.0.0.1:${port}/etc`;
    await failsWith(connectSource(url, trusting()), 'origin-failed', /the path "\/etc" is not offered here/);
  });

  test('a stock sshd without gridvfs says that the command was not found', async () => {
    const url = `ssh://root@127.0.0.1:${sshd.port}/srv/store`;
    const options = {
      ...clientOptions(ground, sshdFingerprint()),
      remoteCommand: 'no-such-gridvfs server --stdio',
    };
    await failsWith(
      connectSource(url, options),
      'origin-failed',
      /status 127: .*not found.*is gridvfs installed there/,
    );
    const chatty = { ...options, remoteCommand: 'echo welcome;' };
    await failsWith(connectSource(url, chatty), 'origin-failed', /not HTTP/);
  });

  test('a remote command that fails over its path says why', async () => {
    const url = `ssh://root@127.0.0.1:${sshd.port}/no/such/store`;
    const options = { ...clientOptions(ground, sshdFingerprint()), remoteCommand: sshd.remoteCommand };
    await failsWith(connectSource(url, options), 'origin-failed', /\/no\/such\/store/);
  });
});

test('refused and failed connections leave no descriptor open', async () => {
  const start = openDescriptors();
  const options = trusting();
  await failsWith(connectSource(serving.url, { ...options, identityPaths: [ground.otherKey] }), 'denied');
  await failsWith(connectSource(serving.url, clientOptions(ground, `SHA256:${'A'.repeat(43)}`)), 'host-key');
  await failsWith(connectSource(`ssh://x@127.0.0.1:${port}/etc`, options), 'origin-failed');
  await visit(serving.url, options);
  await until(() => openDescriptors() <= start, 'as many descriptors as before');
});
