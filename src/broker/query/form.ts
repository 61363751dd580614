/**
 * Compositional queries: sets of resources that together have what is asked for. The form is JSON; compile.ts makes
 * the SQL that finds candidates, search.ts composes sets of them.
 *
 *   physical hosts that can instantiate a VM with 1 GB
 *     { "find": "hosts", "canRun": { "memoryBytes": 1073741824 } }
 *   sets of four different VMs on the same network with total memory between 512 MB and 1 GB
 *     { "find": "vms", "count": 4, "same": "network",
 *       "total": [{ "field": "memoryBytes", "atLeast": 536870912, "atMost": 1073741824 }] }
 *   16 hosts on one LAN that together have 32 GB
 *     { "find": "hosts", "count": 16, "same": "network", "total": [{ "field": "memoryBytes", "atLeast": 34359738368 }] }
 *
 * Hosts that are VMs themselves are found only with `virtual`; what does not run yet only as `find: futures` or
 * through `canRun`.
 */
import { list, name, object } from '../schemas.ts';

export const FINDABLE = ['hosts', 'vms', 'futures'] as const;
export const OPERATORS = ['=', '!=', '<', '<=', '>', '>='] as const;
export const TOTALS = ['memoryBytes', 'vcpus'] as const;

export interface Condition {
  readonly field: string;
  readonly operator: (typeof OPERATORS)[number];
  readonly value: string | number;
}

export interface Total {
  readonly field: (typeof TOTALS)[number];
  readonly atLeast?: number;
  readonly atMost?: number;
}

export interface Query {
  readonly find: (typeof FINDABLE)[number];
  /** What each resource must be. */
  readonly where?: readonly Condition[];
  /** Hosts: what they must still promise. */
  readonly canRun?: { readonly memoryBytes?: number; readonly vcpus?: number; readonly machines?: number };
  /** Resources in a set; 1 when left out. */
  readonly count?: number;
  /** All of a set on one network. */
  readonly same?: 'network';
  /** What a set must have together. */
  readonly total?: readonly Total[];
  /** Also hosts that are VMs. */
  readonly virtual?: boolean;
  /** Networks at most `hops` links from this one. */
  readonly scope?: { readonly network: string; readonly hops: number };
  /** Answer by then with what there is. */
  readonly withinMs?: number;
  /** Totals as what each resource must have: misses sets of unequal ones, costs no search. */
  readonly approximate?: boolean;
  /** In random order: with `limit`, a random sample. */
  readonly nondeterministic?: boolean;
  /** Sets at most; 1 when left out. */
  readonly limit?: number;
}

export interface Found {
  readonly id: string;
  readonly memoryBytes: number;
  readonly vcpus: number;
  readonly network?: string;
}

export interface Answer {
  readonly sets: readonly (readonly Found[])[];
  /** All sets there are, or as many as were asked for; false when the time or a bound ended the search. */
  readonly complete: boolean;
  readonly elapsedMs: number;
}

const amount = { type: 'integer', minimum: 0, maximum: Number.MAX_SAFE_INTEGER };

export const querySchema = object(
  {
    find: { type: 'string', enum: FINDABLE },
    where: list(
      object(
        {
          field: { type: 'string', maxLength: 64 },
          operator: { type: 'string', enum: OPERATORS },
          value: { type: ['string', 'integer'], maxLength: 1024 },
        },
        ['field', 'operator', 'value'],
      ),
      32,
    ),
    canRun: object({ memoryBytes: amount, vcpus: amount, machines: amount }),
    count: { type: 'integer', minimum: 1, maximum: 256 },
    same: { type: 'string', enum: ['network'] },
    total: list(
      object({ field: { type: 'string', enum: TOTALS }, atLeast: amount, atMost: amount }, ['field']),
      4,
    ),
    virtual: { type: 'boolean' },
    scope: object({ network: name, hops: { type: 'integer', minimum: 0, maximum: 16 } }, ['network', 'hops']),
    withinMs: { type: 'integer', minimum: 1, maximum: 60_000 },
    approximate: { type: 'boolean' },
    nondeterministic: { type: 'boolean' },
    limit: { type: 'integer', minimum: 1, maximum: 10_000 },
  },
  ['find'],
);
