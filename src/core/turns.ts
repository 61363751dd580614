/** Work on things by name: what is done to one thing never overlaps, in order of asking. */
export class Turns {
  /** The last of each, which never rejects. */
  readonly #last = new Map<string, Promise<unknown>>();

  /** Runs `task` when what was asked for `name` before is over, however it ended. */
  async run<T>(name: string, task: () => Promise<T>): Promise<T> {
    const mine = (this.#last.get(name) ?? Promise.resolve()).then(task);
    const over = mine.catch(() => undefined);
    this.#last.set(name, over);
    try {
      return await mine;
    } finally {
      if (this.#last.get(name) === over) this.#last.delete(name);
    }
  }

  /** Names of what something is done to. */
  names(): string[] {
    return [...this.#last.keys()];
  }

  /** Resolves when all that was asked for is over. */
  async over(): Promise<void> {
    await Promise.all(this.#last.values());
  }
}
