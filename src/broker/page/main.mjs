/**
 * The broker's page. It holds what the broker last said (hosts, images, VMs, workspaces, volumes: whole lists over
 * server-sent events), and
 * each section draws what it needs of that; elements stay where they are, so that focus and selection do.
 */
import { call, follow, forgetToken, keepToken, token } from './api.mjs';
import { place } from './dom.mjs';
import { Hosts, Images, Usage } from './inventory.mjs';
import { isMoving, Machines } from './machines.mjs';
import { Volumes } from './volumes.mjs';

const $ = (id) => document.getElementById(id);
const TOLD_MS = 5000;
const nothing = () => ({ hosts: [], images: [], vms: [], workspaces: [], volumes: [] });

const page = {
  known: nothing(),
  /** Who is logged in. */
  user: undefined,
  /** Routes of this broker. */
  paths: new Set(),
  /** What the broker's clock is ahead of this one. */
  clockMs: 0,
  tell,
};
let telling;
let ended = new AbortController();
let sections;
let heardOnce = false;

function tell(text) {
  $('told').textContent = text;
  clearTimeout(telling);
  telling = setTimeout(() => ($('told').textContent = ''), TOLD_MS);
}

function current() {
  const name = location.hash.slice(1);
  return Object.hasOwn(sections, name) ? name : 'machines';
}

function turn() {
  const name = current();
  for (const link of document.querySelectorAll('nav a')) {
    if (link.hash === `#${name}`) link.setAttribute('aria-current', 'page');
    else link.removeAttribute('aria-current');
  }
  document.title = `gridvfs: ${name}`;
  place($('content'), sections[name].elements);
  sections[name].show();
  sections[name].load?.();
}

/** Says what became of VMs, to those who look elsewhere or cannot see. */
function announce(before, after) {
  const states = new Map(before.map((vm) => [vm.id, vm.state]));
  const changed = after.filter(
    (vm) => states.get(vm.id) !== vm.state && (states.has(vm.id) || vm.state !== 'stopped'),
  );
  if (changed.length === 0) return;
  const [vm] = changed;
  const why = vm.state === 'failed' && vm.reason ? `: ${vm.reason}` : '';
  tell(changed.length === 1 ? `${vm.name} is ${vm.state}${why}` : `${changed.length} machines changed`);
}

function heard(event, data) {
  if (event === 'you') {
    page.user = data.user;
    $('who').textContent = `${data.user} (${data.role})`;
    page.clockMs = Date.parse(data.now) - Date.now();
    return;
  }
  if (event === 'vms') {
    if (heardOnce) announce(page.known.vms, data);
    heardOnce = true;
  }
  page.known[event] = data;
  sections[current()].show();
}

function live(yes) {
  $('live').textContent = yes ? 'live' : 'connecting';
  $('live').dataset.live = yes ? 'yes' : 'no';
}

function enter() {
  ended.abort();
  ended = new AbortController();
  heardOnce = false;
  page.known = nothing();
  sections = {
    machines: new Machines(page),
    hosts: new Hosts(page),
    images: new Images(page),
    volumes: new Volumes(page),
    usage: new Usage(page),
  };
  $('login').hidden = true;
  $('app').hidden = false;
  turn();
  follow(heard, live, ended.signal).catch((refused) => leave(refused.message));
}

function leave(why = '') {
  ended.abort();
  forgetToken();
  $('app').hidden = true;
  $('content').replaceChildren();
  $('login').hidden = false;
  $('login-error').textContent = why;
  $('token').value = '';
  $('token').focus();
}

async function logIn() {
  $('login-error').textContent = '';
  keepToken($('token').value.trim());
  try {
    await call('GET', '/v1/hosts');
    enter();
  } catch (refused) {
    leave(refused.message);
  }
}

$('login-form').addEventListener('submit', (event) => {
  event.preventDefault();
  void logIn();
});
$('logout').addEventListener('click', () => leave());
window.addEventListener('hashchange', () => {
  if ($('app').hidden) return;
  turn();
  $('content').focus({ preventScroll: true });
});
window.addEventListener('resize', () => {
  if (!$('app').hidden) sections[current()].show();
});
setInterval(() => {
  if (!$('app').hidden && isMoving(page.known.vms)) sections[current()].show();
}, 250);

const { paths } = await (await fetch('/v1/openapi.json')).json();
page.paths = new Set(Object.keys(paths));
if (token() === null) leave();
else enter();
