/** The `gridvfs` command. One file per verb group in src/cli; this one only puts them together. */
import { enableCompileCache } from 'node:module';
import { program } from './cli/program.ts';
import { runToExit } from './cli/kit.ts';

enableCompileCache();
await runToExit(await program(process.argv), process.argv);
