/** known_hosts, authorized_keys and the remote command as text, held against OpenSSH's own tools and shell. */
import assert from 'node:assert/strict';
import { execFileSync } from 'node:child_process';
import { chmodSync, mkdtempSync, readFileSync, rmSync, writeFileSync } from 'node:fs';
import os from 'node:os';
import path from 'node:path';
import { after, before, describe, test } from 'node:test';
import fc from 'fast-check';
import ssh2 from 'ssh2';
import { mayUse, parseAuthorizedKeys, readAuthorizedKeys } from '../../proxy/authorized-keys.ts';
import { HostKeyPolicy, fingerprintOf, parseKnownHosts } from '../../proxy/known-hosts.ts';
import { makeSshKey } from '../../proxy/ssh-key.ts';
import { parseTunnelCommand, shellQuote, shellWords, tunnelCommand } from '../../proxy/tunnel-command.ts';
import { GridError } from '../../src/core/errors.ts';
import { keygen } from './kit.ts';

let folder: string;
/** `type base64` */
let ed: string;
let ecdsa: string;
let rsa: string;
const blobOf = (key: string) => Buffer.from(key.split(' ')[1]!, 'base64');

before(() => {
  folder = mkdtempSync(path.join(os.tmpdir(), 'gridvfs-keys-'));
  const make = (name: string, ...args: string[]) => {
    keygen(path.join(folder, name), ...args);
    return readFileSync(path.join(folder, `${name}.pub`), 'utf8')
      .split(' ')
      .slice(0, 2)
      .join(' ');
  };
  ed = make('ed', '-t', 'ed25519');
  ecdsa = make('ecdsa', '-t', 'ecdsa');
  rsa = make('rsa', '-t', 'rsa', '-b', '2048');
});

after(() => rmSync(folder, { recursive: true, force: true }));

// Guards the second look in makeSshKey: ssh2 alone spoils one key in 200, so 1,500 of them never all parse.
test('every key that is made can be read again', () => {
  for (let made = 0; made < 1_500; made++) {
    const keys = makeSshKey('a comment');
    for (const text of [keys.private, keys.public]) {
      const parsed = ssh2.utils.parseKey(text);
      assert.ok(!(parsed instanceof Error), text);
    }
  }
});

describe('known_hosts', () => {
  const finds = (lines: string, host: string, port = 22) => parseKnownHosts(lines, host, port).length > 0;

  test('fingerprints are those that ssh-keygen prints', () => {
    for (const name of ['ed', 'ecdsa', 'rsa']) {
      const printed = execFileSync('ssh-keygen', ['-l', '-f', path.join(folder, `${name}.pub`)], {
        encoding: 'utf8',
      });
      const key = readFileSync(path.join(folder, `${name}.pub`), 'utf8');
      assert.equal(printed.split(' ')[1], fingerprintOf(blobOf(key)));
    }
  });

  test('plain names, ports, wildcards and negation match as in ssh', () => {
    const cases: [line: string, host: string, port: number, found: boolean][] = [
      ['host.example', 'host.example', 22, true],
      ['host.example', 'HOST.example', 22, true],
      ['host.example', 'host.example', 2222, false],
      ['[host.example]:2222', 'host.example', 2222, true],
      ['[host.example]:2222', 'host.example', 22, false],
      ['a,b,host.example', 'host.example', 22, true],
      ['*.example', 'host.example', 22, true],
      ['*.example', 'example', 22, false],
      ['h?st.example', 'host.example', 22, true],
      ['*.example,!host.example', 'host.example', 22, false],
      ['!host.example,*.example', 'host.example', 22, false],
      ['[*.example]:22*', 'host.example', 2222, true],
      ['2001:db8::1', '2001:db8::1', 22, true],
    ];
    for (const [names, host, port, found] of cases) {
      assert.equal(finds(`${names} ${ed}\n`, host, port), found, `${names} for ${host}:${port}`);
    }
  });

  test('hashed names as ssh-keygen -H writes them are found, others are not', () => {
    const file = path.join(folder, 'hashed');
    writeFileSync(file, `host.example ${ed}\n[host.example]:2222 ${ecdsa}\n`);
    execFileSync('ssh-keygen', ['-q', '-H', '-f', file], { stdio: 'ignore' });
    const text = readFileSync(file, 'utf8');
    assert.match(text, /^\|1\|/);
    assert.deepEqual(
      parseKnownHosts(text, 'host.example', 22).map(({ type }) => type),
      ['ssh-ed25519'],
    );
    assert.deepEqual(
      parseKnownHosts(text, 'host.example', 2222).map(({ type }) => type),
      ['ecdsa-sha2-nistp256'],
    );
    assert.ok(!finds(text, 'other.example'));
  });

  test('comments, broken lines and certificate authorities make no key known', () => {
    const lines = [
      '# host ' + ed,
      'host',
      'host ssh-ed25519',
      'host ssh-ed25519 !!!!',
      `host ssh-rsa ${ed.split(' ')[1]}`,
      `@cert-authority host ${ed}`,
      `@other host ${ed}`,
      '|1|x|y ' + ed,
      '|2|| ' + ed,
    ];
    assert.deepEqual(parseKnownHosts(lines.join('\n'), 'host', 22), []);
  });

  test('any text is read without an error or a hang', () => {
    fc.assert(
      fc.property(fc.string({ maxLength: 400 }), (text) => {
        parseKnownHosts(text, 'host', 22);
        parseAuthorizedKeys(text);
      }),
      { numRuns: 500 },
    );
    parseKnownHosts(`${'*a'.repeat(2000)} ${ed}`, 'a'.repeat(200), 22);
  });

  const policy = (lines: string, fingerprint?: string) => {
    const file = path.join(folder, 'known_hosts');
    writeFileSync(file, lines);
    return new HostKeyPolicy('host', 22, {
      files: [path.join(folder, 'missing'), file],
      ...(fingerprint ? { fingerprint } : {}),
    });
  };

  test('a known key is accepted, an unknown or changed one refused with its fingerprint and the way on', () => {
    assert.equal(policy(`host ${ed}`).judge(blobOf(ed)), undefined);
    const unknown = policy('').judge(blobOf(ed))!;
    assert.equal(unknown.code, 'host-key');
    assert.ok(unknown.message.includes(fingerprintOf(blobOf(ed))));
    assert.match(unknown.message, /ssh-keyscan host/);
    const changed = policy(`host ${ecdsa}`).judge(blobOf(ed))!;
    assert.equal(changed.code, 'host-key');
    assert.match(changed.message, /changed/);
    assert.ok(changed.message.includes(fingerprintOf(blobOf(ecdsa))));
    assert.match(changed.message, /ssh-keygen -R/);
  });

  test('a revoked key is refused even where it is also listed or pinned', () => {
    const lines = `host ${ed}\n@revoked * ${ed}\n`;
    assert.match(policy(lines).judge(blobOf(ed))!.message, /revoked/);
    assert.match(policy(lines, fingerprintOf(blobOf(ed))).judge(blobOf(ed))!.message, /revoked/);
  });

  test('a pinned fingerprint decides alone', () => {
    assert.equal(policy('', fingerprintOf(blobOf(ed))).judge(blobOf(ed)), undefined);
    assert.equal(policy(`host ${ed}`, fingerprintOf(blobOf(ecdsa))).judge(blobOf(ed))!.code, 'host-key');
    assert.throws(() => policy('', 'MD5:00'), { code: 'bad-request' });
  });

  test('algorithms whose keys are known are offered first', () => {
    assert.equal(policy(`host ${ed}`).algorithms()[0], 'ssh-ed25519');
    assert.deepEqual(policy(`host ${rsa}`).algorithms().slice(0, 2), ['rsa-sha2-512', 'rsa-sha2-256']);
    assert.equal(policy(`host ${ecdsa}`).algorithms()[0], 'ecdsa-sha2-nistp256');
    assert.equal(policy('').algorithms().length, 6);
  });
});

describe('authorized_keys', () => {
  const one = (line: string) => parseAuthorizedKeys(line)[0];

  test('keys are read with and without options and comments', () => {
    assert.equal(one(`${ed} me@home`)?.comment, 'me@home');
    assert.equal(one(`restrict,pty ${ed}`)?.type, 'ssh-ed25519');
    const key = one(
      `from="10.0.0.0/8,!10.1.*",no-pty,command="gridvfs server --stdio \\"/srv/a b\\"" ${rsa} c d`,
    )!;
    assert.equal(key.command, 'gridvfs server --stdio "/srv/a b"');
    assert.equal(key.from, '10.0.0.0/8,!10.1.*');
    assert.equal(key.comment, 'c d');
  });

  test('lines that are not understood let nobody in', () => {
    for (const line of [
      `new-option ${ed}`,
      `cert-authority ${ed}`,
      `command=unquoted ${ed}`,
      `command ${ed}`,
      `command="a",command="b" ${ed}`,
      `from="a" from="b" ${ed}`,
      `expiry-time="soon" ${ed}`,
      `ssh-ed25519 ${rsa.split(' ')[1]}`,
      'ssh-ed25519',
      `# ${ed}`,
    ]) {
      assert.deepEqual(parseAuthorizedKeys(line), [], line);
    }
  });

  test('from= and expiry-time= narrow who may come', () => {
    const from = one(`from="10.0.0.0/8,!10.1.*,2001:db8::/32,192.168.1.?" ${ed}`)!;
    for (const [address, allowed] of [
      ['10.2.3.4', true],
      ['::ffff:10.2.3.4', true],
      ['10.1.3.4', false],
      ['11.0.0.1', false],
      ['2001:db8::5', true],
      ['192.168.1.7', true],
      ['192.168.1.77', false],
    ] as const) {
      assert.equal(mayUse(from, address, 0), allowed, address);
    }
    const until = one(`expiry-time="20300101Z" ${ed}`)!;
    assert.equal(mayUse(until, 'any', Date.UTC(2029, 11, 31)), true);
    assert.equal(mayUse(until, 'any', Date.UTC(2030, 0, 1)), false);
  });

  test('a file that others can write, or that is missing, lets nobody in', () => {
    const file = path.join(folder, 'authorized');
    writeFileSync(file, ed, { mode: 0o600 });
    assert.equal(readAuthorizedKeys(file).length, 1);
    chmodSync(file, 0o666);
    assert.throws(() => readAuthorizedKeys(file), { code: 'denied' });
    assert.throws(() => readAuthorizedKeys(path.join(folder, 'none')), GridError);
  });
});

describe('the remote command', () => {
  test('a path survives any shell and our own reading, whatever is in it', () => {
    // One run of /bin/sh for many words.
    const words = fc.sample(
      fc
        .string({ unit: 'binary', minLength: 1, maxLength: 30 })
        .filter((text) => !/[\0\ud800-\udfff]/.test(text)),
      200,
    );
    words.push("it's", 'a b', '$(reboot)', '`id`', '-n', '~', '*', '\\', "'", '"', 'ü/ß', 'a\nb');
    const script = words.map((word) => `printf '%s\\0' ${shellQuote(word)}`).join('\n');
    const printed = execFileSync('/bin/sh', [], { input: script, encoding: 'utf8' });
    assert.deepEqual(printed.split('\0').slice(0, -1), words);
    for (const word of words) assert.deepEqual(shellWords(shellQuote(word)), [word]);
  });

  test('is understood in both orders, and nothing else is', () => {
    for (const line of [
      'gridvfs server --stdio /srv/store',
      'gridvfs server /srv/store --stdio',
      `gridvfs  server --stdio '/srv/store'`,
      'gridvfs server --stdio "/srv/store"',
      tunnelCommand('gridvfs server --stdio', '/srv/store'),
    ]) {
      assert.deepEqual(parseTunnelCommand(line), { path: '/srv/store', acceptUploads: false }, line);
    }
    assert.equal(parseTunnelCommand(tunnelCommand('gridvfs server --stdio', "/a b/it's"))?.path, "/a b/it's");
    for (const line of [
      'gridvfs server --stdio --accept-uploads /srv/store',
      'gridvfs server /srv/store --accept-uploads --stdio',
    ]) {
      assert.deepEqual(parseTunnelCommand(line), { path: '/srv/store', acceptUploads: true }, line);
    }
    assert.equal(parseTunnelCommand('gridvfs server --accept-uploads /srv/store'), undefined);
    for (const line of [
      '',
      'sh',
      'gridvfs',
      'gridvfs server --stdio',
      'gridvfs server --stdio /a /b',
      'gridvfs server --stdio --listen',
      'gridvfs server --stdio /a; reboot',
      'gridvfs server --stdio $(reboot)',
      'gridvfs server --stdio /a | sh',
      "gridvfs server --stdio '/a",
      'gridvfs store --stdio /a',
      '/tmp/gridvfs server --stdio /a',
      'scp -t /srv/store',
    ]) {
      assert.equal(parseTunnelCommand(line), undefined, line);
    }
  });
});
