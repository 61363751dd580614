/** Hosts with what they have warm, images with their versions and lineage, and what was used. */
import { call } from './api.mjs';
import { bytesText, h, place, refresh, Table } from './dom.mjs';

const nameOf = (image) => `${image.image}:${image.version}`;

export class Hosts {
  constructor(page) {
    this.page = page;
    this.cards = new Map();
    this.grid = h('div', { class: 'hosts' });
    this.empty = h('p', { class: 'card empty' }, 'No host has registered yet.');
    this.elements = [
      h(
        'div',
        { class: 'head' },
        h(
          'div',
          {},
          h('h2', {}, 'Hosts'),
          h('p', { class: 'dim' }, 'What each promises, and what its cache holds of each image.'),
        ),
      ),
      this.empty,
      this.grid,
    ];
  }

  show() {
    const { hosts, images } = this.page.known;
    this.empty.hidden = hosts.length > 0;
    const byManifest = new Map(images.map((image) => [image.manifest, image]));
    place(
      this.grid,
      hosts.map((host) => {
        const card =
          this.cards.get(host.id) ?? h('article', { class: 'card', 'aria-label': `Host ${host.id}` });
        this.cards.set(host.id, card);
        const { load: _, ...calm } = host;
        refresh(card, JSON.stringify([calm, images.length]), () => this.#card(host, byManifest));
        return card;
      }),
    );
  }

  #card(host, byManifest) {
    const warm = Object.entries(host.warmBytes)
      .flatMap(([manifest, bytes]) => {
        const image = byManifest.get(manifest);
        return image === undefined || bytes === 0 ? [] : [[image, bytes]];
      })
      .toSorted(([, a], [, b]) => b - a)
      .slice(0, 12);
    const facts = [
      ['VMs', host.vms],
      ['Promises', `${bytesText(host.future.memoryBytes)}, ${host.future.vcpus} vcpus`],
      ['Processor', host.accelerator === 'kvm' ? 'KVM' : host.accelerator === 'tcg' ? 'emulated' : 'none'],
      ['Networks', host.networks.join(', ') || 'none'],
    ];
    return [
      h(
        'header',
        {},
        h('h3', {}, host.id),
        h('span', { class: 'state', 'data-state': host.state }, host.unusable ?? host.state),
      ),
      h('dl', {}, ...facts.map(([label, value]) => h('div', {}, h('dt', {}, label), h('dd', {}, value)))),
      h(
        'ul',
        { class: 'warmth', 'aria-label': `Warm on ${host.id}` },
        ...(warm.length === 0 ? [h('li', { class: 'dim' }, 'Nothing is warm yet.')] : []),
        ...warm.map(([image, bytes]) =>
          h(
            'li',
            {},
            h('span', {}, nameOf(image)),
            h('span', { class: 'dim' }, bytesText(bytes)),
            h('meter', {
              min: 0,
              max: Math.max(image.sizeBytes, bytes),
              value: String(bytes),
              'aria-label': `${bytesText(bytes)} of ${nameOf(image)} on ${host.id}`,
            }),
          ),
        ),
      ),
    ];
  }
}

export class Images {
  constructor(page) {
    this.page = page;
    const tags = (image) =>
      Object.entries(image.labels)
        .filter(([name]) => !/^(boot|machine)\./.test(name))
        .map(([name, value]) => `${name}=${value}`);
    this.list = new Table(
      [
        ['Version', (one) => nameOf(one)],
        ['Kind', (one) => one.kind],
        ['Size', (one) => bytesText(one.sizeBytes), 'number'],
        ['Made from', (one) => this.#lineage(one)],
        ['Warm on', (one) => this.#warmOn(one)],
        ['Owner', (one) => one.owner ?? 'everybody'],
        [
          'Labels',
          (one) => {
            const all =
              one.deprecated === undefined ? tags(one) : [`deprecated: ${one.deprecated}`, ...tags(one)];
            return {
              key: JSON.stringify(all),
              make: () => h('span', {}, ...all.map((text) => h('span', { class: 'tag' }, text))),
            };
          },
        ],
      ],
      'Images',
    );
    this.empty = h('p', { class: 'empty' }, 'No host offers an image that you may use.');
    this.elements = [
      h(
        'div',
        { class: 'head' },
        h(
          'div',
          {},
          h('h2', {}, 'Images'),
          h('p', { class: 'dim' }, 'Versions never change; a new one names what it was made from.'),
        ),
      ),
      h('div', { class: 'card' }, this.list.element, this.empty),
    ];
  }

  /** From the nearest to the farthest, as far as they are known; a bound, for a parent may name whatever it likes. */
  #lineage(image) {
    const names = [];
    let { parent } = image;
    while (parent !== undefined && names.length < 16) {
      const known = this.page.known.images.find(({ manifest }) => manifest === parent);
      names.push(known === undefined ? parent.slice(0, 12) : nameOf(known));
      parent = known?.parent;
    }
    return names.join(' ← ');
  }

  #warmOn(image) {
    return this.page.known.hosts
      .filter((host) => (host.warmBytes[image.manifest] ?? 0) > 0)
      .map((host) => `${host.id} (${bytesText(host.warmBytes[image.manifest])})`)
      .join(', ');
  }

  show() {
    const { images } = this.page.known;
    this.empty.hidden = images.length > 0;
    this.list.element.hidden = images.length === 0;
    this.list.show(images, nameOf);
  }
}

const gibHours = (byteSeconds) => (byteSeconds / 3600 / 2 ** 30).toFixed(3);

export class Usage {
  constructor(page) {
    this.page = page;
    this.machines = new Table(
      [
        ['VM', (row) => row.name],
        ['Workspace', (row) => row.workspace],
        ['Owner', (row) => row.owner],
        ['Host', (row) => row.host],
        ['Time', (row) => `${row.seconds.toFixed(0)} s`, 'number'],
        ['GiB hours', (row) => gibHours(row.memoryByteSeconds), 'number'],
        ['Fetched', (row) => bytesText(row.fetchedBytes), 'number'],
        ['Stored', (row) => bytesText(row.storedBytes), 'number'],
        ['CPU', (row) => `${row.cpuSeconds.toFixed(2)} s`, 'number'],
        ['', (row) => (row.running ? 'still running' : '')],
      ],
      'Usage',
    );
    this.volumes = new Table(
      [
        ['Volume', (row) => row.name],
        ['Owner', (row) => row.owner],
        ['Size', (row) => bytesText(row.sizeBytes), 'number'],
        ['GiB hours', (row) => gibHours(row.byteSeconds), 'number'],
        ['Stored', (row) => bytesText(row.storedBytes), 'number'],
        ['', (row) => (row.there ? '' : 'removed')],
      ],
      'Usage of data volumes',
    );
    this.total = h('p', { class: 'dim' });
    this.quota = h('p', { class: 'dim' });
    this.elements = [
      h(
        'div',
        { class: 'head' },
        h('div', {}, h('h2', {}, 'Usage'), this.total, this.quota),
        h('button', { type: 'button', onclick: () => this.load() }, 'Refresh'),
      ),
      h('div', { class: 'card' }, this.machines.element),
      h('div', { class: 'card' }, this.volumes.element),
    ];
  }

  async load() {
    try {
      const [machines, volumes, quota] = await Promise.all(
        ['/v1/usage', '/v1/usage?by=volume', '/v1/quota'].map((path) => call('GET', path)),
      );
      const sum = (rows, of) => rows.reduce((total, row) => total + of(row), 0);
      this.total.textContent = [
        `${gibHours(sum(machines, (row) => row.memoryByteSeconds))} GiB hours of memory`,
        `${gibHours(sum(volumes, (row) => row.byteSeconds))} of volumes`,
        `${bytesText(sum(machines, (row) => row.fetchedBytes))} fetched`,
      ].join(', ');
      this.quota.textContent = quotaText(quota);
      this.machines.show(machines, (row) => `${row.vm}.${row.generation}`);
      this.volumes.show(volumes, (row) => row.volume);
      this.volumes.element.parentElement.hidden = volumes.length === 0;
    } catch (refused) {
      this.page.tell(refused.message);
    }
  }

  show() {}
}

/** What one has, of what one may have where that is bounded. */
function quotaText({ used, ...quota }) {
  const of = (key, write) =>
    quota[key] === undefined ? write(used[key]) : `${write(used[key])} of ${write(quota[key])}`;
  return `Now: ${of('machines', String)} machines, ${of('vcpus', String)} processors, ${of('memoryBytes', bytesText)} memory, ${of('volumeBytes', bytesText)} data volumes`;
}
