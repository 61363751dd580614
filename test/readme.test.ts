/** The README's claims that can be checked against the code: the error table, the files it names. */
import assert from 'node:assert/strict';
import { existsSync, readFileSync } from 'node:fs';
import path from 'node:path';
import { test } from 'node:test';
import { BEGIN, END, performanceSection, readResults } from '../bench/readme.ts';
import { ERROR_CODES } from '../src/core/errors.ts';

const ROOT = path.resolve(import.meta.dirname, '..');
const text = readFileSync(path.join(ROOT, 'README.md'), 'utf8');

test('the error table has exactly the codes of errors.ts, with their sentences', () => {
  const rows = Object.entries(ERROR_CODES).map(
    ([code, { blame, help }]) => `| \`${code}\` | ${blame} | ${help} |`,
  );
  const expected = ['| code | who failed | what to do |', '| --- | --- | --- |', ...rows].join('\n');
  const found = /<!-- errors:begin -->\n([\s\S]*?)\n?<!-- errors:end -->/.exec(text)?.[1]?.trim();
  assert.equal(found, expected);
});

test('every source file that the README names exists', () => {
  const named = [...text.matchAll(/`((?:src|cache|proxy|bench|test)\/[\w./-]+\.\w+)`/g)].map(
    (match) => match[1]!,
  );
  assert.ok(named.length > 5);
  assert.deepEqual(
    named.filter((file) => !existsSync(path.join(ROOT, file))),
    [],
  );
});

test('every figure of the performance section comes from the record of a bench', () => {
  const found = text.slice(text.indexOf(BEGIN) + BEGIN.length, text.indexOf(END)).trim();
  assert.equal(found, performanceSection(readResults()));
});
