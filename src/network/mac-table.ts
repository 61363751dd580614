/**
 * Which port a MAC address was last seen at. Bounded by its form: sets of a few entries, where the one unused for longest
 * makes room; and each port owns a bounded number, so a machine that invents addresses forgets its own and not others'.
 * Nothing is allocated after the start, and an entry that is too old is no entry.
 */

const SETS = 1024;
const WAYS = 4;
/** As bridges have it. */
export const MAC_AGE_SECONDS = 300;
const NOBODY = -1;

export class MacTable {
  readonly #low = new Uint32Array(SETS * WAYS);
  readonly #high = new Uint16Array(SETS * WAYS);
  readonly #port = new Int32Array(SETS * WAYS).fill(NOBODY);
  readonly #seenSeconds = new Float64Array(SETS * WAYS);
  /** Entries of each port. */
  readonly #owned: number[] = [];

  /** The port of an address, or -1. `high` has its first two bytes and `low` the other four. */
  find(high: number, low: number, nowSeconds: number): number {
    const first = setOf(high, low);
    for (let at = first; at < first + WAYS; at++) {
      if (this.#low[at] === low && this.#high[at] === high) {
        return nowSeconds - this.#seenSeconds[at]! > MAC_AGE_SECONDS ? NOBODY : this.#port[at]!;
      }
    }
    return NOBODY;
  }

  /** The address is at `port`, which may own `ownedMax` entries. */
  learn(high: number, low: number, port: number, nowSeconds: number, ownedMax: number): void {
    const first = setOf(high, low);
    let chosen = -1;
    for (let at = first; at < first + WAYS; at++) {
      if (this.#port[at] !== NOBODY && this.#low[at] === low && this.#high[at] === high) {
        this.#seenSeconds[at] = nowSeconds;
        if (this.#port[at] === port) return;
        chosen = at;
        break;
      }
    }
    const owned = this.#owned[port] ?? 0;
    if (owned >= ownedMax) {
      this.#forgetAged(nowSeconds);
      if ((this.#owned[port] ?? 0) >= ownedMax) {
        // It has moved to a port that cannot have it: better nowhere than at the wrong one.
        if (chosen >= 0) this.#free(chosen);
        return;
      }
    }
    if (chosen < 0) {
      chosen = first;
      for (let at = first; at < first + WAYS; at++) {
        if (this.#port[at] === NOBODY) {
          chosen = at;
          break;
        }
        if (this.#seenSeconds[at]! < this.#seenSeconds[chosen]!) chosen = at;
      }
    }
    this.#free(chosen);
    this.#low[chosen] = low;
    this.#high[chosen] = high;
    this.#port[chosen] = port;
    this.#seenSeconds[chosen] = nowSeconds;
    this.#owned[port] = (this.#owned[port] ?? 0) + 1;
  }

  #free(at: number): void {
    const port = this.#port[at]!;
    if (port === NOBODY) return;
    this.#owned[port]!--;
    this.#port[at] = NOBODY;
  }

  #agedAtSeconds = -Infinity;

  #forgetAged(nowSeconds: number): void {
    // A port at its bound would have all of it looked through for each of its frames.
    if (nowSeconds - this.#agedAtSeconds < 1) return;
    this.#agedAtSeconds = nowSeconds;
    for (let at = 0; at < this.#port.length; at++) {
      if (nowSeconds - this.#seenSeconds[at]! > MAC_AGE_SECONDS) this.#free(at);
    }
  }

  /** The port is gone. */
  forget(port: number): void {
    for (let at = 0; at < this.#port.length; at++) if (this.#port[at] === port) this.#free(at);
  }

  /** Entries that somebody owns. */
  get size(): number {
    return this.#owned.reduce((sum, count) => sum + count, 0);
  }
}

function setOf(high: number, low: number): number {
  return ((Math.imul(low ^ Math.imul(high, 0x9e3779b1), 0x85ebca6b) >>> 16) % SETS) * WAYS;
}
