/**
 * The remote command of an ssh tunnel, in the manner of git and rsync: `gridvfs server --stdio PATH`. Made by the
 * client for any shell, and read by the built-in endpoint, which runs no shell and knows only this command.
 */

/** A word as a POSIX shell reads it back, whatever is in it. */
export function shellQuote(word: string): string {
  return /^[A-Za-z0-9_@%+=:,./-]+$/.test(word) ? word : `'${word.replaceAll("'", `'\\''`)}'`;
}

/** `--stdio PATH` after `command`; `command` itself is the operator's and is taken as it is. */
export function tunnelCommand(command: string, path: string): string {
  return `${command} ${shellQuote(path)}`;
}

/** The words of a command line, quotes and backslashes resolved as a shell would; undefined when a quote is open
 * or something only a shell could do (substitution, redirection, a second command) stands outside quotes. */
export function shellWords(line: string): string[] | undefined {
  const words: string[] = [];
  const pattern = /[ \t]+|'([^']*)'|"((?:[^"\\$`]|\\["\\$`])*)"|\\(.)|([^\s'"\\$`;&|<>(){}*?[\]#~!\n]+)/y;
  let word: string | undefined;
  while (pattern.lastIndex < line.length) {
    const match = pattern.exec(line);
    if (!match) return undefined;
    const [all, single, double, escaped, bare] = match;
    if (/^[ \t]/.test(all)) {
      if (word !== undefined) words.push(word);
      word = undefined;
    } else {
      word = (word ?? '') + (single ?? double?.replaceAll(/\\(["\\$`])/g, '$1') ?? escaped ?? bare ?? '');
    }
  }
  if (word !== undefined) words.push(word);
  return words;
}

/** Lets whoever runs the command upload: the operator's word, in a forced command of authorized_keys. */
const ACCEPT_UPLOADS = '--accept-uploads';

/** PATH of `gridvfs server --stdio PATH`, options and path in any order, and whether it accepts uploads; undefined
 * for any other command. */
export function parseTunnelCommand(line: string): { path: string; acceptUploads: boolean } | undefined {
  const words = shellWords(line);
  if (words?.[0] !== 'gridvfs' || words[1] !== 'server') return undefined;
  const rest = words.slice(2);
  const acceptUploads = rest.includes(ACCEPT_UPLOADS);
  const [path, ...others] = rest.filter((word) => word !== '--stdio' && word !== ACCEPT_UPLOADS);
  if (rest.length !== (acceptUploads ? 3 : 2) || others.length > 0 || !rest.includes('--stdio'))
    return undefined;
  return path === undefined || path === '' || path.startsWith('-') ? undefined : { path, acceptUploads };
}
