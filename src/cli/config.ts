/**
 * The configuration file: TOML, one table per verb with the long options' names as keys. What the command line
 * says wins over the file. A key that no option has is refused, so a typing error does not go unnoticed.
 *
 *   [mount]
 *   cache-dir = "/srv/cache"
 *   quota = "200G"
 */
import { existsSync, readFileSync } from 'node:fs';
import type { Command } from 'commander';
import { parse } from 'smol-toml';
import { asGridError, GridError } from '../core/errors.ts';
import { configPath } from './paths.ts';

/** Fills options of `command` that the command line did not set from table `section` of the file. */
export function applyConfig(command: Command, section: string, explicitPath?: string): void {
  const file = explicitPath ?? configPath();
  if (explicitPath === undefined && !existsSync(file)) return;
  let root: Record<string, unknown>;
  try {
    root = parse(readFileSync(file, 'utf8'));
  } catch (error) {
    throw asGridError(error, `cannot read the configuration file ${file}`, 'bad-request');
  }
  const values = root[section];
  if (values === undefined) return;
  if (typeof values !== 'object' || values === null || Array.isArray(values)) {
    throw new GridError('bad-request', `${file}: [${section}] must be a table`);
  }
  for (const [key, value] of Object.entries(values)) {
    const option = command.options.find((candidate) => candidate.long === `--${key}`);
    if (!option) {
      const known = command.options.map((candidate) => candidate.long?.slice(2)).join(', ');
      throw new GridError('bad-request', `${file}: [${section}] has no option '${key}'; it has ${known}`);
    }
    const name = option.attributeName();
    const source = command.getOptionValueSource(name);
    if (source !== undefined && source !== 'default') continue;
    const parseText = (text: string): unknown => {
      try {
        return option.parseArg ? option.parseArg(text, undefined as never) : text;
      } catch (error) {
        throw asGridError(error, `${file}: [${section}] ${key}`, 'bad-request');
      }
    };
    const parsed =
      typeof value === 'boolean'
        ? value !== option.negate
        : Array.isArray(value)
          ? value.map(String)
          : parseText(String(value));
    command.setOptionValueWithSource(name, parsed, 'config');
  }
}
