/** gridvfs vm attach|detach|limit: thin calls of the proxy's control socket. */
import type { Command } from 'commander';
import type { AttachRequest } from '../agent/vm-volumes.ts';
import type { VmStatus, VmVolume } from '../agent/vm-record.ts';
import { GridError } from '../core/errors.ts';
import type { IoLimits } from '../core/machine.ts';
import { bytesText, jsonOption, parseBytes, parseCount, parseDuration, show, verb } from './kit.ts';
import { findProxy, withProxyOption } from './registry.ts';

interface Options {
  json?: boolean;
  proxy?: string;
}

const routeOf = (id: string, action: string) => `/v1/vms/${encodeURIComponent(id)}/${action}`;

export function limitsOf({ ioBytes, ioOps }: { ioBytes?: number; ioOps?: number }): IoLimits {
  return {
    ...(ioBytes === undefined ? {} : { bytesPerSecond: ioBytes }),
    ...(ioOps === undefined ? {} : { operationsPerSecond: ioOps }),
  };
}

function limitsText({ bytesPerSecond, operationsPerSecond }: IoLimits): string {
  const parts = [
    ...(bytesPerSecond === undefined ? [] : [`${bytesText(bytesPerSecond)} a second`]),
    ...(operationsPerSecond === undefined ? [] : [`${operationsPerSecond} operations a second`]),
  ];
  return parts.length === 0 ? 'without bounds' : `at most ${parts.join(', ')}`;
}

export function volumeVerbs(): Command[] {
  return [
    withProxyOption(
      verb(
        'attach',
        'Give a VM that runs another disk: a data image, of which it gets a clone, or a clone of yours.',
        [
          'gridvfs vm attach web data:7                    # gone with the VM, or when it is detached',
          'gridvfs vm attach web --clone work --name work  # stays; the guest finds /dev/disk/by-id/virtio-work',
        ],
      ),
    )
      .argument('<vm>')
      .argument('[image]', 'name:version')
      .option('--clone <id>', 'this clone instead')
      .option('--name <name>', 'serial number of the disk in the guest (default: that of image or clone)')
      .option('--read-only', 'the guest cannot write to it')
      .addOption(jsonOption())
      .action(
        async (
          id: string,
          image: string | undefined,
          options: Options & { clone?: string; name?: string; readOnly?: boolean },
        ) => {
          if ((image === undefined) === (options.clone === undefined))
            throw new GridError('bad-request', 'name an image, or a clone with --clone (one of the two)');
          const { client } = await findProxy(options.proxy);
          const request: AttachRequest = {
            ...(image === undefined ? {} : { image }),
            ...(options.clone === undefined ? {} : { clone: options.clone }),
            ...(options.name === undefined ? {} : { name: options.name }),
            ...(options.readOnly === undefined ? {} : { readOnly: options.readOnly }),
          };
          const volume = await client.call<VmVolume>('POST', routeOf(id, 'attach'), request);
          show(
            options,
            volume,
            () => `${id} has volume ${volume.name}: clone ${volume.clone} of ${volume.image}`,
          );
        },
      ),
    withProxyOption(
      verb('detach', 'Take a volume from a VM; its guest is asked to let go of it.', [
        'gridvfs vm detach web work',
      ]),
    )
      .argument('<vm>')
      .argument('<volume>')
      .option('--timeout <duration>', 'how long the guest may take (default: 30s)', parseDuration)
      .addOption(jsonOption())
      .action(async (id: string, volumeName: string, options: Options & { timeout?: number }) => {
        const { client } = await findProxy(options.proxy);
        const volume = await client.call<VmVolume>('POST', routeOf(id, 'detach'), {
          name: volumeName,
          ...(options.timeout === undefined ? {} : { timeoutMs: options.timeout }),
        });
        show(options, volume, () =>
          volume.discards ? `volume ${volume.name} is gone` : `clone ${volume.clone} is free again`,
        );
      }),
    withProxyOption(
      verb('limit', 'Bound what a VM’s disks do a second, from now on; without options: no bounds.', [
        'gridvfs vm limit web --io-bytes 20M --io-ops 500',
        'gridvfs vm limit web',
      ]),
    )
      .argument('<vm>')
      .option('--io-bytes <size>', 'most bytes a second', parseBytes)
      .option('--io-ops <count>', 'most operations a second', parseCount)
      .addOption(jsonOption())
      .action(async (id: string, options: Options & { ioBytes?: number; ioOps?: number }) => {
        const { client } = await findProxy(options.proxy);
        const vm = await client.call<VmStatus>('POST', routeOf(id, 'limits'), limitsOf(options));
        show(options, vm, () => `${id}: ${limitsText(vm.limits ?? {})}`);
      }),
  ];
}
