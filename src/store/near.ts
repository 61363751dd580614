/** "Did you mean": the tags nearest to what a person typed. */
import type { Tag } from '../core/manifest.ts';

const NEAR_TAGS_MAX = 5;

/** Up to five tags, nearest first: other versions of the same name, then names within a few typing errors. */
export function nearTags(wanted: string, tags: readonly Tag[]): string[] {
  const name = wanted.split(':')[0]!;
  return tags
    .map((tag) => {
      const full = `${tag.name}:${tag.version}`;
      return { full, distance: tag.name === name ? 0 : editDistance(wanted, full) };
    })
    .filter(({ distance }) => distance <= Math.max(3, wanted.length / 3))
    .toSorted((a, b) => a.distance - b.distance || (a.full < b.full ? -1 : 1))
    .slice(0, NEAR_TAGS_MAX)
    .map(({ full }) => full);
}

/** Levenshtein's distance, one row at a time. */
function editDistance(a: string, b: string): number {
  let row = Array.from({ length: b.length + 1 }, (_, i) => i);
  for (let i = 1; i <= a.length; i++) {
    const next = [i];
    for (let j = 1; j <= b.length; j++) {
      next.push(Math.min(row[j]! + 1, next[j - 1]! + 1, row[j - 1]! + (a[i - 1] === b[j - 1] ? 0 : 1)));
    }
    row = next;
  }
  return row[b.length]!;
}
