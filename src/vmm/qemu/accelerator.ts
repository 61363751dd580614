/**
 * Which accelerator this host can really use. /dev/kvm may exist, open, and still not run an ordinary guest: where
 * the host's own processor shows neither vmx nor svm (nested without hardware), a stock kernel hangs early and
 * burns a core. So KVM needs both the flag and the device; everything else is TCG, and the operator may override.
 */
import { constants } from 'node:fs';
import { open, readFile } from 'node:fs/promises';
import { errnoOf } from '../../core/errors.ts';

export type Accelerator = 'kvm' | 'tcg';

export interface AcceleratorChoice {
  readonly accelerator: Accelerator;
  /** One sentence. */
  readonly reason: string;
}

export async function chooseAccelerator(wanted: 'auto' | Accelerator): Promise<AcceleratorChoice> {
  if (wanted !== 'auto') return { accelerator: wanted, reason: `${wanted} was asked for` };
  let flags = '';
  try {
    flags = await readFile('/proc/cpuinfo', 'utf8');
  } catch {
    // No /proc: no flag to trust.
  }
  if (!/^flags\s*:.*\b(?:vmx|svm)\b/m.test(flags)) {
    return { accelerator: 'tcg', reason: 'the processor shows neither vmx nor svm in /proc/cpuinfo' };
  }
  try {
    await (await open('/dev/kvm', constants.O_RDWR)).close();
  } catch (error) {
    return { accelerator: 'tcg', reason: `/dev/kvm does not open (${errnoOf(error) ?? String(error)})` };
  }
  return { accelerator: 'kvm', reason: 'the processor has hardware virtualization and /dev/kvm opens' };
}
