/**
 * Checkpoints in a store are three versions: NAME of kind memory, which names its disk and its devices as parts, and
 * these as NAME.disk and NAME.state. Names go together, unless some mean something else by now.
 */
import { GridError } from '../core/errors.ts';
import { parseManifest, parseReference } from '../core/manifest.ts';
import type { Manifest, Tag } from '../core/manifest.ts';
import type { Store } from './store.ts';

/** The tag and, where it is a checkpoint's, those of its parts that still are its parts. Throws not-found. */
export async function namesWithParts(
  store: Store,
  reference: string,
): Promise<{ tags: Tag[]; kind: string }> {
  const tag = await store.resolve(reference);
  const { kind, parts } = await readDamaged(store, tag);
  const isPart = ({ name, version, manifest }: Tag) =>
    version === tag.version &&
    Object.entries(parts).some(([part, digest]) => name === `${tag.name}.${part}` && manifest === digest);
  return { tags: [tag, ...(kind === 'memory' ? (await store.listTags()).filter(isPart) : [])], kind };
}

/** See UploadTarget.removeCheckpoint. */
export async function removeCheckpoint(store: Store, name: string, version: string): Promise<string[]> {
  const reference = `${name}:${version}`;
  parseReference(reference);
  const known = await store.listTags();
  // The answer to the first call may have been lost.
  if (!known.some((tag) => tag.name === name && tag.version === version)) return [];
  const { tags, kind } = await namesWithParts(store, reference);
  if (kind !== 'memory')
    throw new GridError('bad-request', `${reference} is no checkpoint but of kind '${kind}'`);
  const needed = new Set(tags.map(({ manifest }) => manifest));
  const holders = (await store.listHolds()).filter(({ manifests }) =>
    manifests.some((one) => needed.has(one)),
  );
  if (holders.length > 0) {
    const names = holders.map(({ holder }) => holder).join(', ');
    throw new GridError(
      'in-use',
      `VMs or clones of ${names} lie on ${reference}; \`gridvfs vm ls\` and \`gridvfs clone ls\` there say which`,
    );
  }
  await store.removeTags(tags);
  return tags.map((tag) => `${tag.name}:${tag.version}`);
}

/** A name can be taken away whatever became of what it means. */
async function readDamaged(
  store: Store,
  { manifest }: Tag,
): Promise<Pick<Manifest, 'parts'> & { kind: string }> {
  try {
    return parseManifest(await store.readManifest(manifest), manifest);
  } catch (error) {
    if (!(error instanceof GridError)) throw error;
    return { kind: 'unknown', parts: {} };
  }
}
