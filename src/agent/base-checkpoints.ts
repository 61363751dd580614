/**
 * Base checkpoints: an image version as it is when its guest has booted and is ready, so that further VMs of it go on from
 * there instead of booting. `NAME.base:VERSION` is the base checkpoint of NAME:VERSION; its labels say of which image
 * exactly and of what machine, so that one that was made of an earlier NAME:VERSION or for other machines is not taken.
 */
import type { Digest } from '../core/bytes.ts';
import { GridError } from '../core/errors.ts';
import { MIB } from '../core/limits.ts';
import { parseReference } from '../core/manifest.ts';
import type { Manifest } from '../core/manifest.ts';
import type { CheckpointFacts } from './checkpoint-file.ts';
import type { MachineCatalog } from './machine-parts.ts';
import { describeMachine } from './machine-description.ts';
import type { RunRequest } from './vm-record.ts';

const LABEL_OF = 'checkpoint.of';
const LABEL_MEMORY_MIB = 'checkpoint.memory-mib';
const LABEL_VCPUS = 'checkpoint.vcpus';

export type BaseRequest = Pick<RunRequest, 'memoryBytes' | 'vcpus'> & { readonly image: string };

export function baseReference(image: string): string {
  const { name, version } = parseReference(image);
  return `${name}.base:${version}`;
}

function labelsFor(of: Digest, memoryBytes: number, vcpus: number): Record<string, string> {
  return {
    [LABEL_OF]: of,
    [LABEL_MEMORY_MIB]: String(memoryBytes / MIB),
    [LABEL_VCPUS]: String(vcpus),
  };
}

/** What a checkpoint that is made as a base says of itself. */
export function baseLabels({ base, description }: CheckpointFacts): Record<string, string> {
  return labelsFor(base, description.memoryBytes, description.vcpus);
}

/** The reference of the base checkpoint for such a VM. Throws not-found, saying why there is none. */
export async function findBase(catalog: MachineCatalog, request: BaseRequest): Promise<string> {
  const { digest, manifest } = await catalog.resolve(request.image);
  const reference = baseReference(request.image);
  let base: Manifest;
  try {
    ({ manifest: base } = await catalog.resolve(reference));
  } catch (error) {
    throw new GridError('not-found', `there is no base checkpoint ${reference}`, { cause: error });
  }
  const { memoryBytes, vcpus } = describeMachine(request, 'base', manifest, '/', '/');
  for (const [label, wanted] of Object.entries(labelsFor(digest, memoryBytes, vcpus))) {
    const is = base.labels[label];
    if (is !== wanted)
      throw new GridError(
        'not-found',
        `${reference} does not fit: its ${label} is ${is ?? 'not said'}, not ${wanted}`,
      );
  }
  return reference;
}
