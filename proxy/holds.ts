/**
 * Holds on the wire: which images a host's clones lie on, so that no garbage collection at the store takes them.
 *
 *   POST /v1/holds/<holder>   body: JSON, an array of manifest digests; replaces what the holder held → { held }
 *
 * As with recordings of profiles, only over a way that says who comes (ssh, stdio, a unix socket).
 */
import type { Duplex } from 'node:stream';
import type { FastifyInstance } from 'fastify';
import { isDigest } from '../src/core/bytes.ts';
import type { Digest } from '../src/core/bytes.ts';
import { GridError } from '../src/core/errors.ts';
import { HOLD_MANIFESTS_MAX, KIB } from '../src/core/limits.ts';
import { isName } from '../src/core/manifest.ts';
import type { ChunkSource } from '../src/core/source.ts';
import type { Wanted } from './work.ts';

/** Digests of 64 digits, with quotes and commas. */
const BODY_BYTES_MAX = HOLD_MANIFESTS_MAX * 70;
const ANSWER_BYTES_MAX = 64 * KIB;

function holdPath(holder: string): string {
  if (!isName(holder)) {
    throw new GridError('bad-request', `'${String(holder).slice(0, 80)}' is not the name of a holder`);
  }
  return `/v1/holds/${holder}`;
}

function parseDigests(body: unknown): Digest[] {
  let parsed: unknown;
  try {
    parsed = JSON.parse(String(body));
  } catch {
    parsed = undefined;
  }
  if (Array.isArray(parsed) && parsed.length <= HOLD_MANIFESTS_MAX && parsed.every(isDigest)) return parsed;
  throw new GridError('bad-request', `a hold is a list of at most ${HOLD_MANIFESTS_MAX} digests`);
}

export function holdRoutes(app: FastifyInstance, source: ChunkSource, authenticated: WeakSet<Duplex>): void {
  app.post<{ Params: { holder: string } }>(
    '/v1/holds/:holder',
    {
      bodyLimit: BODY_BYTES_MAX,
      // Before the body is read.
      onRequest: async (request) => {
        if (!authenticated.has(request.raw.socket)) {
          throw new GridError('denied', 'images are held over ssh only: plain http does not say who comes');
        }
        if (!source.hold) throw new GridError('denied', `${source.name} holds nothing`);
      },
    },
    async (request) => {
      const digests = parseDigests(request.body);
      const { holder } = request.params;
      holdPath(holder); // refuses what could be a path
      await source.hold!(holder, digests);
      return { held: digests.length };
    },
  );
}

/** The client's side: `ChunkSource.hold` over a way of sending. */
export function holdClient(
  source: { readonly name: string },
  send: (wanted: Wanted) => Promise<Buffer>,
): (holder: string, manifests: readonly Digest[]) => Promise<void> {
  return async (holder, manifests) => {
    const body = Buffer.from(JSON.stringify(manifests));
    try {
      await send({ path: holdPath(holder), bytesMax: ANSWER_BYTES_MAX, body });
    } catch (error) {
      // An older server or a static one has no such path.
      if (error instanceof GridError && /not there \(HTTP|no such path|HTTP 405/.test(error.message)) {
        throw new GridError('denied', `${source.name} holds nothing for hosts`, { cause: error });
      }
      throw error;
    }
  };
}
