/** The QMP client against a real QEMU without a machine (-M none), and against servers that are none. */
import assert from 'node:assert/strict';
import { spawn, type ChildProcess } from 'node:child_process';
import { mkdirSync, mkdtempSync, rmSync } from 'node:fs';
import net from 'node:net';
import os from 'node:os';
import path from 'node:path';
import { after, before, describe, test } from 'node:test';
import fc from 'fast-check';
import { errnoOf } from '../../src/core/errors.ts';
import { QmpClient, type QmpEvent } from '../../src/vmm/qemu/qmp.ts';
import { failsWith } from '../suites/vmm.ts';

const temporary = mkdtempSync(path.join(os.tmpdir(), 'gridvfs-qmp-'));
after(() => rmSync(temporary, { recursive: true, force: true }));

/** Connects as soon as QEMU listens. */
async function connect(
  socket: string,
  options: Partial<Parameters<typeof QmpClient.connect>[1]> = {},
): Promise<QmpClient> {
  for (let attempt = 0; ; attempt++) {
    try {
      return await QmpClient.connect(socket, { name: 'test', timeoutMs: 10_000, ...options });
    } catch (error) {
      if (!['ENOENT', 'ECONNREFUSED'].includes(errnoOf(error) ?? '') || attempt > 1000) throw error;
      await new Promise((resolve) => setTimeout(resolve, 10));
    }
  }
}

describe('a QMP client of a real QEMU', () => {
  // Too long for a socket's address.
  const folder = path.join(temporary, 'folder-'.repeat(20));
  const socket = path.join(folder, 'qmp.sock');
  let qemu: ChildProcess;
  let client: QmpClient;
  const events: QmpEvent[] = [];

  before(async () => {
    mkdirSync(folder);
    const args = [
      '-M',
      'none',
      '-display',
      'none',
      '-nodefaults',
      '-qmp',
      'unix:qmp.sock,server=on,wait=off',
    ];
    qemu = spawn('qemu-system-x86_64', args, { cwd: folder, stdio: 'ignore' });
    client = await connect(socket, {
      onEvent: (event) => events.push(event),
      describeLoss: () => Promise.resolve('these were its last words'),
    });
  });
  after(() => void qemu.kill('SIGKILL'));

  test('a command is answered, also over a path that is longer than a socket address', async () => {
    const version = (await client.execute('query-version')) as { qemu: { major: number } };
    assert.ok(version.qemu.major >= 5);
  });

  test('each of many commands at once gets its own answer', async () => {
    const answers = await Promise.all(
      Array.from({ length: 50 }, (_, index) =>
        index % 2 === 0 ? client.execute('query-status') : client.execute('query-name'),
      ),
    );
    answers.forEach((answer, index) => {
      assert.equal('running' in (answer as object), index % 2 === 0, JSON.stringify(answer));
    });
  });

  test('an answer of hundreds of KB arrives whole', async () => {
    const schema = (await client.execute('query-qmp-schema')) as unknown[];
    assert.ok(schema.length > 500);
  });

  test('a command that QEMU refuses rejects with its words, and the next one works', async () => {
    await assert.rejects(
      client.execute('no-such-command'),
      failsWith('vm-failed', /QEMU of test refused no-such-command: .*has not been found/),
    );
    await assert.rejects(
      client.execute('human-monitor-command', { wrong: 1 }),
      failsWith('vm-failed', /command-line/),
    );
    await client.execute('query-status');
  });

  test('events are told in order', async () => {
    await client.execute('cont').catch(() => undefined);
    events.length = 0;
    await client.execute('stop');
    await client.execute('cont');
    assert.deepEqual(
      events.map((event) => event.event),
      ['STOP', 'RESUME'],
    );
  });

  test('a command without an answer in time is a timeout, and its late answer disturbs nobody', async () => {
    qemu.kill('SIGSTOP');
    await assert.rejects(
      client.execute('query-status', undefined, 100),
      failsWith('timeout', /query-status within 100 ms/),
    );
    qemu.kill('SIGCONT');
    assert.ok('qemu' in ((await client.execute('query-version')) as object));
  });

  test('when QEMU dies, open and later commands reject at once with its last words', async () => {
    qemu.kill('SIGSTOP');
    const open = [client.execute('query-status'), client.execute('query-version')];
    const told = Promise.all(
      open.map((each) => assert.rejects(each, failsWith('vm-failed', /these were its last words/))),
    );
    qemu.kill('SIGKILL');
    await told;
    assert.match((await client.closed).message, /last words/);
    await assert.rejects(client.execute('query-status'), failsWith('vm-failed', /last words/));
  });
});

describe('a QMP client of something else', () => {
  const servers: net.Server[] = [];
  after(() => servers.forEach((server) => server.close()));

  async function serve(onConnection: (socket: net.Socket) => void): Promise<string> {
    const socket = path.join(temporary, `server-${servers.length}.sock`);
    const server = net.createServer((connection) => {
      connection.on('error', () => undefined);
      onConnection(connection);
    });
    servers.push(server);
    await new Promise<void>((resolve) => server.listen(socket, resolve));
    return socket;
  }

  test('a server that says nothing is a timeout', async () => {
    const socket = await serve(() => undefined);
    await assert.rejects(
      connect(socket, { timeoutMs: 100 }),
      failsWith('timeout', /a greeting within 100 ms/),
    );
  });

  test('a server that speaks something else, or without end, is refused', async () => {
    const ssh = await serve((connection) => connection.write('SSH-2.0-OpenSSH_9.2\r\n'));
    await assert.rejects(connect(ssh), failsWith('vm-failed', /does not speak QMP/));
    const list = await serve((connection) => connection.write('[1]\n'));
    await assert.rejects(connect(list), failsWith('vm-failed', /does not speak QMP/));
    const endless = await serve((connection) => connection.write(Buffer.alloc(9 * 1024 * 1024, 'x')));
    await assert.rejects(connect(endless), failsWith('vm-failed', /a line without end/));
  });

  test('after close, open commands reject with closed', async () => {
    const socket = await serve((connection) => {
      connection.write('{"QMP": {}}\r\n');
      connection.once('data', () => connection.write('{"return": {}, "id": 1}\r\n'));
    });
    const client = await connect(socket);
    const open = assert.rejects(client.execute('stop'), failsWith('closed', /was closed/));
    client.close();
    await open;
    await assert.rejects(client.execute('cont'), failsWith('closed', /was closed/));
    assert.equal((await client.closed).code, 'closed');
  });

  test('however the stream is cut into pieces, answers and events are the same', async () => {
    const answers = [
      '{"event": "STOP", "data": {}}',
      '{"return": "zwölf 🐘", "id": 2}',
      '',
      '{"event": "RESUME"}',
    ];
    const bytes = Buffer.from('{"QMP": {}}\r\n{"return": {}, "id": 1}\r\n' + answers.join('\r\n') + '\r\n');
    const cuts = fc.uniqueArray(fc.integer({ min: 1, max: bytes.length - 1 }), { maxLength: 12 });
    await fc.assert(
      fc.asyncProperty(cuts, async (at) => {
        const edges = [0, ...at.toSorted((a, b) => a - b), bytes.length];
        const socket = await serve((connection) => {
          // The first command (qmp_capabilities, id 1) and the second are on their way: all answers at once.
          const write = async () => {
            for (let index = 1; index < edges.length; index++) {
              connection.write(bytes.subarray(edges[index - 1], edges[index]));
              await new Promise((resolve) => setImmediate(resolve));
            }
          };
          const greeting = bytes.indexOf(0x0a) + 1;
          const rest = edges.filter((edge) => edge > greeting);
          connection.write(bytes.subarray(0, greeting));
          connection.once('data', () => {
            const first = bytes.indexOf(0x0a, greeting) + 1;
            connection.write(bytes.subarray(greeting, first));
            connection.once('data', () => {
              edges.splice(0, edges.length, first, ...rest.filter((edge) => edge > first));
              void write();
            });
          });
        });
        const events: string[] = [];
        const { promise: resumed, resolve } = Promise.withResolvers<void>();
        const client = await connect(socket, {
          onEvent: ({ event }) => {
            events.push(event);
            if (event === 'RESUME') resolve();
          },
        });
        assert.equal(await client.execute('query'), 'zwölf 🐘');
        await resumed;
        assert.deepEqual(events, ['STOP', 'RESUME']);
        client.close();
      }),
      { numRuns: 50 },
    );
  });
});
