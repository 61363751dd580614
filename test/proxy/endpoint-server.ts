/** The built-in ssh endpoint as a process of its own: STORE HOST-KEY AUTHORIZED-KEYS PORT. */
import { createServer, createSshEndpoint } from '../../proxy/index.ts';
import { openStore } from '../../src/store/index.ts';

const [storeFolder, hostKeyPath, authorizedKeysPath, port] = process.argv.slice(2) as [
  string,
  string,
  string,
  string,
];
const store = await openStore(storeFolder);
await createSshEndpoint({
  server: createServer(store),
  hostKeyPath,
  authorizedKeysPath,
  listen: { host: '127.0.0.1', port: Number(port) },
  paths: [storeFolder],
});
