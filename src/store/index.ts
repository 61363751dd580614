/** The store's public face: what the command line, servers and tests use. */
export { namesWithParts } from './checkpoints.ts';
export { commitImage } from './commit.ts';
export type { CommitOptions, CommitResult } from './commit.ts';
export { EXPORT_FORMATS, exportImage } from './export.ts';
export type { ExportFormat, ExportOptions, ExportResult } from './export.ts';
export { IMAGE_FORMATS } from './formats.ts';
export type { ImageFormat } from './formats.ts';
export { collectGarbage, GC_GRACE_MS } from './gc.ts';
export type { GcOptions, GcResult } from './gc.ts';
export { importImage } from './import.ts';
export type { ImportOptions, ImportPart, ImportResult } from './import.ts';
export { uploadImage, uploadVersion } from './upload-image.ts';
export type { UploadOptions, UploadResult, VersionOptions } from './upload-image.ts';
export { firstLine, runQemuImg, shareDone } from './qemu-img.ts';
export { initStore, openStore, Store } from './store.ts';
export type { ImageStatistics, StoreStatistics } from './store.ts';
export { verifyStore } from './verify.ts';
export type { DamagedObject, MissingObject, VerifyOptions, VerifyResult } from './verify.ts';
