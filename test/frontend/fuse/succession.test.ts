/**
 * What a successor knows of the kernel's side of a mount, byte by byte and without a kernel: one session writes a
 * ledger, another goes on from it. Each test names the line that it hangs on; it fails without that line.
 */
import assert from 'node:assert/strict';
import { closeSync, ftruncateSync, fstatSync, openSync, readFileSync, writeSync } from 'node:fs';
import path from 'node:path';
import { after, afterEach, before, describe, test } from 'node:test';
import type { GridError } from '../../../src/core/errors.ts';
import type { Image, TreePath } from '../../../src/core/image.ts';
import { Ledger } from '../../../src/frontend/fuse/ledger.ts';
import type { Facts } from '../../../src/frontend/fuse/ledger.ts';
import * as fuse from '../../../src/frontend/fuse/protocol.ts';
import { Session } from '../../../src/frontend/fuse/session.ts';
import { FileTree } from './file-tree.ts';
import { Place } from './harness.ts';
import { ask, body, request } from './requests.ts';

const MOUNT = { mountpoint: '/mnt', mountId: 1, passthrough: true, resend: true };
const openBody = body([4, 0], [4, 0]);
const RESENT = fuse.UNIQUE_RESEND;

describe('a session that goes on where another one died', () => {
  let place: Place;
  let tree: FileTree;
  let file: number;
  const sessions: Session[] = [];
  /** Backing ids in the order of what happened to them. */
  let backings: string[] = [];

  before(() => {
    place = new Place();
    tree = new FileTree(
      [
        { path: 'disk', source: place.source('disk', 100_000), kind: 'image', contentId: '1' },
        { path: 'other', source: place.source('other', 50_000), kind: 'image', contentId: '2' },
      ],
      place.scratch,
    );
  });
  afterEach(async () => {
    for (const session of sessions.splice(0)) await session.close();
    closeSync(file);
    backings = [];
  });
  after(() => place.remove());

  const newLedger = () => (file = openSync(path.join(place.scratch, `ledger${Math.random()}`), 'wx+'));
  /** What a successor would find now. */
  const facts = (): Facts | undefined => new Ledger(file, () => undefined).read();

  /** By content, as the real tree opens it. */
  const openContent = async (contentId: string): Promise<Image> => {
    const spec = tree.specs.find((each) => each.contentId === contentId)!;
    return await tree.open(spec.path.split('/'), { write: false });
  };

  async function start(options: { before?: Facts | undefined; backs?: boolean } = {}): Promise<Session> {
    const session = new Session({
      tree: {
        lookup: (names: TreePath) => tree.lookup(names),
        list: (names: TreePath) => tree.list(names),
        open: (names: TreePath, how: { write: boolean }) => tree.open(names, how),
        openContent,
        space: async () => ({ totalBytes: 0, freeBytes: 0 }),
      },
      root: { name: '', type: 'directory', modifiedMs: 0 },
      owner: { uid: 0, gid: 0 },
      readOnly: false,
      log: () => undefined,
      opened: () => undefined,
      released: () => undefined,
      claim: async () => (options.backs ? backing(7) : undefined),
      ledger: new Ledger(file, () => undefined),
    });
    sessions.push(session);
    await session.begin(MOUNT, options.before, async (_image, id) => backing(id, 'adopted'));
    return session;
  }

  function backing(id: number, how = 'opened') {
    backings.push(`${how} ${id}`);
    const closed = () => {
      const open = facts()!.files.length;
      backings.push(`closed ${id} with ${open} files in the ledger`);
    };
    return { id, close: closed };
  }

  const lookup = async (session: Session, name: string) =>
    (await ask(session, request(fuse.LOOKUP, 1, body(name)))).body.readUInt32LE(0);
  const open = async (session: Session, node: number, unique?: bigint) =>
    (await ask(session, request(fuse.OPEN, node, openBody, unique))).body;

  // session.ts, #record: `this.#ledger?.flush()`.
  test('what a reply tells the kernel is in the ledger when the reply is sent', async () => {
    newLedger();
    const session = await start();
    const seen: Facts[] = [];
    const asked = (bytes: Buffer) =>
      new Promise<Buffer>((resolve) => {
        session.handle(bytes, (reply) => {
          seen.push(facts()!);
          resolve(reply);
        });
      });
    const node = (await asked(request(fuse.LOOKUP, 1, body('disk')))).readUInt32LE(fuse.OUT_HEADER_BYTES);
    const handle = (await asked(request(fuse.OPEN, node, openBody))).readUInt32LE(fuse.OUT_HEADER_BYTES);
    await asked(request(fuse.RELEASE, node, body([8, handle], [8, 0], [8, 0])));
    assert.deepEqual(
      seen.map(({ nodes, files }) => [nodes.map(({ id }) => id), files.map((each) => each.handle)]),
      [
        [[node], []],
        [[node], [handle]],
        [[node], []],
      ],
    );
  });

  // session.ts, begin: `nodes.restore` and `this.#handles.restore`; handles.ts and nodes.ts: `this.#next = …`.
  test('nodes and handles go on, also where a tag has moved, and no id is given twice', async () => {
    newLedger();
    const first = await start();
    const [disk, other] = [await lookup(first, 'disk'), await lookup(first, 'other')];
    const handle = (await open(first, disk)).readUInt32LE(0);
    const gone = (await open(first, other)).readUInt32LE(0);
    await ask(first, request(fuse.RELEASE, other, body([8, gone], [8, 0], [8, 0])));
    first.handle(request(fuse.FORGET, other, body([8, 1])), () => assert.fail('FORGET has no answer'));
    const { specs } = tree;
    tree.specs = specs.map((spec) => (spec.path === 'disk' ? { ...spec, path: 'moved' } : spec));
    try {
      const second = await start({ before: facts() });
      const read = request(fuse.READ, disk, body([8, handle], [8, 10], [4, 100], [4, 0]));
      const { error, body: bytes } = await ask(second, read);
      assert.equal(error, 0);
      assert.ok(bytes.equals(readFileSync(specs[0]!.source).subarray(10, 110)));
      const again = await lookup(second, 'other');
      assert.ok(again > other, `node ${again} after ${other}`);
      assert.ok((await open(second, again)).readUInt32LE(0) > gone);
      // As often as the kernel was told, not once more: it forgets the node when it says so.
      second.handle(request(fuse.FORGET, disk, body([8, 1])), () => assert.fail('FORGET has no answer'));
      assert.notEqual((await ask(second, request(fuse.GETATTR, disk))).error, 0);
    } finally {
      tree.specs = specs;
    }
  });

  // handles.ts, restore: `this.#made.set(unique, handle)`, and madeFor.
  test('an OPEN or OPENDIR that is sent again gets the handle that was made for it, a new one another', async () => {
    newLedger();
    const first = await start();
    const disk = await lookup(first, 'disk');
    const handle = (await open(first, disk, 1000n)).readUInt32LE(0);
    const listing = (await ask(first, request(fuse.OPENDIR, 1, openBody, 1002n))).body.readUInt32LE(0);
    const second = await start({ before: facts() });
    // `ask` compares the reply's unique with the request's, resend bit and all.
    assert.equal((await open(second, disk, 1000n | RESENT)).readUInt32LE(0), handle);
    const opendir = await ask(second, request(fuse.OPENDIR, 1, openBody, 1002n | RESENT));
    assert.equal(opendir.body.readUInt32LE(0), listing);
    assert.equal(second.statistics().openFiles, 1);
    assert.notEqual((await open(second, disk, 1000n)).readUInt32LE(0), handle);
    assert.equal(second.statistics().openFiles, 2);
  });

  // handles.ts, restore: `reopening.adopt`; session.ts, #release: `removeFile` before `this.#images.release`.
  test('a backing id is adopted, given to later opens, and given back only when the ledger says released', async () => {
    newLedger();
    const first = await start({ backs: true });
    const disk = await lookup(first, 'disk');
    const one = (await open(first, disk)).readUInt32LE(0);
    const second = await start({ before: facts(), backs: true });
    const reply = await open(second, disk);
    assert.equal(reply.readUInt32LE(8), fuse.FOPEN_PASSTHROUGH);
    assert.equal(reply.readInt32LE(12), 7);
    for (const handle of [one, reply.readUInt32LE(0)]) {
      await ask(second, request(fuse.RELEASE, disk, body([8, handle], [8, 0], [8, 0])));
    }
    assert.deepEqual(backings, ['opened 7', 'adopted 7', 'closed 7 with 0 files in the ledger']);
  });

  // ledger.ts, #records: `if (next > bytes.length) return`.
  test('a record that its writer was killed in is as if it had not been', async () => {
    newLedger();
    const first = await start();
    const disk = await lookup(first, 'disk');
    const { size } = fstatSync(file);
    await lookup(first, 'other');
    const whole = fstatSync(file).size;
    for (const end of [size + 1, size + 4, size + 5, whole - 1]) {
      ftruncateSync(file, end);
      assert.deepEqual(
        facts()!.nodes.map(({ id }) => id),
        [disk],
      );
    }
  });

  // ledger.ts, #guarded: the word at GOOD_AT; read: `!== 1`.
  test('a ledger that could not be written is no ledger, and a foreign one is refused', async () => {
    newLedger();
    await start();
    assert.ok(facts());
    writeSync(file, Buffer.alloc(4), 0, 4, 12);
    assert.equal(facts(), undefined);
    writeSync(file, Buffer.from('OTHER'), 0, 5, 0);
    assert.throws(facts, (error: GridError) => error.code === 'bad-format');
  });
});
