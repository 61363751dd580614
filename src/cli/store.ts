/** gridvfs store init|import|export|ls|show|tag|rm|pin|unpin|verify|gc. The store is always named by its folder. */
import path from 'node:path';
import type { Command } from 'commander';
import { Option } from 'commander';
import { isDigest } from '../core/bytes.ts';
import type { Digest } from '../core/bytes.ts';
import { ChunkTable } from '../core/chunk-table.ts';
import { GridError } from '../core/errors.ts';
import { CHUNK_BYTES_DEFAULT } from '../core/limits.ts';
import { MANIFEST_KINDS, parseManifest, parseReference } from '../core/manifest.ts';
import type { ManifestKind } from '../core/manifest.ts';
import {
  collectGarbage,
  EXPORT_FORMATS,
  exportImage,
  GC_GRACE_MS,
  IMAGE_FORMATS,
  importImage,
  initStore,
  namesWithParts,
  openStore,
  verifyStore,
} from '../store/index.ts';
import type { ExportFormat, ImageFormat, Store } from '../store/index.ts';
import {
  abortOnSignals,
  bytesText,
  jsonOption,
  parseBytes,
  parseDuration,
  Progress,
  show,
  table,
  verb,
} from './kit.ts';

interface Json {
  json?: boolean;
}

/** "os=debian" → ['os', 'debian'], gathered over several uses of the option. */
function collectLabel(text: string, previous: Record<string, string> = {}): Record<string, string> {
  const at = text.indexOf('=');
  if (at < 1) throw new GridError('bad-request', `'${text}' is not a label: write key=value`);
  return { ...previous, [text.slice(0, at)]: text.slice(at + 1) };
}

function importVerb(): Command {
  return verb('import', 'Import a disk image (raw, qcow2 and whatever qemu-img reads) as name:version.', [
    'gridvfs store init /srv/store',
    'gridvfs store import /srv/store debian-12-generic.qcow2 debian:12',
    'gridvfs store import /srv/store root.ext4 app:1.4 --kernel vmlinuz --initrd initrd.img --label boot.cmdline="root=/dev/vda rw console=ttyS0"',
  ])
    .argument('<store>', 'folder, made with `gridvfs store init`')
    .argument('<file>')
    .argument('<image>', 'name:version')
    .addOption(new Option('--kind <kind>', 'what it is').choices(MANIFEST_KINDS).default('disk'))
    .addOption(
      new Option('--format <format>', 'format of the file')
        .choices(['auto', ...IMAGE_FORMATS])
        .default('auto'),
    )
    .option('--chunk <size>', 'chunk size of this image', parseBytes, CHUNK_BYTES_DEFAULT)
    .option('--replace', 'let the name move to this image when it has another one')
    .option('--kernel <file>', 'kernel for direct boot, kept with the image')
    .option('--initrd <file>', 'initial RAM disk, kept with the image')
    .option('--label <key=value>', 'label (may be given again)', collectLabel)
    .addOption(jsonOption())
    .action(
      async (
        folder: string,
        file: string,
        image: string,
        options: Json & {
          kind: ManifestKind;
          format: ImageFormat | 'auto';
          chunk: number;
          replace?: boolean;
          kernel?: string;
          initrd?: string;
          label?: Record<string, string>;
        },
      ) => {
        const { name, version } = parseReference(image);
        const store = await openStore(folder);
        const held = (await store.listTags()).find((tag) => tag.name === name && tag.version === version);
        if (held && !options.replace) {
          await store.close();
          throw new GridError(
            'exists',
            `${name}:${version} is ${held.manifest.slice(0, 12)} already; choose another version, or move it with --replace`,
          );
        }
        const progress = new Progress(`import ${image}`, options);
        try {
          const result = await importImage(store, {
            path: file,
            reference: image,
            kind: options.kind,
            format: options.format,
            chunkBytes: options.chunk,
            labels: options.label ?? {},
            parts: [
              ...(options.kernel === undefined
                ? []
                : [{ name: 'kernel', kind: 'kernel' as const, path: options.kernel }]),
              ...(options.initrd === undefined
                ? []
                : [{ name: 'initrd', kind: 'initrd' as const, path: options.initrd }]),
            ],
            onProgress: (done, total) => progress.update(done, total),
            signal: abortOnSignals(),
          });
          progress.end();
          show(options, result, () =>
            [
              `${image} is ${result.digest}`,
              `${bytesText(result.sizeBytes)}, ${bytesText(result.nonzeroBytes)} of it data in ${result.chunks} chunks;`,
              `${result.newChunks} chunks were new, ${bytesText(result.newStoredBytes)} compressed`,
            ].join('\n'),
          );
        } finally {
          progress.end();
          await store.close();
        }
      },
    );
}

function listVerb(): Command {
  return verb('ls', 'List the images of a store.', ['gridvfs store ls /srv/store'])
    .argument('<store>')
    .addOption(jsonOption())
    .action(async (folder: string, options: Json) => {
      const store = await openStore(folder);
      const { images } = await store.statistics();
      show(options, images, () =>
        table(
          ['IMAGE', 'KIND', 'SIZE', 'DATA', 'STORED', 'MANIFEST', 'MOVED'],
          images.map((image) => [
            `${image.tag.name}:${image.tag.version}`,
            image.manifest.kind,
            bytesText(image.manifest.sizeBytes),
            bytesText(image.manifest.nonzeroBytes),
            bytesText(image.storedBytes),
            image.tag.manifest.slice(0, 12),
            image.tag.moved,
          ]),
        ),
      );
    });
}

function showVerb(): Command {
  return verb('show', 'Show the manifest of an image.', ['gridvfs store show /srv/store debian:12'])
    .argument('<store>')
    .argument('<image>', 'name:version')
    .addOption(jsonOption())
    .action(async (folder: string, image: string, options: Json) => {
      const store = await openStore(folder);
      const tag = await store.resolve(image);
      const manifest = parseManifest(await store.readManifest(tag.manifest), tag.manifest);
      const table = ChunkTable.parse(await store.readTable(manifest.table), manifest.table);
      const chunks = { count: table.entryCount, patched: table.patchCount };
      show(options, { digest: tag.manifest, tag, manifest, chunks }, () =>
        [
          `image: ${tag.name}:${tag.version} (moved ${tag.moved})`,
          `manifest: ${tag.manifest}`,
          `kind: ${manifest.kind}`,
          `size: ${bytesText(manifest.sizeBytes)} in chunks of ${bytesText(manifest.chunkBytes)}, ${bytesText(manifest.nonzeroBytes)} data`,
          `chunks of data: ${chunks.count}${chunks.patched === 0 ? '' : `, ${chunks.patched} of them another image's with some blocks replaced`}`,
          `created: ${manifest.created}`,
          ...(manifest.parent === undefined ? [] : [`parent: ${manifest.parent}`]),
          ...Object.entries(manifest.labels).map(([key, value]) => `label ${key}: ${value}`),
          ...Object.entries(manifest.parts).map(([key, value]) => `part ${key}: ${value}`),
        ].join('\n'),
      );
    });
}

function verifyVerb(): Command {
  return verb('verify', 'Read every object of a store and check it against its digest.', [
    'gridvfs store verify /srv/store',
  ])
    .argument('<store>')
    .addOption(jsonOption())
    .action(async (folder: string, options: Json) => {
      const store = await openStore(folder);
      const progress = new Progress('verify', options);
      const result = await verifyStore(store, {
        onProgress: (done, total) => progress.update(done, total),
        signal: abortOnSignals(),
      }).finally(() => progress.end());
      const images = (names: readonly string[]) => names.join(', ') || 'no image needs it';
      show(options, result, () =>
        [
          ...result.damaged.map((one) => `damaged: ${one.path}: ${one.reason} (${images(one.images)})`),
          ...result.missing.map((one) => `missing: ${one.kind} ${one.digest} (${images(one.images)})`),
          `${result.checkedObjects} objects (${bytesText(result.checkedBytes)}) checked: ${result.damaged.length} damaged, ${result.missing.length} missing`,
          ...(result.unreferencedChunks === 0
            ? []
            : [
                `${result.unreferencedChunks} chunks belong to no image; 'gridvfs store gc' removes them in time`,
              ]),
        ].join('\n'),
      );
      if (result.damaged.length + result.missing.length > 0) process.exitCode = 1;
    });
}

/** The manifest that a person means: `name:version`, or a digest. */
async function manifestOf(store: Store, image: string): Promise<Digest> {
  return isDigest(image) ? image : (await store.resolve(image)).manifest;
}

function exportVerb(): Command {
  return verb('export', 'Write an image to a file: a sparse raw disk, or qcow2.', [
    'gridvfs store export /srv/store debian:12 debian-12.raw',
    'gridvfs store export /srv/store debian:12 debian-12.qcow2 --format qcow2',
    'gridvfs store export /srv/store app:1.4 vmlinuz --part kernel',
  ])
    .argument('<store>')
    .argument('<image>', 'name:version, or the digest of a manifest')
    .argument('<file>')
    .addOption(new Option('--format <format>', 'format of the file').choices(EXPORT_FORMATS).default('raw'))
    .option('--part <name>', 'one of the files kept with the image (`store show` lists them)')
    .option('--force', 'replace a file that is there')
    .addOption(jsonOption())
    .action(
      async (
        folder: string,
        image: string,
        file: string,
        options: Json & { format: ExportFormat; part?: string; force?: boolean },
      ) => {
        const store = await openStore(folder);
        let manifest = await manifestOf(store, image);
        if (options.part !== undefined) {
          const { parts } = parseManifest(await store.readManifest(manifest), manifest);
          if (!Object.hasOwn(parts, options.part)) {
            const names = Object.keys(parts).join(', ') || 'none';
            throw new GridError('not-found', `${image} has no part '${options.part}'; it has ${names}`);
          }
          manifest = parts[options.part]!;
        }
        const progress = new Progress(`export ${image}`, options);
        const result = await exportImage(store, {
          manifest,
          path: file,
          format: options.format,
          force: options.force ?? false,
          onProgress: (done, total) => progress.update(done, total),
          signal: abortOnSignals(),
        }).finally(() => progress.end());
        show(
          options,
          result,
          () =>
            `${file} is ${image}, ${bytesText(result.sizeBytes)}, ${bytesText(result.nonzeroBytes)} of it data`,
        );
      },
    );
}

function gcVerb(): Command {
  return verb('gc', 'Remove what no image needs any more. Imports may run meanwhile.', [
    'gridvfs store gc /srv/store --dry-run',
    'gridvfs store gc /srv/store --grace 1h',
  ])
    .argument('<store>')
    .option('--dry-run', 'say what would be removed, and remove nothing')
    .addOption(
      new Option(
        '--grace <duration>',
        'keep what is younger, so that an import that was killed can go on where it was',
      )
        .argParser(parseDuration)
        .default(GC_GRACE_MS, '24h'),
    )
    .addOption(jsonOption())
    .action(async (folder: string, options: Json & { dryRun?: boolean; grace: number }) => {
      const store = await openStore(folder);
      const progress = new Progress('gc', options);
      const result = await collectGarbage(store, {
        dryRun: options.dryRun ?? false,
        graceMs: options.grace,
        onProgress: (done, total) => progress.update(done, total),
        signal: abortOnSignals(),
      }).finally(() => progress.end());
      const { manifests, tables, chunks, profiles } = result.removed;
      show(options, result, () =>
        [
          `${result.dryRun ? 'would remove' : 'removed'} ${manifests} manifests, ${tables} tables, ${chunks} chunks and ${profiles} profiles: ${bytesText(result.removedBytes)}`,
          ...(result.keptYoung === 0
            ? []
            : [
                `kept ${result.keptYoung} objects (${bytesText(result.keptYoungBytes)}) that nothing needs: they are younger than --grace, or than an import that runs`,
              ]),
        ].join('\n'),
      );
    });
}

function pinVerb(): Command {
  return verb(
    'pin',
    'Keep an image in the store though its name moves or goes; without an image: list pins.',
    ['gridvfs store pin /srv/store debian:12', 'gridvfs store pin /srv/store'],
  )
    .argument('<store>')
    .argument('[image]', 'name:version, or the digest of a manifest')
    .addOption(jsonOption())
    .action(async (folder: string, image: string | undefined, options: Json) => {
      const store = await openStore(folder);
      if (image === undefined) {
        const pins = await store.listPins();
        return show(options, pins, () => pins.join('\n') || 'nothing is pinned');
      }
      const manifest = await manifestOf(store, image);
      await store.pin(manifest);
      show(options, { pinned: manifest }, () => `pinned ${manifest}`);
    });
}

function unpinVerb(): Command {
  return verb('unpin', 'Take a pin away.', ['gridvfs store unpin /srv/store debian:12'])
    .argument('<store>')
    .argument('<image>', 'name:version, or the digest of a manifest')
    .addOption(jsonOption())
    .action(async (folder: string, image: string, options: Json) => {
      const store = await openStore(folder);
      const manifest = await manifestOf(store, image);
      await store.unpin(manifest);
      show(options, { unpinned: manifest }, () => `unpinned ${manifest}`);
    });
}

function holdsVerb(): Command {
  return verb('holds', 'List the images that are kept because clones of some host lie on them.', [
    'gridvfs store holds /srv/store',
  ])
    .argument('<store>')
    .addOption(jsonOption())
    .action(async (folder: string, options: Json) => {
      const holds = (await (await openStore(folder)).listHolds()).map(({ renewedMs, ...hold }) => ({
        ...hold,
        renewed: new Date(renewedMs).toISOString(),
      }));
      show(options, holds, () =>
        table(
          ['HOST', 'RENEWED', 'MANIFEST'],
          holds.flatMap(({ holder, renewed, manifests }) =>
            manifests.map((manifest) => [holder, renewed, manifest]),
          ),
        ),
      );
    });
}

export function storeVerbs(): Command {
  const group = verb('store', 'Make stores; import, export, list and verify images; collect garbage.');
  group.addCommand(
    verb('init', 'Make an empty store.', ['gridvfs store init /srv/store'])
      .argument('<store>', 'folder')
      .addOption(jsonOption())
      .action(async (folder: string, options: Json) => {
        await initStore(folder);
        show(options, { store: path.resolve(folder) }, () => `${folder} is a store`);
      }),
  );
  group.addCommand(importVerb());
  group.addCommand(exportVerb());
  group.addCommand(listVerb());
  group.addCommand(showVerb());
  group.addCommand(
    verb('tag', 'Give an image another name.', ['gridvfs store tag /srv/store debian:12 debian:latest'])
      .argument('<store>')
      .argument('<image>', 'name:version that is there')
      .argument('<new>', 'name:version to point at the same')
      .addOption(jsonOption())
      .action(async (folder: string, image: string, target: string, options: Json) => {
        const { name, version } = parseReference(target);
        const store = await openStore(folder);
        const tag = await store.setTag(name, version, (await store.resolve(image)).manifest);
        show(options, tag, () => `${target} is ${tag.manifest}`);
      }),
  );
  group.addCommand(
    verb(
      'rm',
      'Remove a name; of a checkpoint, those of its disk and its devices too. What nothing else needs goes with the next gc.',
      ['gridvfs store rm /srv/store debian:11', 'gridvfs store rm /srv/store web:warm'],
    )
      .argument('<store>')
      .argument('<image>', 'name:version')
      .addOption(jsonOption())
      .action(async (folder: string, image: string, options: Json) => {
        const { name, version } = parseReference(image);
        const store = await openStore(folder);
        const { tags } = await namesWithParts(store, `${name}:${version}`);
        await store.removeTags(tags);
        const [removed, ...parts] = tags.map((tag) => `${tag.name}:${tag.version}`);
        show(options, { removed, parts }, () => `removed ${[removed, ...parts].join(', ')}`);
      }),
  );
  for (const more of [pinVerb(), unpinVerb(), holdsVerb(), verifyVerb(), gcVerb()]) group.addCommand(more);
  return group;
}
