/** Data volumes: one's own and those that are shared, who has each, and a form to make an empty one. */
import { call } from './api.mjs';
import { bytesText, h, state, Table } from './dom.mjs';

const MIB = 2 ** 20;

export class Volumes {
  constructor(page) {
    this.page = page;
    this.list = new Table(
      [
        ['Volume', (one) => this.#nameOf(one)],
        ['State', (one) => state(one.state)],
        ['Size', (one) => bytesText(one.sizeBytes), 'number'],
        ['Version', (one) => String(one.version), 'number'],
        ['Stored', (one) => bytesText(one.storedBytes), 'number'],
        [
          'Attached to',
          (one) => one.attached.map(({ vm, readOnly }) => (readOnly ? `${vm} (reads)` : vm)).join(', '),
        ],
        ['Host', (one) => (one.host === undefined ? '' : `${one.host}${one.unsaved ? ', not saved' : ''}`)],
        ['Shared with', (one) => one.sharedWith.join(', ')],
        ['Why', (one) => one.reason ?? ''],
        ['', (one) => this.#remover(one)],
      ],
      'Data volumes',
    );
    this.empty = h(
      'p',
      { class: 'empty' },
      'No data volumes yet. What machines write there stays when they go.',
    );
    this.problem = h('p', { class: 'error wide', role: 'alert' });
    this.name = h('input', {
      id: 'v-name',
      required: true,
      maxlength: 20,
      pattern: '[a-z0-9][a-z0-9._\\-]*',
    });
    this.size = h('input', { id: 'v-size', type: 'number', min: 1, max: 2 ** 23, step: 1, value: '1024' });
    this.maker = h('button', { type: 'submit', class: 'primary' }, 'Make volume');
    this.form = h(
      'form',
      { class: 'card', 'aria-label': 'Make a data volume' },
      h(
        'div',
        { class: 'fields' },
        h('div', {}, h('label', { for: 'v-name' }, 'Name'), this.name),
        h('div', {}, h('label', { for: 'v-size' }, 'Size, MiB'), this.size),
        h('div', { class: 'actions' }, this.maker),
        this.problem,
      ),
    );
    this.form.addEventListener('submit', (event) => {
      event.preventDefault();
      void this.#do(this.maker, `Making ${this.name.value}`, () =>
        call('POST', '/v1/volumes', {
          name: this.name.value.trim(),
          sizeBytes: Number(this.size.value) * MIB,
        }),
      );
    });
    this.elements = [
      h(
        'div',
        { class: 'head' },
        h(
          'div',
          {},
          h('h2', {}, 'Volumes'),
          h(
            'p',
            { class: 'dim' },
            'One machine at a time writes to one; any number read what was saved last.',
          ),
        ),
      ),
      this.form,
      h('div', { class: 'card' }, this.list.element, this.empty),
    ];
  }

  /** Another user's is known by its owner, too. */
  #nameOf({ owner, name }) {
    return owner === this.page.user ? name : `${owner}/${name}`;
  }

  #remover(one) {
    const may = one.owner === this.page.user && one.attached.length === 0;
    return {
      key: may ? one.id : '',
      make: () =>
        may
          ? h(
              'button',
              {
                type: 'button',
                class: 'danger',
                'aria-label': `Remove ${one.name}`,
                onclick: (event) => this.#remove(event.currentTarget, one),
              },
              'Remove',
            )
          : '',
    };
  }

  #remove(button, { id, name }) {
    if (!confirm(`Remove volume ${name}? What was written since its last version goes with it.`)) return;
    void this.#do(button, `Removed ${name}`, () => call('DELETE', `/v1/volumes/${id}`));
  }

  async #do(button, told, work) {
    this.problem.textContent = '';
    button.disabled = true;
    try {
      await work();
      this.page.tell(told);
    } catch (refused) {
      this.problem.textContent = refused.message;
    } finally {
      button.disabled = false;
    }
  }

  show() {
    const { volumes } = this.page.known;
    this.empty.hidden = volumes.length > 0;
    this.list.element.hidden = volumes.length === 0;
    this.list.show(volumes, ({ id }) => id);
  }
}
