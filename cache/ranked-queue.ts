/** What waits to be fetched, the lowest rank first, in order of coming within a rank. */
export class RankedQueue<T extends { readonly key: string; readonly rank: number }> {
  readonly #ranks = new Map<number, Map<string, T>>();
  /** Of those that are not empty, rising. */
  #order: number[] = [];
  #size = 0;

  get size(): number {
    return this.#size;
  }

  add(item: T): void {
    let rank = this.#ranks.get(item.rank);
    if (!rank) {
      this.#ranks.set(item.rank, (rank = new Map()));
      this.#order = [...this.#ranks.keys()].toSorted((a, b) => a - b);
    }
    if (!rank.has(item.key)) this.#size++;
    rank.set(item.key, item);
  }

  has({ key, rank }: T): boolean {
    return this.#ranks.get(rank)?.has(key) === true;
  }

  /** False when it does not wait. */
  delete({ key, rank }: T): boolean {
    const items = this.#ranks.get(rank);
    if (items?.delete(key) !== true) return false;
    this.#size--;
    if (items.size > 0) return true;
    this.#ranks.delete(rank);
    this.#order = this.#order.filter((one) => one !== rank);
    return true;
  }

  clear(): void {
    this.#ranks.clear();
    this.#order = [];
    this.#size = 0;
  }

  /** What is deleted meanwhile does not hurt. */
  *[Symbol.iterator](): Generator<T> {
    for (const rank of this.#order) yield* this.#ranks.get(rank)?.values() ?? [];
  }
}
