/**
 * `gridvfs bench instantiate` and `gridvfs demo`: the field's founding table on this host. How long from asking
 * for a VM until its guest answers: from local disk, over a LAN link and over a WAN link, each cold and then warm; how
 * long an application in it takes then; and what a full copy of one's own costs instead.
 *
 * Every VM is a non-persistent clone, but for the rows that say `full`. Cold: the host's cache folder is empty. Warm: it
 * holds what earlier starts fetched. Local and warm runs are interleaved, so that a drift of the machine's speed meets
 * all alike, and the first of each is a warm-up that does not count: a warm guest is quicker than a cold one, so
 * read-ahead reaches a chunk or two further. The ratio of a warm run is to the local run of its own round. `profile`: cold,
 * but the origin has the profile of another start.
 *
 * Resumes are the table's other row: from the request until the guest has said what only its memory holds (lib/resumes.ts).
 * `--only resume` measures these, and of the reboots what their promises need.
 *
 * Everything started is stopped at the end, on failure and on Ctrl-C.
 */
import { rm } from 'node:fs/promises';
import path from 'node:path';
import { parseArgs } from 'node:util';
import { isRoot } from '../src/core/linux.ts';
import { createQemu } from '../src/vmm/index.ts';
import { hostFacts } from './lib/facts.ts';
import { heatOf } from './lib/heat.ts';
import { KnownSets, prepareCheckpoints, resumeGrid, resumeLocal } from './lib/resumes.ts';
import type { Checkpoints } from './lib/resumes.ts';
import { printStarts, promisesOf, rowsOf } from './lib/start-rows.ts';
import type { Runs } from './lib/start-rows.ts';
import { check, printPromises, recordOf, writeRecord } from './lib/record.ts';
import { runProgram } from './peers/program.ts';
import { abortOnSignals, failed, prepareScene, say } from './lib/scene.ts';
import type { Scene } from './lib/scene.ts';
import { startGrid, startLocal } from './lib/starts.ts';
import type { Start } from './lib/starts.ts';
import { EMULATORS, parseLink } from './link/network.ts';

/** Of the rounds, those in which an application runs too: it takes as long as a boot, and its time spreads less. */
const APPLICATION_RUNS = 9;
const DEMO = process.env['GRIDVFS_BENCH_AS'] === 'demo';

function options() {
  const { values } = parseArgs({
    options: {
      guest: { type: 'string', default: 'small' },
      runs: { type: 'string' },
      'cold-runs': { type: 'string' },
      lan: { type: 'string', default: '0.2ms,1gbit' },
      wan: { type: 'string', default: '30ms,100mbit' },
      link: { type: 'string' },
      quick: { type: 'boolean', default: false },
      full: { type: 'boolean' },
      application: { type: 'boolean' },
      only: { type: 'string' },
      check: { type: 'boolean', default: false },
      json: { type: 'string' },
    },
    allowNegative: true,
  });
  const quick = DEMO || values.quick;
  const count = (name: 'runs' | 'cold-runs', otherwise: number) => {
    const text = values[name] ?? String(otherwise);
    const value = Number(text);
    if (!Number.isSafeInteger(value) || value < 1)
      throw new RangeError(`--${name} ${text}: write a whole number of at least 1`);
    return value;
  };
  const guest = (['small', 'debian'] as const).find((name) => name === values.guest);
  if (guest === undefined) throw new RangeError(`--guest ${values.guest}: write small or debian`);
  const asked = values.link ?? (DEMO || !isRoot() ? 'relay' : 'packets');
  const emulator = EMULATORS.find((name) => name === asked);
  if (emulator === undefined) throw new RangeError(`--link ${asked}: write ${EMULATORS.join(' or ')}`);
  const only = (['reboot', 'resume'] as const).find((name) => name === values.only);
  if (only === undefined && values.only !== undefined)
    throw new RangeError(`--only ${values.only}: write reboot or resume`);
  return {
    guest,
    emulator,
    runs: { reboot: count('runs', quick ? 5 : 23), resume: count('runs', quick ? 5 : 13) },
    coldRuns: count('cold-runs', quick ? 1 : 3),
    links: [parseLink('lan', values.lan), parseLink('wan', values.wan)],
    asked: { lan: values.lan, wan: values.wan },
    only,
    full: values.full ?? (!DEMO && only === undefined),
    application: values.application ?? (!DEMO && only === undefined),
    check: values.check,
    json: values.json,
  };
}

type Settings = ReturnType<typeof options>;

interface Step {
  readonly kind: 'reboot' | 'resume';
  readonly subject: string;
  readonly counted: boolean;
  readonly run: (scene: Scene, number: number) => Promise<Start>;
}

/** A start over `link` with a cache folder of that name. */
const grid = (link: string, cache: string, more: { profile?: boolean; application?: boolean } = {}) => {
  return (scene: Scene) => startGrid(scene, { link, cache, ...more });
};

/** The same over an empty cache folder, which goes afterwards. */
const cold = (link: string, more: { profile?: boolean; application?: boolean; full?: boolean } = {}) => {
  return async (scene: Scene, number: number): Promise<Start> => {
    const cache = `cache-cold-${number}`;
    try {
      return await startGrid(scene, { link, cache, ...more });
    } finally {
      await rm(path.join(scene.folder, cache), { recursive: true, force: true });
    }
  };
};

/** The whole image copied on this host, then started from the copy. */
async function startFromCopy(scene: Scene, number: number): Promise<Start> {
  const copy = path.join(scene.folder, `copy-${number}.raw`);
  try {
    return await startLocal(scene, {
      name: `copied-${number}`,
      backing: { file: copy, format: 'raw' },
      before: async () =>
        void (await runProgram(
          ['cp', '--sparse=always', '--reflink=never', scene.guest.disk, copy],
          scene.signal,
        )),
    });
  } finally {
    await rm(copy, { force: true });
  }
}

type Plain = Pick<Step, 'subject' | 'run'>;
const counted = (steps: readonly Plain[]) => steps.map((step) => ({ ...step, counted: true }));

/** Always in the same order, so that it is equally long ago for everybody that somebody read the same files: what a disk
 * or the host of this machine still has of them counts. (There and back again, a local resume right after another one was
 * 0.30 s instead of 0.38.) */
const rounds = (count: number, steps: readonly Plain[]) =>
  counted(Array.from({ length: count }, () => steps).flat());

/** Of the reboots, what the resumes are compared with. */
function fewReboots({ runs }: Settings): Omit<Step, 'kind'>[] {
  const run = grid('lan', 'cache-lan');
  const local = (scene: Scene, number: number) => startLocal(scene, { name: `local-${number}` });
  return [
    { subject: 'local', run: local, counted: true },
    { subject: 'lan-cold', run, counted: false },
    ...counted(Array.from({ length: Math.min(runs.reboot, 2) }, () => ({ subject: 'lan-warm', run }))),
  ];
}

/**
 * As the reboots: once in the table's order, then rounds of local and warm ones, then cold ones. Cold ones find at the
 * origin what the checkpoint's publication left there (its rehearsal); `profile`: what another resume over the first link
 * left that found nothing; `unknown`: nothing, and record nothing. What warm ones know is what a proxy knows by default.
 */
function resumesOf({ runs, coldRuns }: Settings, checkpoints: Checkpoints): Omit<Step, 'kind'>[] {
  let published: KnownSets | undefined;
  let recorded: KnownSets | undefined;
  const over = (link: string) => (scene: Scene) => {
    (published ??= KnownSets.now(scene)).restore();
    return resumeGrid(scene, checkpoints, { link, cache: `cache-resumes-${link}`, profile: true });
  };
  const overEmpty =
    (link: string, options: { profile: boolean; records?: boolean }, known: (scene: Scene) => void) =>
    async (scene: Scene, number: number) => {
      known(scene);
      const cache = `cache-resume-${number}`;
      try {
        return await resumeGrid(scene, checkpoints, { link, cache, ...options });
      } finally {
        await rm(path.join(scene.folder, cache), { recursive: true, force: true });
      }
    };
  const local = {
    subject: 'local',
    run: (scene: Scene, number: number) => resumeLocal(scene, checkpoints, `resumed-${number}`),
  };
  const warm = (link: string) => ({ subject: `${link}-warm`, run: over(link) });
  const firstOf = (link: string) => ({ subject: `${link}-cold`, run: over(link), counted: true });
  const cold = (link: string) => ({
    subject: `${link}-cold`,
    run: overEmpty(link, { profile: true }, () => published!.restore()),
  });
  const record = overEmpty('lan', { profile: true, records: true }, (scene) => KnownSets.forget(scene));
  const coldProfile = (link: string) => ({
    subject: `${link}-cold-profile`,
    run: overEmpty(link, { profile: true }, (scene) => (recorded ??= KnownSets.now(scene)).restore()),
  });
  const unknown = (link: string) => ({
    subject: `${link}-cold-unknown`,
    run: overEmpty(link, { profile: false }, () => undefined),
  });
  return [
    { ...local, counted: false },
    firstOf('lan'),
    { ...warm('lan'), counted: false },
    firstOf('wan'),
    { ...warm('wan'), counted: false },
    ...rounds(runs.resume, [local, warm('lan'), warm('wan')]),
    { subject: 'lan-cold-recording', run: record, counted: false },
    // Twice as many as of the reboots: a second each.
    ...Array.from({ length: 2 * coldRuns }, (_, round) =>
      counted([
        ...(round === 0 ? [] : [cold('lan'), cold('wan')]),
        coldProfile('lan'),
        coldProfile('wan'),
        unknown('lan'),
        unknown('wan'),
      ]),
    ).flat(),
  ];
}

/**
 * Once in the table's order, of which only the cold ones count; then rounds of the others, interleaved; then a start that
 * records the profile, and the cold ones again, with and without it.
 */
function rebootsOf({ runs, coldRuns, full, application }: Settings): Omit<Step, 'kind'>[] {
  const local = (applied: boolean) => ({
    subject: 'local',
    run: (scene: Scene, number: number) =>
      startLocal(scene, { name: `local-${number}`, application: applied }),
  });
  const warm = (link: string, applied: boolean) => ({
    subject: `${link}-warm`,
    run: grid(link, `cache-${link}`, { application: applied }),
  });
  const round = (applied: boolean) => [local(applied), warm('lan', applied), warm('wan', applied)];
  const withApplication = application ? Math.min(APPLICATION_RUNS, runs.reboot) : 0;
  const first = (link: string): Omit<Step, 'kind'>[] => [
    { subject: `${link}-cold`, run: grid(link, `cache-${link}`, { application }), counted: true },
    { ...warm(link, application), counted: false },
  ];
  const again = (coldRound: number): Omit<Step, 'kind'>[] =>
    counted([
      ...(coldRound === 0
        ? []
        : ['lan', 'wan'].map((link) => ({ subject: `${link}-cold`, run: cold(link, { application }) }))),
      ...['lan', 'wan'].map((link) => ({
        subject: `${link}-cold-profile`,
        run: cold(link, { profile: true }),
      })),
    ]);
  return [
    { ...local(application), counted: false },
    ...first('lan'),
    ...first('wan'),
    ...rounds(withApplication, round(true)),
    ...rounds(runs.reboot - withApplication, round(false)),
    { subject: 'lan-warm-recording', run: grid('lan', 'cache-lan', { profile: true }), counted: false },
    ...Array.from({ length: coldRuns }, (_, coldRound) => again(coldRound)).flat(),
    ...(full
      ? counted([
          { subject: 'local-copy', run: startFromCopy },
          ...['lan', 'wan'].map((link) => ({ subject: `${link}-full`, run: cold(link, { full: true }) })),
        ])
      : []),
  ];
}

async function measure(scene: Scene, plan: readonly Step[]): Promise<Record<Step['kind'], Runs>> {
  const all = { reboot: new Map() as Runs, resume: new Map() as Runs };
  const startedMs = performance.now();
  for (const [index, { kind, subject, counted: counts, run }] of plan.entries()) {
    scene.signal.throwIfAborted();
    const start = await run(scene, index);
    const runs = all[kind];
    if (counts) runs.set(subject, [...(runs.get(subject) ?? []), start]);
    const fetched = start.grid === undefined ? '' : `, ${start.grid.fetchedChunks} chunks fetched`;
    const application =
      start.applicationSeconds === undefined ? '' : `, application ${start.applicationSeconds.toFixed(2)} s`;
    const leftSeconds = ((performance.now() - startedMs) / 1000 / (index + 1)) * (plan.length - index - 1);
    const left = leftSeconds < 90 ? `${Math.ceil(leftSeconds)} s` : `${Math.ceil(leftSeconds / 60)} min`;
    say(
      `[${index + 1}/${plan.length}] ${`${kind} ${subject}`.padEnd(25)} ${start.seconds.toFixed(2)} s${application}${fetched}${counts ? '' : ' (not counted)'}${leftSeconds > 0 ? `; about ${left} left` : ''}`,
    );
  }
  return all;
}

async function main(): Promise<void> {
  const settings = options();
  const signal = abortOnSignals();
  const { accelerator, usable, reason } = await createQemu({ accelerator: 'auto' }).probe();
  if (!usable) throw new Error(`no VM can run here: ${reason ?? 'no reason given'}`);

  await using stack = new AsyncDisposableStack();
  const { guest, emulator, links } = settings;
  const host = hostFacts(accelerator ?? 'tcg');
  const scene = await prepareScene(stack, { guest, emulator, links, signal });
  const checkpoints =
    DEMO || settings.only === 'reboot' ? undefined : await prepareCheckpoints(scene, links[0]!.name);
  const reboots = settings.only === 'resume' ? fewReboots(settings) : rebootsOf(settings);
  const { reboot, resume } = await measure(scene, [
    ...reboots.map((step) => ({ ...step, kind: 'reboot' as const })),
    ...(checkpoints === undefined ? [] : resumesOf(settings, checkpoints)).map((step) => ({
      ...step,
      kind: 'resume' as const,
    })),
  ]);
  const rows = rowsOf(scene, reboot, resume);
  const promises = promisesOf(rows, checkpoints?.memoryNonzeroBytes);
  printStarts(scene, rows, settings.asked);
  if (!DEMO) printPromises(promises);
  if (settings.json !== undefined) {
    await writeRecord(settings.json, {
      ...recordOf('instantiate', scene, settings.asked, host),
      rows,
      promises,
      ...(checkpoints === undefined ? {} : { memoryNonzeroBytes: checkpoints.memoryNonzeroBytes }),
      heat: await heatOf(scene),
    });
  }
  if (settings.check) check(promises);
}

try {
  await main();
} catch (error) {
  failed(DEMO ? 'demo' : 'bench instantiate', error);
}
