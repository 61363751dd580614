/**
 * Headless Chromium for tests of the page: started by itself, driven over its debugging pipe (descriptors 3 and 4: JSON
 * with a NUL behind it), no port and no package. What the page's console says and what fails is kept.
 */
import { spawn } from 'node:child_process';
import type { ChildProcess } from 'node:child_process';
import { mkdtempSync, rmSync, writeFileSync } from 'node:fs';
import os from 'node:os';
import path from 'node:path';
import type { Readable, Writable } from 'node:stream';
import { setTimeout as sleep } from 'node:timers/promises';

const ARGUMENTS = [
  ...['--headless', '--no-sandbox', '--disable-gpu', '--disable-quic', '--no-first-run'],
  ...['--disable-background-networking', '--disable-component-update', '--disable-sync'],
  '--remote-debugging-pipe',
];

interface Message {
  readonly id?: number;
  readonly method?: string;
  readonly params?: Record<string, unknown>;
  readonly result?: Record<string, unknown>;
  readonly error?: { message: string };
}

export class Browser {
  readonly #child: ChildProcess;
  readonly #folder: string;
  readonly #session: string;
  readonly #calls: Calls;
  /** Errors and warnings of the page's console, exceptions, requests that failed. */
  readonly complaints: string[];

  private constructor(child: ChildProcess, folder: string, calls: Calls, session: string) {
    this.#child = child;
    this.#folder = folder;
    this.#calls = calls;
    this.#session = session;
    this.complaints = calls.complaints;
  }

  static async start(): Promise<Browser> {
    const folder = mkdtempSync(path.join(os.tmpdir(), 'gridvfs-browser-'));
    const child = spawn('chromium', [...ARGUMENTS, `--user-data-dir=${folder}`, 'about:blank'], {
      stdio: ['ignore', 'ignore', 'ignore', 'pipe', 'pipe'],
    });
    const calls = new Calls(child.stdio[3] as Writable, child.stdio[4] as Readable);
    child.once('error', (error) => calls.fail(error));
    child.once('exit', () => calls.fail(new Error('the browser ended')));
    try {
      const { targetId } = await calls.call<{ targetId: string }>('Target.createTarget', {
        url: 'about:blank',
      });
      const { sessionId } = await calls.call<{ sessionId: string }>('Target.attachToTarget', {
        targetId,
        flatten: true,
      });
      const browser = new Browser(child, folder, calls, sessionId);
      for (const domain of ['Page', 'Runtime', 'Log', 'Network']) await browser.#send(`${domain}.enable`);
      return browser;
    } catch (error) {
      child.kill('SIGKILL');
      rmSync(folder, { recursive: true, force: true });
      throw error;
    }
  }

  #send<T>(method: string, params: object = {}): Promise<T> {
    return this.#calls.call<T>(method, params, this.#session);
  }

  async open(url: string): Promise<void> {
    await this.#send('Page.navigate', { url });
    await this.until('document.readyState === "complete"');
  }

  /** By the browser: an expression that reloads its own page may have no answer. */
  async reload(): Promise<void> {
    await this.#send('Page.reload');
  }

  /** The value of an expression in the page. */
  async evaluate<T>(expression: string): Promise<T> {
    const { result, exceptionDetails } = await this.#send<{
      result: { value: T };
      exceptionDetails?: { exception?: { description?: string } };
    }>('Runtime.evaluate', { expression, returnByValue: true, awaitPromise: true });
    if (exceptionDetails) throw new Error(`${expression}: ${exceptionDetails.exception?.description}`);
    return result.value;
  }

  /** Resolves when the expression is true; generous, for a loaded machine. */
  async until(expression: string): Promise<void> {
    const endMs = performance.now() + 60_000;
    const isTrue = () =>
      this.evaluate<boolean>(`Boolean(${expression})`).catch((error: Error) => {
        if (error.message !== NAVIGATED) throw error;
        return false;
      });
    while (!(await isTrue())) {
      if (performance.now() > endMs) {
        const text = await this.evaluate<string>('document.body.innerText');
        throw new Error(`not in time: ${expression}; the page says: ${text}; ${this.complaints.join('; ')}`);
      }
      await sleep(30);
    }
  }

  /** What is to be read on the page. */
  text(): Promise<string> {
    return this.evaluate<string>('document.body.innerText');
  }

  /** Clicks the visible button or link with this text. */
  async click(text: string): Promise<void> {
    const find = `[...document.querySelectorAll('button, a')].find((one) => one.textContent.trim() === ${JSON.stringify(text)} && one.checkVisibility() && !one.disabled)`;
    await this.until(find);
    await this.evaluate(`${find}.click()`);
  }

  /** Types as a keyboard does, into what has the focus. */
  async type(text: string): Promise<void> {
    await this.#send('Input.insertText', { text });
  }

  async press(key: 'Tab' | 'Enter'): Promise<void> {
    const code = { Tab: 9, Enter: 13 }[key];
    const common = { key, code: key, windowsVirtualKeyCode: code };
    await this.#send('Input.dispatchKeyEvent', {
      type: 'keyDown',
      ...common,
      ...(key === 'Enter' ? { text: '\r' } : {}),
    });
    await this.#send('Input.dispatchKeyEvent', { type: 'keyUp', ...common });
  }

  /** Answers the page's next questions with yes. */
  acceptQuestions(): void {
    this.#calls.heard.set('Page.javascriptDialogOpening', () => {
      void this.#send('Page.handleJavaScriptDialog', { accept: true });
    });
  }

  async size(width: number, height: number, options: { dark?: boolean } = {}): Promise<void> {
    await this.#send('Emulation.setDeviceMetricsOverride', {
      ...{ width, height, deviceScaleFactor: 1, mobile: width < 600 },
    });
    await this.#send('Emulation.setEmulatedMedia', {
      features: [{ name: 'prefers-color-scheme', value: options.dark ? 'dark' : 'light' }],
    });
  }

  async screenshot(file: string): Promise<void> {
    const { data } = await this.#send<{ data: string }>('Page.captureScreenshot', { format: 'png' });
    writeFileSync(file, Buffer.from(data, 'base64'));
  }

  /** Roles and names as a screen reader has them. */
  async accessible(): Promise<{ role: string; name: string }[]> {
    const { nodes } = await this.#send<{
      nodes: { ignored: boolean; role?: { value: string }; name?: { value: string } }[];
    }>('Accessibility.getFullAXTree');
    return nodes
      .filter(({ ignored }) => !ignored)
      .map(({ role, name }) => ({ role: role?.value ?? '', name: name?.value ?? '' }));
  }

  async close(): Promise<void> {
    const ended = new Promise((resolve) => this.#child.once('exit', resolve));
    if (this.#child.exitCode === null && this.#child.signalCode === null) {
      await this.#calls.call('Browser.close', {}).catch(() => undefined);
      const late = setTimeout(() => this.#child.kill('SIGKILL'), 5_000);
      await ended;
      clearTimeout(late);
    }
    rmSync(this.#folder, { recursive: true, force: true, maxRetries: 10, retryDelay: 100 });
  }
}

/** Calls and their answers by number, and what the browser tells by itself. */
class Calls {
  readonly complaints: string[] = [];
  readonly heard = new Map<string, (params: Record<string, unknown>) => void>();
  readonly #write: Writable;
  readonly #open = new Map<number, { resolve(value: unknown): void; reject(error: Error): void }>();
  #count = 0;
  #text = '';
  #failed: Error | undefined;

  constructor(write: Writable, read: Readable) {
    this.#write = write;
    write.on('error', () => {});
    read.setEncoding('utf8');
    read.on('data', (piece: string) => {
      const parts = (this.#text + piece).split('\0');
      this.#text = parts.pop()!;
      for (const part of parts) this.#take(JSON.parse(part) as Message);
    });
  }

  #take({ id, method, params = {}, result, error }: Message): void {
    if (id !== undefined) {
      const call = this.#open.get(id);
      this.#open.delete(id);
      if (error) call?.reject(new Error(error.message));
      else call?.resolve(result);
      return;
    }
    const { level } = (params['entry'] ?? {}) as { level?: string };
    const bad =
      method === 'Runtime.exceptionThrown' ||
      (method === 'Log.entryAdded' && (level === 'error' || level === 'warning')) ||
      (method === 'Runtime.consoleAPICalled' &&
        ['error', 'warning', 'assert'].includes(params['type'] as string));
    if (bad) this.complaints.push(JSON.stringify(params));
    if (method !== undefined) this.heard.get(method)?.(params);
  }

  call<T>(method: string, params: object, sessionId?: string): Promise<T> {
    if (this.#failed) return Promise.reject(this.#failed);
    const id = ++this.#count;
    return new Promise<T>((resolve, reject) => {
      this.#open.set(id, { resolve: (value) => resolve(value as T), reject });
      this.#write.write(JSON.stringify({ id, method, params, ...(sessionId ? { sessionId } : {}) }) + '\0');
    });
  }

  fail(error: Error): void {
    this.#failed = error;
    for (const call of this.#open.values()) call.reject(error);
    this.#open.clear();
  }
}
/** What an expression is answered with whose page gave way to another meanwhile. */
const NAVIGATED = 'Inspected target navigated or closed';
