/**
 * Every bound of the program, each with its reason. Relations between them are asserted at load (below), so a
 * change that breaks one fails the first test that imports anything.
 */
import { invariant } from './errors.ts';

export const KIB = 1024;
export const MIB = 1024 * KIB;
export const GIB = 1024 * MIB;

/** Chunk size of new images. At 256 KiB a boot fetches 75 MB where 64 KiB fetches 53 and 1 MiB 124, but a
 * round trip carries four times as much as at 64 KiB and zstd gains 5 %. */
export const CHUNK_BYTES_DEFAULT = 256 * KIB;
/** Chunk size of memory images: what a guest touches after a resume is scattered by pages. */
export const MEMORY_CHUNK_BYTES = 16 * KIB;
/** Smaller chunks make the table (36 bytes each) cost more than it saves. Also the unit of a memory page. */
export const CHUNK_BYTES_MIN = 4 * KIB;
/** A chunk is held in memory whole, several at a time. */
export const CHUNK_BYTES_MAX = 4 * MIB;

/** Largest image: keeps offsets well inside 2^53 and a table inside 64 Mi chunks at the default size. */
export const IMAGE_BYTES_MAX = 16 * 1024 * GIB;

/** A stored chunk that is larger than its plain bytes by more than this is not one of ours: zstd stores
 * incompressible data raw with a few bytes of frame around it (ZSTD_compressBound). */
export const STORED_OVERHEAD_BYTES_MAX = 4 * KIB;

/** A manifest is a page of JSON; whatever is larger is an attack or a mistake. */
export const MANIFEST_BYTES_MAX = 256 * KIB;
/** The chunk table as bytes: 36 per nonzero chunk; 1 GiB of table would be 7 TiB of data at 256 KiB. */
export const TABLE_BYTES_MAX = 1 * GIB;
/** All tags of a store in one listing (about 200 bytes each). */
export const TAGS_MAX = 100_000;
export const TAGS_BYTES_MAX = 64 * MIB;
export const NAME_LENGTH_MAX = 128;
export const LABELS_MAX = 256;
export const LABEL_LENGTH_MAX = 1024;
/** Files of one image version beside its disk (kernel, initrd, memory, device state, …). */
export const PARTS_MAX = 32;

/** A profile as JSON: a hundred thousand runs of chunks; a boot has a few hundred. */
export const PROFILE_BYTES_MAX = 2 * MIB;
/** Chunks in one profile: 256 GiB of a disk, 4 GiB of a memory image in chunks of a page. A run of a few digits
 * names any number of them, so the size of the JSON bounds nothing. */
export const PROFILE_CHUNKS_MAX = 1 << 20;
/** Recordings merged into one profile. What differs from boot to boot is noise: by then all of it is in. */
export const PROFILE_RUNS_MAX = 32;
/** Purposes that one manifest may have profiles for; the names come from outside and become files. */
export const PROFILE_PURPOSES_MAX = 16;

/** How long a store keeps the images of a host's clones after the host last said that it has them: longer than a
 * holiday, so that a host that was off finds them again. */
export const HOLD_MS = 30 * 24 * 3_600_000;
/** Images that one host's clones lie on. */
export const HOLD_MANIFESTS_MAX = 4096;
/** Hosts that a store keeps images for; each is one file in one folder. */
export const HOLDERS_MAX = 10_000;

/** Chunks in one batch request: 256 × 256 KiB is 64 MiB plain, about two seconds of a 100 Mbit/s link; the
 * request itself is 8 KiB of digests. */
export const BATCH_CHUNKS_MAX = 256;

/** A commit of the cache (fdatasync of the data, then the map) comes at most this often: kill -9 then costs a
 * second's fetching, and a disk flush a second is below what any disk notices. */
export const CACHE_COMMIT_INTERVAL_MS = 1000;
/** … or after this many new bytes: a fast link should not have to fetch more than this twice. */
export const CACHE_COMMIT_BYTES = 64 * MIB;
/** Fetched chunks that readers already have and the disk has not: beyond it readers wait for the disk. */
export const CACHE_WRITE_BEHIND_BYTES_MAX = 32 * MIB;
/** Chunks kept in memory when the disk or the quota is full; without them 64 reads of 4 KiB would fetch one
 * chunk 64 times. */
export const CACHE_MEMORY_BYTES_MAX = 64 * MIB;
/** How long a full or failing disk is left alone before the next attempt to store. */
export const CACHE_RETRY_MS = 1000;
/** Calls of readChunks under way for demand reads; further reads wait and go together in the next one. */
export const CACHE_BATCHES_MAX = 32;
/** Images nobody has open whose files and verified marks are kept: 2 descriptors each. */
export const CACHE_IDLE_IMAGES_MAX = 64;
/** Kept free below a cache's quota for what is not chunks: folders, extent blocks between two recounts. */
export const CACHE_QUOTA_SLACK_BYTES = 256 * KIB;
/** What a cache leaves free on its disk for others, where 5 % of the disk is not less. */
export const CACHE_MIN_FREE_BYTES = 1 * GIB;
/** How often marks of use are read; also how often a disk that others fill is looked at. */
export const CACHE_SWEEP_MS = 5_000;
/** Most that one round of eviction takes: readers of new chunks wait for it when the disk is full. */
export const CACHE_EVICT_BYTES = 64 * MIB;
/** Plain bytes of chunks of one prefetch that are asked for and not yet stored: they are held in memory. */
export const CACHE_PREFETCH_BYTES_MAX = 48 * MIB;
/** Recording of a start ends this long after its first read: what comes later is work, not start. */
export const PROFILE_WINDOW_MS = 120_000;
/** A moved tag is seen this much later; each expiry costs a round trip. */
export const TAG_TTL_MS = 1000;
/** A name in the tree may be this old, so that opening an image again costs no round trip; a request through the
 * control socket (`vm run`, `clone create`) is not answered from names older than TAG_TTL_MS. */
export const TAG_RECENT_MS = 30_000;
/** How long a listing waits for the source when the last known tags are at hand. */
export const TAG_WAIT_MS = 2000;

/** Block of a difference layer: the block size of ext4 and XFS and the page of x86, so an aligned guest write
 * never needs the bytes around it. */
export const LAYER_BLOCK_BYTES = 4 * KIB;

/** Largest FUSE request: 256 pages, the kernel's FUSE_MAX_MAX_PAGES default (fs.fuse.max_pages_limit). */
export const FUSE_REQUEST_BYTES_MAX = 1 * MIB;

/**
 * Most bytes of one pwrite(2) to a data file. The kernel makes folios as large as the writes, and ext4 goes through all of
 * a folio's blocks at each later write of one of them. On two processors, interleaved, three rounds: scattered direct
 * writes of 4 KiB to a clone that had been filled in such pieces 1.4 times as fast as after pieces of 1 MiB, writes of
 * 64 KiB 1.0, of 1 MiB 1.03.
 */
export const WRITE_PIECE_BYTES = 256 * KIB;

/** Stock sshd allows 10 sessions per connection (MaxSessions). One is left for whatever else the account does. */
export const SSH_CHANNELS_MAX = 9;

/** How long a read waits for a broken tunnel: longer than the minute's cut a VM should ride out. */
export const RECONNECT_TIMEOUT_MS = 120_000;
/** How long the first connection may take before `mount` gives up with a reason. */
export const CONNECT_TIMEOUT_MS = 15_000;

invariant(
  CHUNK_BYTES_DEFAULT >= CHUNK_BYTES_MIN && CHUNK_BYTES_DEFAULT <= CHUNK_BYTES_MAX,
  'default chunk size',
);
invariant(CHUNK_BYTES_MIN % LAYER_BLOCK_BYTES === 0, 'a chunk is a whole number of layer blocks');
invariant(IMAGE_BYTES_MAX < Number.MAX_SAFE_INTEGER, 'offsets are exact numbers');
invariant(SSH_CHANNELS_MAX >= 2, 'one channel for demand, one for bulk');
