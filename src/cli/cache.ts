/** gridvfs cache status|warm|pin|unpin|evict|scrub: what a host keeps of its images, through the control socket. */
import { setTimeout as sleep } from 'node:timers/promises';
import type { Command } from 'commander';
import type { Job, JobRequest } from '../agent/cache-routes.ts';
import type { ControlClient } from '../agent/client.ts';
import { GridError } from '../core/errors.ts';
import { abortOnSignals, bytesText, jsonOption, Progress, show, table, verb } from './kit.ts';
import { findProxy, withProxyOption } from './registry.ts';

interface Options {
  json?: boolean;
  proxy?: string;
  purpose?: string;
}

const POLL_MS = 100;

interface CacheView {
  readonly folder: string;
  readonly usedBytes: number;
  readonly quotaBytes?: number;
  readonly degraded?: string;
  readonly evictedChunks: number;
  readonly corruptChunks: number;
  readonly images: readonly {
    readonly manifest: string;
    readonly names: readonly string[];
    readonly chunks: number;
    readonly presentChunks: number;
    readonly presentBytes: number;
    readonly hitRate?: number;
    readonly fetchedPlainBytes: number;
    readonly refetchedChunks: number;
    readonly savedBytes: number;
    readonly prefetchedChunks: number;
    readonly prefetchedUsedChunks: number;
    readonly pinned: readonly string[];
  }[];
}

const percent = (part: number, whole: number) => `${whole === 0 ? 100 : Math.floor((100 * part) / whole)} %`;

function statusVerb(): Command {
  return withProxyOption(
    verb(
      'status',
      'What is here of each image, and what it cost.\n\nHITS: share of the chunks read since the proxy started that were here when they were first read.',
      ['gridvfs cache status', 'gridvfs cache status --json'],
    ),
  )
    .addOption(jsonOption())
    .action(async (options: Options) => {
      const { client } = await findProxy(options.proxy);
      const status = await client.call<CacheView>('GET', '/v1/cache');
      show(options, status, () =>
        [
          `${status.folder}: ${bytesText(status.usedBytes)}${status.quotaBytes === undefined ? '' : ` of ${bytesText(status.quotaBytes)}`}, ${status.evictedChunks} chunks evicted, ${status.corruptChunks} arrived corrupt`,
          ...(status.degraded === undefined ? [] : [`degraded: ${status.degraded}`]),
          '',
          table(
            ['IMAGE', 'PRESENT', 'HERE', 'HITS', 'FETCHED', 'REFETCHED', 'SAVED', 'AHEAD', 'USED', 'PINNED'],
            status.images.map((one) => [
              one.names[0] ?? one.manifest.slice(0, 12),
              bytesText(one.presentBytes),
              percent(one.presentChunks, one.chunks),
              one.hitRate === undefined ? '-' : `${(100 * one.hitRate).toFixed(1)} %`,
              bytesText(one.fetchedPlainBytes),
              one.refetchedChunks,
              bytesText(one.savedBytes),
              one.prefetchedChunks,
              one.prefetchedUsedChunks,
              one.pinned.join(', '),
            ]),
          ),
        ].join('\n'),
      );
    });
}

/** Runs a job to its end; Ctrl-C cancels it. */
async function runJob(client: ControlClient, request: JobRequest, options: Options): Promise<Job> {
  const signal = abortOnSignals();
  const progress = new Progress(request.work, options);
  let job = await client.call<Job>('POST', '/v1/cache/jobs', request);
  try {
    while (job.state === 'running') {
      if (signal.aborted) await client.call('DELETE', `/v1/cache/jobs/${job.id}`);
      if (job.totalChunks > 0) progress.update(job.doneChunks, job.totalChunks);
      await sleep(POLL_MS);
      job = await client.call<Job>('GET', `/v1/cache/jobs/${job.id}`);
    }
  } finally {
    progress.end();
  }
  if (job.error) throw new GridError(job.error.code, job.error.message);
  return job;
}

interface JobVerb {
  readonly work: JobRequest['work'];
  readonly summary: string;
  readonly examples: string[];
  readonly argument: '<image>' | '[image]';
  readonly purpose: boolean;
  readonly text: (result: Readonly<Record<string, number>>, image: string) => string;
}

const VERBS: JobVerb[] = [
  {
    work: 'warm',
    summary: 'Fetch an image, with its kernel and other parts, before anybody asks for it.',
    examples: ['gridvfs cache warm debian:12', 'gridvfs cache warm debian:12 --purpose boot'],
    argument: '<image>',
    purpose: true,
    text: ({ chunks, fetchedChunks }, image) =>
      `${image}: ${chunks} chunks are here, ${fetchedChunks} fetched`,
  },
  {
    work: 'pin',
    summary: 'Fetch an image, or what its boots touch, and keep it from eviction.',
    examples: ['gridvfs cache pin debian:12', 'gridvfs cache pin debian:12 --purpose boot'],
    argument: '<image>',
    purpose: true,
    text: ({ chunks, fetchedChunks }, image) =>
      `${image}: ${chunks} chunks are pinned, ${fetchedChunks} fetched`,
  },
  {
    work: 'unpin',
    summary: 'Let an image be evicted again.',
    examples: ['gridvfs cache unpin debian:12'],
    argument: '<image>',
    purpose: true,
    text: (_, image) => `${image} is no longer pinned`,
  },
  {
    work: 'evict',
    summary: 'Take an image off this host’s disk.',
    examples: ['gridvfs cache evict debian:12'],
    argument: '<image>',
    purpose: false,
    text: ({ chunks }, image) => `${image}: ${chunks} chunks evicted`,
  },
  {
    work: 'scrub',
    summary: 'Read and hash what is here, of one image or all, and fetch again what is damaged.',
    examples: ['gridvfs cache scrub', 'gridvfs cache scrub debian:12 --json'],
    argument: '[image]',
    purpose: false,
    text: ({ images, checkedChunks, refetchedChunks, lostChunks }) =>
      `${checkedChunks} chunks of ${images} images checked, ${refetchedChunks} damaged and fetched again, ${lostChunks} damaged and lost until they are next read`,
  },
];

function jobVerb({ work, summary, examples, argument, purpose, text }: JobVerb): Command {
  const command = withProxyOption(verb(work, summary, examples)).argument(argument, 'name:version');
  if (purpose) command.option('--purpose <purpose>', 'only what starts of this kind touch, e.g. boot');
  return command.addOption(jsonOption()).action(async (image: string | undefined, options: Options) => {
    const { client } = await findProxy(options.proxy);
    const request: JobRequest = {
      work,
      ...(image === undefined ? {} : { image }),
      ...(options.purpose === undefined ? {} : { purpose: options.purpose }),
    };
    const { result = {} } = await runJob(client, request, options);
    show(options, result, () => text(result, image ?? 'all'));
  });
}

export function cacheVerbs(): Command {
  const group = verb('cache', 'What this host keeps of its images: look, fetch ahead, pin, evict, check.');
  group.addCommand(statusVerb());
  for (const one of VERBS) group.addCommand(jobVerb(one));
  return group;
}
