/**
 * Calls of the control socket that take long. Who asks for them with `Accept: application/x-ndjson` gets lines of
 * JSON: { progress: [done, total] } a few times a second, and last { result } or { error: { code, message } }; others
 * get the result alone. Who hangs up cancels the call; who wants to know when everything is taken back (the disk is
 * free again) cancels it with DELETE /v1/calls/:id, the id being in the answer's header, and reads on to the last line.
 */
import type { FastifyInstance, FastifyReply, FastifyRequest } from 'fastify';
import { asGridError, GridError } from '../core/errors.ts';
import { body } from './schemas.ts';

export const LINES_TYPE = 'application/x-ndjson';
export const CALL_HEADER = 'gridvfs-call';
const LINE_INTERVAL_MS = 200;

/** What a task that takes long is given. */
export interface LongTask {
  readonly signal: AbortSignal;
  /** In bytes, or whatever the task counts. */
  readonly onProgress: (done: number, total: number) => void;
}

const running = new Map<number, AbortController>();
let lastId = 0;

export function serveLongCalls(app: FastifyInstance): void {
  app.delete<{ Params: { id: number } }>(
    '/v1/calls/:id',
    { schema: { params: body({ id: { type: 'integer' } }, ['id']) } },
    (request) => {
      const { id } = request.params;
      const call = running.get(id);
      if (!call) throw new GridError('not-found', `call ${id} has ended`);
      call.abort();
      return { cancelled: id };
    },
  );
}

/** Runs `task` and answers with what it resolves with or throws. */
export async function longCall<T>(
  request: FastifyRequest,
  reply: FastifyReply,
  task: (control: LongTask) => Promise<T>,
): Promise<T | undefined> {
  const gone = new AbortController();
  reply.raw.once('close', () => {
    if (!reply.raw.writableFinished) gone.abort();
  });
  const { signal } = gone;
  if (request.headers.accept !== LINES_TYPE) return task({ signal, onProgress: () => {} });
  reply.hijack();
  reply.raw.on('error', () => {}); // 'close' says what matters
  const id = ++lastId;
  running.set(id, gone);
  reply.raw.writeHead(200, { 'content-type': LINES_TYPE, [CALL_HEADER]: id });
  reply.raw.flushHeaders();
  const line = (value: unknown) => reply.raw.write(JSON.stringify(value) + '\n');
  let lastMs = -Infinity;
  try {
    const result = await task({
      signal,
      onProgress(done, total) {
        const nowMs = performance.now();
        if (nowMs - lastMs < LINE_INTERVAL_MS) return;
        lastMs = nowMs;
        line({ progress: [done, total] });
      },
    });
    line({ result });
  } catch (error) {
    const { code, message } = asGridError(error, 'the proxy failed', 'bug');
    line({ error: { code, message } });
  } finally {
    running.delete(id);
  }
  reply.raw.end();
  return undefined;
}
