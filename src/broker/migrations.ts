/**
 * The schema, as the list of its changes. Each entry is applied once, in order; entries that were released are never
 * edited. Only what SQLite and PostgreSQL both have: TEXT, BIGINT, plain constraints. Times are milliseconds since
 * 1970 in BIGINT, booleans 0 and 1.
 *
 * What changes by the second (load, warm bytes) is not here but in memory (loads.ts): it comes again with the next
 * report. What promises are made of is here: `futures` are counted down in the transaction that takes them.
 */
export const MIGRATIONS: readonly (readonly string[])[] = [
  [
    `CREATE TABLE users (name TEXT PRIMARY KEY, created_ms BIGINT NOT NULL)`,
    `CREATE TABLE tokens (
       id TEXT PRIMARY KEY, user_name TEXT NOT NULL REFERENCES users (name), role TEXT NOT NULL,
       hash TEXT NOT NULL, created_ms BIGINT NOT NULL, revoked_ms BIGINT)`,

    `CREATE TABLE hosts (
       id TEXT PRIMARY KEY, incarnation TEXT NOT NULL, sequence BIGINT NOT NULL, state TEXT NOT NULL,
       vcpus BIGINT NOT NULL, memory_bytes BIGINT NOT NULL, guest_vcpus BIGINT NOT NULL,
       guest_memory_bytes BIGINT NOT NULL, accelerator TEXT, unusable TEXT, is_virtual BIGINT NOT NULL,
       source TEXT NOT NULL, owner TEXT NOT NULL, registered_ms BIGINT NOT NULL)`,
    `CREATE TABLE networks (id TEXT PRIMARY KEY, created_ms BIGINT NOT NULL)`,
    `CREATE TABLE host_networks (
       host TEXT NOT NULL REFERENCES hosts (id), network TEXT NOT NULL REFERENCES networks (id),
       PRIMARY KEY (host, network))`,
    `CREATE INDEX host_networks_network ON host_networks (network, host)`,
    `CREATE TABLE links (
       a TEXT NOT NULL REFERENCES networks (id), b TEXT NOT NULL REFERENCES networks (id),
       round_trip_ms BIGINT, bits_per_second BIGINT, PRIMARY KEY (a, b))`,

    `CREATE TABLE images (name TEXT PRIMARY KEY, owner TEXT, created_ms BIGINT NOT NULL)`,
    `CREATE TABLE image_shares (
       image TEXT NOT NULL REFERENCES images (name), user_name TEXT NOT NULL, PRIMARY KEY (image, user_name))`,
    `CREATE TABLE versions (
       image TEXT NOT NULL REFERENCES images (name), version TEXT NOT NULL, manifest TEXT NOT NULL,
       kind TEXT NOT NULL, size_bytes BIGINT NOT NULL, parent TEXT, created TEXT NOT NULL,
       deprecated TEXT, PRIMARY KEY (image, version))`,
    `CREATE TABLE labels (
       image TEXT NOT NULL, version TEXT NOT NULL, name TEXT NOT NULL, value TEXT NOT NULL,
       PRIMARY KEY (image, version, name))`,
    `CREATE INDEX labels_name ON labels (name, value)`,
    `CREATE TABLE host_versions (
       host TEXT NOT NULL REFERENCES hosts (id), image TEXT NOT NULL, version TEXT NOT NULL,
       PRIMARY KEY (host, image, version))`,
    `CREATE INDEX host_versions_version ON host_versions (image, version)`,

    `CREATE TABLE jobs (
       id TEXT PRIMARY KEY, owner TEXT NOT NULL, kind TEXT NOT NULL, body TEXT NOT NULL, created_ms BIGINT NOT NULL)`,
    `CREATE TABLE idempotency_keys (
       owner TEXT NOT NULL, name TEXT NOT NULL, request_hash TEXT NOT NULL, job TEXT NOT NULL,
       created_ms BIGINT NOT NULL, PRIMARY KEY (owner, name))`,
    `CREATE TABLE vms (
       id TEXT PRIMARY KEY, owner TEXT NOT NULL, job TEXT NOT NULL REFERENCES jobs (id), name TEXT NOT NULL,
       image TEXT, version TEXT, host TEXT, network TEXT, generation BIGINT NOT NULL, state TEXT NOT NULL,
       reason TEXT, memory_bytes BIGINT NOT NULL, vcpus BIGINT NOT NULL, restart BIGINT NOT NULL,
       wanted TEXT NOT NULL, timeline TEXT, fetched_bytes BIGINT, console TEXT,
       created_ms BIGINT NOT NULL, placed_ms BIGINT, ended_ms BIGINT)`,
    `CREATE INDEX vms_state ON vms (state)`,
    `CREATE INDEX vms_owner ON vms (owner, state)`,
    `CREATE INDEX vms_host ON vms (host, state)`,
    `CREATE INDEX vms_job ON vms (job)`,
    `CREATE INDEX vms_network ON vms (network, state, memory_bytes, vcpus)`,

    `CREATE TABLE virtualization (
       virtual_kind TEXT NOT NULL, virtual_id TEXT NOT NULL, physical_kind TEXT NOT NULL, physical_id TEXT NOT NULL,
       since_ms BIGINT NOT NULL, PRIMARY KEY (virtual_kind, virtual_id))`,
    `CREATE TABLE futures (
       host TEXT PRIMARY KEY REFERENCES hosts (id), memory_bytes BIGINT NOT NULL, vcpus BIGINT NOT NULL,
       machines BIGINT NOT NULL,
       CHECK (memory_bytes >= 0), CHECK (vcpus >= 0), CHECK (machines >= 0))`,
    `CREATE INDEX futures_memory ON futures (memory_bytes, vcpus)`,
    `CREATE TABLE leases (
       host TEXT PRIMARY KEY REFERENCES hosts (id), incarnation TEXT NOT NULL, granted_ms BIGINT NOT NULL,
       lease_ms BIGINT NOT NULL)`,
    `CREATE TABLE orders (
       id TEXT PRIMARY KEY, host TEXT NOT NULL REFERENCES hosts (id), vm TEXT, kind TEXT NOT NULL,
       body TEXT NOT NULL, state TEXT NOT NULL, error TEXT, created_ms BIGINT NOT NULL, done_ms BIGINT)`,
    `CREATE INDEX orders_open ON orders (host, state)`,
    `CREATE TABLE usage (
       vm TEXT NOT NULL, generation BIGINT NOT NULL, owner TEXT NOT NULL, host TEXT NOT NULL,
       memory_bytes BIGINT NOT NULL, vcpus BIGINT NOT NULL, fetched_bytes BIGINT,
       started_ms BIGINT NOT NULL, ended_ms BIGINT, PRIMARY KEY (vm, generation))`,
    `CREATE INDEX usage_owner ON usage (owner, started_ms)`,
  ],
  [
    // The last checkpoint in the store, and what a host must be to resume it.
    `ALTER TABLE vms ADD COLUMN checkpoint TEXT`,
    `ALTER TABLE vms ADD COLUMN checkpoint_manifest TEXT`,
    `ALTER TABLE vms ADD COLUMN checkpoint_accelerator TEXT`,
    `ALTER TABLE vms ADD COLUMN checkpoint_ms BIGINT`,
    `ALTER TABLE vms ADD COLUMN checkpoint_every_ms BIGINT`,
    // Where the next placement has to be, or must not be.
    `ALTER TABLE vms ADD COLUMN target TEXT`,
    `ALTER TABLE vms ADD COLUMN avoid TEXT`,
    // Starts that failed since it last ran, and when that began.
    `ALTER TABLE vms ADD COLUMN failures BIGINT NOT NULL DEFAULT 0`,
    `ALTER TABLE vms ADD COLUMN ran_ms BIGINT`,
    `ALTER TABLE usage ADD COLUMN stored_bytes BIGINT`,
    // Jobs that are about one VM or image; the state of a request is that of its VMs.
    `ALTER TABLE jobs ADD COLUMN vm TEXT`,
    `ALTER TABLE jobs ADD COLUMN state TEXT`,
    `ALTER TABLE jobs ADD COLUMN error TEXT`,
    `ALTER TABLE jobs ADD COLUMN result TEXT`,
    `ALTER TABLE jobs ADD COLUMN ended_ms BIGINT`,
    `CREATE INDEX jobs_vm ON jobs (vm, state)`,
    `ALTER TABLE orders ADD COLUMN job TEXT`,
    `CREATE INDEX orders_vm ON orders (vm, state)`,
    `CREATE INDEX vms_name ON vms (name, ended_ms)`,
    `CREATE INDEX orders_job ON orders (job, state)`,
    `CREATE TABLE schedules (
       id TEXT PRIMARY KEY, owner TEXT NOT NULL, image TEXT NOT NULL, every_ms BIGINT NOT NULL, hosts BIGINT NOT NULL,
       due_ms BIGINT NOT NULL, warmed TEXT, warmed_manifest TEXT)`,
    // Compositional queries read nothing but these.
    `DROP INDEX vms_network`,
    `CREATE INDEX vms_network ON vms (network, state, memory_bytes, vcpus, owner, id)`,
    `CREATE INDEX vms_memory ON vms (state, memory_bytes, vcpus, owner, id, network)`,
  ],
  [
    // Virtual networks, and the addresses of VMs on them (the last byte: each network is a /24).
    `CREATE TABLE segments (
       name TEXT PRIMARY KEY, owner TEXT NOT NULL, subnet BIGINT NOT NULL UNIQUE, created_ms BIGINT NOT NULL)`,
    `CREATE TABLE vm_segments (
       vm TEXT NOT NULL REFERENCES vms (id), network TEXT NOT NULL REFERENCES segments (name),
       address BIGINT NOT NULL, PRIMARY KEY (vm, network))`,
    `CREATE INDEX vm_segments_network ON vm_segments (network, address)`,
    `CREATE TABLE workspaces (
       id TEXT PRIMARY KEY, name TEXT NOT NULL, owner TEXT NOT NULL, job TEXT NOT NULL REFERENCES jobs (id),
       network TEXT, created_ms BIGINT NOT NULL, ends_ms BIGINT, ended_ms BIGINT)`,
    `CREATE INDEX workspaces_owner ON workspaces (owner, name)`,
    `CREATE INDEX workspaces_job ON workspaces (job)`,
    `CREATE TABLE quotas (user_name TEXT PRIMARY KEY, machines BIGINT, vcpus BIGINT, memory_bytes BIGINT)`,
  ],
  [
    // Data volumes. \`host\` has the clone that was written to last; \`unsaved\`: and nobody else has all of that.
    `CREATE TABLE volumes (
       id TEXT PRIMARY KEY, owner TEXT NOT NULL, name TEXT NOT NULL, size_bytes BIGINT NOT NULL,
       version BIGINT NOT NULL, manifest TEXT, stored_bytes BIGINT NOT NULL, host TEXT, unsaved BIGINT NOT NULL,
       writer TEXT, made_from TEXT, failed BIGINT NOT NULL, reason TEXT, created_ms BIGINT NOT NULL, removed_ms BIGINT)`,
    `CREATE INDEX volumes_owner ON volumes (owner, name)`,
    `CREATE TABLE volume_versions (
       volume TEXT NOT NULL REFERENCES volumes (id), version BIGINT NOT NULL, reference TEXT NOT NULL,
       manifest TEXT NOT NULL, size_bytes BIGINT NOT NULL, stored_bytes BIGINT NOT NULL, created_ms BIGINT NOT NULL,
       PRIMARY KEY (volume, version))`,
    `CREATE TABLE volume_shares (
       volume TEXT NOT NULL REFERENCES volumes (id), user_name TEXT NOT NULL, PRIMARY KEY (volume, user_name))`,
    // Of those that it reads, the version that it has.
    `CREATE TABLE vm_volumes (
       vm TEXT NOT NULL REFERENCES vms (id), volume TEXT NOT NULL REFERENCES volumes (id), name TEXT NOT NULL,
       read_only BIGINT NOT NULL, manifest TEXT, size_bytes BIGINT, PRIMARY KEY (vm, volume))`,
    `CREATE INDEX vm_volumes_volume ON vm_volumes (volume)`,
    // What is run in a VM when it has booted, and what came of it (JSON).
    `ALTER TABLE vms ADD COLUMN command TEXT`,
    `ALTER TABLE vms ADD COLUMN command_result TEXT`,
  ],
  [
    // What volumes are charged for: each size that one had, and how long.
    `CREATE TABLE volume_sizes (
       volume TEXT NOT NULL REFERENCES volumes (id), since_ms BIGINT NOT NULL, until_ms BIGINT,
       size_bytes BIGINT NOT NULL, PRIMARY KEY (volume, since_ms))`,
    `INSERT INTO volume_sizes (volume, since_ms, until_ms, size_bytes)
       SELECT id, created_ms, removed_ms, size_bytes FROM volumes`,
    `ALTER TABLE quotas ADD COLUMN volume_bytes BIGINT`,
    // CPU time of the file service on a VM's behalf: the sum, and what its host said last, which begins anew with the proxy.
    `ALTER TABLE usage ADD COLUMN cpu_ms BIGINT NOT NULL DEFAULT 0`,
    `ALTER TABLE usage ADD COLUMN cpu_told_ms BIGINT NOT NULL DEFAULT 0`,
  ],
  [
    // Since when a VM waits, or waited, for its last placement; NULL: since it was requested.
    `ALTER TABLE vms ADD COLUMN asked_ms BIGINT`,
  ],
];
