/** The timeline of instantiations as bars over one axis of seconds: a row per phase of one VM, or a row per VM. */
import { h, s, secondsText } from './dom.mjs';

/** What a VM went through, in order. `of` says when it was over, in milliseconds since it was asked for. */
const PHASES = [
  ['queued', 'Queued', 'waited for a host'],
  ['cloned', 'Mounted', 'a clone of its image on the mount'],
  ['started', 'Started', 'its machine runs'],
  ['answered', 'Answered', 'its guest is ready'],
];

/** Room for the length at the end of a bar. */
const RIGHT = 70;
const LETTER = 7;
const ROW = 26;

/** [{ phase, fromMs, toMs, open }], `open`: goes on. */
export function phasesOf(vm, nowMs) {
  const asked = Date.parse(vm.asked);
  const placed = vm.placed === undefined ? undefined : Date.parse(vm.placed) - asked;
  const { clonedMs, startedMs, readyMs } = vm.timeline ?? {};
  const ends = [
    placed,
    ...[clonedMs, startedMs, readyMs].map((ms) =>
      ms === undefined || placed === undefined ? undefined : placed + ms,
    ),
  ];
  const spans = [];
  let from = 0;
  for (const [at, [phase]] of PHASES.entries()) {
    const to = ends[at];
    if (to === undefined) {
      const waiting = vm.state === 'requested' || vm.state === 'placed';
      if (waiting) spans.push({ phase, fromMs: from, toMs: Math.max(from, nowMs - asked), open: true });
      break;
    }
    spans.push({ phase, fromMs: from, toMs: Math.max(from, to), open: false });
    from = Math.max(from, to);
  }
  return spans;
}

const labelOf = (phase) => PHASES.find(([name]) => name === phase)[1];

export function spokenOf(vm, nowMs) {
  return phasesOf(vm, nowMs)
    .map(
      ({ phase, fromMs, toMs, open }) =>
        `${labelOf(phase)} ${open ? 'since' : 'in'} ${secondsText(toMs - fromMs)}`,
    )
    .join(', ');
}

/** A step of 1, 2 or 5 that gives about five of them. */
function stepOf(totalMs) {
  const rough = totalMs / 5;
  const power = 10 ** Math.floor(Math.log10(rough));
  return power * ([1, 2, 5].find((step) => step * power >= rough) ?? 10);
}

/** The drawing, for one VM or for all of a request. */
export function waterfall(vms, nowMs, width) {
  const left = Math.max(70, Math.min(150, width / 5));
  const rows =
    vms.length === 1
      ? phasesOf(vms[0], nowMs).map((span) => ({ label: labelOf(span.phase), spans: [span] }))
      : vms.map((vm) => ({ label: vm.name, spans: phasesOf(vm, nowMs) }));
  const start = Math.min(...vms.map((vm) => Date.parse(vm.asked)));
  const offset = (vm) => Date.parse(vm.asked) - start;
  const totalMs = Math.max(
    1,
    ...vms.flatMap((vm) => phasesOf(vm, nowMs).map(({ toMs }) => toMs + offset(vm))),
  );
  const x = (ms) => left + (ms / totalMs) * (width - left - RIGHT);
  const height = rows.length * ROW + 28;
  const step = stepOf(totalMs * Math.max(1, 500 / width));
  const axis = s('g', { class: 'axis' });
  for (let ms = 0; ms <= totalMs; ms += step) {
    axis.append(
      s('line', { x1: x(ms), x2: x(ms), y1: 0, y2: height - 22 }),
      s('text', { x: x(ms), y: height - 6, 'text-anchor': 'middle' }, secondsText(ms).replace('.00', '')),
    );
  }
  const drawing = s('svg', {
    class: 'waterfall',
    viewBox: `0 0 ${width} ${height}`,
    role: 'img',
    'aria-label': `Timeline. ${vms.map((vm) => `${vm.name}: ${spokenOf(vm, nowMs)}`).join('. ')}`,
  });
  drawing.append(axis);
  for (const [at, row] of rows.entries()) {
    const y = at * ROW + 4;
    const letters = Math.floor((left - 10) / LETTER);
    const label = row.label.length > letters ? `${row.label.slice(0, letters - 1)}…` : row.label;
    drawing.append(s('text', { x: left - 10, y: y + 13, 'text-anchor': 'end' }, label));
    for (const { phase, fromMs, toMs, open } of row.spans) {
      drawing.append(
        s(
          'rect',
          {
            x: x(fromMs),
            y,
            width: Math.max(2, x(toMs) - x(fromMs)),
            height: ROW - 9,
            rx: 3,
            class: `p-${phase}${open ? ' open' : ''}`,
          },
          s('title', {}, `${labelOf(phase)}: ${secondsText(toMs - fromMs)}`),
        ),
      );
    }
    const last = row.spans.at(-1);
    if (last) {
      const lengthMs = vms.length === 1 ? last.toMs - last.fromMs : last.toMs;
      drawing.append(s('text', { x: x(last.toMs) + 7, y: y + 13 }, secondsText(lengthMs)));
    }
  }
  return drawing;
}

/** What the colours mean, for a drawing of several VMs. */
export function legend() {
  return h(
    'p',
    { class: 'dim legend' },
    ...PHASES.map(([phase, label, what]) => {
      const swatch = s('svg', {
        width: 12,
        height: 12,
        class: 'waterfall-key waterfall',
        'aria-hidden': 'true',
      });
      swatch.append(s('rect', { width: 12, height: 12, rx: 3, class: `p-${phase}` }));
      return h('span', { class: 'key', title: what }, swatch, ` ${label} `);
    }),
  );
}
