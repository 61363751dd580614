/**
 * Takes a checkpoint's names away at the store, unless something of this host goes on from it: of that a guest may want
 * pages yet that are nowhere but there. What other hosts have told the store that they need, it refuses itself.
 */
import type { Digest } from '../core/bytes.ts';
import { GridError } from '../core/errors.ts';
import { parseReference } from '../core/manifest.ts';
import type { ChunkSource } from '../core/source.ts';
import type { CloneRecord } from './clone-record.ts';
import type { MachineCatalog } from './machine-parts.ts';
import type { VmRecord } from './vm-record.ts';

export interface RemovalParts {
  readonly catalog: Pick<MachineCatalog, 'resolve'>;
  /** VMs that run. */
  readonly machines: { records(): Iterable<VmRecord> };
  readonly clones: { records(): Iterable<CloneRecord> };
  /** Resolves when the store knows what this host needs now. */
  settle(): Promise<void>;
  readonly source: Pick<ChunkSource, 'name' | 'uploads'>;
}

/** Throws not-found, bad-request (no checkpoint), in-use with what it is that goes on from it, denied. */
export async function removeCheckpoint(
  parts: RemovalParts,
  reference: string,
): Promise<{ readonly removed: readonly string[] }> {
  const { digest, manifest } = await parts.catalog.resolve(reference);
  if (manifest.kind !== 'memory')
    throw new GridError('bad-request', `${reference} is no checkpoint but of kind '${manifest.kind}'`);
  const users = usersOf(new Set([digest, ...Object.values(manifest.parts)]), parts);
  if (users.length > 0) {
    const names = users.join(', ');
    throw new GridError('in-use', `${reference} is needed here by ${names}; stop or remove them first`);
  }
  const { uploads, name: store } = parts.source;
  if (!uploads)
    throw new GridError('denied', `${store} takes no uploads, so nothing can be removed from here`);
  await parts.settle();
  const { name, version } = parseReference(reference);
  const removed = await uploads.removeCheckpoint(name, version);
  if (removed.length === 0) throw new GridError('not-found', `${reference} is no longer in ${store}`);
  return { removed };
}

function usersOf(digests: ReadonlySet<Digest>, { machines, clones }: RemovalParts): string[] {
  const users = new Set<string>();
  for (const { id, memory } of machines.records())
    if (memory?.image !== undefined && digests.has(memory.image)) users.add(`VM '${id}'`);
  for (const { id, base, vm, detached } of clones.records())
    if (detached === undefined && digests.has(base))
      users.add(vm === undefined ? `clone '${id}'` : `VM '${vm}'`);
  return [...users];
}
