#!/bin/sh
# SPDX-License-Identifier: Apache-2.0
# units.sh UNITS [PROGRAM]: what this machine's systemd thinks of the agent's units:
# `systemd-analyze verify` says nothing, and the exposure is within bounds (0 is best,
# 10 worst; a unit without any sandbox has 9.6): 0.5 as shipped, 1.2 for the one with a
# network, 1.0 with each drop-in.
# UNITS is the folder systemd/. PROGRAM stands in for /usr/bin/tdx-agent.
# Exit: 0 good, 1 not, 77 no systemd here.
set -eu
U=$1; B=${2:-/bin/true}
command -v systemd-analyze >/dev/null || { echo "units: SKIPPED: no systemd-analyze" >&2; exit 77; }
T=$(mktemp -d); trap 'rm -rf "$T"' EXIT
bad=0
fail() { echo "units: FAILED: $*" >&2; bad=1; }
systemd-analyze --version | sed -n '1s/ (.*//p'

# fill DIR: the units with PROGRAM in them
fill() {
  mkdir -p "$1"
  for f in "$U"/*.service "$U"/*.socket; do sed "s,/usr/bin/tdx-agent,$B," "$f" > "$1/${f##*/}"; done
}
# dropin DIR SERVICE FILE
dropin() { mkdir -p "$1/$2.d"; cp "$U/drop-ins/$3" "$1/$2.d/"; }
# verify DIR
verify() {
  if ! SYSTEMD_LOG_LEVEL=warning systemd-analyze verify --man=no "$1"/*.service "$1"/*.socket > "$T/out" 2>&1 || [ -s "$T/out" ]; then
    fail "systemd-analyze verify:"; cat "$T/out" >&2
  fi
}
# score DIR SERVICE MOST: MOST is ten times the exposure
score() {
  systemd-analyze security --no-pager --offline=true --threshold="$3" "$1/$2" > "$T/out" 2>&1 && ok=1 || ok=0
  printf '%-46s %s\n' "${1##*/} $2" "$(sed -n 's/.*exposure level for [^:]*: \([0-9.]*\).*/\1/p' "$T/out")"
  [ $ok = 1 ] || { fail "$2 is more exposed than $3/10:"; grep -a '✗' "$T/out" >&2 || cat "$T/out" >&2; }
}

fill "$T/shipped"; verify "$T/shipped"
for s in tdx-agent.service tdx-agent-measure.service tdx-agent-endpoint.service tdx-agent-connect.service; do score "$T/shipped" $s 5; done
score "$T/shipped" tdx-agent-egress.service 12 # the one with a network
for d in "$U"/drop-ins/*.conf; do
  d=${d##*/}
  fill "$T/$d"
  for s in tdx-agent.service tdx-agent-measure.service; do dropin "$T/$d" $s "$d"; done
  verify "$T/$d"
  score "$T/$d" tdx-agent.service 10
done
exit $bad
