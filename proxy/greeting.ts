/** The first exchange with a far side: what is it, and does it speak a protocol that we know? */
import { GridError } from '../src/core/errors.ts';
import { KIB, TAGS_BYTES_MAX } from '../src/core/limits.ts';
import { parseTags } from '../src/core/manifest.ts';
import { HELLO_PATH, PROTOCOL_VERSION, TAGS_PATH, remoteError } from './protocol.ts';

type Get = (path: string, bytesMax: number) => Promise<{ status: number; body: Buffer }>;

/**
 * 'server': one of ours. 'static': a web server with the files of a store, recognized by its tag list. Throws
 * newer-format, not-found (no store there), denied, origin-failed.
 */
export async function greet(get: Get, name: string): Promise<'server' | 'static'> {
  const hello = await get(HELLO_PATH, 64 * KIB);
  const protocol = hello.status === 200 ? protocolOf(hello.body) : undefined;
  if (protocol !== undefined) {
    if (protocol <= PROTOCOL_VERSION) return 'server';
    throw new GridError(
      'newer-format',
      `${name} speaks protocol ${protocol}, this gridvfs ${PROTOCOL_VERSION}: upgrade this one`,
    );
  }
  if (hello.status >= 500) throw remoteError(hello.body, hello.status, name);
  const tags = await get(TAGS_PATH, TAGS_BYTES_MAX);
  if (tags.status !== 200) throw remoteError(tags.body, tags.status, `there is no gridvfs store at ${name}`);
  parseTags(tags.body, `the tag list of ${name}`);
  return 'static';
}

/** The protocol version of a hello; undefined when it is something else's page. */
function protocolOf(body: Buffer): number | undefined {
  try {
    const hello: unknown = JSON.parse(body.toString());
    if (typeof hello !== 'object' || hello === null || !('protocol' in hello)) return undefined;
    return typeof hello.protocol === 'number' && hello.protocol >= 1 ? hello.protocol : undefined;
  } catch {
    return undefined;
  }
}
