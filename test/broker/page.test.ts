/**
 * The broker's page in a real browser: what a user does there, from the log in to the end of the machines. Screenshots
 * go to the folder in GRIDVFS_SCREENSHOTS where that is set.
 */
import assert from 'node:assert/strict';
import { after, before, suite, test } from 'node:test';
import path from 'node:path';
import { createApi } from '../../src/broker/server.ts';
import { serveBroker } from '../../src/broker/index.ts';
import type { BrokerServer } from '../../src/broker/index.ts';
import { GIB, MIB } from '../../src/core/limits.ts';
import { Browser } from './browser.ts';
import { Databases, eventually, startBroker, TestHost, version } from './harness.ts';
import type { Running } from './harness.ts';

const HOSTILE = `<img src="x" onerror="window.hurt=1"><script>window.hurt=1</script>`;

suite('the page of a broker', () => {
  const databases = new Databases('sqlite');
  const hosts: TestHost[] = [];
  let running: Running;
  let server: BrokerServer;
  let browser: Browser;
  let url = '';
  let token = '';
  /** Starts wait for it. */
  const gate = Promise.withResolvers<void>();

  before(async () => {
    running = await startBroker(await databases.fresh(), databases.folder);
    server = await serveBroker(running.broker, { listen: { host: '127.0.0.1', port: 0 } });
    url = `http://127.0.0.1:${server.port}`;
    token = (await running.broker.access.create('ada', 'user')).token;
    const small = version('small', '1', { os: 'small', kernel: '6.1.0' });
    const offered = [
      small,
      { ...version('small', '2', { os: 'small', note: HOSTILE }), parent: small.manifest },
      version('debian', '12', { os: 'debian', kernel: '6.1.0', 'library.libc': '2.36' }),
    ];
    for (const [at, name] of ['north', 'south', 'west'].entries()) {
      const host = new TestHost(name, databases.folder, offered, { guestMemoryBytes: 4 * GIB });
      host.warmBytes[small.manifest] = (at + 1) * 150 * MIB;
      const run = host.machines.run.bind(host.machines);
      host.machines.run = async (request) => {
        await gate.promise;
        return run(request);
      };
      hosts.push(host.connect(await running.as(`agent-${name}`, 'agent')));
    }
    // A name that no store could have, as if a host of an attacker had offered it.
    await running.broker.db.run('INSERT INTO images (name, created_ms) VALUES (?, 0)', HOSTILE);
    await running.broker.db.run(
      `INSERT INTO versions (image, version, manifest, kind, size_bytes, created) VALUES (?, '1', 'x', 'data', 1, 'now')`,
      HOSTILE,
    );
    const user = await running.as('looker');
    await eventually(async () => (await user.call<unknown[]>('GET', '/v1/hosts')).length === 3);
    await eventually(async () => (await user.call<unknown[]>('GET', '/v1/images')).length === 4);
    browser = await Browser.start();
  });
  after(async () => {
    gate.resolve();
    await browser?.close();
    for (const host of hosts) await host.close();
    await server?.close();
    await running?.close();
    await databases.stop();
  });

  const shot = async (name: string) => {
    const folder = process.env['GRIDVFS_SCREENSHOTS'];
    if (folder !== undefined) await browser.screenshot(path.join(folder, `${name}.png`));
  };
  const states = () =>
    browser.evaluate<string[]>(
      `[...document.querySelectorAll('tbody .state')].map((one) => one.textContent)`,
    );

  /** What reaches beyond the window, where that can be scrolled. */
  const tooWide = () =>
    browser.evaluate<string[]>(`(() => {
      const width = document.documentElement.clientWidth;
      if (document.documentElement.scrollWidth <= width) return [];
      return [...document.querySelectorAll('body *')]
        .filter((one) => one.getBoundingClientRect().right > width + 1)
        .map((one) => one.outerHTML.slice(0, 120));
    })()`);

  test('it runs its own files only, and nobody frames it', async () => {
    const app = await createApi(running.broker);
    try {
      for (const file of ['/', '/page/main.mjs', '/page/page.css']) {
        const answer = await app.inject(file);
        assert.equal(answer.statusCode, 200);
        const policy = String(answer.headers['content-security-policy']);
        assert.match(policy, /default-src 'none'.*script-src 'self'.*frame-ancestors 'none'/);
        assert.doesNotMatch(policy, /unsafe/);
        assert.equal(answer.headers['x-content-type-options'], 'nosniff');
      }
      for (const file of ['/page/../server.ts', '/page/%2e%2e/server.ts', '/page/server.ts']) {
        assert.equal((await app.inject(file)).statusCode, 404, file);
      }
      assert.equal((await app.inject('/v1/events')).statusCode, 401);
    } finally {
      await app.close();
    }
  });

  test('a user logs in by keyboard, requests machines, sees them come up live, opens the waterfall and ends them', async () => {
    await browser.size(1280, 860);
    await browser.open(url);
    await browser.until(`document.activeElement.id === 'token'`);
    await browser.type('gvt_000000000000_wrong');
    await browser.press('Enter');
    await browser.until(`document.getElementById('login-error').textContent !== ''`);
    await shot('1-login');
    // The browser itself notes the 401 that this was about.
    assert.deepEqual(
      browser.complaints.splice(0).filter((one) => !one.includes('401')),
      [],
    );
    await browser.type(token);
    await browser.press('Enter');
    await browser.until(`document.getElementById('live').textContent === 'live'`);
    assert.match(await browser.text(), /No machines yet/);
    assert.match(await browser.text(), /ada \(user\)/);

    await browser.click('Request machines');
    await browser.until(
      `document.activeElement.id === 'r-image' && document.activeElement.options.length >= 3`,
    );
    await browser.evaluate(`document.getElementById('r-image').value = 'small:1'`);
    for (const [id, value] of [
      ['r-count', '3'],
      ['r-name', 'web'],
      ['r-memory', '256'],
      ['r-network', 'lab'],
    ]) {
      await browser.evaluate(`document.getElementById('${id}').value = '${value}'`);
    }
    await shot('2-request');
    await browser.click('Request');
    await browser.until(`document.querySelectorAll('tbody tr').length === 3`);
    await browser.until(
      `[...document.querySelectorAll('tbody .state')].every((one) => one.textContent === 'placed')`,
    );
    await browser.until(`document.querySelector('svg.waterfall rect.open')`);
    const width = `Number(document.querySelector('svg.waterfall rect.open').getAttribute('width')) && document.querySelector('svg.waterfall').getAttribute('aria-label')`;
    const early = await browser.evaluate<string>(width);
    await browser.until(`(${width}) !== ${JSON.stringify(early)}`); // it grows
    await shot('3-coming');
    gate.resolve();
    await browser.until(
      `[...document.querySelectorAll('tbody .state')].every((one) => one.textContent === 'running')`,
    );
    await browser.until(
      `document.getElementById('told').textContent.includes('running') || document.getElementById('told').textContent.includes('changed')`,
    );
    await browser.until(`document.querySelectorAll('svg.waterfall rect.p-answered').length >= 3`);
    const label = await browser.evaluate<string>(
      `document.querySelector('svg.waterfall[role=img]').getAttribute('aria-label')`,
    );
    assert.match(label, /web-1: Queued in .*Mounted in .*Started in .*Answered in /);
    await shot('4-waterfall');
    await browser.size(390, 844);
    await shot('5-phone');
    assert.deepEqual(await tooWide(), [], 'nothing is wider than a phone');
    await browser.size(390, 844, { dark: true });
    await shot('6-phone-dark');
    await browser.size(1280, 860);

    const spoken = await browser.accessible();
    const has = (role: string, name: RegExp) =>
      assert.ok(
        spoken.some((one) => role.split('|').includes(one.role) && name.test(one.name)),
        `${role} ${name}`,
      );
    has('navigation', /Sections/);
    has('table', /Machines/);
    has('columnheader', /State/);
    has('button', /^web-1$/);
    has('image|img', /Timeline\. web-1: Queued/);
    for (const { role, name } of spoken) {
      if (['button', 'link', 'textbox', 'combobox', 'img'].includes(role)) assert.notEqual(name, '', role);
    }

    browser.acceptQuestions();
    const ended = (name: string) =>
      browser.until(
        `[...document.querySelectorAll('tbody tr')].some((row) => row.textContent.includes('${name}') && row.textContent.includes('stopped'))`,
      );
    await browser.click('web-2');
    await browser.until(`document.getElementById('detail-title').textContent === 'web-2'`);
    assert.equal(await browser.evaluate('document.activeElement.id'), 'detail-title');
    assert.match(await browser.text(), /10\.64\.0\.3/);
    const says = (text: string) =>
      `document.querySelector('pre.console').textContent.includes(${JSON.stringify(text)})`;
    await browser.click('Console');
    await browser.until(says(' 0\n')); // how a guest of these tests begins
    await browser.type('\u001b[1mecho <b>bold</b>');
    await browser.press('Enter');
    await browser.until(says('echo <b>bold</b>\n'));
    assert.equal(await browser.evaluate(`document.querySelector('pre.console').children.length`), 0);
    await shot('6-console');
    await browser.click('web-3');
    await browser.until(`document.querySelector('.console-form').hidden`);
    await browser.click('web-2');
    await browser.click('End');
    await ended('web-2');
    await browser.click('web-1');
    await browser.click('End all');
    await eventually(async () => (await states()).every((state) => state === 'stopped'));
    assert.ok(hosts.every(({ machines }) => machines.vms.size === 0));
    assert.deepEqual(browser.complaints, []);
  });

  test('hosts show what is warm, images where they come from; names and labels of others are text', async () => {
    await browser.click('Hosts');
    await browser.until(`document.querySelectorAll('.hosts article').length === 3`);
    await browser.until(`document.querySelectorAll('meter').length === 3`);
    assert.match(await browser.text(), /small:1\s+450\.0 MiB/);
    await shot('7-hosts');
    await browser.click('Images');
    await browser.until(`document.querySelectorAll('tbody tr').length === 4`);
    const text = await browser.text();
    assert.ok(text.includes(`${HOSTILE}:1`) && text.includes(`note=${HOSTILE}`));
    assert.match(text, /small:2[\s\S]*small:1/);
    assert.equal(await browser.evaluate('window.hurt === undefined && document.images.length === 0'), true);
    assert.equal(await browser.evaluate(`document.querySelectorAll('#content script').length`), 0);
    await shot('8-images');
    await browser.size(390, 844);
    assert.deepEqual(await tooWide(), []);
    await shot('9-images-phone');
    await browser.size(1280, 860, { dark: true });
    await browser.click('Usage');
    await browser.until(`document.querySelectorAll('tbody tr').length === 3`);
    await shot('10-usage-dark');
    assert.deepEqual(browser.complaints, []);
  });

  test('volumes are made, requested with a machine, shown with who has them, accounted and removed', async () => {
    await browser.size(1280, 860);
    await browser.click('Volumes');
    await browser.until(`document.body.innerText.includes('No data volumes yet')`);
    await browser.evaluate(
      `document.getElementById('v-name').value = 'home'; document.getElementById('v-size').value = '4'`,
    );
    await browser.click('Make volume');
    // Live: fails without 'volumes' in tellChanges.
    const cells = `[...document.querySelectorAll('tbody td')].map((one) => one.textContent)`;
    await browser.until(`${cells}.includes('free') && ${cells}.includes('4.0 MiB')`);
    await browser.click('Make volume');
    await browser.until(`document.querySelector('#content .error').textContent.includes('already')`);
    browser.complaints.splice(0); // the 409 that this was about
    await browser.click('Machines');
    await browser.click('Request machines');
    await browser.until(`document.getElementById('r-image').options.length >= 3`);
    await browser.evaluate(`document.getElementById('r-image').value = 'small:1'`);
    await browser.evaluate(
      `for (const [id, value] of [['r-name', 'desk'], ['r-count', '1'], ['r-network', ''], ['r-volumes', 'home'], ['r-key', 'ssh-ed25519 AAAA ada'], ['r-command', 'echo <i>']]) document.getElementById(id).value = value`,
    );
    await browser.click('Request');
    await eventually(async () => (await states()).includes('running'));
    await browser.until(`document.body.innerText.includes('echo <i>: ended with exit code 0')`);
    const asked = hosts
      .flatMap(({ machines }) => machines.requests)
      .find(({ hostName }) => hostName === 'desk');
    assert.deepEqual(asked?.sshKeys, ['ssh-ed25519 AAAA ada']);
    await browser.click('Volumes');
    await browser.until(`${cells}.includes('attached') && ${cells}.includes('desk')`);
    await shot('11-volumes');
    await browser.size(390, 844);
    assert.deepEqual(await tooWide(), []);
    await shot('12-volumes-phone');
    await browser.size(1280, 860);
    assert.ok(
      (await browser.accessible()).some(({ role, name }) => role === 'table' && name === 'Data volumes'),
    );
    await (await running.as('ada')).call('POST', '/v1/workspaces/desk/end', {});
    await browser.until(`${cells}.includes('free')`);
    await browser.click('Remove');
    await browser.until(`document.body.innerText.includes('No data volumes yet')`);
    await browser.click('Usage');
    await browser.until(`document.body.innerText.includes('removed')`);
    assert.match(await browser.text(), /Now: 0 machines.*0 B data volumes/);
    assert.deepEqual(browser.complaints, []);
  });

  test("another user's page has none of it, and a token that is revoked ends the session", async () => {
    await browser.click('Log out');
    await browser.until(`document.activeElement.id === 'token'`);
    assert.equal(await browser.evaluate('sessionStorage.length'), 0);
    const made = await running.broker.access.create('bob', 'user');
    await browser.type(made.token);
    await browser.press('Enter');
    await browser.until(`document.getElementById('live').textContent === 'live'`);
    await browser.click('Machines');
    await browser.until(`document.body.innerText.includes('No machines yet')`);
    await running.broker.access.revoke(made.info.id);
    await browser.reload();
    await browser.until(`document.getElementById('login-error')?.textContent`);
    browser.complaints.splice(0);
  });
});
