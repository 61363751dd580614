/** A TCP port for a program that has to be told one. */
import net from 'node:net';

/** One of 127.0.0.1 that is free at this moment; it may be somebody else's when it is used. */
export async function freePort(): Promise<number> {
  const server = net.createServer().listen(0, '127.0.0.1');
  await new Promise((resolve) => server.once('listening', resolve));
  const { port } = server.address() as net.AddressInfo;
  await new Promise((resolve) => server.close(resolve));
  return port;
}
