/** The control socket's calls about clones (their list: control.ts). */
import type { FastifyInstance } from 'fastify';
import type { Digest } from '../core/bytes.ts';
import { GridError } from '../core/errors.ts';
import { LABEL_LENGTH_MAX, LABELS_MAX } from '../core/limits.ts';
import { CLONE_KINDS } from './clone-record.ts';
import type { CloneKind, CloneRecord } from './clone-record.ts';
import type { CloneDisk, CreateOptions, DiskSnapshot } from './clone-parts.ts';
import type { Clones } from './clones.ts';
import { longCall } from './long-call.ts';
import type { LongTask } from './long-call.ts';
import { body, file, name, params, reference, sizeBytes } from './schemas.ts';

/** What is done with whole clones and needs stores or archives; the daemon's wiring gives it. */
export interface CloneWork {
  /** A new version in the store at `store` (default: the proxy's own source). */
  commit(disk: CloneDisk, record: CloneRecord, request: CommitRequest, control: LongTask): Promise<unknown>;
  /** Writes the archive; a failure leaves nothing. Throws exists. */
  export(disk: CloneDisk, record: CloneRecord, file: string, control: LongTask): Promise<unknown>;
  /** Checks the archive and makes the clone of it; a failure leaves nothing. */
  import(request: { file: string; name?: string; image?: string }, control: LongTask): Promise<CloneRecord>;
  /** The disk as of the moment becomes the clone's next pushed version in the source. */
  push(
    snapshot: DiskSnapshot,
    record: CloneRecord,
    request: { reference?: string },
    control: LongTask,
  ): Promise<unknown>;
  /** A persistent clone of a pushed version; a failure leaves nothing. */
  pull(request: { reference: string; name?: string }, control: LongTask): Promise<CloneRecord>;
}

export interface CommitRequest {
  readonly reference: string;
  readonly store?: string;
  readonly labels?: Record<string, string>;
}

export interface CloneRequest {
  /** name:version; or … */
  readonly image?: string;
  /** … a stopped clone to start from. */
  readonly from?: string;
  readonly name?: string;
  readonly kind?: CloneKind;
  readonly sizeBytes?: number;
  readonly quotaBytes?: number;
}

export interface CloneRouteParts {
  readonly clones: Clones;
  readonly cloneWork: CloneWork;
  resolve(reference: string): Promise<{ digest: Digest; manifest: { kind: string; sizeBytes: number } }>;
}

interface Id {
  Params: { id: string };
}

export function serveClones(app: FastifyInstance, parts: CloneRouteParts): void {
  const { clones, cloneWork } = parts;
  app.get('/v1/clones', () => clones.statuses());
  app.post<{ Body: CloneRequest }>(
    '/v1/clones',
    {
      schema: {
        body: body({
          image: reference,
          from: name,
          name,
          kind: { enum: CLONE_KINDS },
          sizeBytes,
          quotaBytes: sizeBytes,
        }),
      },
    },
    async (request) => clones.status((await clones.create(await originOf(request.body, parts))).id),
  );
  app.post<{ Body: { file: string; name?: string; image?: string } }>(
    '/v1/clones/import',
    { schema: { body: body({ file, name, image: reference }, ['file']) } },
    (request, reply) =>
      longCall(request, reply, async (control) =>
        clones.status((await cloneWork.import(request.body, control)).id),
      ),
  );
  app.post<{ Body: { reference: string; name?: string } }>(
    '/v1/clones/pull',
    { schema: { body: body({ reference, name }, ['reference']) } },
    (request, reply) =>
      longCall(request, reply, async (control) =>
        clones.status((await cloneWork.pull(request.body, control)).id),
      ),
  );
  app.post<Id & { Body: { reference?: string } }>(
    '/v1/clones/:id/push',
    { schema: { params, body: body({ reference }) } },
    (request, reply) =>
      longCall(request, reply, (control) =>
        clones.atMoment(request.params.id, (snapshot, record) =>
          cloneWork.push(snapshot, record, request.body, control),
        ),
      ),
  );
  app.get<Id>('/v1/clones/:id', { schema: { params } }, async (request) => clones.status(request.params.id));
  app.delete<Id>('/v1/clones/:id', { schema: { params } }, async (request) => {
    await clones.remove(request.params.id);
    return { removed: request.params.id };
  });
  app.post<Id & { Body: { quotaBytes?: number } }>(
    '/v1/clones/:id/quota',
    { schema: { params, body: body({ quotaBytes: sizeBytes }) } },
    async (request) => {
      await clones.setQuota(request.params.id, request.body.quotaBytes);
      return clones.status(request.params.id);
    },
  );
  app.post<Id & { Body: CommitRequest }>(
    '/v1/clones/:id/commit',
    {
      schema: {
        params,
        body: body(
          {
            reference,
            store: file,
            labels: {
              type: 'object',
              maxProperties: LABELS_MAX,
              additionalProperties: { type: 'string', maxLength: LABEL_LENGTH_MAX },
            },
          },
          ['reference'],
        ),
      },
    },
    (request, reply) =>
      longCall(request, reply, (control) =>
        clones.exclusive(request.params.id, 'committed', (disk, record) =>
          cloneWork.commit(disk, record, request.body, control),
        ),
      ),
  );
  app.post<Id & { Body: { file: string } }>(
    '/v1/clones/:id/export',
    { schema: { params, body: body({ file }, ['file']) } },
    (request, reply) =>
      longCall(request, reply, (control) =>
        clones.exclusive(request.params.id, 'exported', (disk, record) =>
          cloneWork.export(disk, record, request.body.file, control),
        ),
      ),
  );
}

async function originOf(request: CloneRequest, parts: CloneRouteParts): Promise<CreateOptions> {
  const { image, from, sizeBytes: wanted, ...rest } = request;
  if ((image === undefined) === (from === undefined)) {
    throw new GridError('bad-request', 'name either an image to clone or, with --from, a clone');
  }
  if (from !== undefined) {
    const parent = parts.clones.get(from);
    const { base, sizeBytes: least } = parent;
    return {
      ...rest,
      from,
      image: parent.image,
      base,
      sizeBytes: checkedSize(wanted, least, `clone '${from}'`),
    };
  }
  const { digest, manifest } = await parts.resolve(image!);
  return { ...rest, image: image!, base: digest, sizeBytes: checkedSize(wanted, manifest.sizeBytes, image!) };
}

const SECTOR_BYTES = 512;

function checkedSize(wanted: number | undefined, least: number, what: string): number {
  if (wanted === undefined) return least;
  if (wanted >= least && wanted % SECTOR_BYTES === 0) return wanted;
  throw new GridError(
    'bad-request',
    wanted < least
      ? `${what} has ${least} bytes; a clone of it can be larger (--size), not smaller`
      : `a disk of ${wanted} bytes is not a whole number of ${SECTOR_BYTES}-byte sectors`,
  );
}
