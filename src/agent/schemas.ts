/** JSON schemas that the routes of the control socket share. */
import { IMAGE_BYTES_MAX, NAME_LENGTH_MAX } from '../core/limits.ts';

export const name = {
  type: 'string',
  maxLength: NAME_LENGTH_MAX,
  pattern: '^[a-z0-9][a-z0-9._-]*$',
  description: `up to ${NAME_LENGTH_MAX} lower-case letters, digits, dots, hyphens and underscores, a letter or digit first`,
};
export const reference = { type: 'string', maxLength: 2 * NAME_LENGTH_MAX };
export const params = { type: 'object', properties: { id: name }, required: ['id'] };
export const sizeBytes = { type: 'integer', minimum: 0, maximum: IMAGE_BYTES_MAX };
/** An absolute path on this host. */
export const file = { type: 'string', maxLength: 4096, pattern: '^/' };

export function body(properties: Record<string, unknown>, required: string[] = []) {
  return { type: 'object', additionalProperties: false, properties, required };
}

/** What ajv, asked to be verbose, says of a value that is not as its schema wants it. */
export interface Mismatch {
  /** `/name` */
  readonly instancePath: string;
  readonly parentSchema?: { readonly description?: string };
}

/** One sentence for people: what the schema describes, where it does, else what ajv says. */
export function mismatchText(mismatches: readonly Mismatch[], otherwise: string): string {
  const described = mismatches.find(({ parentSchema }) => parentSchema?.description !== undefined);
  if (!described) return otherwise;
  return `${described.instancePath.slice(1).replaceAll('/', ' ')} must be ${described.parentSchema!.description}`;
}
