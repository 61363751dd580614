/**
 * Ranges of label values: `12`, `>=6.1 <7`, `>=2.36`. Comparators that stand beside each other must all hold; one
 * without an operator means exactly this text. Parts between dots and dashes compare as numbers where both are.
 */
import { GridError } from '../../core/errors.ts';

const COMPARATOR = /^(>=|<=|>|<|=)?([A-Za-z0-9][A-Za-z0-9._+~-]*)$/;

type Comparator = readonly [operator: string, value: string];

function parse(range: string): Comparator[] {
  return range
    .trim()
    .split(/\s+/)
    .map((text): Comparator => {
      const match = COMPARATOR.exec(text);
      if (!match) {
        throw new GridError('bad-request', `'${text}' is no version or range; write 12, >=6.1 or ">=6.1 <7"`);
      }
      return [match[1] ?? '=', match[2]!];
    });
}

/** Negative, zero, positive like every comparison. */
export function compareVersions(a: string, b: string): number {
  const left = a.split(/[.+~-]/);
  const right = b.split(/[.+~-]/);
  for (let part = 0; part < Math.max(left.length, right.length); part++) {
    const one = left[part] ?? '';
    const other = right[part] ?? '';
    const numbers = /^\d+$/.test(one) && /^\d+$/.test(other);
    const order = numbers ? Number(one) - Number(other) : one < other ? -1 : one > other ? 1 : 0;
    if (order !== 0) return order;
  }
  return 0;
}

/** Throws bad-request for a malformed range. */
export function inRange(value: string, range: string): boolean {
  return parse(range).every(([operator, bound]) => {
    if (operator === '=') return value === bound;
    const order = compareVersions(value, bound);
    if (operator === '>=') return order >= 0;
    if (operator === '<=') return order <= 0;
    return operator === '>' ? order > 0 : order < 0;
  });
}
