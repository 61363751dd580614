/** What verbs that start machines read from files for the guests' seed. */
import { readFile } from 'node:fs/promises';
import { asGridError } from '../core/errors.ts';

/** The text of a file. */
export async function textOf(file: string): Promise<string> {
  try {
    return await readFile(file, 'utf8');
  } catch (error) {
    throw asGridError(error, `cannot read ${file}`);
  }
}

/** The keys of a file like authorized_keys. */
export function keysIn(text: string): string[] {
  return text
    .split('\n')
    .map((line) => line.trim())
    .filter((line) => line !== '' && !line.startsWith('#'));
}
