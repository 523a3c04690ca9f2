#!/bin/bash
# SPDX-License-Identifier: Apache-2.0
# tier.sh: the agent against a real kernel and a real systemd, in virtual machines made
# by setup.sh. A line for each machine at the end.
#   (a) the kernel tests and the conformance table of measure/, on three guests: Linux
#       6.16 and later; 6.7 to 6.15; dstack OS 0.5
#   (b) the installed units with the agent, on systemd 257 and 252 (agentpayload/)
#   (c) two machines of different MRTD that attest each other with them
# With TESTJSON (.ci/testjson.go, built) and RESULTS, Go tests are counted there.
# Exit: 0 passed, 1 failed, 77 cannot be run.
set -u
here=$(cd "$(dirname "$0")" && pwd)
root=$(cd "$here/../.." && pwd)
export VMWORK=${VMWORK:-$here/work}
cd "$root" || exit 1
T=$(mktemp -d) || exit 1
trap 'rm -rf "$T"' EXIT
trap 'exit 1' INT TERM HUP
skip() { echo "tier: SKIPPED: $*"; exit 77; }
[ "$(id -u)" = 0 ] || skip "wants root (mknod)"
command -v qemu-system-x86_64 >/dev/null || skip "no QEMU; run setup.sh"
[ -f "$VMWORK/ktdx.ko" ] || skip "nothing in $VMWORK; run setup.sh"
command -v go >/dev/null || skip "no Go"

status=0
: > "$T/table"
# machine NAME COMMAND...: run, show a failure whole, note the verdict
machine() {
	local name=$1 start=$SECONDS s
	shift
	echo "-- $name"
	"$@" > "$T/console" 2>&1; s=$?
	case $s in
	0) summary < "$T/console"; verdict=passed ;;
	77) cat "$T/console"; verdict=SKIPPED ;;
	*) cat "$T/console"; verdict=FAILED; status=1 ;;
	esac
	printf '%-44s %-8s %4d s\n' "$name" $verdict $((SECONDS - start)) >> "$T/table"
}
summary() { grep -aE '^(ok  |--- |[0-9]+ checks|systemd [0-9]|Overall|→)' || :; }

# kernel NAME PACKAGE PATTERN: a package's tests, in a machine
kernel() {
	local test=$T/${2##*/}.test
	[ -x "$test" ] || CGO_ENABLED=0 go test -c -o "$test" "$2" || { status=1; return; }
	machine "$1" "$here/vmtest.sh" bin "$test" -kernel -test.v -test.timeout 250s -test.run "$3"
	[ -z "${TESTJSON:-}" ] || grep -av '^\[' "$T/console" | go tool test2json -p "tdx-agent/${2#./}" | "$TESTJSON" add "$RESULTS" > "$T/counted"
}
for shape in "" "sysfs_mr=0" "report=0 sysfs_mr=0 extend_ioctl=1"; do
	case $shape in "") name="Linux 6.16" ;; sysfs*) name="Linux 6.7" ;; *) name="dstack OS 0.5" ;; esac
	KTDX=$shape kernel "$name: interfaces" ./measure/tsm Kernel
done
# A quote ends with EINTR whenever the reading thread gets a signal, and Go's runtime
# sends itself SIGURG. This table asks about the kernel, so the runtime is kept quiet (the
# kernel gives init what it does not know itself as environment). What the agent does with
# EINTR is the business of the tests above, where it is not.
APPEND="GODEBUG=asyncpreemptoff=1" kernel "Linux 6.16: as the simulated TD" ./measure/tdxsim Conformance

# payload DIR: the agent as it is installed. It is built to trust the root of a simulated
# platform in the place of Intel's: an agent in a machine with the kernel's TDX interfaces
# takes itself for real, and then accepts nothing simulated.
payload() {
	mkdir -p "$1/usr/bin" "$1/usr/lib/systemd/system" "$1/usr/share/doc/tdx-agent"
	cp -a "$here/agentpayload/." "$1/"
	CGO_ENABLED=0 go build -trimpath -buildvcs=false -o "$1/opt/simhost" ./packaging/testbed/simhost || return
	registers=$("$1/opt/simhost" state "$1/opt/td" "$1/etc/tdx-agent/ccel.root") || return
	"$1/opt/simhost" collateral "$1/opt/td" > "$1/etc/tdx-agent/collateral.json" || return
	"$1/opt/simhost" roots "$1/opt/td" remote/dcap/roots.go > "$T/roots.go" || return
	printf '{"Replace": {"%s": "%s"}}\n' "$root/remote/dcap/roots.go" "$T/roots.go" > "$T/overlay.json"
	CGO_ENABLED=0 go build -trimpath -buildvcs=false -overlay "$T/overlay.json" -o "$1/usr/bin/tdx-agent" ./agent || return
	# of the first machine and of the second, whose MRTD is another
	case $registers in 0*) other=1${registers#?} ;; *) other=0${registers#?} ;; esac
	echo "$registers" > "$1/etc/tdx-agent/registers1"
	echo "$other" > "$1/etc/tdx-agent/registers2"
	cp systemd/*.service systemd/*.socket "$1/usr/lib/systemd/system/"
	cp -r systemd/sysusers.d systemd/tmpfiles.d "$1/usr/lib/"
	cp -r systemd/system-preset "$1/usr/lib/systemd/"
	cp -r systemd/drop-ins "$1/usr/share/doc/tdx-agent/"
}
mkdir "$T/payload"
if payload "$T/payload"; then
	export KTDX="init_mr=$registers"
	machine "units on systemd of trixie" "$here/vmtest.sh" sys "$T/payload"
	KTDX2="init_mr=$other" machine "two machines attest each other" "$here/vmtest.sh" syspair "$T/payload"
	KTDX="report=0 sysfs_mr=0 extend_ioctl=1 $KTDX" machine "units in dstack OS 0.5" "$here/vmtest.sh" sys "$T/payload"
	old=$VMWORK/root-bookworm.ext4
	[ -f "$old" ] || { echo "-- root image of bookworm"; "$here/mkrootfs.sh" "$old" bookworm > "$T/rootfs.log" 2>&1 || tail -5 "$T/rootfs.log"; }
	if [ -f "$old" ]; then ROOT=$old machine "units on systemd of bookworm" "$here/vmtest.sh" sys "$T/payload"
	else printf '%-44s %-8s %s\n' "units on systemd of bookworm" SKIPPED "no root image, see above" >> "$T/table"; fi
else
	echo "tier: the agent's payload could not be built"; status=1
fi
echo; cat "$T/table"
exit $status
