/** Programs of the host. */
import { constants } from 'node:fs';
import { access } from 'node:fs/promises';
import path from 'node:path';

/** The program's path, looked up in PATH where it has no slash; undefined when there is none to execute. */
export async function findProgram(program: string): Promise<string | undefined> {
  const candidates = program.includes('/')
    ? [path.resolve(program)]
    : (process.env['PATH'] ?? '/usr/bin:/bin').split(':').map((folder) => path.join(folder || '.', program));
  for (const candidate of candidates) {
    try {
      await access(candidate, constants.X_OK);
      return candidate;
    } catch {
      // The next one.
    }
  }
  return undefined;
}
