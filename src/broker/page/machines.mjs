/** The machines of whoever is logged in: the list, the form to request more, and one of them in detail. */
import { call } from './api.mjs';
import { Console } from './console.mjs';
import { bytesText, h, refresh, secondsText, state, Table } from './dom.mjs';
import { RequestForm } from './request.mjs';
import { legend, spokenOf, waterfall } from './waterfall.mjs';

const STARTING = ['requested', 'placed'];
const GONE = ['stopped', 'failed', 'lost'];

export class Machines {
  constructor(page) {
    this.page = page;
    this.open = undefined;
    this.list = new Table(
      [
        ['Name', (vm) => ({ key: vm.name, make: () => this.#opener(vm) })],
        ['State', (vm) => state(vm.state)],
        ['Image', (vm) => vm.image ?? ''],
        ['Host', (vm) => vm.host ?? ''],
        ['Address', (vm) => this.#workspaceOf(vm)?.addresses[vm.id] ?? ''],
        ['Memory', (vm) => bytesText(vm.memoryBytes), 'number'],
        ['Ready after', (vm) => readyAfter(vm), 'number'],
        ['Fetched', (vm) => (vm.fetchedBytes === undefined ? '' : bytesText(vm.fetchedBytes)), 'number'],
      ],
      'Machines',
    );
    this.empty = h('p', { class: 'empty' }, 'No machines yet. Request one, and watch it come up here.');
    this.card = h('div', { class: 'card' }, this.list.element, this.empty);
    this.form = new RequestForm((made) => {
      this.#ask(false);
      if (made === undefined) return;
      const count = made.machines.length;
      this.page.tell(`${count === 1 ? 'One machine is' : `${count} machines are`} on the way.`);
      this.select(made.machines[0]?.id);
    });
    this.asker = h(
      'button',
      {
        type: 'button',
        class: 'primary',
        'aria-expanded': 'false',
        onclick: () => this.#ask(this.form.element.hidden),
      },
      'Request machines',
    );
    this.detail = h('section', { class: 'card detail', hidden: true, 'aria-labelledby': 'detail-title' });
    this.#detailParts();
    this.summary = h('p', { class: 'dim' });
    this.elements = [
      h('div', { class: 'head' }, h('div', {}, h('h2', {}, 'Machines'), this.summary), this.asker),
      this.form.element,
      this.detail,
      this.card,
    ];
  }

  #workspaceOf(vm) {
    return this.page.known.workspaces.find(({ job }) => job === vm.job);
  }

  #opener(vm) {
    return h(
      'button',
      { type: 'button', class: 'link', onclick: () => this.select(this.open === vm.id ? undefined : vm.id) },
      vm.name,
    );
  }

  #ask(yes) {
    this.form.element.hidden = !yes;
    this.asker.setAttribute('aria-expanded', String(yes));
    if (yes) this.form.image.focus();
    else this.asker.focus();
  }

  #detailParts() {
    this.title = h('h3', { id: 'detail-title', tabindex: '-1' });
    this.stateLine = h('span');
    this.actions = h('div', { class: 'actions' });
    this.facts = h('dl');
    this.drawing = h('div');
    this.spoken = h('p', { class: 'dim' });
    this.problem = h('p', { class: 'error', role: 'alert' });
    this.console = new Console();
    this.detail.append(
      h('div', { class: 'head' }, h('div', {}, this.title, this.stateLine), this.actions),
      this.problem,
      this.facts,
      h('h3', {}, 'Timeline'),
      this.drawing,
      this.spoken,
      this.console.element,
    );
  }

  select(id) {
    if (this.console.of !== id) this.console.close();
    this.open = id;
    this.toFocus = id;
    this.problem.textContent = '';
    this.show();
  }

  /** What can be done now, to the machine and to all of its workspace. */
  #verbs(vm) {
    const { paths, known } = this.page;
    const at = `/v1/vms/${encodeURIComponent(vm.id)}`;
    const can = (verb) => paths.has(`/v1/vms/{id}/${verb}`);
    const verbs = [];
    if (vm.state === 'running' && can('suspend')) verbs.push([`${at}/suspend`, 'Suspend', {}]);
    if (vm.state === 'suspended' && can('resume')) verbs.push([`${at}/resume`, 'Resume', {}]);
    if (!GONE.includes(vm.state) && vm.state !== 'stopping') {
      verbs.push([`${at}/stop`, 'End', { graceMs: 5000 }]);
    }
    const workspace = this.#workspaceOf(vm);
    const states = known.vms.filter(({ job }) => job === vm.job).map(({ state }) => state);
    if (workspace === undefined || states.length < 2) return verbs;
    const all = `/v1/workspaces/${encodeURIComponent(workspace.id)}`;
    if (states.includes('running') && can('suspend')) verbs.push([`${all}/suspend`, 'Suspend all', {}]);
    if (states.includes('suspended') && can('resume')) verbs.push([`${all}/resume`, 'Resume all', {}]);
    verbs.push([`${all}/end`, 'End all', {}]);
    return verbs;
  }

  #showActions(vm) {
    const verbs = this.#verbs(vm);
    const hasConsole = vm.state === 'running' && this.page.paths.has('/v1/vms/{id}/console');
    if (!hasConsole) this.console.close();
    refresh(this.actions, JSON.stringify([vm.id, verbs, hasConsole]), () => [
      ...verbs.map(([path, label, body]) =>
        h(
          'button',
          {
            type: 'button',
            class: label.startsWith('End') ? 'danger' : undefined,
            onclick: (event) => this.#act(event, vm, path, label, body),
          },
          label,
        ),
      ),
      hasConsole
        ? h('button', { type: 'button', onclick: () => this.console.open(vm.id) }, 'Console')
        : undefined,
      h('button', { type: 'button', class: 'quiet', onclick: () => this.#close() }, 'Close'),
    ]);
  }

  #close() {
    const row = this.list.rows.get(this.open);
    this.select(undefined);
    row?.querySelector('button')?.focus();
  }

  async #act(event, vm, path, label, body) {
    const button = event.currentTarget;
    const whom = label.endsWith('all') ? `all of ${this.#workspaceOf(vm)?.name}` : vm.name;
    if (label.startsWith('End') && !confirm(`End ${whom}? What was written to its own disks goes with it.`)) {
      return;
    }
    button.disabled = true;
    this.problem.textContent = '';
    try {
      await call('POST', path, body);
      this.page.tell(`${label}: ${vm.name}`);
    } catch (refused) {
      this.problem.textContent = refused.message;
      button.disabled = false;
    }
  }

  /** Shows what the page knows now; also called as time goes on. */
  show() {
    const { vms, images } = this.page.known;
    this.form.offer(images);
    const count = (name) => vms.filter((vm) => vm.state === name).length;
    this.summary.textContent = `${count('running')} running, ${vms.filter((vm) => STARTING.includes(vm.state)).length} starting`;
    this.empty.hidden = vms.length > 0;
    this.list.element.hidden = vms.length === 0;
    this.list.show(vms, ({ id }) => id, this.open);
    this.#showDetail(vms.find(({ id }) => id === this.open));
  }

  #showDetail(vm) {
    this.detail.hidden = vm === undefined;
    if (vm === undefined) return;
    const nowMs = Date.now() + this.page.clockMs;
    this.title.textContent = vm.name;
    if (this.toFocus === vm.id) {
      this.toFocus = undefined;
      this.detail.scrollIntoView({ block: 'nearest' });
      this.title.focus({ preventScroll: true });
    }
    const width = Math.min(1100, this.drawing.clientWidth || 720);
    refresh(this.stateLine, vm.state, () => state(vm.state).make());
    this.#showActions(vm);
    const workspace = this.#workspaceOf(vm);
    const facts = [
      ['Image', vm.image],
      ['Host', vm.host],
      ['Owner', vm.owner],
      ['Memory', bytesText(vm.memoryBytes)],
      ['Processors', vm.vcpus],
      ['Workspace', workspace?.name],
      ['Virtual network', workspace?.network],
      ['Address', workspace?.addresses[vm.id]],
      ['Ends', workspace?.ends && new Date(workspace.ends).toLocaleString()],
      ['On hosts of', vm.network],
      ['Fetched', vm.fetchedBytes === undefined ? undefined : bytesText(vm.fetchedBytes)],
      ['Requested', new Date(vm.created).toLocaleString()],
      ['On the host as', vm.placedAs],
      ['Command', vm.command && commandText(vm.command)],
      ['Why', vm.reason],
    ].filter(([, value]) => value !== undefined);
    refresh(this.facts, JSON.stringify(facts), () =>
      facts.map(([label, value]) =>
        h(
          'div',
          { class: ['Command', 'Why'].includes(label) ? 'wide' : undefined },
          h('dt', {}, label),
          h('dd', {}, value),
        ),
      ),
    );
    const together = this.page.known.vms.filter(({ job }) => job === vm.job).slice(0, 40);
    const live = together.some((one) => STARTING.includes(one.state));
    const key = JSON.stringify([
      together.map((one) => [one.id, one.state, one.timeline, one.placed]),
      live ? Math.floor(nowMs / 200) : 0,
      width,
    ]);
    refresh(this.drawing, key, () => [
      waterfall(together.length > 0 ? together : [vm], nowMs, width),
      together.length > 1 ? legend() : undefined,
    ]);
    if (!live) this.spoken.textContent = spokenOf(vm, nowMs);
    else this.spoken.textContent = 'It is coming up; the last bar grows.';
  }
}

const commandText = ({ command, exitCode, error }) =>
  `${command}: ${error ?? (exitCode === undefined ? 'is not over' : `ended with exit code ${exitCode}`)}`;

function readyAfter(vm) {
  const readyMs = vm.timeline?.readyMs;
  if (readyMs === undefined) return '';
  const waitedMs = vm.placed === undefined ? 0 : Date.parse(vm.placed) - Date.parse(vm.asked);
  return secondsText(readyMs + Math.max(0, waitedMs));
}

/** Whether something on the page changes although nothing new came. */
export const isMoving = (vms) => vms.some(({ state }) => STARTING.includes(state));
