/** Options from the configuration file and from mount(8): what is taken, and what is refused with its line. */
import assert from 'node:assert/strict';
import { mkdtempSync, rmSync, writeFileSync } from 'node:fs';
import os from 'node:os';
import path from 'node:path';
import { after, test } from 'node:test';
import { applyConfig, applyMountOptions } from '../../src/cli/config.ts';
import { verb } from '../../src/cli/kit.ts';
import { mountVerb } from '../../src/cli/mount.ts';
import { addProxyOptions, proxyArguments } from '../../src/cli/proxy-options.ts';
import { GridError } from '../../src/core/errors.ts';

const folder = mkdtempSync(path.join(os.tmpdir(), 'gridvfs-config-'));
after(() => rmSync(folder, { recursive: true }));
const file = path.join(folder, 'gridvfs.toml');

function configured(text: string, section = 'mount'): Record<string, unknown> {
  writeFileSync(file, text);
  const command = addProxyOptions(verb('mount', ''));
  applyConfig(command, section, file);
  return command.opts();
}

function refused(pattern: RegExp, run: () => unknown): void {
  assert.throws(run, (error) => {
    assert.ok(error instanceof GridError && error.code === 'bad-request', String(error));
    assert.match(error.message, pattern);
    return true;
  });
}

test('values of the file arrive parsed, lists as lists, flags as flags', () => {
  const options = configured(
    '[mount]\nquota = "2G"\nworkers = 3\nidentity = ["/a", "/b"]\nread-only = true\nno-passthrough = true\nallow-other = false\n[server]\nssh = "0.0.0.0:1"\n',
  );
  assert.equal(options['quota'], 2 * 1024 ** 3);
  assert.equal(options['workers'], 3);
  assert.deepEqual(options['identity'], ['/a', '/b']);
  assert.equal(options['readOnly'], true);
  assert.equal(options['passthrough'], false);
  assert.equal(options['allowOther'], false);
});

test('unknown tables and keys, wrong types and options of one call are refused with file and line', () => {
  refused(/gridvfs\.toml:2: there is no 'muont'/, () => configured('\n[muont]\nquota = "1G"\n'));
  refused(/gridvfs\.toml:1: there is no 'quota'/, () => configured('quota = "1G"\n'));
  refused(/gridvfs\.toml:3: \[mount\] has no option 'quotta'/, () =>
    configured('[mount]\n\nquotta = "1G"\n'),
  );
  refused(/:2: \[mount\] has no option 'config'/, () => configured('[mount]\nconfig = "/x"\n'));
  refused(/has no option 'json'/, () => {
    writeFileSync(file, '[mount]\njson = true\n');
    applyConfig(mountVerb(), 'mount', file);
  });
  refused(/:2: \[mount\] quota must be a text/, () => configured('[mount]\nquota = true\n'));
  refused(/quota must be a text/, () => configured('[mount]\nquota = ["1G"]\n'));
  refused(/quota must be a text/, () => configured('[mount]\nquota = 1979-05-27\n'));
  refused(/read-only must be true or false/, () => configured('[mount]\nread-only = "yes"\n'));
  refused(/identity must be texts/, () => configured('[mount]\nidentity = [1]\n'));
  refused(/quota/, () => configured('[mount]\nquota = "much"\n'));
  refused(/driver/, () => configured('[mount]\ndriver = "none"\n'));
  refused(/must be a table/, () => configured('mount = 3\n'));
});

test('-o takes what mount(8) and fstab write, and leaves alone what is not for a file system', () => {
  const command = addProxyOptions(verb('mount', ''));
  applyMountOptions(command, [
    'rw,noauto,nofail,_netdev,x-systemd.automount,relatime,nosuid,user=joe',
    'ro,allow_other,uid=1000,gid=100,quota=1G,cache_dir=/c,identity=/a,identity=/b,no-passthrough',
  ]);
  assert.deepEqual(proxyArguments(command, '/store', '/mnt', 'grid'), [
    ...[
      'proxy',
      'run',
      '/store',
      '/mnt',
      '--name',
      'grid',
      '--cache-dir',
      '/c',
      '--quota',
      String(1024 ** 3),
    ],
    ...['--no-passthrough', '--read-only', '--allow-other', '--uid', '1000', '--gid', '100'],
    ...['--identity', '/a', '--identity', '/b'],
  ]);
});

test('-o refuses what no option has, and flags with values and values without', () => {
  const apply = (list: string) => applyMountOptions(addProxyOptions(verb('mount', '')), [list]);
  refused(/has no option 'nonsense'/, () => apply('nonsense=1'));
  refused(/has no option 'suid'/, () => apply('suid'));
  refused(/quota must be a text/, () => apply('quota'));
  refused(/ro=1 must be true or false/, () => apply('ro=1'));
  refused(/uid=joe/, () => apply('uid=joe'));
});
