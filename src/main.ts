/** The `gridvfs` command. One file per verb group in src/cli; this one only puts them together. */
import { enableCompileCache } from 'node:module';
import { collectLess } from './core/collector.ts';
import { program } from './cli/program.ts';
import { runToExit } from './cli/kit.ts';

enableCompileCache();
collectLess();
await runToExit(await program(process.argv), process.argv);
