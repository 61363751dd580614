/** The request parser and the main thread's answers, byte by byte, without a kernel. */
import assert from 'node:assert/strict';
import { constants } from 'node:os';
import { after, before, describe, test } from 'node:test';
import { setTimeout } from 'node:timers/promises';
import fc from 'fast-check';
import { GridError } from '../../../src/core/errors.ts';
import type { Image, ImageTree, TreeEntry, TreePath } from '../../../src/core/image.ts';
import { encodeInitReply, errnoNumberOf } from '../../../src/frontend/fuse/protocol.ts';
import * as fuse from '../../../src/frontend/fuse/protocol.ts';
import { Session } from '../../../src/frontend/fuse/session.ts';
import { FileTree } from './file-tree.ts';
import { Place } from './harness.ts';
import { ask, body, parse, request } from './requests.ts';

const { errno } = constants;

function sessionOver(tree: ImageTree, released: (handle: number) => void = () => undefined): Session {
  return new Session({
    tree,
    root: { name: '', type: 'directory', modifiedMs: 0 },
    owner: { uid: 0, gid: 0 },
    readOnly: false,
    log: () => undefined,
    opened: () => undefined,
    released,
  });
}

describe('the session of the kernel driver', () => {
  let place: Place;
  let tree: FileTree;

  before(() => {
    place = new Place();
    tree = new FileTree(
      [
        { path: 'disk', source: place.source('disk', 100_000), kind: 'image', contentId: '1' },
        { path: 'clone', source: place.source('clone', 100_000), kind: 'clone', contentId: '2' },
      ],
      place.scratch,
    );
  });
  after(() => place.remove());

  test('any bytes after a header get at most one answer with an errno of the table, and nothing throws', async () => {
    const session = sessionOver(tree);
    for (const name of ['disk', 'clone']) {
      const node = (await ask(session, request(fuse.LOOKUP, 1, body(name)))).body.readUInt32LE(0);
      await ask(session, request(fuse.OPEN, node, body([4, 0], [4, 0])));
    }
    await ask(session, request(fuse.OPENDIR, 1, body([4, 0], [4, 0])));
    const small = fc.oneof(fc.nat(4), fc.nat(200_000), fc.integer({ min: 0, max: 0xffff_ffff }));
    const fields = fc.oneof(
      fc.uint8Array({ maxLength: 120 }),
      // u64 handle, u64 offset, u32 size, … as most bodies are.
      fc
        .tuple(small, small, small, small)
        .map(([a, b, c, d]) => body([8, a], [8, b], [4, c], [4, d], [8, d], [8, a])),
    );
    const opcodes = [
      1, 2, 3, 4, 5, 8, 14, 15, 16, 17, 18, 20, 21, 27, 28, 29, 34, 35, 36, 38, 40, 42, 43, 44, 46, 99,
    ];
    await fc.assert(
      fc.asyncProperty(fc.constantFrom(...opcodes), fc.nat(4), fields, async (opcode, node, bytes) => {
        const replies: Buffer[] = [];
        const sent = request(opcode, node, Buffer.from(bytes));
        session.handle(sent, (reply) => replies.push(reply));
        const silent = [fuse.FORGET, fuse.BATCH_FORGET, fuse.INTERRUPT].includes(opcode);
        const enough = silent ? 0 : 1;
        for (let turn = 0; turn < 500 && replies.length < enough; turn++) {
          await new Promise((resolve) => void setImmediate(resolve));
        }
        assert.equal(replies.length, silent ? 0 : 1);
        for (const reply of replies) {
          const { error } = parse(reply, sent);
          assert.ok(error >= 0 && error < 512, `errno ${error}`);
        }
      }),
      { numRuns: 3000 },
    );
    for (let length = 0; length < fuse.IN_HEADER_BYTES; length++) {
      session.handle(Buffer.alloc(length), () => assert.fail('no answer without a header'));
    }
    await session.close();
    assert.equal(tree.openImages.size, 0);
  });

  test('bodies that are too short are EINVAL for every request that has fields', async () => {
    const session = sessionOver(tree);
    for (const opcode of [
      fuse.LOOKUP,
      fuse.SETATTR,
      fuse.OPEN,
      fuse.READ,
      fuse.WRITE,
      fuse.RELEASE,
      fuse.READDIR,
    ]) {
      const looked = await ask(session, request(fuse.LOOKUP, 1, body('clone')));
      const node = opcode === fuse.LOOKUP ? 1 : Number(looked.body.readBigUInt64LE(0));
      assert.equal((await ask(session, request(opcode, node))).error, errno.EINVAL, `opcode ${opcode}`);
    }
    await session.close();
  });

  test('a WRITE whose data is shorter than it says is EINVAL and writes nothing', async () => {
    const session = sessionOver(tree);
    const node = (await ask(session, request(fuse.LOOKUP, 1, body('clone')))).body.readUInt32LE(0);
    const handle = (await ask(session, request(fuse.OPEN, node, body([4, 2], [4, 0])))).body.readUInt32LE(0);
    const write = (size: number, data: Uint8Array) =>
      ask(
        session,
        request(fuse.WRITE, node, body([8, handle], [8, 0], [4, size], [4, 0], [8, 0], [4, 0], [4, 0], data)),
      );
    assert.equal((await write(10, Buffer.alloc(9))).error, errno.EINVAL);
    assert.equal((await write(0xffff_ffff, Buffer.alloc(9))).error, errno.EINVAL);
    assert.equal((await write(4, Buffer.from('good'))).error, 0);
    const read = await ask(session, request(fuse.READ, node, body([8, handle], [8, 0], [4, 4], [4, 0])));
    assert.equal(read.body.toString(), 'good');
    assert.equal(
      (await ask(session, request(fuse.READ, node, body([8, handle], [8, 0], [4, 2 << 20], [4, 0])))).error,
      errno.EINVAL,
    );
    await session.close();
  });

  test('names that would leave a folder or are not UTF-8 are refused', async () => {
    const session = sessionOver(tree);
    for (const name of ['.', '..', 'a/b', '/etc', '']) {
      assert.equal((await ask(session, request(fuse.LOOKUP, 1, body(name)))).error, errno.EINVAL, name);
    }
    const notUtf8 = request(fuse.LOOKUP, 1, Buffer.from([0xff, 0xfe, 0]));
    assert.equal((await ask(session, notUtf8)).error, errno.ENOENT);
    assert.equal(
      (await ask(session, request(fuse.LOOKUP, 1, body('x'.repeat(256))))).error,
      errno.ENAMETOOLONG,
    );
    await session.close();
  });

  test('a node lives until it was forgotten as often as it was told, and its id is never used again', async () => {
    const session = sessionOver(tree);
    const lookup = async () =>
      (await ask(session, request(fuse.LOOKUP, 1, body('disk')))).body.readUInt32LE(0);
    const node = await lookup();
    assert.equal(await lookup(), node);
    const getattr = async () => (await ask(session, request(fuse.GETATTR, node))).error;
    session.handle(request(fuse.FORGET, node, body([8, 1])), () => assert.fail('FORGET has no answer'));
    assert.equal(await getattr(), 0);
    session.handle(request(fuse.BATCH_FORGET, 0, body([4, 1], [4, 0], [8, node], [8, 1])), () =>
      assert.fail(),
    );
    assert.equal(await getattr(), errno.ESTALE);
    assert.notEqual(await lookup(), node);
    await session.close();
  });

  test('a name that means other content by the time of OPEN is ESTALE', async () => {
    const session = sessionOver(tree);
    const node = (await ask(session, request(fuse.LOOKUP, 1, body('disk')))).body.readUInt32LE(0);
    const { specs } = tree;
    tree.specs = specs.map((spec) => (spec.path === 'disk' ? { ...spec, contentId: 'moved' } : spec));
    assert.equal((await ask(session, request(fuse.OPEN, node, body([4, 0], [4, 0])))).error, errno.ESTALE);
    tree.specs = specs;
    assert.equal((await ask(session, request(fuse.OPEN, node, body([4, 0], [4, 0])))).error, 0);
    await session.close();
    assert.equal(tree.openImages.size, 0);
  });

  test('an image closes after its last file is released and its last read is done, not before', async () => {
    const waiting = Promise.withResolvers<void>();
    const events: string[] = [];
    const image: Image = {
      sizeBytes: 100,
      writable: false,
      read: async (target) => {
        await waiting.promise;
        target.fill(7);
        events.push('read');
      },
      write: () => Promise.reject(new GridError('read-only', 'no')),
      trim: () => Promise.reject(new GridError('read-only', 'no')),
      flush: async () => undefined,
      close: async () => void events.push('closed'),
    };
    const entry: TreeEntry = {
      name: 'x',
      type: 'file',
      sizeBytes: 100,
      writable: false,
      modifiedMs: 0,
      contentId: 'x',
    };
    const slow: ImageTree = {
      lookup: async (names: TreePath) => (names.length === 1 ? entry : undefined),
      list: async () => [entry],
      open: async () => image,
      space: async () => ({ totalBytes: 0, freeBytes: 0 }),
    };
    const session = sessionOver(slow, (handle) => events.push(`released ${handle}`));
    const node = (await ask(session, request(fuse.LOOKUP, 1, body('x')))).body.readUInt32LE(0);
    const handle = (await ask(session, request(fuse.OPEN, node, body([4, 0], [4, 0])))).body.readUInt32LE(0);
    // Given up by its reader: pid of nobody, so the interrupt counts as deadly.
    const readBytes = request(fuse.READ, node, body([8, handle], [8, 0], [4, 10], [4, 0]));
    readBytes.writeUInt32LE(0, 32);
    const read = ask(session, readBytes);
    session.handle(request(fuse.INTERRUPT, 0, readBytes.subarray(8, 16)), () => assert.fail('no answer'));
    assert.equal((await read).error, errno.EINTR);
    assert.equal(
      (await ask(session, request(fuse.RELEASE, node, body([8, handle], [8, 0], [8, 0])))).error,
      0,
    );
    assert.deepEqual(events, [`released ${handle}`]);
    waiting.resolve();
    await new Promise((resolve) => void setImmediate(resolve));
    assert.deepEqual(events, [`released ${handle}`, 'read', 'closed']);
    await session.close();
  });

  test('an INTERRUPT that comes before its request is heard, one of a living reader is not obeyed', async () => {
    const never = new Promise<undefined>(() => undefined);
    const session = sessionOver({
      lookup: () => never,
      list: () => Promise.reject(new Error('unused')),
      open: () => Promise.reject(new Error('unused')),
      space: () => never.then(() => ({ totalBytes: 0, freeBytes: 0 })),
    });
    const early = request(fuse.STATFS, 1);
    early.writeUInt32LE(0, 32); // of a process that is gone
    session.handle(request(fuse.INTERRUPT, 0, early.subarray(8, 16)), () => assert.fail('no answer'));
    assert.equal((await ask(session, early)).error, errno.EINTR);
    const living = request(fuse.STATFS, 1); // of this process
    session.handle(living, () => assert.fail('nobody is being killed'));
    session.handle(request(fuse.INTERRUPT, 0, living.subarray(8, 16)), () => assert.fail('no answer'));
    await setTimeout(250);
    assert.equal(session.statistics().interrupted, 1);
    await session.close();
  });

  test('a listing does not change while it is read', async () => {
    const session = sessionOver(tree);
    const handle = (await ask(session, request(fuse.OPENDIR, 1, body([4, 0], [4, 0])))).body.readUInt32LE(0);
    const names: string[] = [];
    const { specs } = tree;
    for (let offset = 0; ;) {
      const { body: bytes } = await ask(
        session,
        request(fuse.READDIR, 1, body([8, handle], [8, offset], [4, 40], [4, 0])),
      );
      if (bytes.length === 0) break;
      names.push(bytes.toString('utf8', 24, 24 + bytes.readUInt32LE(16)));
      offset = bytes.readUInt32LE(8);
      tree.specs = [];
    }
    tree.specs = specs;
    assert.deepEqual(names, ['.', '..', 'clone', 'disk']);
    await session.close();
  });

  test('INIT asks only for what the kernel offers, and refuses kernels before 7.31', () => {
    const init = (minor: number, flags: number) =>
      request(fuse.INIT, 0, body([4, 7], [4, minor], [4, 1 << 20], [4, flags], [4, 0]));
    const newest = encodeInitReply(init(45, 0xffff_ffff), 131072);
    const reply = newest.reply.subarray(fuse.OUT_HEADER_BYTES);
    assert.equal(reply.readUInt32LE(0), 7);
    assert.equal(reply.readUInt32LE(8), 131072);
    assert.equal(reply.readUInt32LE(12) & (1 << 16), 0, 'no write-back cache');
    assert.equal(reply.readUInt32LE(20), 1 << 20);
    assert.equal(reply.readUInt32LE(32), 0, 'nothing of the second flags that was not offered');
    assert.equal(newest.passthrough, false);
    const oldest = encodeInitReply(init(31, 1), 131072).reply;
    assert.equal(oldest.readUInt32LE(fuse.OUT_HEADER_BYTES + 12), 1);
    const offers = request(
      fuse.INIT,
      0,
      body([4, 7], [4, 45], [4, 1 << 20], [4, 1 << 30], [4, 0xffff_ffff], [4, 0]),
    );
    const agreed = encodeInitReply(offers, 131072);
    assert.equal(agreed.passthrough, true);
    assert.equal(agreed.resend, true);
    assert.equal(agreed.reply.readUInt32LE(fuse.OUT_HEADER_BYTES + 32), (1 << 5) | (1 << 7));
    assert.equal(agreed.reply.readUInt32LE(fuse.OUT_HEADER_BYTES + 36), 1);
    // Without INIT_EXT what looks like second flags is none.
    offers.writeUInt32LE(0, fuse.IN_HEADER_BYTES + 12);
    assert.equal(encodeInitReply(offers, 131072).passthrough, false);
    for (const bad of [init(30, 1), request(fuse.LOOKUP, 0, body('x')), init(31, 1).subarray(0, 50)]) {
      assert.throws(
        () => encodeInitReply(bad, 0),
        (error: GridError) => error.code === 'unsupported',
      );
    }
  });

  test('errors become errnos: ours by code, the system’s by name, all others EIO', () => {
    assert.equal(errnoNumberOf(new GridError('no-space', 'full')), errno.ENOSPC);
    assert.equal(errnoNumberOf(Object.assign(new Error('x'), { code: 'EDQUOT' })), errno.EDQUOT);
    assert.equal(errnoNumberOf(new Error('x')), errno.EIO);
    assert.equal(errnoNumberOf('x'), errno.EIO);
  });
});
