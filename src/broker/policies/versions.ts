/** Which image version serves a request best: all labels that it needs, fewest others, most bytes warm, newest. */
import { inRange } from './labels.ts';

export interface VersionCandidate {
  readonly image: string;
  readonly version: string;
  readonly manifest: string;
  readonly created: string;
  readonly labels: Readonly<Record<string, string>>;
  readonly deprecated?: string;
  /** Most that one host has of it. */
  readonly warmBytes: number;
}

export interface VersionNeed {
  /** `name` or `name:version`. */
  readonly image?: string;
  /** Ranges by label. */
  readonly labels: Readonly<Record<string, string>>;
}

export interface RankedVersion extends VersionCandidate {
  /** Labels that nobody asked for, how the machine is started aside. */
  readonly surplus: number;
  readonly why: string;
}

/** Labels that say how a machine is started, not what is in it. */
const ABOUT_STARTING = /^(boot|machine)\./;

/** Why a version does not serve; undefined when it does. */
export function misfit(version: VersionCandidate, need: VersionNeed): string | undefined {
  const reference = `${version.image}:${version.version}`;
  if (need.image !== undefined && need.image !== version.image && need.image !== reference)
    return 'another image';
  if (version.deprecated !== undefined && need.image !== reference)
    return `deprecated: ${version.deprecated}`;
  for (const [label, range] of Object.entries(need.labels)) {
    const value = version.labels[label];
    if (value === undefined) return `has no label ${label}`;
    if (!inRange(value, range)) return `has ${label} ${value}, not ${range}`;
  }
  return undefined;
}

export function rankVersions(versions: readonly VersionCandidate[], need: VersionNeed): RankedVersion[] {
  return versions
    .filter((version) => misfit(version, need) === undefined)
    .map((version) => {
      const surplus = Object.keys(version.labels).filter(
        (label) => !ABOUT_STARTING.test(label) && !(label in need.labels),
      ).length;
      const why = `has all ${Object.keys(need.labels).length} labels asked for and ${surplus} others, ${version.warmBytes} bytes warm on a host`;
      return { ...version, surplus, why };
    })
    .toSorted(
      (a, b) =>
        a.surplus - b.surplus ||
        b.warmBytes - a.warmBytes ||
        (a.created < b.created ? 1 : a.created > b.created ? -1 : 0),
    );
}
