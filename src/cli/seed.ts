/** What verbs that start machines read from files for the guests' seed. */
import { readFile } from 'node:fs/promises';
import { asGridError, GridError } from '../core/errors.ts';
import { PUBLIC_KEY_PATTERN } from '../core/machine.ts';

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
  const lines = text
    .split('\n')
    .map((line) => line.trim())
    .filter((line) => line !== '' && !line.startsWith('#'));
  const isKey = new RegExp(PUBLIC_KEY_PATTERN);
  // Nothing of it is repeated: it may be a private key.
  if (!lines.every((line) => isKey.test(line)))
    throw new GridError(
      'bad-request',
      '--ssh-key: that file has other lines than public keys; give the .pub file',
    );
  return lines;
}
