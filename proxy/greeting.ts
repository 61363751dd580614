/** The first exchange with a far side: what is it, and does it speak a protocol that we know? */
import { GridError } from '../src/core/errors.ts';
import { KIB, TAGS_BYTES_MAX } from '../src/core/limits.ts';
import { parseTags } from '../src/core/manifest.ts';
import { HELLO_PATH, PROTOCOL_VERSION, TAGS_PATH, remoteError } from './protocol.ts';

type Get = (path: string, bytesMax: number) => Promise<{ status: number; body: Buffer }>;

export interface Greeting {
  /** One of ours, or a web server with the files of a store, recognized by its tag list. */
  readonly kind: 'server' | 'static';
  /** Lanes that cost the far side next to nothing while they are idle. */
  readonly idleLanes: number;
  /** It answers with more than a manifest: openings.ts. */
  readonly openings: boolean;
}

/** Throws newer-format, not-found (no store there), denied, origin-failed. */
export async function greet(get: Get, name: string): Promise<Greeting> {
  const answer = await get(HELLO_PATH, 64 * KIB);
  const hello = answer.status === 200 ? helloOf(answer.body) : undefined;
  if (hello !== undefined) {
    const { protocol, ...greeting } = hello;
    if (protocol <= PROTOCOL_VERSION) return { kind: 'server', ...greeting };
    throw new GridError(
      'newer-format',
      `${name} speaks protocol ${protocol}, this gridvfs ${PROTOCOL_VERSION}: upgrade this one`,
    );
  }
  if (answer.status >= 500) throw remoteError(answer.body, answer.status, name);
  const tags = await get(TAGS_PATH, TAGS_BYTES_MAX);
  if (tags.status !== 200) throw remoteError(tags.body, tags.status, `there is no gridvfs store at ${name}`);
  parseTags(tags.body, `the tag list of ${name}`);
  return { kind: 'static', idleLanes: 0, openings: false };
}

/** Undefined when it is something else's page. */
function helloOf(body: Buffer): ({ protocol: number } & Omit<Greeting, 'kind'>) | undefined {
  try {
    const { protocol, idleLanes, openings } = Object(JSON.parse(body.toString())) as Partial<
      Record<string, unknown>
    >;
    if (typeof protocol !== 'number' || protocol < 1) return undefined;
    const lanes = typeof idleLanes === 'number' && idleLanes > 0 ? idleLanes : 0;
    return { protocol, idleLanes: lanes, openings: openings === true };
  } catch {
    return undefined;
  }
}
