/** Requests of the /dev/fuse protocol as a kernel would send them, and what comes back, without a kernel. */
import assert from 'node:assert/strict';
import * as fuse from '../../../src/frontend/fuse/protocol.ts';
import type { Session } from '../../../src/frontend/fuse/session.ts';

/** Little-endian fields one after the other: numbers as [bytes, value], names with their zero byte. */
export function body(...fields: ([4 | 8, number] | string | Uint8Array)[]): Buffer {
  return Buffer.concat(
    fields.map((field) => {
      if (typeof field === 'string') return Buffer.from(`${field}\0`);
      if (field instanceof Uint8Array) return field;
      const bytes = Buffer.alloc(field[0]);
      if (field[0] === 4) bytes.writeUInt32LE(field[1]);
      else bytes.writeBigUInt64LE(BigInt(field[1]));
      return bytes;
    }),
  );
}

let nextUnique = 2n;

export function request(
  opcode: number,
  nodeId: number,
  fields: Buffer = Buffer.alloc(0),
  unique = (nextUnique += 2n),
): Buffer {
  const header = Buffer.alloc(fuse.IN_HEADER_BYTES);
  header.writeUInt32LE(header.length + fields.length, 0);
  header.writeUInt32LE(opcode, 4);
  header.writeBigUInt64LE(unique, 8);
  header.writeBigUInt64LE(BigInt(nodeId), 16);
  header.writeUInt32LE(process.pid, 32);
  return Buffer.concat([header, fields]);
}

export interface Reply {
  error: number;
  body: Buffer;
}

export function parse(reply: Buffer, to: Buffer): Reply {
  assert.equal(reply.readUInt32LE(0), reply.length);
  assert.equal(reply.readBigUInt64LE(8), to.readBigUInt64LE(8));
  return { error: Math.abs(reply.readInt32LE(4)), body: reply.subarray(fuse.OUT_HEADER_BYTES) };
}

export const ask = (session: Session, bytes: Buffer) =>
  new Promise<Reply>((resolve) => {
    session.handle(bytes, (reply) => resolve(parse(reply, bytes)));
  });
