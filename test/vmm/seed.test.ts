/** The seed's image, as other programs see it; that a guest reads it is in the suite of machines. */
import assert from 'node:assert/strict';
import { execFileSync } from 'node:child_process';
import { mkdtempSync, rmSync, writeFileSync } from 'node:fs';
import os from 'node:os';
import path from 'node:path';
import { after, test } from 'node:test';
import { seedImage } from '../../src/vmm/seed.ts';

const temporary = mkdtempSync(path.join(os.tmpdir(), 'gridvfs-seed-'));
after(() => rmSync(temporary, { recursive: true, force: true }));

test('a seed is an ISO 9660 image with the label that cloud-init looks for, the same for the same words', () => {
  const seed = {
    instanceId: 'one-1',
    hostName: 'o"ne',
    sshKeys: ['ssh-ed25519 AAAA a@b'],
    userData: '#cloud-config\nx: 1\n',
  };
  const image = seedImage(seed);
  const file = path.join(temporary, 'seed.iso');
  writeFileSync(file, image);
  const said = execFileSync('blkid', ['-p', '-o', 'export', file], { encoding: 'utf8' });
  assert.match(said, /^LABEL=cidata$/m);
  assert.match(said, /^TYPE=iso9660$/m);
  const text = image.toString('latin1');
  assert.ok(
    text.includes(
      'instance-id: "one-1"\nlocal-hostname: "o\\"ne"\npublic-keys:\n  - "ssh-ed25519 AAAA a@b"\n',
    ),
  );
  assert.ok(text.includes('#cloud-config\nx: 1\n'));
  assert.deepEqual(seedImage(seed), image);
  // A fork's takes the place of the one that its guest knows.
  assert.equal(
    seedImage({ ...seed, instanceId: 'another-name-2', hostName: 'another' }).length,
    image.length,
  );
});
