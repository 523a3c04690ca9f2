#!/bin/sh
# Runs dstack's published SDKs against a running agent.
#
#   run.sh RUNTIME_DIR
#
# RUNTIME_DIR holds the sockets dstack.sock and tappd.sock of an agent that runs with
# the configuration agent.toml of this folder. The Go SDK runs its own test suite, all
# of it, the JavaScript SDK the script in js/. Status 0 if every test has passed.
set -eu

if [ $# -ne 1 ]; then
	echo "usage: $0 RUNTIME_DIR" >&2
	exit 2
fi
dir=$(cd "$1" && pwd)
here=$(cd "$(dirname "$0")" && pwd)
for name in dstack tappd; do
	if [ ! -S "$dir/$name.sock" ]; then
		echo "$0: $dir/$name.sock is not a socket: start the agent with --runtime-dir $dir" >&2
		exit 2
	fi
done
DSTACK_SIMULATOR_ENDPOINT=$dir/dstack.sock
TAPPD_SIMULATOR_ENDPOINT=$dir/tappd.sock
export DSTACK_SIMULATOR_ENDPOINT TAPPD_SIMULATOR_ENDPOINT
status=0

sdk=github.com/Dstack-TEE/dstack/sdk/go

echo "== Go SDK"
cd "$here/go"
go test -count=1 -v $sdk/dstack $sdk/tappd || status=1

echo "== JavaScript SDK"
if ! command -v node >/dev/null || ! command -v npm >/dev/null; then
	echo "left out: node and npm are not installed"
	exit $status
fi
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cp "$here/js/package.json" "$here/js/package-lock.json" "$here/js/test.mjs" "$work"
cd "$work"
npm ci --no-audit --no-fund --loglevel=error
node test.mjs || status=1
exit $status
