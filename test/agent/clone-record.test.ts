/** Records of clones that somebody damaged: refused by code, whatever JSON they hold. */
import assert from 'node:assert/strict';
import { mkdtempSync, rmSync, writeFileSync } from 'node:fs';
import os from 'node:os';
import path from 'node:path';
import { after, test } from 'node:test';
import { readRecord } from '../../src/agent/clone-record.ts';
import { GridError } from '../../src/core/errors.ts';

const folder = mkdtempSync(path.join(os.tmpdir(), 'gridvfs-record-'));
after(() => rmSync(folder, { recursive: true }));

for (const [text, code] of [
  ['{"schema":{"toString":1}}', 'newer-format'],
  ['null', 'newer-format'],
  ['{"schema":2}', 'bad-format'],
  ['{"schema":2,', 'bad-format'],
] as const) {
  test(`a record ${text} is ${code}`, async () => {
    writeFileSync(path.join(folder, 'clone.json'), text);
    await assert.rejects(
      () => readRecord(folder),
      (error) => error instanceof GridError && error.code === code,
    );
  });
}
