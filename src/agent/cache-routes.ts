/**
 * The cache's part of the control socket. Long work is a job: it goes on when its caller goes away, says how far it
 * is when asked, and is cancelled by a DELETE.
 *
 *   GET    /v1/cache             figures, with the names that each image has
 *   POST   /v1/cache/jobs        { work: warm | pin | unpin | evict | scrub, image?, purpose? } → Job
 *   GET    /v1/cache/jobs/:id    Job
 *   DELETE /v1/cache/jobs/:id    cancels
 */
import { randomBytes } from 'node:crypto';
import type { FastifyInstance } from 'fastify';
import type { Digest } from '../core/bytes.ts';
import { asGridError, GridError } from '../core/errors.ts';
import type { ErrorCode } from '../core/errors.ts';
import { CHECKPOINT_IMAGE, VOLUME_IMAGE } from '../core/grid.ts';
import { NAME_LENGTH_MAX } from '../core/limits.ts';
import type { Manifest, Tag } from '../core/manifest.ts';

type Progress = (doneChunks: number, totalChunks: number) => void;

/** What the routes need of the cache. */
export interface CacheWork {
  status(): Promise<{ readonly images: readonly { readonly manifest: Digest }[] }>;
  listTags(): Promise<readonly Tag[]>;
  readManifest(digest: Digest): Promise<Manifest>;
  warm(
    manifest: Digest,
    options: { purpose?: string; signal?: AbortSignal; progress?: Progress },
  ): Promise<{ readonly chunks: number; readonly fetchedChunks: number }>;
  pin(manifest: Digest, purpose?: string): Promise<void>;
  unpin(manifest: Digest, purpose?: string): void;
  evict(manifest: Digest): Promise<number>;
  scrub(options: { manifest?: Digest; signal?: AbortSignal; progress?: Progress }): Promise<{
    readonly images: number;
    readonly checkedChunks: number;
    readonly refetchedChunks: number;
    readonly lostChunks: number;
  }>;
}

const WORK = ['warm', 'pin', 'unpin', 'evict', 'scrub'] as const;

export interface JobRequest {
  readonly work: (typeof WORK)[number];
  /** name:version with all its parts; only scrub goes without. */
  readonly image?: string;
  readonly purpose?: string;
}

export interface Job {
  readonly id: string;
  readonly state: 'running' | 'done' | 'failed';
  readonly doneChunks: number;
  readonly totalChunks: number;
  /** What it did, as counts. */
  readonly result?: Readonly<Record<string, number>>;
  readonly error?: { readonly code: ErrorCode; readonly message: string };
}

/** Finished jobs that can still be asked for. */
const JOBS_KEPT_MAX = 100;

interface RunningJob {
  job: Job;
  readonly cancel: AbortController;
}

export function serveCache(
  app: FastifyInstance,
  cache: CacheWork,
  resolve: (reference: string) => Promise<{ digest: Digest }>,
): void {
  const jobs = new Map<string, RunningJob>();
  const find = (id: string) => {
    const found = jobs.get(id);
    if (!found) throw new GridError('not-found', `there is no job '${id}' of the cache`);
    return found;
  };

  app.get('/v1/cache', async () => {
    const status = await cache.status();
    const names = await namesOf(cache);
    return {
      ...status,
      images: status.images.map((image) => ({ ...image, names: names.get(image.manifest) ?? [] })),
    };
  });
  app.post<{ Body: JobRequest }>(
    '/v1/cache/jobs',
    {
      schema: {
        body: {
          type: 'object',
          additionalProperties: false,
          required: ['work'],
          properties: {
            work: { enum: WORK },
            image: { type: 'string', maxLength: 2 * NAME_LENGTH_MAX },
            purpose: { type: 'string', maxLength: NAME_LENGTH_MAX, pattern: '^[a-z0-9][a-z0-9._-]*$' },
          },
        },
      },
    },
    async (request) => {
      const { image } = request.body;
      if (image === undefined && request.body.work !== 'scrub') {
        throw new GridError('bad-request', `name the image to ${request.body.work}`);
      }
      const manifests = image === undefined ? [] : await partsOf(cache, (await resolve(image)).digest);
      const id = `job-${randomBytes(5).toString('hex')}`;
      const entry: RunningJob = {
        job: { id, state: 'running', doneChunks: 0, totalChunks: 0 },
        cancel: new AbortController(),
      };
      jobs.set(id, entry);
      void run(cache, request.body, manifests, entry).then(
        (result) => {
          entry.job = { ...entry.job, state: 'done', result };
        },
        (error: unknown) => {
          const { code, message } = asGridError(error, `cannot ${request.body.work}`, 'bug');
          entry.job = { ...entry.job, state: 'failed', error: { code, message } };
        },
      );
      for (const [old, { job }] of jobs) {
        if (jobs.size <= JOBS_KEPT_MAX) break;
        if (job.state !== 'running') jobs.delete(old);
      }
      return entry.job;
    },
  );
  app.get<{ Params: { id: string } }>('/v1/cache/jobs/:id', async (request) => find(request.params.id).job);
  app.delete<{ Params: { id: string } }>('/v1/cache/jobs/:id', async (request) => {
    const { job, cancel } = find(request.params.id);
    cancel.abort();
    return job;
  });
  app.addHook('onClose', async () => {
    for (const { cancel } of jobs.values()) cancel.abort();
  });
}

async function run(
  cache: CacheWork,
  request: JobRequest,
  manifests: readonly Digest[],
  entry: RunningJob,
): Promise<Record<string, number>> {
  const { signal } = entry.cancel;
  const { purpose } = request;
  const ofPurpose = purpose === undefined ? {} : { purpose };
  /** Progress of one part after another: what the earlier ones had counts as done. */
  let before = 0;
  const progress: Progress = (done, total) => {
    entry.job = { ...entry.job, doneChunks: before + done, totalChunks: before + total };
  };
  if (request.work === 'scrub') {
    const total = { images: 0, checkedChunks: 0, refetchedChunks: 0, lostChunks: 0 };
    for (const options of manifests.length > 0 ? manifests.map((manifest) => ({ manifest })) : [{}]) {
      const result = await cache.scrub({ ...options, signal, progress });
      before += result.checkedChunks;
      for (const key of Object.keys(total) as (keyof typeof total)[]) total[key] += result[key];
    }
    return total;
  }
  if (request.work === 'evict') {
    let chunks = 0;
    for (const manifest of manifests) {
      chunks += await cache.evict(manifest).catch((error: unknown) => {
        if (!(error instanceof GridError)) throw error;
        // Of a part, too, it is said by the name that was given.
        const message = error.message.replace(`image ${manifest.slice(0, 12)}`, String(request.image));
        throw new GridError(error.code, message, { cause: error });
      });
    }
    return { chunks };
  }
  if (request.work === 'unpin') {
    return { images: await each(manifests, async (manifest) => cache.unpin(manifest, purpose)) };
  }
  const result = { images: 0, chunks: 0, fetchedChunks: 0 };
  result.images = await each(manifests, async (manifest) => {
    if (request.work === 'pin') await cache.pin(manifest, purpose);
    const { chunks, fetchedChunks } = await cache.warm(manifest, { ...ofPurpose, signal, progress });
    before += chunks;
    result.chunks += chunks;
    result.fetchedChunks += fetchedChunks;
  });
  return result;
}

/** The same for an image and its parts; a part may lack what is asked for (a profile, a pin), but not all may. */
async function each(
  manifests: readonly Digest[],
  work: (manifest: Digest) => Promise<void>,
): Promise<number> {
  let done = 0;
  let missing: GridError | undefined;
  for (const manifest of manifests) {
    try {
      await work(manifest);
      done++;
    } catch (error) {
      if (!(error instanceof GridError) || error.code !== 'not-found') throw error;
      missing ??= error;
    }
  }
  if (done === 0 && missing) throw missing;
  return done;
}

/** An image and its parts, in the order in which a boot needs them. */
async function partsOf(cache: CacheWork, digest: Digest): Promise<Digest[]> {
  const { parts } = await cache.readManifest(digest);
  return [...new Set([...Object.values(parts), digest])];
}

/** name:version, or name:version/part, of every manifest that a tag reaches; those that a broker made come last. */
async function namesOf(cache: CacheWork): Promise<Map<Digest, string[]>> {
  const names = new Map<Digest, string[]>();
  const add = (digest: Digest, name: string) => names.set(digest, [...(names.get(digest) ?? []), name]);
  const isMade = ({ name }: Tag) => CHECKPOINT_IMAGE.test(name) || VOLUME_IMAGE.test(name);
  const tags = await cache.listTags().catch(() => []);
  const inOrder = tags.toSorted((a, b) => Number(isMade(a)) - Number(isMade(b)));
  for (const { name, version, manifest } of inOrder) {
    add(manifest, `${name}:${version}`);
    // A manifest that is neither here nor to be had now has no parts to name.
    const known = await cache.readManifest(manifest).catch(() => undefined);
    for (const [part, digest] of Object.entries(known?.parts ?? {}))
      add(digest, `${name}:${version}/${part}`);
  }
  return names;
}
