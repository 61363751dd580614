/** New ssh key pairs: for the endpoint's host key, and for the identities that benches and tests make. */
import ssh2 from 'ssh2';
import { GridError } from '../src/core/errors.ts';

/** Tries before a key is given up. One in 200 fails, see below; so many in a row mean that something else is wrong. */
const TRIES = 16;

/**
 * A new ed25519 key pair in OpenSSH's own form: the private part as a PEM text, the public part as one line.
 *
 * Every pair is parsed again before it is given out: ssh2 1.17 strips leading zero bytes off the public half
 * (`lib/keygen.js`, "Remove leading zero bytes"), of which there are more than the one of the bit string's header
 * in every 256th key, and such a key is refused by ssh2 and OpenSSH alike. Measured: 26 of 5,000.
 *
 * @throws GridError `bug` when no try gave a key that parses.
 */
export function makeSshKey(comment = ''): { private: string; public: string } {
  for (let tries = 0; tries < TRIES; tries++) {
    const keys = ssh2.utils.generateKeyPairSync('ed25519', { comment });
    if (isWhole(keys.private) && isWhole(keys.public)) return keys;
  }
  throw new GridError('bug', `no ssh key could be made in ${TRIES} tries`);
}

function isWhole(text: string): boolean {
  const parsed = ssh2.utils.parseKey(text);
  return !(parsed instanceof Error);
}
