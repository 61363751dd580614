/** The body of a lane's worker thread (see lanes.ts): one job in, one answer out. */
import { parentPort } from 'node:worker_threads';
import { asGridError } from '../core/errors.ts';
import type { ErrorCode } from '../core/errors.ts';
import { runJob } from './jobs.ts';
import type { Job } from './jobs.ts';

/** Classes do not survive postMessage, codes and sentences do. */
export type Answer = { readonly result: unknown } | { readonly code: ErrorCode; readonly message: string };

parentPort?.on('message', (job: Job) => {
  let answer: Answer;
  try {
    answer = { result: runJob(job) };
  } catch (error) {
    const { code, message } = asGridError(error, 'the store failed');
    answer = { code, message };
  }
  // oxlint-disable-next-line unicorn/require-post-message-target-origin -- a thread, not a browser window
  parentPort?.postMessage(answer);
});
