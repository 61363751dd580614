/**
 * What more hosts behind one origin and one link would see: a model with few parameters, fitted to measured points, and never
 * more than a prediction. Hosts of a bench share one machine's processor; real ones do not. So the model keeps what they
 * do share: the link, of which each host needs `bytesPerHost`, and the origin, of which each needs
 * `serverCpuSecondsPerHost`. The last host is ready when the scarcer of both has served all, after what one host needs
 * by itself.
 */

export interface ScalePoint {
  readonly hosts: number;
  readonly lastReadySeconds: number;
  readonly originBytes: number;
  readonly serverCpuSeconds: number;
}

export interface ScaleModel {
  /** What one host takes beyond its share of link and origin: its own boot. */
  readonly aloneSeconds: number;
  readonly bytesPerHost: number;
  readonly serverCpuSecondsPerHost: number;
  readonly linkBitsPerSecond: number;
  /** Of the measured points, all on this machine: last ready = a + b × hosts. */
  readonly measured: { readonly a: number; readonly b: number; readonly rSquared: number };
}

/** Least squares: y = a + b x, and how much of the variance that explains. */
export function fitLine(points: readonly (readonly [x: number, y: number])[]) {
  const n = points.length;
  const meanOf = (of: (point: readonly [number, number]) => number) =>
    points.reduce((sum, point) => sum + of(point), 0) / n;
  const meanX = meanOf(([x]) => x);
  const meanY = meanOf(([, y]) => y);
  const sumOf = (of: (x: number, y: number) => number) =>
    points.reduce((sum, [x, y]) => sum + of(x - meanX, y - meanY), 0);
  const xx = sumOf((x) => x * x);
  const xy = sumOf((x, y) => x * y);
  const yy = sumOf((_, y) => y * y);
  const b = xx === 0 ? 0 : xy / xx;
  return { a: meanY - b * meanX, b, rSquared: xx === 0 || yy === 0 ? 1 : (xy * xy) / (xx * yy) };
}

export function fitScale(points: readonly ScalePoint[], linkBitsPerSecond: number): ScaleModel {
  const slope = (of: (point: ScalePoint) => number) =>
    points.length < 2
      ? of(points[0]!) / points[0]!.hosts
      : Math.max(0, fitLine(points.map((point) => [point.hosts, of(point)])).b);
  const bytesPerHost = slope((point) => point.originBytes);
  const serverCpuSecondsPerHost = slope((point) => point.serverCpuSeconds);
  const first = points.toSorted((a, b) => a.hosts - b.hosts)[0]!;
  const shared = first.hosts * shareSeconds(bytesPerHost, serverCpuSecondsPerHost, linkBitsPerSecond);
  return {
    aloneSeconds: Math.max(0, first.lastReadySeconds - shared),
    bytesPerHost,
    serverCpuSecondsPerHost,
    linkBitsPerSecond,
    measured: fitLine(points.map((point) => [point.hosts, point.lastReadySeconds])),
  };
}

/** What one host takes of the scarcer of link and origin; the origin serves with one thread. */
function shareSeconds(bytes: number, cpuSeconds: number, bitsPerSecond: number): number {
  return Math.max((bytes * 8) / bitsPerSecond, cpuSeconds);
}

/** Seconds until the last of `hosts` hosts with processors of their own is ready. */
export function predictSeconds(model: ScaleModel, hosts: number): number {
  const { aloneSeconds, bytesPerHost, serverCpuSecondsPerHost, linkBitsPerSecond } = model;
  return aloneSeconds + hosts * shareSeconds(bytesPerHost, serverCpuSecondsPerHost, linkBitsPerSecond);
}
