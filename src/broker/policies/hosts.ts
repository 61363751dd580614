/** Which host a VM goes to: one where it fits and that has most of its image and its volumes, then as the policy says. */

export interface HostCandidate {
  readonly host: string;
  /** What it still promises. */
  readonly memoryBytes: number;
  readonly vcpus: number;
  readonly machines: number;
  /** Bytes of the image version in its cache. */
  readonly warmBytes: number;
  /** Bytes of its data volumes there. */
  readonly volumeBytes: number;
  readonly load: number;
  /** This VM failed there before. */
  readonly failedBefore: boolean;
}

/** `warm`: where the bytes are. `spread`: where most memory is free. `pack`: where least is. */
export const POLICIES = ['warm', 'spread', 'pack'] as const;
export type Policy = (typeof POLICIES)[number];

export interface HostNeed {
  readonly memoryBytes: number;
  readonly vcpus: number;
  readonly policy: Policy;
}

export interface RankedHost extends HostCandidate {
  readonly why: string;
}

/** Why a host does not serve; undefined when it does. */
export function hostMisfit(host: HostCandidate, need: HostNeed): string | undefined {
  if (host.failedBefore) return 'this VM failed there before';
  if (host.memoryBytes < need.memoryBytes)
    return `promises ${host.memoryBytes} bytes of memory more, not ${need.memoryBytes}`;
  if (host.vcpus < need.vcpus) return `promises ${host.vcpus} vcpus more, not ${need.vcpus}`;
  if (host.machines < 1) return 'promises no further machine';
  return undefined;
}

/** Bytes that differ by less than this are equally warm: what a boot leaves differs from run to run. */
const WARM_STEP_BYTES = 1024 * 1024;

export function rankHosts(hosts: readonly HostCandidate[], need: HostNeed): RankedHost[] {
  const warm = (host: HostCandidate) => Math.floor((host.warmBytes + host.volumeBytes) / WARM_STEP_BYTES);
  const order: Record<Policy, (a: HostCandidate, b: HostCandidate) => number> = {
    warm: (a, b) => warm(b) - warm(a) || b.memoryBytes - a.memoryBytes,
    spread: (a, b) => b.memoryBytes - a.memoryBytes || warm(b) - warm(a),
    pack: (a, b) => a.memoryBytes - b.memoryBytes || warm(b) - warm(a),
  };
  return hosts
    .filter((host) => hostMisfit(host, need) === undefined)
    .toSorted(
      (a, b) =>
        order[need.policy](a, b) ||
        b.volumeBytes - a.volumeBytes ||
        a.load - b.load ||
        (a.host < b.host ? -1 : 1),
    )
    .map((host) => ({
      ...host,
      why: `policy ${need.policy}: ${host.warmBytes} bytes of the image warm, ${host.volumeBytes > 0 ? `${host.volumeBytes} of its volumes, ` : ''}${host.memoryBytes} bytes of memory promised, load ${host.load.toFixed(2)}`,
    }));
}
