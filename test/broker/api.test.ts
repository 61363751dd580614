/** The API's door: who may do what, what is refused and how, and the document that describes it. */
import assert from 'node:assert/strict';
import { after, before, suite, test } from 'node:test';
import { createApi } from '../../src/broker/server.ts';
import { GIB } from '../../src/core/limits.ts';
import { Databases, startBroker } from './harness.ts';
import type { Running } from './harness.ts';

suite('the API of a broker', () => {
  const databases = new Databases('sqlite');
  let running: Running;
  before(async () => {
    running = await startBroker(await databases.fresh(), databases.folder);
  });
  after(async () => {
    await running.close();
    await databases.stop();
  });
  const tokenOf = async (user: string, role: 'user' | 'operator' | 'agent') =>
    (await running.broker.access.create(user, role)).token;

  /** One VM of ada's that is there, without a host to carry it. */
  async function vmOf(user: string): Promise<string> {
    const { db } = running.broker;
    const id = `g${Buffer.from(user).toString('hex').padEnd(12, '0').slice(0, 12)}`;
    await db.transaction(async (tx) => {
      await tx.run(
        `INSERT INTO jobs (id, owner, kind, body, created_ms) VALUES (?, ?, 'request', '{}', 0)`,
        `job-${user}`,
        user,
      );
      await tx.run(
        `INSERT INTO vms (id, owner, job, name, generation, state, memory_bytes, vcpus, restart, wanted, created_ms)
         VALUES (?, ?, ?, 'mine', 1, 'running', ?, 1, 0, 'running', 0)`,
        ...[id, user, `job-${user}`, GIB],
      );
    });
    return id;
  }

  test('the document names the routes there are, each with its answers, and is served to everybody', async () => {
    const app = await createApi(running.broker);
    try {
      const answer = await app.inject('/v1/openapi.json');
      assert.equal(answer.statusCode, 200);
      const { paths } = answer.json<{ paths: Record<string, Record<string, { responses: object }>> }>();
      for (const [path, methods] of Object.entries(paths)) {
        for (const [method, { responses }] of Object.entries(methods)) {
          const url = path.replaceAll(/\{(\w+)\}/g, ':$1');
          assert.ok(app.hasRoute({ method: method.toUpperCase(), url }), `${method} ${url}`);
          assert.ok(Object.keys(responses).length > 0);
        }
      }
      const expected = [
        ...[
          '/v1/agent/orders',
          '/v1/agent/register',
          '/v1/agent/report',
          '/v1/events',
          '/v1/hosts',
          '/v1/images',
          '/v1/images/{id}',
        ],
        ...[
          '/v1/jobs/{id}',
          '/v1/jobs/{id}/events',
          '/v1/query',
          '/v1/tokens',
          '/v1/tokens/{id}',
          '/v1/usage',
        ],
        ...['/v1/quota', '/v1/quotas/{id}', '/v1/usage.csv', '/v1/workspaces', '/v1/workspaces/{id}'],
        ...['end', 'extend', 'move', 'resume', 'suspend'].map((verb) => `/v1/workspaces/{id}/${verb}`),
        ...['/v1/volumes', '/v1/volumes/{id}'],
        ...['attach', 'detach', 'grow', 'revert', 'share', 'snapshot', 'unshare'].map(
          (verb) => `/v1/volumes/{id}/${verb}`,
        ),
        ...['/v1/images/{id}/warm', '/v1/schedules', '/v1/schedules/{id}'],
        ...['/v1/networks', '/v1/links', '/v1/links/{a}/{b}'],
        ...['/v1/vms', '/v1/vms/explain', '/v1/vms/{id}'],
        ...['checkpoint', 'commit', 'console', 'move', 'resume', 'stop', 'suspend'].map(
          (verb) => `/v1/vms/{id}/${verb}`,
        ),
      ];
      assert.deepEqual(Object.keys(paths).toSorted(), expected.toSorted());
    } finally {
      await app.close();
    }
  });

  test("a user's token sees and stops nothing of another's; an agent's and none at all do nothing of users", async () => {
    const app = await createApi(running.broker);
    try {
      const vm = await vmOf('ada');
      const call = async (
        method: 'GET' | 'POST' | 'DELETE',
        url: string,
        token?: string,
        payload?: object,
      ) => {
        const headers = token === undefined ? {} : { authorization: `Bearer ${token}` };
        const answer = await app.inject({ method, url, headers, ...(payload ? { payload } : {}) });
        if (answer.statusCode >= 400) {
          assert.match(String(answer.headers['content-type']), /^application\/problem\+json/);
          assert.equal(answer.json<{ status: number }>().status, answer.statusCode);
        }
        return answer;
      };
      const [ada, bob, agent, operator] = await Promise.all([
        ...[
          tokenOf('ada', 'user'),
          tokenOf('bob', 'user'),
          tokenOf('hosts', 'agent'),
          tokenOf('root', 'operator'),
        ],
      ]);
      for (const which of [vm, 'mine']) {
        assert.equal((await call('GET', `/v1/vms/${which}`, ada)).statusCode, 200);
        assert.equal((await call('GET', `/v1/vms/${which}`, bob)).statusCode, 404);
        for (const verb of ['stop', 'suspend', 'resume', 'move', 'checkpoint']) {
          assert.equal((await call('POST', `/v1/vms/${which}/${verb}`, bob, {})).statusCode, 404, verb);
        }
        const commit = { reference: 'stolen:1' };
        assert.equal((await call('POST', `/v1/vms/${which}/commit`, bob, commit)).statusCode, 404);
      }
      assert.equal((await call('GET', '/v1/jobs/job-ada', bob)).statusCode, 404);
      assert.equal((await call('GET', '/v1/jobs/job-ada/events', bob)).statusCode, 404);
      assert.deepEqual((await call('GET', '/v1/vms', bob)).json(), []);
      assert.equal((await call('GET', '/v1/vms', operator)).json<unknown[]>().length, 1);
      assert.equal((await call('GET', `/v1/vms/${vm}`, ada)).json<{ state: string }>().state, 'running');
      for (const url of ['/v1/vms', '/v1/hosts', '/v1/images', '/v1/usage', '/v1/tokens']) {
        assert.equal((await call('GET', url, agent)).statusCode, 403, url);
        assert.equal((await call('GET', url)).statusCode, 401, url);
      }
      for (const url of ['/v1/tokens', '/v1/schedules']) {
        assert.equal((await call('GET', url, ada)).statusCode, 403, url);
      }
      const stop = await call('POST', `/v1/vms/${vm}/stop`, agent, {});
      assert.equal(stop.statusCode, 403);
      assert.equal((await call('GET', '/v1/agent/orders?host=a&incarnation=b', ada)).statusCode, 403);
      const { id } = (await running.broker.access.list()).find(({ user }) => user === 'bob')!;
      assert.equal((await call('DELETE', `/v1/tokens/${id}`, operator)).statusCode, 200);
      assert.equal((await call('GET', '/v1/vms', bob)).statusCode, 401);
      const rows = JSON.stringify(await running.broker.db.all('SELECT * FROM tokens'));
      for (const token of [ada, bob, agent]) assert.ok(!rows.includes(token!.slice(-43))); // a secret may hold '_'
    } finally {
      await app.close();
    }
  });

  test('1,000 hostile requests are refused with a reason, and leave nothing', async () => {
    const app = await createApi(running.broker);
    try {
      const authorization = `Bearer ${await tokenOf('eve', 'user')}`;
      const words = [
        "'; DROP TABLE vms; --",
        '../../etc/passwd',
        '..%2f..%2f',
        '\u0000',
        'x'.repeat(5000),
        '<script>',
        '{{7*7}}',
      ];
      const wrong = [null, [], {}, -1, 1e308, true, '', ...words];
      const fields = [
        'image',
        'name',
        'labels',
        'os',
        'kernel',
        'libraries',
        'memoryBytes',
        'vcpus',
        'network',
        'policy',
        'count',
        'restart',
      ];
      const before = JSON.stringify(await running.broker.db.all('SELECT * FROM vms'));
      for (let round = 0; round < 1000; round++) {
        const word = words[round % words.length]!;
        const value = wrong[round % wrong.length]!;
        const field = fields[round % fields.length]!;
        const request = [
          {
            method: 'POST',
            url: '/v1/vms',
            payload: { [field]: typeof value === 'object' ? [value] : value, count: 'many' },
          },
          { method: 'POST', url: '/v1/vms', payload: { image: 'none', [word]: value } },
          { method: 'POST', url: '/v1/vms', payload: { libraries: { [word]: word } } },
          { method: 'POST', url: '/v1/vms', payload: { os: word } },
          { method: 'GET', url: `/v1/vms/${encodeURIComponent(word.slice(0, 300))}` },
          {
            method: 'POST',
            url: '/v1/query',
            payload: { find: 'vms', where: [{ field: word, operator: '=', value: word }] },
          },
          {
            method: 'PATCH',
            url: `/v1/images/${encodeURIComponent(word.slice(0, 300))}`,
            payload: { owner: word },
          },
          {
            method: 'POST',
            url: '/v1/vms',
            payload: '{"count":',
            headers: { 'content-type': 'application/json' },
          },
          { method: 'POST', url: '/v1/vms', payload: { name: 'y'.repeat(2 ** 20) } },
          { method: 'POST', url: '/v1/vms/mine/commit', payload: { reference: word } },
          { method: 'POST', url: '/v1/vms/mine/move', payload: { host: word } },
          { method: 'POST', url: `/v1/vms/${encodeURIComponent(word.slice(0, 300))}/suspend`, payload: {} },
          { method: 'POST', url: '/v1/vms/mine/stop', payload: { graceMs: value, [word]: 1 } },
          { method: 'POST', url: '/v1/schedules', payload: { image: word, everyMs: value } },
        ][round % 14] as { method: 'GET'; url: string; payload?: object; headers?: Record<string, string> };
        const answer = await app.inject({ ...request, headers: { ...request.headers, authorization } });
        assert.ok(
          answer.statusCode >= 400 && answer.statusCode < 500,
          `${answer.statusCode} to ${JSON.stringify(request).slice(0, 300)}`,
        );
        assert.match(answer.json<{ detail?: string }>().detail ?? '', /./, answer.body);
      }
      assert.equal(JSON.stringify(await running.broker.db.all('SELECT * FROM vms')), before);
    } finally {
      await app.close();
    }
  });

  test('whoever calls too often is told so', async () => {
    const app = await createApi(running.broker, { callsPerMinute: 3 });
    try {
      const authorization = `Bearer ${await tokenOf('hasty', 'user')}`;
      const codes: number[] = [];
      for (let call = 0; call < 5; call++) {
        codes.push((await app.inject({ url: '/v1/vms', headers: { authorization } })).statusCode);
      }
      assert.deepEqual(codes, [200, 200, 200, 429, 429]);
    } finally {
      await app.close();
    }
  });
});
