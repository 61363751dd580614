/**
 * What every verb shares: output for people and machines, progress, failures and exit codes. Exit codes: 0 ok,
 * 1 failed, 2 usage (also every `bad-request`).
 */
import { Command, CommanderError, Help, InvalidArgumentError, Option } from 'commander';
import cliProgress from 'cli-progress';
import { asGridError, errnoOf } from '../core/errors.ts';
import { GIB, KIB, MIB } from '../core/limits.ts';

/** A group or verb with the settings all share; `examples` end its --help. */
export function verb(name: string, summary: string, examples: readonly string[] = []): Command {
  const help = new Help();
  const command = new Command(name).description(summary).exitOverride().showHelpAfterError(false);
  command.configureOutput({
    outputError: (text, write) => write(`${oneLine(text.replace(/^error: /, 'gridvfs: '))} [bad-request]\n`),
  });
  command.configureHelp({
    optionDescription(option) {
      const text = textOfDefault(option);
      if (text !== undefined) option.defaultValueDescription ??= text;
      return help.optionDescription(option);
    },
  });
  if (examples.length > 0) {
    command.addHelpText(
      'after',
      `\nExample${examples.length > 1 ? 's' : ''}:\n${examples.map((line) => `  $ ${line}`).join('\n')}`,
    );
  }
  return command;
}

/** The default of a size or duration as people write it; undefined for others, which print as they are. */
function textOfDefault({ defaultValue, parseArg }: Option): string | undefined {
  if (typeof defaultValue !== 'number') return undefined;
  const units = parseArg === parseBytes ? SIZE_UNITS : parseArg === parseDuration ? TIME_UNITS : [];
  const unit = units.find(([, size]) => defaultValue >= size && defaultValue % size === 0);
  return unit && `${defaultValue / unit[1]} ${unit[0]}`;
}

const SIZE_UNITS: [string, number][] = [
  ['GiB', GIB],
  ['MiB', MIB],
  ['KiB', KIB],
];
const TIME_UNITS: [string, number][] = [
  ['h', 3_600_000],
  ['min', 60_000],
  ['s', 1000],
  ['ms', 1],
];

export function jsonOption(): Option {
  return new Option('--json', 'print JSON for programs');
}

/** Prints `value` as JSON, or the text for people. */
export function show(options: { json?: boolean }, value: unknown, text: () => string): void {
  process.stdout.write((options.json ? JSON.stringify(value, null, 2) : text()) + '\n');
}

/** Columns as wide as their widest cell; numbers to the right. */
export function table(head: readonly string[], rows: readonly (readonly (string | number)[])[]): string {
  const cells = [head, ...rows].map((row) => row.map(String));
  const widths = head.map((_, column) => Math.max(...cells.map((row) => (row[column] ?? '').length)));
  const right = head.map(
    (_, column) =>
      rows.length > 0 &&
      rows.every((row) => /^[\d.,]+( .?i?B| s| %|x)?$|^-?$/.test(String(row[column] ?? ''))),
  );
  return cells
    .map((row) =>
      row
        .map((cell, column) =>
          right[column] ? cell.padStart(widths[column]!) : cell.padEnd(widths[column]!),
        )
        .join('  ')
        .trimEnd(),
    )
    .join('\n');
}

/** 1536 → "1.5 KiB". */
export function bytesText(bytes: number): string {
  if (bytes >= GIB) return `${(bytes / GIB).toFixed(2)} GiB`;
  if (bytes >= MIB) return `${(bytes / MIB).toFixed(1)} MiB`;
  if (bytes >= KIB) return `${(bytes / KIB).toFixed(1)} KiB`;
  return `${bytes} B`;
}

const UNITS: Record<string, number> = { '': 1, k: KIB, m: MIB, g: GIB, t: 1024 * GIB };

/** "20G", "512MiB", "4096" → bytes, as an option's parser. */
export function parseBytes(text: string): number {
  const match = /^(\d+(?:\.\d+)?)\s*([kmgt]?)(?:i?b)?$/i.exec(text.trim());
  if (!match) throw new InvalidArgumentError('Write a size such as 20G, 512M or 4096.');
  return Math.floor(Number(match[1]) * UNITS[match[2]!.toLowerCase()]!);
}

/** A positive whole number, as an option's parser. */
export function parseCount(text: string): number {
  const value = Number(text);
  if (!Number.isSafeInteger(value) || value < 1)
    throw new InvalidArgumentError('Write a whole number of at least 1.');
  return value;
}

/** The parser of an option that may be given again. */
export function collect(value: string, previous: string[] | undefined): string[] {
  return [...(previous ?? []), value];
}

/** A user's or group's number, as an option's parser. */
export function parseId(text: string): number {
  if (!/^\d+$/.test(text) || Number(text) >= 2 ** 32 - 1)
    throw new InvalidArgumentError('Write the number of a user or group, e.g. 1000.');
  return Number(text);
}

/** "120s", "2m", "500ms", "30" (seconds) → milliseconds, as an option's parser. */
export function parseDuration(text: string): number {
  const match = /^(\d+(?:\.\d+)?)(ms|s|m|h)?$/.exec(text.trim());
  if (!match) throw new InvalidArgumentError('Write a duration such as 500ms, 30s or 2m.');
  return Math.round(Number(match[1]) * { ms: 1, s: 1000, m: 60_000, h: 3_600_000 }[match[2] ?? 's']!);
}

/** "127.0.0.1:2222", ":2222" or "2222" → where to listen; without a host the loopback address. */
export function parseListen(text: string): { host: string; port: number } {
  const match = /^(?:\[([0-9a-fA-F:]+)\]|([^:]*))?:?(\d+)$/.exec(/^\d+$/.test(text) ? `:${text}` : text);
  const port = Number(match?.[3]);
  if (!match || port > 65_535)
    throw new InvalidArgumentError('Write HOST:PORT, e.g. 127.0.0.1:2222 (port 0 picks one).');
  return { host: match[1] ?? (match[2] === '' || match[2] === undefined ? '127.0.0.1' : match[2]), port };
}

/** Progress of long work: a bar on a terminal, a line a second elsewhere; on standard error, quiet with --json. */
export class Progress {
  readonly #what: string;
  readonly #quiet: boolean;
  #bar: cliProgress.SingleBar | undefined;
  #lastLineMs = 0;

  constructor(what: string, options: { json?: boolean } = {}) {
    this.#what = what;
    this.#quiet = options.json === true && !process.stderr.isTTY;
  }

  update(done: number, total: number): void {
    if (this.#quiet) return;
    if (process.stderr.isTTY) {
      this.#bar ??= new cliProgress.SingleBar(
        {
          format: `${this.#what} {bar} {percentage} % | {eta_formatted} left`,
          stream: process.stderr,
          hideCursor: true,
        },
        cliProgress.Presets.shades_grey,
      );
      if (!this.#bar.isActive) this.#bar.start(total, done);
      this.#bar.setTotal(total);
      this.#bar.update(done);
      return;
    }
    const now = performance.now();
    if (now - this.#lastLineMs < 1000) return;
    this.#lastLineMs = now;
    process.stderr.write(`${this.#what}: ${total > 0 ? Math.floor((100 * done) / total) : 0} %\n`);
  }

  end(): void {
    this.#bar?.stop();
  }
}

/** Runs the program and turns whatever it throws into one line and an exit code. */
export async function runToExit(program: Command, argv: string[]): Promise<void> {
  // Whoever reads our output may stop reading (`| head`): that is no failure.
  process.stdout.on('error', (error) => process.exit(errnoOf(error) === 'EPIPE' ? 0 : 1));
  try {
    await program.parseAsync(argv);
  } catch (error) {
    process.exitCode = report(error);
  }
}

function oneLine(text: string): string {
  return text.trim().replaceAll(/\s*\n\s*/g, '; ');
}

function report(error: unknown): number {
  if (error instanceof CommanderError) return error.exitCode === 0 ? 0 : 2;
  const known = asGridError(error, 'gridvfs failed', 'bug');
  process.stderr.write(`gridvfs: ${oneLine(known.message)} [${known.code}]\n`);
  if (process.env['GRIDVFS_DEBUG']) console.error(error);
  return known.code === 'bad-request' ? 2 : 1;
}

/** A signal that aborts on Ctrl-C or SIGTERM; the second Ctrl-C ends the process at once. */
export function abortOnSignals(): AbortSignal {
  const controller = new AbortController();
  const stop = () => {
    if (controller.signal.aborted) process.exit(130);
    controller.abort();
  };
  process.on('SIGINT', stop);
  process.on('SIGTERM', stop);
  return controller.signal;
}
