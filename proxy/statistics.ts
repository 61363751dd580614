/** What a source did so far, as plain figures, and what happens to its connection, for a log. */

export interface SourceStatistics {
  /** Calls of listTags, readManifest, readTable, readProfile, recordProfile and readChunks. */
  readonly requests: number;
  /** HTTP exchanges: what cost a round trip. */
  readonly roundTrips: number;
  readonly chunksReceived: number;
  /** Bodies of answers as they travel, without HTTP and ssh around them. */
  readonly bytesReceived: number;
  /** Times the way was made again after it broke. */
  readonly reconnects: number;
  /** Chunks that did not decode, as the receiver reported. */
  readonly corruptChunks: number;
  /** Why it cannot be reached, while its way is being made again. */
  readonly down?: string;
}

/** The counters behind it. */
export type SourceCounters = { -readonly [Key in keyof SourceStatistics]: SourceStatistics[Key] };

export function newCounters(): SourceCounters {
  return {
    requests: 0,
    roundTrips: 0,
    chunksReceived: 0,
    bytesReceived: 0,
    reconnects: 0,
    corruptChunks: 0,
  };
}

export interface SourceEvent {
  readonly type: 'connected' | 'lost' | 'retry' | 'reconnected';
  readonly message: string;
}
