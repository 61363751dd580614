/** The form by which machines are asked for: a workspace of one or several of a kind. */
import { call } from './api.mjs';
import { h, refresh } from './dom.mjs';

const MIB = 2 ** 20;
const HOUR_MS = 3_600_000;
const NAME = '[a-z0-9][a-z0-9._\\-]*';

const field = (id, label, input, hint) =>
  h(
    'div',
    {},
    h('label', { for: id }, label),
    input,
    hint && h('span', { class: 'hint', id: `${id}-hint` }, hint),
  );
const number = (id, value, min, max, more = {}) =>
  h('input', { id, type: 'number', min, max, step: 1, value, ...more });
const text = (id, placeholder) =>
  h('input', { id, pattern: NAME, maxlength: 100, placeholder, 'aria-describedby': `${id}-hint` });

/** 'home, tables:ro' as the broker takes it. */
const volumesIn = (text) =>
  text
    .split(/[\s,]+/)
    .filter(Boolean)
    .map((one) => (one.endsWith(':ro') ? { volume: one.slice(0, -3), readOnly: true } : { volume: one }));

export class RequestForm {
  /** `done(workspace)` when one was made, without it when it was given up. */
  constructor(done) {
    this.done = done;
    this.image = h('select', { id: 'r-image', required: true });
    this.error = h('p', { class: 'error wide', role: 'alert' });
    this.submit = h('button', { type: 'submit', class: 'primary' }, 'Request');
    this.restart = h('input', { id: 'r-restart', type: 'checkbox' });
    this.element = h(
      'form',
      { class: 'card', hidden: true, 'aria-label': 'Request machines' },
      h(
        'div',
        { class: 'fields' },
        field('r-image', 'Image', this.image),
        field('r-count', 'How many', number('r-count', '1', 1, 100, { required: true })),
        field('r-name', 'Name', text('r-name', 'made up'), 'small letters, digits, . _ -'),
        field('r-memory', 'Memory each, MiB', number('r-memory', '512', 16, 4194304, { required: true })),
        field('r-vcpus', 'Processors each', number('r-vcpus', '1', 1, 64, { required: true })),
        field('r-network', 'Virtual network', text('r-network', 'none'), 'joins them, also across hosts'),
        field(
          'r-volumes',
          'Data volumes',
          h('input', { id: 'r-volumes', placeholder: 'none', 'aria-describedby': 'r-volumes-hint' }),
          'names with commas; NAME:ro to read one',
        ),
        field(
          'r-key',
          'Public ssh key',
          h('input', { id: 'r-key', placeholder: 'none', 'aria-describedby': 'r-key-hint' }),
          'let in where the guest reads its seed',
        ),
        field(
          'r-command',
          'Command in each',
          h('input', { id: 'r-command', placeholder: 'none', 'aria-describedby': 'r-command-hint' }),
          'run when it has booted; its end is kept',
        ),
        field('r-hours', 'Ends after, hours', number('r-hours', '', 1, 8000, { placeholder: 'never' })),
        h(
          'div',
          { class: 'wide' },
          h(
            'label',
            { class: 'check' },
            this.restart,
            'Start again on another host when its own falls silent',
          ),
        ),
        this.error,
        h(
          'div',
          { class: 'actions wide' },
          this.submit,
          h('button', { type: 'button', onclick: () => this.done() }, 'Cancel'),
        ),
      ),
    );
    this.element.addEventListener('submit', (event) => {
      event.preventDefault();
      void this.#send();
    });
  }

  #value(id) {
    return this.element.querySelector(`#${id}`).value.trim();
  }

  async #send() {
    this.error.textContent = '';
    this.submit.disabled = true;
    const given = (id, key, of = (value) => value) =>
      this.#value(id) === '' ? {} : { [key]: of(this.#value(id)) };
    try {
      const made = await call('POST', '/v1/workspaces', {
        image: this.image.value,
        count: Number(this.#value('r-count')),
        memoryBytes: Number(this.#value('r-memory')) * MIB,
        vcpus: Number(this.#value('r-vcpus')),
        restart: this.restart.checked,
        ...given('r-name', 'name'),
        ...given('r-network', 'network'),
        ...given('r-volumes', 'volumes', volumesIn),
        ...given('r-key', 'sshKeys', (key) => [key]),
        ...given('r-command', 'command'),
        ...given('r-hours', 'lifetimeMs', (hours) => Number(hours) * HOUR_MS),
      });
      this.done(made);
    } catch (refused) {
      this.error.textContent = refused.message;
    } finally {
      this.submit.disabled = false;
    }
  }

  /** Images that can be asked for. */
  offer(images) {
    const usable = images.filter(({ kind, hosts }) => kind === 'disk' && hosts > 0);
    const nameOf = (one) => `${one.image}:${one.version}`;
    refresh(this.image, JSON.stringify(usable.map((one) => [nameOf(one), one.deprecated])), () =>
      usable.map((one) =>
        h(
          'option',
          { value: nameOf(one) },
          `${nameOf(one)}${one.deprecated === undefined ? '' : ' (deprecated)'}`,
        ),
      ),
    );
  }
}
