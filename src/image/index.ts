/** Base image + layers = clone, and the tree of names that frontends show. */
export { exportArchive, readArchive, readArchiveInfo } from './archive.ts';
export type { ArchiveInfo, ArchiveTarget } from './archive.ts';
export { createLayerOver, openChain } from './chain.ts';
export type { Chain } from './chain.ts';
export { blockChangeIn, blockChangeOf, changedUnits, changedUnitsOf } from './changes.ts';
export { openClone, zeroImage } from './clone.ts';
export type { Clone } from './clone.ts';
export type { FillOptions } from './fill.ts';
export { createLayer, openLayer, removeLayer, sweepLayers, syncLayer } from './layer-files.ts';
export { Layer } from './layer.ts';
export type { LayerStatistics } from './layer.ts';
export type { Snapshot } from './snapshot.ts';
export { createTree } from './tree.ts';
export type { CloneCatalog, CloneEntry, ImageCatalog } from './tree.ts';
