#!/bin/sh
# npm run check: types, lint, format, architecture. All of them run, so one call shows everything.
export PATH="$PWD/node_modules/.bin:$PATH"
status=0
echo '== types'; tsc -p . || status=1
echo '== lint'; oxlint --type-aware || status=1
echo '== format'; prettier --check --log-level warn . || status=1
echo '== architecture'; node --test --test-reporter=dot test/architecture.test.ts || status=1
[ $status -eq 0 ] && echo 'check: all good'
exit $status
