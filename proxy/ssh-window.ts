/**
 * More under way on an ssh channel than ssh2 lets be: its window is 2 MiB, and it gives more only when half of that
 * is used up, so that on 50 ms one channel carries 20 to 40 MB/s, and lanes that share a long link stand still in
 * turn.
 *
 * ssh2 has no option for it. It keeps one number per channel, what the far side may still send, fills it up to
 * 2 MiB when it is below 1, and drops data when it is exactly 0. Here that number is the true one less `bytes`, which
 * the far side was given once: ssh2 fills it up as before, and what is dropped goes by the true one.
 */
import type { ClientChannel } from 'ssh2';

/** What of ssh2's channel this needs; none of it is in its types. */
interface Inside {
  readonly incoming?: { window?: number };
  readonly outgoing?: { readonly id?: number };
  readonly _client?: { readonly _protocol?: { channelWindowAdjust?(channel: number, bytes: number): void } };
}

/** Lets the far side have `bytes` more under way on this channel. False, and all as it was, where ssh2 is another inside. */
export function widenWindow(channel: ClientChannel, bytes: number): boolean {
  const { incoming, outgoing, _client: client } = channel as unknown as Inside;
  const { _protocol: protocol } = client ?? {};
  if (typeof incoming?.window !== 'number' || typeof outgoing?.id !== 'number') return false;
  if (typeof protocol?.channelWindowAdjust !== 'function') return false;
  let open = incoming.window + bytes;
  // 0 says "drop what comes": only where nothing may come.
  const shown = () => (open <= 0 ? 0 : open - bytes || 1);
  Object.defineProperty(incoming, 'window', {
    get: shown,
    set: (next: number) => {
      open += next - shown();
    },
  });
  protocol.channelWindowAdjust(outgoing.id, bytes);
  return true;
}
