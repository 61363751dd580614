/** The remote command of the tests with a stock sshd: serves the store that the last argument names on stdio. */
import { createServer, serveStdio } from '../../proxy/index.ts';
import { openStore } from '../../src/store/index.ts';

const store = await openStore(process.argv.at(-1)!);
const server = createServer(store);
const serving = serveStdio(server);
console.log('this must not get into the protocol');
await serving;
await server.close();
await store.close();
