/** A broker in a process of its own, to be killed: `broker-child.ts DATABASE SOCKET LEASE_MS MARGIN_MS`. Says `ready`. */
import { rmSync } from 'node:fs';
import { Broker, serveBroker } from '../../src/broker/index.ts';

const [database, socketPath, leaseMs, marginMs] = process.argv.slice(2);
const broker = await Broker.open({
  database: database!,
  log: (line) => process.stderr.write(`${line}\n`),
  leaseTimes: { leaseMs: Number(leaseMs), marginMs: Number(marginMs) },
});
rmSync(socketPath!, { force: true }); // of the one that was killed
await serveBroker(broker, { socketPath: socketPath! });
process.stdout.write('ready\n');
