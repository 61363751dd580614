/** The README's claims that can be checked against the code: the error table, the files it names. */
import assert from 'node:assert/strict';
import { existsSync, readFileSync } from 'node:fs';
import path from 'node:path';
import { test } from 'node:test';
import type { Command } from 'commander';
import { BEGIN, END, performanceSection, readResults } from '../bench/readme.ts';
import { program } from '../src/cli/program.ts';
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

/** `gridvfs VERB …` as it stands in the README, in blocks (with `\` at a line's end) and in sentences. */
function namedCommands(): string[] {
  const [...blocks] = text.matchAll(/^```\w*\n([\s\S]*?)^```/gm);
  const lines = blocks.flatMap(([, block]) => block!.replaceAll(/\\\n\s*/g, '').split('\n'));
  const prose = text.replaceAll(/^```[\s\S]*?^```/gm, '');
  const inline = [...prose.matchAll(/`(gridvfs [^`]+)`/g)].map((match) => match[1]!);
  return [...lines.filter((line) => line.startsWith('gridvfs ')), ...inline];
}

test('every command that the README names is there, and has the options that it is shown with', async () => {
  const commands = namedCommands();
  assert.ok(commands.length > 80, `${commands.length} commands`);
  const wrong: string[] = [];
  for (const line of commands) {
    const words = line
      .replace(/\s#.*$/, '')
      .split(/\s+/)
      .slice(1);
    if (['bench', 'demo'].includes(words[0]!) || !/^[a-z]/.test(words[0]!)) continue; // the benches read theirs themselves
    let command: Command | undefined = await program(['node', 'gridvfs', ...words]);
    // `share|unshare` and the like are several.
    for (const word of words) {
      const next: Command | undefined = command.commands.find((one) => word.split('|').includes(one.name()));
      if (next === undefined) break;
      command = next;
    }
    if (command.commands.length > 0 && words.length > 1) wrong.push(`${line}: no such verb`);
    const own = words.includes('--') ? words.slice(0, words.indexOf('--')) : words;
    for (const word of own.filter((one) => one.startsWith('--'))) {
      if (!command.options.some(({ long }) => long === word)) wrong.push(`${line}: ${word}`);
    }
  }
  assert.deepEqual(wrong, []);
});

test('every option that a sentence of the README names is one of some command', async () => {
  const sentences = text
    .replaceAll(/^```[\s\S]*?^```/gm, '')
    .replaceAll(/<!-- performance:begin[\s\S]*performance:end -->/g, '');
  // Those that the benches read themselves, and another program's.
  const known = new Set(['--check', '--guest', '--help', '--link', '--wan']);
  const take = ({ options, commands }: Command) => {
    for (const { long } of options) if (long) known.add(long);
    commands.forEach(take);
  };
  for (const group of (await program([])).commands)
    (await program(['node', 'gridvfs', group.name()])).commands.forEach(take);
  const named = [...sentences.matchAll(/`(--[a-z][a-z-]+)/g)].map((match) => match[1]!);
  assert.ok(named.length > 20);
  assert.deepEqual(
    named.filter((option) => !known.has(option)),
    [],
  );
});
