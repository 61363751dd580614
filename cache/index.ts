/** The disk cache: `openCache` and what it gives. Everything else in this folder is its own business. */
export { openCache } from './cache.ts';
export type { Cache, CacheOptions } from './cache.ts';
export type { CachedImage } from './cached-image.ts';
export type { PrefetchOptions } from './prefetch.ts';
export type { CachedImageStatus, CacheStatus } from './status.ts';
export type { ScrubResult, WarmResult } from './upkeep.ts';
