/** gridvfs broker networks, link, unlink: which LANs hosts are on, and what lies between them. */
import type { Command } from 'commander';
import type { NetworkInfo } from '../broker/index.ts';
import { withBroker, withClient } from './broker-kit.ts';
import type { Connection } from './broker-kit.ts';
import { parseCount, parseDuration, show, table, verb } from './kit.ts';

export function networkVerbs(): Command[] {
  const networks = withBroker(
    verb('networks', 'List the networks that hosts are on, and the links between them.', [
      'gridvfs broker networks',
    ]),
  ).action(async (options: Connection) => {
    const all = await withClient(options, (client) => client.call<NetworkInfo[]>('GET', '/v1/networks'));
    show(options, all, () =>
      table(
        ['NETWORK', 'HOSTS', 'LINKS'],
        all.map(({ id, hosts, links }) => [
          id,
          hosts,
          links
            .map(({ to, roundTripMs }) => (roundTripMs === undefined ? to : `${to} (${roundTripMs} ms)`))
            .join(', '),
        ]),
      ),
    );
  });
  const link = withBroker(
    verb('link', 'Tell of a link between two networks (operators): queries with a scope go by it.', [
      'gridvfs broker link lan-a lan-b --rtt 12ms --bits-per-second 1000000000',
    ]),
  )
    .argument('<network>')
    .argument('<network>')
    .option('--rtt <duration>', 'its round trip', parseDuration)
    .option('--bits-per-second <number>', 'its rate', parseCount)
    .action(async (a: string, b: string, options: Connection & { rtt?: number; bitsPerSecond?: number }) => {
      const { rtt, bitsPerSecond } = options;
      await withClient(options, (client) =>
        client.call('PUT', '/v1/links', {
          ...{ a, b },
          ...(rtt === undefined ? {} : { roundTripMs: rtt }),
          ...(bitsPerSecond === undefined ? {} : { bitsPerSecond }),
        }),
      );
      show(options, { linked: [a, b] }, () => `${a} and ${b} are linked`);
    });
  const unlink = withBroker(
    verb('unlink', 'Forget a link (operators).', ['gridvfs broker unlink lan-a lan-b']),
  )
    .argument('<network>')
    .argument('<network>')
    .action(async (a: string, b: string, options: Connection) => {
      const route = `/v1/links/${encodeURIComponent(a)}/${encodeURIComponent(b)}`;
      await withClient(options, (client) => client.call('DELETE', route));
      show(options, { unlinked: [a, b] }, () => `${a} and ${b} are not linked any more`);
    });
  return [networks, link, unlink];
}
