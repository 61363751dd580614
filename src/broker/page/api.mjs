/** Calls to the broker that served this page, under the token of whoever is logged in. */

const KEY = 'gridvfs-token';

export const token = () => sessionStorage.getItem(KEY);
export const keepToken = (text) => sessionStorage.setItem(KEY, text);
export const forgetToken = () => sessionStorage.removeItem(KEY);

export class Refused extends Error {
  constructor(status, code, detail) {
    super(detail);
    this.status = status;
    this.code = code;
  }
}

async function answerOf(response) {
  if (response.ok) return response;
  const problem = await response.json().catch(() => ({}));
  throw new Refused(
    response.status,
    problem.code,
    problem.detail ?? `the broker answered ${response.status}`,
  );
}

const headers = (more = {}) => ({ authorization: `Bearer ${token()}`, ...more });

export async function call(method, path, body) {
  const init = { method, headers: headers(), cache: 'no-store' };
  if (body !== undefined) {
    Object.assign(init.headers, { 'content-type': 'application/json' });
    init.body = JSON.stringify(body);
  }
  if (path === '/v1/workspaces') init.headers['idempotency-key'] = crypto.randomUUID();
  const response = await answerOf(await fetch(path, init));
  return response.status === 204 ? undefined : response.json();
}

/** What is answered as it comes, until `signal` is aborted. */
export async function read(path, signal) {
  return (await answerOf(await fetch(path, { headers: headers(), cache: 'no-store', signal }))).body;
}

/**
 * Server-sent events of /v1/events; `EventSource` cannot send a token. `heard(event, data)` for each, `live(yes)` when
 * the connection comes and goes. Connects again until `signal` is aborted; rejects when the token is refused.
 */
export async function follow(heard, live, signal) {
  for (let waitMs = 500; !signal.aborted; waitMs = Math.min(10_000, waitMs * 2)) {
    try {
      const response = await answerOf(
        await fetch('/v1/events', { headers: headers({ accept: 'text/event-stream' }), signal }),
      );
      live(true);
      waitMs = 250;
      const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
      let text = '';
      for (;;) {
        const { done, value } = await reader.read();
        if (done) break;
        const parts = (text + value).split('\n\n');
        text = parts.pop();
        for (const part of parts) {
          const event = /^event: (\w+)$/m.exec(part)?.[1];
          const data = /^data: (.*)$/m.exec(part)?.[1];
          if (event !== undefined && data !== undefined) heard(event, JSON.parse(data));
        }
      }
    } catch (error) {
      if (error instanceof Refused && (error.status === 401 || error.status === 403)) throw error;
      if (signal.aborted) return;
    }
    live(false);
    await new Promise((resolve) => {
      setTimeout(resolve, waitMs);
    });
  }
}
