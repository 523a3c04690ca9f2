#!/bin/sh
# Runs dstack's published SDKs against a running agent.
#
#   run.sh RUNTIME_DIR
#
# RUNTIME_DIR holds the sockets dstack.sock and tappd.sock of an agent that runs with
# the configuration agent.toml of this folder. The Go SDK runs its own test suite, all
# of it; the others, whose packages have no tests, a program here that calls every
# method. An SDK that cannot be had on this machine is left out, and the last line names
# it. Status 0 if every test has passed that was run.
#
#   SDKTEST_CACHE   folder for what the Rust SDK compiles to (default: thrown away)
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
missing=""
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

# left_out SDK REASON
left_out() {
	echo "LEFT OUT: the $1 SDK was not tested: $2"
	missing="$missing $1"
}

go_sdk() {
	sdk=github.com/Dstack-TEE/dstack/sdk/go
	cd "$here/go"
	go test -count=1 -v $sdk/dstack $sdk/tappd || status=1
}

javascript_sdk() {
	if ! command -v node >/dev/null || ! command -v npm >/dev/null; then
		left_out JavaScript "node and npm are not installed"
		return
	fi
	mkdir "$work/js"
	cp "$here/js/package.json" "$here/js/package-lock.json" "$here/js/test.mjs" "$work/js"
	cd "$work/js"
	npm ci --no-audit --no-fund --loglevel=error
	node test.mjs || status=1
}

python_sdk() {
	if ! python3 -c 'import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 10))' 2>/dev/null; then
		left_out Python "there is no Python 3.10 with venv"
		return
	fi
	python3 -m venv "$work/python"
	if ! "$work/python/bin/pip" install --quiet --disable-pip-version-check --no-deps --only-binary :all: -r "$here/python/requirements.txt"; then
		left_out Python "its packages could not be installed, of the exact versions in python/requirements.txt"
		return
	fi
	"$work/python/bin/python" "$here/python/test.py" || status=1
}

rust_sdk() {
	if ! command -v cargo >/dev/null; then
		left_out Rust "cargo is not installed"
		return
	fi
	export CARGO_TARGET_DIR="${SDKTEST_CACHE:-$work/rust}"
	cd "$here/rust"
	if ! cargo fetch --locked --quiet; then
		left_out Rust "its crates could not be fetched, of the exact versions in rust/Cargo.lock"
		return
	fi
	if ! cargo build --locked --offline --quiet; then
		left_out Rust "it does not compile with $(cargo --version)"
		return
	fi
	"$CARGO_TARGET_DIR/debug/sdktest" || status=1
}

for language in Go JavaScript Python Rust; do
	echo "== $language SDK"
	case $language in
	Go) go_sdk ;;
	JavaScript) javascript_sdk ;;
	Python) python_sdk ;;
	Rust) rust_sdk ;;
	esac
done
[ -z "$missing" ] || echo "LEFT OUT:$missing"
exit $status
