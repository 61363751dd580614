/** The serial console of one machine: what its guest said lately and says now, and a line to type to it. */
import { call, read } from './api.mjs';
import { h } from './dom.mjs';

/** What is kept of it, in characters. */
const KEPT = 64 * 1024;
const [ESCAPE, BELL] = ['\u001b', '\u0007'];
/** Colours, cursor movements and titles: this is no terminal. */
const SEQUENCES = new RegExp(
  `${ESCAPE}(?:\\[[0-9;?]*[ -/]*[@-~]|\\][^${BELL}${ESCAPE}]*(?:${BELL}|${ESCAPE}\\\\)|[()][A-Za-z0-9]|[=>78A-Z])`,
  'g',
);

const plain = (text) => {
  let rest = text.replaceAll(SEQUENCES, '');
  for (const mark of ['\r', BELL, '\b \b']) rest = rest.replaceAll(mark, '');
  return rest;
};

export class Console {
  constructor() {
    this.output = h('pre', {
      class: 'console',
      role: 'log',
      tabindex: '0',
      'aria-label': 'What the guest says',
    });
    this.line = h('input', { id: 'c-line', autocomplete: 'off', spellcheck: 'false', maxlength: 4000 });
    this.problem = h('p', { class: 'error', role: 'alert' });
    this.element = h(
      'form',
      { hidden: true, class: 'console-form', 'aria-label': 'Console' },
      h('h3', {}, 'Console'),
      this.output,
      h('label', { for: 'c-line' }, 'Type to it'),
      h(
        'div',
        { class: 'actions' },
        this.line,
        h('button', { type: 'submit' }, 'Send'),
        h('button', { type: 'button', onclick: () => this.#send('\u0003') }, 'Ctrl-C'),
      ),
      this.problem,
    );
    this.element.addEventListener('submit', (event) => {
      event.preventDefault();
      void this.#send(`${this.line.value}\n`);
      this.line.value = '';
    });
  }

  get of() {
    return this.ended === undefined ? undefined : this.id;
  }

  /** Shows that of the machine `id`, instead of another's. */
  async open(id) {
    this.close();
    this.id = id;
    this.ended = new AbortController();
    const { signal } = this.ended;
    this.element.hidden = false;
    this.output.textContent = '';
    this.problem.textContent = '';
    this.line.focus();
    try {
      const reader = (await read(this.#path(), signal)).pipeThrough(new TextDecoderStream()).getReader();
      for (let text = ''; ;) {
        const { done, value } = await reader.read();
        if (done) break;
        text = (text + value).slice(-KEPT);
        this.output.textContent = plain(text);
        this.output.scrollTop = this.output.scrollHeight;
      }
      if (!signal.aborted) this.problem.textContent = 'The console is closed.';
    } catch (refused) {
      if (!signal.aborted) this.problem.textContent = refused.message;
    }
  }

  close() {
    this.ended?.abort();
    this.ended = undefined;
    this.element.hidden = true;
  }

  #path() {
    return `/v1/vms/${encodeURIComponent(this.id)}/console`;
  }

  async #send(text) {
    this.problem.textContent = '';
    try {
      await call('POST', this.#path(), { text });
    } catch (refused) {
      this.problem.textContent = refused.message;
    }
  }
}
