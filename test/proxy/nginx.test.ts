/** A stock nginx over the store's folder as the origin, by http and by https with a certificate of its own. */
import assert from 'node:assert/strict';
import { execFileSync, spawn } from 'node:child_process';
import type { ChildProcess } from 'node:child_process';
import { mkdirSync, writeFileSync } from 'node:fs';
import net from 'node:net';
import path from 'node:path';
import { setTimeout as sleep } from 'node:timers/promises';
import { after, before, test } from 'node:test';
import { connectSource } from '../../proxy/index.ts';
import { openStore } from '../../src/store/index.ts';
import { SUITE_FIXTURE, chunkSourceSuite } from '../suites/chunk-source.ts';
import { freePort } from '../../src/core/ports.ts';
import { failsWith, makeGround } from './kit.ts';
import type { Ground } from './kit.ts';

let ground: Ground;
let nginx: ChildProcess | undefined;
let http: string;
let https: string;
let certificate: string;

before(async () => {
  ground = await makeGround(SUITE_FIXTURE);
  const folder = path.join(ground.folder, 'nginx');
  mkdirSync(folder);
  certificate = path.join(folder, 'certificate.pem');
  execFileSync(
    'openssl',
    [
      ...[
        'req',
        '-x509',
        '-newkey',
        'ec',
        '-pkeyopt',
        'ec_paramgen_curve:prime256v1',
        '-nodes',
        '-days',
        '2',
      ],
      ...['-subj', '/CN=gridvfs test', '-addext', 'subjectAltName=IP:127.0.0.1'],
      ...['-keyout', path.join(folder, 'key.pem'), '-out', certificate],
    ],
    { stdio: 'ignore' },
  );
  const [plain, secure] = [await freePort(), await freePort()];
  http = `http://127.0.0.1:${plain}/images`;
  https = `https://127.0.0.1:${secure}/images`;
  const config = path.join(folder, 'nginx.conf');
  const temporary = ['client_body', 'proxy', 'fastcgi', 'uwsgi', 'scgi'];
  writeFileSync(
    config,
    `daemon off; master_process off; pid ${folder}/pid; error_log ${folder}/error.log;
events { worker_connections 64; }
http {
  access_log off;
  ${temporary.map((name) => `${name}_temp_path ${folder}/${name};`).join(' ')}
  server {
    listen 127.0.0.1:${plain};
    listen 127.0.0.1:${secure} ssl;
    ssl_certificate ${certificate};
    ssl_certificate_key ${folder}/key.pem;
    location /images/ { alias ${ground.fixture.storeFolder}/; }
  }
}
`,
  );
  nginx = spawn('/usr/sbin/nginx', ['-p', folder, '-c', config], { stdio: 'ignore' });
  for (let attempt = 0; !(await answers(plain)); attempt++) {
    assert.ok(attempt < 100 && nginx.exitCode === null, 'nginx did not start');
    await sleep(50);
  }
});

after(async () => {
  if (nginx?.exitCode === null) {
    const gone = new Promise((resolve) => nginx!.once('exit', resolve));
    nginx.kill('SIGTERM');
    await gone;
  }
  ground.remove();
});

function answers(port: number): Promise<boolean> {
  return new Promise((resolve) => {
    const socket = net.connect(port, '127.0.0.1');
    socket.once('connect', () => (socket.destroy(), resolve(true)));
    socket.once('error', () => resolve(false));
  });
}

chunkSourceSuite('the client over nginx', async () => {
  const source = await connectSource(http);
  return { source, fixture: ground.fixture, close: () => source.close() };
});

chunkSourceSuite('the client over nginx with https', async () => {
  const source = await connectSource(https, { caPaths: [certificate] });
  return { source, fixture: ground.fixture, close: () => source.close() };
});

test('a certificate that nobody known has signed is refused, and a file that is no certificate too', async () => {
  const error = await failsWith(connectSource(https), 'host-key', /certificate/);
  assert.match(error.message, /not trusted/);
  await failsWith(connectSource(https, { caPaths: [ground.key] }), 'bad-request', /cannot take certificates/);
});

test('nginx gives profiles that the store has, and takes none', async () => {
  const { digest } = ground.fixture;
  const source = await connectSource(http);
  const store = await openStore(ground.fixture.storeFolder);
  const profile = { schema: 1, manifest: digest, purpose: 'boot', runs: 1, early: [[0, 2]], late: [] };
  const recording = Buffer.from(JSON.stringify(profile));
  try {
    assert.equal(await source.readProfile(digest, 'boot'), undefined);
    await failsWith(source.recordProfile(digest, 'boot', recording), 'denied', /static/);
    await store.recordProfile(digest, 'boot', recording);
    const read = JSON.parse((await source.readProfile(digest, 'boot'))!.toString()) as typeof profile;
    assert.deepEqual(read.early, [[0, 2]]);
  } finally {
    await source.close();
    await store.close();
  }
});
