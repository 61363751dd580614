/** Elements and texts. All that comes from the broker becomes text nodes and attributes' values, never markup. */

const SVG = 'http://www.w3.org/2000/svg';
/** What this page sets; a name from outside never is one. */
const PROPERTIES = new Set(['disabled', 'hidden', 'value', 'checked']);

function fill(element, attributes, children) {
  for (const [name, value] of Object.entries(attributes)) {
    if (value === undefined || value === false) continue;
    if (name === 'onclick') element.addEventListener('click', value);
    else if (PROPERTIES.has(name)) element[name] = value;
    else element.setAttribute(name, value === true ? '' : String(value));
  }
  for (const child of children.flat()) {
    if (child === undefined || child === null || child === '') continue;
    element.append(child instanceof Node ? child : String(child));
  }
  return element;
}

export const h = (name, attributes = {}, ...children) =>
  fill(document.createElement(name), attributes, children);
export const s = (name, attributes = {}, ...children) =>
  fill(document.createElementNS(SVG, name), attributes, children);

/** 1536 → "1.5 KiB", as the command prints it. */
export function bytesText(bytes) {
  for (const [unit, size] of [
    ['GiB', 2 ** 30],
    ['MiB', 2 ** 20],
    ['KiB', 2 ** 10],
  ]) {
    if (bytes >= size) return `${(bytes / size).toFixed(unit === 'GiB' ? 2 : 1)} ${unit}`;
  }
  return `${bytes} B`;
}

export const secondsText = (ms) => (ms < 1000 ? `${Math.round(ms)} ms` : `${(ms / 1000).toFixed(2)} s`);

/** Sets the children of `parent` to `elements` and leaves alone those that are there already, so focus stays. */
export function place(parent, elements) {
  for (const [at, element] of elements.entries()) {
    if (parent.children[at] !== element) parent.insertBefore(element, parent.children[at] ?? null);
  }
  while (parent.children.length > elements.length) parent.lastElementChild.remove();
}

/** The same for texts and simple content: replaced only when `key` is another than last time. */
export function refresh(element, key, make) {
  if (element.dataset.key === key) return;
  element.dataset.key = key;
  element.replaceChildren(...[make()].flat().filter((part) => part !== undefined));
}

/** Content of a cell. */
export const state = (name) => ({
  key: name,
  make: () => h('span', { class: 'state', 'data-state': name }, name),
});

/** A table with one row per item, kept by its id. `columns`: [head, cell(item) → content, class]. */
export class Table {
  constructor(columns, label) {
    this.columns = columns;
    this.rows = new Map();
    // On a phone its rows are shown as cards; the roles keep it a table for those who hear it.
    this.body = h('tbody', { role: 'rowgroup' });
    this.element = h(
      'table',
      { role: 'table', 'aria-label': label },
      h(
        'thead',
        { role: 'rowgroup' },
        h(
          'tr',
          { role: 'row' },
          ...columns.map(([head]) => h('th', { scope: 'col', role: 'columnheader' }, head)),
        ),
      ),
      this.body,
    );
  }

  show(items, idOf, openId) {
    const rows = items.map((item) => {
      const id = idOf(item);
      let row = this.rows.get(id);
      if (row === undefined) {
        row = h(
          'tr',
          { role: 'row' },
          ...this.columns.map(([head, , kind]) => h('td', { role: 'cell', 'data-label': head, class: kind })),
        );
        this.rows.set(id, row);
      }
      row.dataset.open = id === openId ? 'yes' : 'no';
      for (const [at, [, cell]] of this.columns.entries()) {
        const content = cell(item);
        refresh(row.children[at], content.key ?? String(content), () => content.make?.() ?? String(content));
      }
      return row;
    });
    const ids = new Set(items.map(idOf));
    for (const id of this.rows.keys()) if (!ids.has(id)) this.rows.delete(id);
    place(this.body, rows);
  }
}
