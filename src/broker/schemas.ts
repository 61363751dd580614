/** JSON schemas of the API's bodies and answers: the routes check with them, and the OpenAPI document is made of them. */
import { IMAGE_BYTES_MAX, KIB, LABEL_LENGTH_MAX, LABELS_MAX, MIB, NAME_LENGTH_MAX } from '../core/limits.ts';
import { ROLES } from './access.ts';
import { POLICIES } from './policies/hosts.ts';
import { CHECKPOINT_EVERY_MS_MIN, COUNT_MAX, MEMORY_BYTES_MAX } from './requests.ts';
import { VM_STATES } from './vm-table.ts';
import { SCHEDULE_EVERY_MS_MIN, WARM_HOSTS_MAX } from './warming.ts';

/** Data volumes of one VM: each takes a slot of its bus. */
const VOLUMES_MAX = 8;

const text = { type: 'string' };
const integer = { type: 'integer' };
const number = { type: 'number' };
const boolean = { type: 'boolean' };

export const object = (properties: Record<string, unknown>, required: string[] = []) => ({
  type: 'object',
  additionalProperties: false,
  properties,
  required,
});
/** An answer: what it has may grow. */
const answer = (properties: Record<string, unknown>) => ({
  type: 'object',
  additionalProperties: true,
  properties,
});
export const list = (items: unknown, maxItems?: number) => ({
  type: 'array',
  items,
  ...(maxItems === undefined ? {} : { maxItems }),
});
const map = (values: unknown, maxProperties = LABELS_MAX) => ({
  type: 'object',
  additionalProperties: values,
  maxProperties,
  propertyNames: { type: 'string', maxLength: NAME_LENGTH_MAX, pattern: '^[A-Za-z0-9][A-Za-z0-9._+-]*$' },
});

export const name = { type: 'string', maxLength: NAME_LENGTH_MAX, pattern: '^[a-z0-9][a-z0-9._-]*$' };
const reference = {
  type: 'string',
  maxLength: 2 * NAME_LENGTH_MAX,
  pattern: '^[a-z0-9][a-z0-9._-]*(:[a-z0-9][a-z0-9._-]*)?$',
};
/** Of a data volume: its name, its id, or its owner's name in front of its own. */
export const volumeName = {
  type: 'string',
  maxLength: 2 * NAME_LENGTH_MAX,
  pattern: '^([a-z0-9][a-z0-9._-]*/)?[a-z0-9][a-z0-9._-]*$',
};
const range = { type: 'string', minLength: 1, maxLength: NAME_LENGTH_MAX };
const memoryBytes = { type: 'integer', minimum: MIB, maximum: MEMORY_BYTES_MAX };
const milliseconds = { type: 'integer', minimum: 0, maximum: 3_600_000 };
const digest = { type: 'string', pattern: '^[0-9a-f]{64}$' };

export const nameParams = { type: 'object', properties: { id: name }, required: ['id'] };

export const problem = {
  type: 'object',
  properties: { type: text, title: text, status: integer, detail: text, code: text },
  required: ['type', 'title', 'status', 'detail', 'code'],
};

export const vmRequest = object({
  count: { type: 'integer', minimum: 1, maximum: COUNT_MAX },
  // Room for "-1000" behind it.
  name: { ...name, maxLength: NAME_LENGTH_MAX - 5 },
  image: reference,
  labels: map(range),
  os: range,
  kernel: range,
  libraries: map(range),
  memoryBytes,
  vcpus: { type: 'integer', minimum: 1, maximum: 256 },
  network: name,
  policy: { type: 'string', enum: POLICIES },
  restart: boolean,
  checkpointEveryMs: { type: 'integer', minimum: CHECKPOINT_EVERY_MS_MIN, maximum: 7 * 24 * 3_600_000 },
  sshKeys: list({ type: 'string', pattern: '^[^\\r\\n]+$', maxLength: 16 * KIB }, 64),
  userData: { type: 'string', maxLength: 64 * KIB },
  command: { type: 'string', minLength: 1, maxLength: 8 * KIB },
  volumes: list(object({ volume: volumeName, readOnly: boolean }, ['volume']), VOLUMES_MAX),
});

export const vm = answer({
  id: text,
  name: text,
  owner: text,
  job: text,
  state: { type: 'string', enum: VM_STATES },
  image: text,
  host: text,
  placedAs: text,
  reason: text,
  memoryBytes: integer,
  vcpus: integer,
  restart: boolean,
  timeline: { type: 'object', additionalProperties: number },
  fetchedBytes: integer,
  console: text,
  command: answer({ command: text, exitCode: integer, output: text, error: text }),
  checkpoint: text,
  checkpointed: text,
  created: text,
  asked: text,
  placed: text,
});

export const job = answer({
  id: text,
  kind: text,
  state: { type: 'string', enum: ['running', 'done', 'failed'] },
  done: integer,
  total: integer,
  created: text,
  vms: list(vm),
  error: answer({ code: text, message: text }),
  result: answer({}),
});

const why = answer({ reference: text, host: text, why: text });
export const explanation = answer({
  versions: list(why),
  rejectedVersions: list(why),
  hosts: list(why),
  rejectedHosts: list(why),
  choice: answer({ image: text, host: text }),
});

export const host = answer({
  id: text,
  state: { type: 'string', enum: ['up', 'silent'] },
  vcpus: integer,
  memoryBytes: integer,
  accelerator: text,
  unusable: text,
  virtual: boolean,
  networks: list(text),
  source: text,
  load: number,
  warmBytes: { type: 'object', additionalProperties: integer },
  future: answer({ memoryBytes: integer, vcpus: integer, machines: integer }),
  vms: integer,
});

export const image = answer({
  image: text,
  version: text,
  manifest: text,
  kind: text,
  sizeBytes: integer,
  labels: { type: 'object', additionalProperties: text },
  owner: text,
  deprecated: text,
  created: text,
  hosts: integer,
});

export const imageChange = object({
  owner: { type: ['string', 'null'], maxLength: NAME_LENGTH_MAX },
  share: list(name, 1000),
  unshare: list(name, 1000),
  deprecate: map({ type: ['string', 'null'], maxLength: LABEL_LENGTH_MAX }),
});

export const tokenRequest = object({ user: name, role: { type: 'string', enum: ROLES } }, ['user', 'role']);
export const token = answer({ id: text, user: text, role: text, created: text, revoked: text });

export const hostFacts = object(
  {
    host: name,
    incarnation: name,
    vcpus: { type: 'integer', minimum: 1, maximum: 65_536 },
    memoryBytes: { type: 'integer', minimum: 0 },
    guestMemoryBytes: { type: 'integer', minimum: 0 },
    guestVcpus: { type: 'integer', minimum: 0, maximum: 1_048_576 },
    accelerator: { type: 'string', maxLength: NAME_LENGTH_MAX },
    unusable: { type: 'string', maxLength: LABEL_LENGTH_MAX },
    virtual: boolean,
    networks: list(name, 64),
    source: { type: 'string', maxLength: 4096 },
  },
  [
    'host',
    'incarnation',
    'vcpus',
    'memoryBytes',
    'guestMemoryBytes',
    'guestVcpus',
    'virtual',
    'networks',
    'source',
  ],
);

const reportedVm = object(
  {
    name,
    state: { type: 'string', maxLength: NAME_LENGTH_MAX },
    reason: { type: 'string', maxLength: 64 * 1024 },
    consoleSocket: { type: 'string', maxLength: 4096 },
    cpuSeconds: { type: 'number', minimum: 0, maximum: Number.MAX_SAFE_INTEGER / 1000 },
  },
  ['name', 'state'],
);

const orderResult = object(
  {
    order: { type: 'string', maxLength: 2 * NAME_LENGTH_MAX },
    error: object({ code: name, message: { type: 'string', maxLength: 64 * 1024 } }, ['code', 'message']),
    timeline: object({ clonedMs: number, startedMs: number, readyMs: number }),
    fetchedBytes: { type: 'integer', minimum: 0 },
    made: object({ manifest: digest, storedBytes: { type: 'integer', minimum: 0 } }, [
      'manifest',
      'storedBytes',
    ]),
    command: object({ exitCode: { type: 'integer' }, output: { type: 'string', maxLength: 64 * KIB } }, [
      'exitCode',
      'output',
    ]),
    saved: list(
      object(
        {
          id: name,
          reference: { type: 'string', maxLength: 2 * NAME_LENGTH_MAX },
          manifest: digest,
          storedBytes: { type: 'integer', minimum: 0 },
        },
        ['id', 'storedBytes'],
      ),
      64,
    ),
  },
  ['order'],
);

const offeredVersion = object(
  {
    name,
    version: name,
    manifest: digest,
    kind: name,
    sizeBytes: { type: 'integer', minimum: 0, maximum: IMAGE_BYTES_MAX },
    labels: { type: 'object', additionalProperties: { type: 'string', maxLength: LABEL_LENGTH_MAX } },
    parent: digest,
    created: { type: 'string', maxLength: NAME_LENGTH_MAX },
  },
  ['name', 'version', 'manifest', 'kind', 'sizeBytes', 'labels', 'created'],
);

export const hostReport = object(
  {
    host: name,
    incarnation: name,
    sequence: { type: 'integer', minimum: 0 },
    load: { type: 'number', minimum: 0 },
    warmBytes: {
      type: 'object',
      additionalProperties: { type: 'integer', minimum: 0 },
      maxProperties: 10_000,
    },
    vms: list(reportedVm, 10_000),
    results: list(orderResult, 10_000),
    versions: list(offeredVersion, 100_000),
  },
  ['host', 'incarnation', 'sequence', 'load', 'warmBytes', 'vms', 'results'],
);

export const lease = answer({ leaseMs: number, reportEveryMs: number, vms: list(text) });
export const order = answer({ id: text, kind: text, vm: text, image: text });
export const stopRequest = object({ graceMs: milliseconds });
export const placeRequest = object({ host: name });
export const nothing = object({});
export const commitRequest = object(
  {
    reference: { ...reference, pattern: '^[a-z0-9][a-z0-9._-]*:[a-z0-9][a-z0-9._-]*$' },
    labels: map({ type: 'string', maxLength: LABEL_LENGTH_MAX }),
  },
  ['reference'],
);
export const warmRequest = object(
  { version: name, hosts: { type: 'integer', minimum: 1, maximum: WARM_HOSTS_MAX } },
  ['version'],
);
export const scheduleRequest = object(
  {
    image: name,
    everyMs: { type: 'integer', minimum: SCHEDULE_EVERY_MS_MIN, maximum: 30 * 24 * 3_600_000 },
    hosts: { type: 'integer', minimum: 0, maximum: WARM_HOSTS_MAX },
  },
  ['image', 'everyMs'],
);
export const schedule = answer({
  id: text,
  image: text,
  everyMs: integer,
  hosts: integer,
  next: text,
  warmed: text,
});
export const linkRequest = object(
  {
    a: name,
    b: name,
    roundTripMs: { type: 'integer', minimum: 0, maximum: 60_000 },
    bitsPerSecond: { type: 'integer', minimum: 1, maximum: Number.MAX_SAFE_INTEGER },
  },
  ['a', 'b'],
);
export const network = answer({
  id: text,
  hosts: integer,
  links: list(answer({ to: text, roundTripMs: integer, bitsPerSecond: integer })),
});
/** With a call that makes a job: the same again is the same job. */
export const keyHeaders = {
  type: 'object',
  properties: { 'idempotency-key': { type: 'string', minLength: 1, maxLength: 200 } },
};

const found = answer({ id: text, memoryBytes: integer, vcpus: integer, network: text });
export const queryAnswer = answer({ sets: list(list(found)), complete: boolean, elapsedMs: number });
