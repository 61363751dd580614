/**
 * Rules of the tree that matter, as tests: who may import whom, how long a file may grow, what is never called.
 * A folder imports src/core, node: and itself, plus the packages listed for it here; only src/main.ts, src/cli,
 * tests and benches see two layers.
 */
import assert from 'node:assert/strict';
import { readdirSync, readFileSync } from 'node:fs';
import path from 'node:path';
import { test } from 'node:test';

const ROOT = path.resolve(import.meta.dirname, '..');

/** Folders whose files form one unit, with the packages each may import. */
const FOLDERS: Record<string, { packages: string[]; folders?: string[] }> = {
  'src/core': { packages: ['koffi', 'xxhash-wasm'] },
  'src/store': { packages: ['lru-cache'] },
  'src/image': { packages: ['tar-stream'] },
  'src/frontend/fuse': { packages: ['koffi', 'fuse-native'] },
  'src/vmm': { packages: [] },
  'src/network': { packages: [] },
  'src/agent': { packages: ['fastify', 'prom-client'] },
  'src/broker': { packages: ['fastify', '@fastify/rate-limit', '@fastify/swagger', 'pg'] },
  cache: { packages: ['lru-cache'] },
  proxy: { packages: ['fastify', 'lru-cache', 'prom-client', 'ssh2'] },
  'src/cli': {
    packages: ['commander', 'cli-progress', 'smol-toml'],
    folders: [
      'src/store',
      'src/image',
      'src/frontend/fuse',
      'src/vmm',
      'src/network',
      'src/agent',
      'src/broker',
      'cache',
      'proxy',
    ],
  },
};

const LINES_MAX = 500;

function filesBelow(folder: string): string[] {
  return readdirSync(path.join(ROOT, folder), { recursive: true, withFileTypes: true })
    .filter((entry) => entry.isFile() && /\.(ts|mjs)$/.test(entry.name))
    .map((entry) => path.relative(ROOT, path.join(entry.parentPath, entry.name)));
}

const SOURCES = ['src', 'cache', 'proxy', 'bench', 'test'].flatMap(filesBelow);

function importsOf(file: string): string[] {
  const text = readFileSync(path.join(ROOT, file), 'utf8');
  return [
    ...text.matchAll(/^(?:import|export)[^'"`;]*?from\s+['"]([^'"]+)['"]|\bimport\(\s*['"]([^'"]+)['"]/gm),
  ].map((match) => (match[1] ?? match[2])!);
}

const folderOf = (file: string) => Object.keys(FOLDERS).find((folder) => file.startsWith(folder + '/'));

test('a folder imports src/core, node: and itself, plus the packages listed for it', () => {
  const wrong: string[] = [];
  for (const file of SOURCES) {
    const own = folderOf(file);
    if (own === undefined) continue;
    const allowed = FOLDERS[own]!;
    for (const target of importsOf(file)) {
      if (target.startsWith('node:')) continue;
      if (target.startsWith('.')) {
        const to = path.relative(ROOT, path.resolve(ROOT, path.dirname(file), target));
        const inside = to.startsWith(own + '/') || to.startsWith('src/core/');
        const listed = allowed.folders?.some((folder) => to.startsWith(folder + '/')) ?? false;
        if (!inside && !listed) wrong.push(`${file} imports ${to}`);
      } else if (!allowed.packages.some((name) => target === name || target.startsWith(name + '/'))) {
        wrong.push(`${file} imports the package ${target}`);
      }
    }
  }
  assert.deepEqual(wrong, []);
});

test('every package that is installed for the program is used by it', () => {
  const { dependencies } = JSON.parse(readFileSync(path.join(ROOT, 'package.json'), 'utf8')) as {
    dependencies: Record<string, string>;
  };
  const used = new Set(SOURCES.filter((file) => !file.startsWith('test/')).flatMap(importsOf));
  assert.deepEqual(
    Object.keys(dependencies).filter((name) => !used.has(name)),
    [],
  );
});

test('nothing imports bench or test', () => {
  const wrong = SOURCES.filter((file) => !file.startsWith('test/') && !file.startsWith('bench/')).flatMap(
    (file) =>
      importsOf(file)
        .filter((target) => target.startsWith('.'))
        .map((target) => path.relative(ROOT, path.resolve(ROOT, path.dirname(file), target)))
        .filter((to) => to.startsWith('bench/') || to.startsWith('test/'))
        .map((to) => `${file} imports ${to}`),
  );
  assert.deepEqual(wrong, []);
});

test(`no file is longer than ${LINES_MAX} lines`, () => {
  const long = SOURCES.map((file) => ({
    file,
    lines: readFileSync(path.join(ROOT, file), 'utf8').split('\n').length,
  })).filter(({ lines }) => lines > LINES_MAX);
  assert.deepEqual(long, []);
});

test('no leftover notes to self, no test that runs alone', () => {
  // Written so that this file does not match itself.
  const marks = /FIX[M]E|\b(?:test|describe|it)[.]only\b/;
  const wrong = SOURCES.filter((file) => marks.test(readFileSync(path.join(ROOT, file), 'utf8')));
  assert.deepEqual(wrong, []);
});
