/** A host's data volumes for tests of the broker: texts in a table, over a store that the hosts of a test share. */
import { setTimeout as sleep } from 'node:timers/promises';
import type { LinkVolumes } from '../../src/agent/broker-orders.ts';
import { sha256 } from '../../src/core/bytes.ts';
import { GridError } from '../../src/core/errors.ts';
import type { CarriedVolume, SavedVolume } from '../../src/core/grid.ts';

interface TableClone {
  manifest: string;
  content: string;
}

/** Data volumes that are texts. */
export class TableVolumes implements LinkVolumes {
  /** What this host has of them, by volume. */
  readonly clones = new Map<string, TableClone>();
  /** By VM as its host calls it. */
  readonly attached = new Map<string, readonly CarriedVolume[]>();
  /** By manifest, and by checkpoint: what the hosts of a test share. */
  store = { contents: new Map<string, string>(), checkpoints: new Map<string, readonly CarriedVolume[]>() };
  failure: GridError | undefined;
  /** What a version takes in the store. */
  savedBytes = 10;

  async attach(vm: string, volume: CarriedVolume): Promise<void> {
    await sleep(1);
    if (this.failure) throw this.failure;
    const content = this.store.contents.get(volume.manifest);
    if (content === undefined) throw new GridError('not-found', `no ${volume.manifest}`);
    const here = this.clones.get(volume.id);
    if (!volume.readOnly && here?.manifest !== volume.manifest)
      this.clones.set(volume.id, { manifest: volume.manifest, content });
    this.attached.set(vm, [...(this.attached.get(vm) ?? []), volume]);
  }

  async detach(vm: string, name: string): Promise<void> {
    if (this.failure) throw this.failure;
    this.attached.set(
      vm,
      (this.attached.get(vm) ?? []).filter((volume) => volume.name !== name),
    );
  }

  async make({ reference, from = '' }: { reference: string; from?: string }) {
    if (this.failure) throw this.failure;
    const digest = sha256(Buffer.from(reference));
    this.store.contents.set(digest, from);
    return { digest, newStoredBytes: 10 };
  }

  async save(id: string, reference: string): Promise<SavedVolume> {
    await sleep(1);
    if (this.failure) throw this.failure;
    const clone = this.clones.get(id);
    if (!clone) return { id, storedBytes: 0 };
    if (this.store.contents.get(clone.manifest) === clone.content)
      return { id, manifest: clone.manifest, storedBytes: 0 };
    clone.manifest = sha256(Buffer.from(reference));
    this.store.contents.set(clone.manifest, clone.content);
    return { id, reference, manifest: clone.manifest, storedBytes: this.savedBytes };
  }

  async drop(id: string): Promise<void> {
    this.clones.delete(id);
  }

  /** What the VM's guest sees. */
  seen(vm: string, name: string): string | undefined {
    const volume = this.attached.get(vm)?.find((one) => one.name === name);
    if (!volume) return undefined;
    return volume.readOnly ? this.store.contents.get(volume.manifest) : this.clones.get(volume.id)!.content;
  }
}
