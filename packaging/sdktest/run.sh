#!/bin/sh
# Runs dstack's published SDKs against a running agent.
#
#   run.sh RUNTIME_DIR
#
# RUNTIME_DIR holds the agent's dstack.sock and tappd.sock. The Go SDK runs its own
# test suite, the JavaScript SDK the script in js/. Tests that need key material are
# left out, and named. Status 0 if every test that ran has passed.
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

# TestGetKeyUnsupportedAlgorithm and TestGetKeySecp256k1PrehashedRejected want an
# error, so an agent without keys passes them too.
go_tests='TestGetQuote TestAttest TestInfo TestGetVersion
TestGetKeyUnsupportedAlgorithm TestGetKeySecp256k1PrehashedRejected
TestEncryptEnvVars TestEncryptEnvVarsInvalidKey
TestVerifyEnvEncryptPublicKeyWithTimestampTooOld
TestVerifyEnvEncryptPublicKeyWithTimestampTooFuture
TestVerifyEnvEncryptPublicKeyWithTimestampCustomMaxAge
TestTdxQuote TestTdxQuoteRawHash'
sdk=github.com/Dstack-TEE/dstack/sdk/go

echo "== Go SDK"
cd "$here/go"
pattern="^($(echo $go_tests | tr ' ' '|'))\$"
go test -count=1 -v -run "$pattern" $sdk/dstack $sdk/tappd || status=1
left=$(go test -list . $sdk/dstack $sdk/tappd | grep '^Test' | grep -Ev "$pattern" || true)
if [ -n "$left" ]; then
	echo "left out, they need key material (GetKey, GetTlsKey, Sign, Verify, DeriveKey):"
	echo "$left" | sed 's/^/  /'
fi

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
