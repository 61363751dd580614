/** What the verbs below `gridvfs broker` share: the way to the broker, and the wait for a job. */
import { Option } from 'commander';
import type { Command } from 'commander';
import { BrokerClient, readToken } from '../agent/broker-client.ts';
import type { JobInfo, VmInfo } from '../broker/index.ts';
import type { ErrorCode } from '../core/errors.ts';
import { GridError } from '../core/errors.ts';
import { brokerSocket, operatorToken, readFile, stateFolder } from './broker-run.ts';
import { abortOnSignals, jsonOption, Progress, table } from './kit.ts';

export interface Connection {
  broker?: string;
  tokenFile?: string;
  brokerCa?: string;
  json?: boolean;
}

export function withBroker(command: Command): Command {
  return command
    .addOption(
      new Option('--broker <url>', 'https://host:port or unix:/path (default: the broker on this host)').env(
        'GRIDVFS_BROKER',
      ),
    )
    .addOption(
      new Option('--token-file <file>', 'file with your token (default: the operator’s on this host)').env(
        'GRIDVFS_TOKEN_FILE',
      ),
    )
    .option('--broker-ca <file>', 'certificate of the authority that the broker’s is from')
    .addOption(jsonOption());
}

/** Does something with a client and closes it. */
export async function withClient<T>(
  options: Connection,
  work: (client: BrokerClient) => Promise<T>,
): Promise<T> {
  const client = new BrokerClient({
    url: options.broker ?? `unix:${brokerSocket()}`,
    token: readToken(options.tokenFile ?? operatorToken(stateFolder())),
    ...(options.brokerCa === undefined ? {} : { ca: readFile(options.brokerCa) }),
  });
  try {
    return await work(client);
  } finally {
    client.close();
  }
}

export const vmTable = (vms: readonly VmInfo[]) =>
  table(
    ['VM', 'ID', 'STATE', 'IMAGE', 'HOST', 'READY AFTER', 'REASON'],
    vms.map((vm) => [
      vm.name,
      vm.id,
      vm.state,
      vm.image ?? '',
      vm.host ?? '',
      vm.timeline?.['readyMs'] === undefined ? '-' : `${(vm.timeline['readyMs'] / 1000).toFixed(2)} s`,
      vm.reason ?? '',
    ]),
  );

/** Waits for a job; a broker that starts again meanwhile is asked again. */
export async function follow(
  client: BrokerClient,
  first: JobInfo,
  options: { json?: boolean; timeout: number },
): Promise<JobInfo> {
  const signal = AbortSignal.any([abortOnSignals(), AbortSignal.timeout(options.timeout)]);
  const progress = new Progress(first.kind, options);
  let job = first;
  try {
    while (job.state === 'running') {
      try {
        for await (const next of client.events<JobInfo>(`/v1/jobs/${job.id}/events`, signal)) {
          job = next;
          progress.update(job.done, job.total);
        }
      } catch (error) {
        if (signal.aborted) {
          throw new GridError('timeout', `${job.id} is still under way; \`gridvfs broker vms\` shows it`, {
            cause: error,
          });
        }
        if (!(error instanceof GridError) || error.blame !== 'tunnel') throw error;
        await new Promise((resolve) => setTimeout(resolve, 500));
      }
    }
    return job;
  } finally {
    progress.end();
  }
}

/** Throws what a job failed with. */
export function checkJob(job: JobInfo): void {
  if (job.state !== 'failed') return;
  const { code = 'vm-failed', message } = job.error ?? {
    message: `not all VMs of ${job.id} run: ${job.vms.find((vm) => vm.state === 'failed')?.reason ?? ''}`,
  };
  throw new GridError(code as ErrorCode, message);
}
