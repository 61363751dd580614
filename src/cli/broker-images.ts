/** gridvfs broker images, image: what versions there are, whose they are, who may use them. */
import type { Command } from 'commander';
import type { ImageInfo, JobInfo, ScheduleInfo } from '../broker/index.ts';
import { checkJob, follow, withBroker, withClient } from './broker-kit.ts';
import type { Connection } from './broker-kit.ts';
import { bytesText, parseCount, parseDuration, show, table, verb } from './kit.ts';

export function imagesVerb(): Command {
  return withBroker(
    verb('images', 'List image versions that you may use.', ['gridvfs broker images --json']),
  ).action(async (options: Connection) => {
    const images = await withClient(options, (client) => client.call<ImageInfo[]>('GET', '/v1/images'));
    show(options, images, () =>
      table(
        ['IMAGE', 'KIND', 'SIZE', 'HOSTS', 'OWNER', 'LABELS'],
        images.map((one) => [
          `${one.image}:${one.version}${one.deprecated === undefined ? '' : ` (deprecated: ${one.deprecated})`}`,
          one.kind,
          bytesText(one.sizeBytes),
          one.hosts,
          one.owner ?? '',
          Object.entries(one.labels)
            .filter(([name]) => !/^(boot|machine)\./.test(name))
            .map((entry) => entry.join('='))
            .join(' '),
        ]),
      ),
    );
  });
}

async function change(image: string, body: object, options: Connection): Promise<void> {
  await withClient(options, (client) =>
    client.call('PATCH', `/v1/images/${encodeURIComponent(image)}`, body),
  );
  show(options, { changed: image }, () => `${image} is changed`);
}

export function imageVerbs(): Command {
  const group = verb('image', 'Your images: who may use them, and what is not to be used any more.');
  const sub = (name: string, summary: string, example: string) =>
    withBroker(verb(name, summary, [`gridvfs broker image ${example}`])).argument('<image>');
  group.addCommand(
    sub('share', 'Let other users start an image of yours.', 'share my-web bob carol')
      .argument('<user...>')
      .action((image: string, users: string[], options: Connection) =>
        change(image, { share: users }, options),
      ),
  );
  group.addCommand(
    sub('unshare', 'No longer let them.', 'unshare my-web bob')
      .argument('<user...>')
      .action((image: string, users: string[], options: Connection) =>
        change(image, { unshare: users }, options),
      ),
  );
  group.addCommand(
    sub(
      'deprecate',
      'No longer choose a version for requests; it can still be named.',
      'deprecate my-web 1 "use 2"',
    )
      .argument('<version>')
      .argument('[reason]', 'what to use instead; without it the version is good again')
      .action((image: string, version: string, reason: string | undefined, options: Connection) =>
        change(image, { deprecate: { [version]: reason ?? null } }, options),
      ),
  );
  group.addCommand(
    sub('give', 'Give an image to a user (operators).', 'give my-web ada')
      .argument('[user]', 'everybody’s when left out')
      .action((image: string, user: string | undefined, options: Connection) =>
        change(image, { owner: user ?? null }, options),
      ),
  );
  group.addCommand(
    sub('warm', 'Have hosts fetch a version ahead (operators).', 'warm debian 12 --hosts 8')
      .argument('<version>')
      .option('--hosts <number>', 'how many', parseCount, 1)
      .option('--timeout <duration>', 'how long to wait', parseDuration, 3_600_000)
      .action((image: string, version: string, options: Connection & { hosts: number; timeout: number }) =>
        withClient(options, async (client) => {
          const { hosts } = options;
          const route = `/v1/images/${encodeURIComponent(image)}/warm`;
          const job = await client.call<JobInfo>('POST', route, { version, hosts });
          const ended = await follow(client, job, options);
          checkJob(ended);
          show(options, ended, () => `${image}:${version} is on ${ended.total} host(s)`);
        }),
      ),
  );
  return group;
}

const scheduleTable = (schedules: readonly ScheduleInfo[]) =>
  table(
    ['SCHEDULE', 'IMAGE', 'EVERY', 'HOSTS', 'NEXT', 'WARMED'],
    schedules.map((one) => [
      one.id,
      one.image,
      `${one.everyMs / 1000} s`,
      one.hosts,
      one.next,
      one.warmed ?? '',
    ]),
  );

export function scheduleVerbs(): Command {
  const group = verb(
    'schedule',
    'Look at the tags of an image’s source again and again, and have hosts fetch each newest version (operators).',
  );
  group.addCommand(
    withBroker(verb('add', 'Add a schedule.', ['gridvfs broker schedule add debian --every 6h --hosts 8']))
      .argument('<image>')
      .requiredOption('--every <duration>', '10s or more', parseDuration)
      .option('--hosts <number>', 'hosts that fetch the newest version', parseCount)
      .action(async (image: string, options: Connection & { every: number; hosts?: number }) => {
        const { every: everyMs, hosts } = options;
        const made = await withClient(options, (client) =>
          client.call<ScheduleInfo>('POST', '/v1/schedules', {
            ...{ image, everyMs },
            ...(hosts === undefined ? {} : { hosts }),
          }),
        );
        show(options, made, () => scheduleTable([made]));
      }),
  );
  group.addCommand(
    withBroker(verb('ls', 'List schedules.', ['gridvfs broker schedule ls'])).action(
      async (options: Connection) => {
        const schedules = await withClient(options, (client) =>
          client.call<ScheduleInfo[]>('GET', '/v1/schedules'),
        );
        show(options, schedules, () => scheduleTable(schedules));
      },
    ),
  );
  group.addCommand(
    withBroker(verb('rm', 'Remove a schedule.', ['gridvfs broker schedule rm schedule-01234567']))
      .argument('<schedule>')
      .action(async (id: string, options: Connection) => {
        await withClient(options, (client) =>
          client.call('DELETE', `/v1/schedules/${encodeURIComponent(id)}`),
        );
        show(options, { removed: id }, () => `${id} is removed`);
      }),
  );
  return group;
}
