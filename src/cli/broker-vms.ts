/** gridvfs broker stop|suspend|resume|move|checkpoint|commit: what users do to VMs that are there. */
import { randomUUID } from 'node:crypto';
import type { Command } from 'commander';
import type { JobInfo, VmInfo } from '../broker/index.ts';
import { GridError } from '../core/errors.ts';
import { checkJob, follow, vmTable, withBroker, withClient } from './broker-kit.ts';
import type { Connection } from './broker-kit.ts';
import { collect, parseDuration, show, verb } from './kit.ts';
import { allOf } from './vm-checkpoint.ts';

interface ActOptions extends Connection {
  host?: string;
  label?: string[];
  wait: boolean;
  timeout: number;
}

/** Asks for it, for each VM at once, and waits until it is done. */
async function act(vms: readonly string[], action: string, body: object, options: ActOptions): Promise<void> {
  const jobs = await withClient(options, (client) =>
    allOf(vms, async (vm) => {
      const job = await client.call<JobInfo>('POST', `/v1/vms/${encodeURIComponent(vm)}/${action}`, body, {
        headers: { 'idempotency-key': randomUUID() },
      });
      const ended = options.wait ? await follow(client, job, options) : job;
      checkJob(ended);
      return ended;
    }),
  );
  show(options, jobs, () => vmTable(jobs.flatMap((job) => job.vms)));
}

function actVerb(name: string, summary: string, examples: string[]): Command {
  return withBroker(verb(name, summary, examples))
    .option('--no-wait', 'return when it is accepted')
    .option('--timeout <duration>', 'how long to wait', parseDuration, 600_000);
}

function stopVerb(): Command {
  return withBroker(verb('stop', 'Stop VMs, by name or id.', ['gridvfs broker stop web-1 web-2']))
    .argument('<vm...>')
    .option('--grace <duration>', 'how long a guest may take to power down', parseDuration, 15_000)
    .action(async (vms: string[], options: Connection & { grace: number }) => {
      const stopped = await withClient(options, async (client) => {
        const answers: VmInfo[] = [];
        for (const vm of vms) {
          answers.push(
            await client.call<VmInfo>('POST', `/v1/vms/${encodeURIComponent(vm)}/stop`, {
              graceMs: options.grace,
            }),
          );
        }
        for (const [at, { id }] of answers.entries()) {
          while (answers[at]!.state === 'stopping') {
            await new Promise((resolve) => setTimeout(resolve, 100));
            answers[at] = await client.call<VmInfo>('GET', `/v1/vms/${id}`);
          }
        }
        return answers;
      });
      show(options, stopped, () => vmTable(stopped));
    });
}

export function vmVerbs(): Command[] {
  return [
    stopVerb(),
    actVerb('suspend', 'Suspend VMs into the store; they hold nothing of a host then.', [
      'gridvfs broker suspend web-1',
    ])
      .argument('<vm...>')
      .action((vms: string[], options: ActOptions) => act(vms, 'suspend', {}, options)),
    actVerb('resume', 'Go on with suspended VMs, on whatever host fits.', [
      'gridvfs broker resume web-1',
      'gridvfs broker resume web-1 --host two',
    ])
      .argument('<vm...>')
      .option('--host <name>', 'on this host')
      .action((vms: string[], options: ActOptions) => act(vms, 'resume', place(options), options)),
    actVerb('move', 'Suspend VMs and resume them on another host.', [
      'gridvfs broker move web-1',
      'gridvfs broker move web-1 --host two',
    ])
      .argument('<vm...>')
      .option('--host <name>', 'to this host')
      .action((vms: string[], options: ActOptions) => act(vms, 'move', place(options), options)),
    actVerb('checkpoint', 'Make a checkpoint of VMs that run on: what a restart goes on from.', [
      'gridvfs broker checkpoint web-1',
    ])
      .argument('<vm...>')
      .action((vms: string[], options: ActOptions) => act(vms, 'checkpoint', {}, options)),
    actVerb('commit', 'Make an image version of your own of a VM’s disk, as a power cut would leave it.', [
      'gridvfs broker commit web-1 my-web:1 --label os=debian',
    ])
      .argument('<vm>')
      .argument('<reference>', 'name:version')
      .option('--label <name=value>', 'label of the version (may be given again)', collect)
      .action((vm: string, reference: string, options: ActOptions) =>
        act([vm], 'commit', { reference, labels: labels(options.label) }, options),
      ),
  ];
}

const place = ({ host }: ActOptions) => (host === undefined ? {} : { host });

function labels(texts: readonly string[] = []): Record<string, string> {
  return Object.fromEntries(
    texts.map((text) => {
      const at = text.indexOf('=');
      if (at < 1) throw new GridError('bad-request', `'${text}' is no label; write name=value`);
      return [text.slice(0, at), text.slice(at + 1)];
    }),
  );
}
