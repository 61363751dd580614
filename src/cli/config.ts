/**
 * Options from elsewhere than the command line: the configuration file, and the comma list of `-o` as mount(8) and
 * fstab give it. Both use the long options' names. What no option has, or has the wrong type, is refused with its
 * line, so a typing error does not go unnoticed.
 *
 * The file is TOML, one table per verb; the command line wins over it:
 *
 *   [mount]
 *   cache-dir = "/srv/cache"
 *   quota = "200G"
 *   identity = ["/etc/gridvfs/id_ed25519"]
 */
import { existsSync, readFileSync } from 'node:fs';
import type { Command, Option } from 'commander';
import { parse } from 'smol-toml';
import { asGridError, GridError } from '../core/errors.ts';
import { collect } from './kit.ts';
import { configPath } from './paths.ts';

/** The tables that a file may have, by the verbs that read them. */
const SECTIONS = ['mount', 'server'];
/** About one call, not about the thing that is configured. */
const NEVER_CONFIGURED = new Set(['config', 'json', 'options']);

/** Fills options of `command` that the command line did not set from table `section` of the file. */
export function applyConfig(command: Command, section: string, explicitPath?: string): void {
  const file = explicitPath ?? configPath();
  if (explicitPath === undefined && !existsSync(file)) return;
  let text: string;
  let root: Record<string, unknown>;
  try {
    text = readFileSync(file, 'utf8');
    root = parse(text);
  } catch (error) {
    throw asGridError(error, `cannot read the configuration file ${file}`, 'bad-request');
  }
  for (const [name, table] of Object.entries(root)) {
    const where = `${file}${lineOf(text, undefined, name)}`;
    if (!SECTIONS.includes(name)) {
      const known = SECTIONS.map((one) => `[${one}]`).join(' and ');
      throw new GridError(
        'bad-request',
        `${where}: there is no '${name}' here; options stand below ${known}`,
      );
    }
    if (!isTable(table)) throw new GridError('bad-request', `${where}: [${name}] must be a table`);
  }
  for (const [key, value] of Object.entries((root[section] ?? {}) as Record<string, unknown>)) {
    const where = `${file}${lineOf(text, section, key)}`;
    const option = optionNamed(command, key, `${where}: [${section}]`);
    const name = option.attributeName();
    const source = command.getOptionValueSource(name);
    if (source !== undefined && source !== 'default') continue;
    const parsed = parsedValue(option, value, `${where}: [${section}] ${key}`);
    command.setOptionValueWithSource(name, parsed, 'config');
  }
}

/** Options of mount(8), fstab and systemd that say nothing to a file system, or what holds here anyway. */
const NEUTRAL =
  /^(rw|defaults|auto|noauto|user|nouser|users|owner|group|_netdev|nofail|nosuid|nodev|exec|noexec|async|(no|rel|strict)?(dir)?atime|(no)?lazytime|user=.*|comment=.*|[xX]-.*)$/;
/** What other file systems call it. */
const ALIASES: Record<string, string> = { ro: 'read-only', allow_other: 'allow-other' };

/** Sets options of `command` from lists such as "ro,uid=1000,quota=50G,x-systemd.automount". */
export function applyMountOptions(command: Command, lists: readonly string[]): void {
  for (const item of lists.flatMap((list) => list.split(',')).filter((one) => one !== '')) {
    if (NEUTRAL.test(item)) continue;
    const at = item.indexOf('=');
    const word = at < 0 ? item : item.slice(0, at);
    const option = optionNamed(command, ALIASES[word] ?? word.replaceAll('_', '-'), '-o', word === 'config');
    const name = option.attributeName();
    const value = parsedValue(option, at < 0 ? true : item.slice(at + 1), `-o ${item}`);
    const repeated = Array.isArray(value) ? ((command.getOptionValue(name) ?? []) as unknown[]) : [];
    command.setOptionValueWithSource(name, Array.isArray(value) ? [...repeated, ...value] : value, 'cli');
  }
}

function optionNamed(command: Command, key: string, where: string, evenOfTheCall = false): Option {
  const usable = command.options.filter(
    (one) => !one.hidden && one.long && (evenOfTheCall || !NEVER_CONFIGURED.has(one.long.slice(2))),
  );
  const option = usable.find((one) => one.long === `--${key}`);
  if (option) return option;
  const known = usable.map((one) => one.long!.slice(2)).join(', ');
  throw new GridError('bad-request', `${where} has no option '${key}'; it has ${known}`);
}

function parsedValue(option: Option, value: unknown, where: string): unknown {
  const repeatable = option.parseArg === collect;
  const wanted = option.isBoolean() || option.negate ? 'true or false' : repeatable ? 'texts' : 'a text';
  const wrong = () => new GridError('bad-request', `${where} must be ${wanted}`);
  if (wanted === 'true or false') {
    if (typeof value !== 'boolean') throw wrong();
    return value !== option.negate;
  }
  if (repeatable) {
    const all: unknown[] = Array.isArray(value) ? value : [value];
    if (!all.every((one) => typeof one === 'string')) throw wrong();
    return all;
  }
  if (typeof value !== 'string' && typeof value !== 'number' && typeof value !== 'bigint') throw wrong();
  try {
    return option.parseArg ? option.parseArg(String(value), undefined as never) : String(value);
  } catch (error) {
    throw asGridError(error, where, 'bad-request');
  }
}

function isTable(value: unknown): boolean {
  return typeof value === 'object' && value !== null && !Array.isArray(value) && !(value instanceof Date);
}

/** ":12", the line on which the table, or the key of a table, stands; '' where it cannot be told. */
function lineOf(text: string, section: string | undefined, key: string): string {
  let current: string | undefined;
  for (const [index, line] of text.split('\n').entries()) {
    const header = /^\s*\[+\s*"?([^\]"]*?)"?\s*\]/.exec(line)?.[1];
    if (header !== undefined) current = header.split('.')[0];
    const found = header !== undefined ? undefined : /^\s*"?([^"=.\s]+)"?\s*[=.]/.exec(line)?.[1];
    if (section === undefined ? current === key || found === key : current === section && found === key)
      return `:${index + 1}`;
  }
  return '';
}
