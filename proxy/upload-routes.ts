/** The server's side of uploads (upload-protocol.ts). Whether they are allowed is asked before a body is read. */
import type { FastifyInstance, FastifyRequest } from 'fastify';
import { GridError } from '../src/core/errors.ts';
import { encodeTags, parseReference } from '../src/core/manifest.ts';
import { UPLOAD_TAG_BYTES_MAX } from '../src/core/uploads.ts';
import type { UploadTarget } from '../src/core/uploads.ts';
import {
  CHUNKS_BODY_BYTES_MAX,
  encodeFound,
  FIND_BODY_BYTES_MAX,
  IMAGE_BODY_BYTES_MAX,
  parseChunks,
  parseFind,
  parseImage,
  UPLOAD_CHUNKS_PATH,
  UPLOAD_FIND_PATH,
  UPLOAD_IMAGE_PATH,
  UPLOAD_REMOVE_PATH,
} from './upload-protocol.ts';

/** `mayUpload`: whether the operator lets whoever is on the request's connection. */
export function uploadRoutes(
  app: FastifyInstance,
  target: UploadTarget | undefined,
  mayUpload: (request: FastifyRequest) => boolean,
): void {
  const onRequest = async (request: FastifyRequest) => {
    if (!target || !mayUpload(request)) {
      throw new GridError(
        'denied',
        'this server takes no uploads from here: its operator allows them with --accept-uploads, over ssh only',
      );
    }
  };
  const bodyOf = (request: FastifyRequest): Buffer => {
    if (!Buffer.isBuffer(request.body)) throw new GridError('bad-request', 'an upload without a body');
    return request.body;
  };
  app.post(UPLOAD_FIND_PATH, { bodyLimit: FIND_BODY_BYTES_MAX, onRequest }, async (request, reply) =>
    reply
      .type('application/octet-stream')
      .send(encodeFound(await target!.findChunks(parseFind(bodyOf(request))))),
  );
  app.post(UPLOAD_CHUNKS_PATH, { bodyLimit: CHUNKS_BODY_BYTES_MAX, onRequest }, async (request) => {
    const chunks = parseChunks(bodyOf(request));
    await target!.putChunks(chunks);
    return { stored: chunks.length };
  });
  app.post(UPLOAD_IMAGE_PATH, { bodyLimit: IMAGE_BODY_BYTES_MAX, onRequest }, async (request, reply) =>
    reply.type('application/json').send(encodeTags([await target!.putImage(parseImage(bodyOf(request)))])),
  );
  app.post(UPLOAD_REMOVE_PATH, { bodyLimit: UPLOAD_TAG_BYTES_MAX, onRequest }, async (request, reply) => {
    const { name, version } = parseReference(bodyOf(request).toString('utf8'));
    return reply.type('application/json').send(JSON.stringify(await target!.removeCheckpoint(name, version)));
  });
}
