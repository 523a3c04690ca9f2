#!/bin/sh
# SPDX-License-Identifier: Apache-2.0
# The agent with the units it is shipped with, under a real systemd and the kernel's
# own interfaces: install, boot step, socket activation, quotes, restart, kill, refusal.
# Each check prints a line; a failed one fails the machine.
K=/sys/module/ktdx/parameters
RTMR3=/sys/devices/virtual/misc/tdx_guest/measurements/rtmr3:sha384
S=tdx-agent.service
SOCKETS="/run/dstack.sock /run/tappd.sock /run/tdx-agent/agent.sock /run/tdx-agent/admin.sock"
bad=0; n=0; out=/tmp/out
# check WHAT COMMAND...: COMMAND must succeed
check() {
	w=$1; shift; n=$((n+1))
	if "$@" >$out 2>&1; then echo "ok    $w"; else echo "FAIL  $w (status $?)"; sed 's/^/      | /' $out | head -40; bad=1; fi
}
# same WHAT WANT GOT
same() { n=$((n+1)); if [ "$2" = "$3" ]; then echo "ok    $1: $2"; else echo "FAIL  $1: want '$2', got '$3'"; bad=1; fi; }
# status WHAT WANT COMMAND...: COMMAND's exit status
status() { w=$1 want=$2; shift 2; "$@" >$out 2>&1; got=$?; same "$w, exit status" "$want" "$got"; [ $want = $got ] || sed 's/^/      | /' $out | head -40; }
has() { grep -q -- "$1" "$2"; }
says() { p=$1; shift; "$@" >$out.says 2>&1; x=$?; cat $out.says; [ $x = 0 ] && grep -q -- "$p" $out.says; }
not() { ! "$@"; }
prop() { systemctl show "$1" -p "$2" --value; }
as() { u=$1; shift; runuser -u "$u" -- "$@"; }
inodes() { stat -c '%n %i %a %U:%G' $SOCKETS; }
proc() { sed -n "s/^$1:[[:space:]]*//p" "/proc/$(prop $S MainPID)/status" | tr -s '\t ' ' '; }
rtmr3() { od -An -v -tx1 $RTMR3 | tr -d ' \n'; }
inside() { nsenter -t "$(prop $S MainPID)" -m -- "$@"; }
# poll SECONDS COMMAND...: until it succeeds
poll() { i=$(($1*10)); shift; while [ $i -gt 0 ]; do "$@" >/dev/null 2>&1 && return; sleep 0.1; i=$((i-1)); done; return 1; }

finish() {
	[ $bad = 0 ] || journalctl -q -u 'tdx-agent*' -o short-monotonic --no-pager | tail -60
	echo "$n checks, bad=$bad"
	exit $bad
}

systemd-analyze --version | head -1
[ -e $RTMR3 ] || { . /opt/old-kernel.sh; finish; }
export SYSTEMD_COLORS=0
echo 20 > $K/poll_ms
systemd-run --quiet --unit=simhost /opt/simhost quotes /opt/td # the module's own quote is too short
id=$(sed -n 's/.*vmid=\([0-9]\).*/\1/p' /proc/cmdline)
[ -z "$id" ] || { . /opt/pair.sh; finish; }
zero=$(rtmr3)

echo "== install"
check "users" systemd-sysusers /usr/lib/sysusers.d/tdx-agent.conf
check "folders and links" systemd-tmpfiles --create /usr/lib/tmpfiles.d/tdx-agent.conf
chmod 400 /etc/tdx-agent/ccel.root; chown root:root /etc/tdx-agent/ccel.root
systemctl daemon-reload
cd /usr/lib/systemd/system
check "verify is clean" sh -c 'o=$(systemd-analyze verify tdx-agent*.service tdx-agent*.socket 2>&1); echo "$o"; ! echo "$o" | grep -q tdx-agent'
for u in tdx-agent tdx-agent-measure tdx-agent-endpoint tdx-agent-connect tdx-agent-egress; do
	check "$u.service has an exposure of at most 1.5" systemd-analyze security --offline=true --threshold=15 --no-pager $u.service
	tail -1 $out
done
cd /
check "presets" systemctl preset $S tdx-agent-measure.service tdx-agent.socket tdx-agent-dstack.socket
same "installing starts nothing" disabled "$(systemctl is-enabled $S)"
same "RTMR3 is untouched" "$zero" "$(rtmr3)"

echo "== boot step"
check "tdx-agent-measure.service" systemctl enable --now tdx-agent-measure.service
journalctl -q -u tdx-agent-measure -o cat --no-pager | grep extended
check "RTMR3 has moved" [ "$(rtmr3)" != "$zero" ]
once=$(rtmr3)
check "again" systemctl restart tdx-agent-measure.service
same "a second run extends nothing" "$once" "$(rtmr3)"
check "original boot log is root's alone" not as tdx-agent cat /etc/tdx-agent/ccel.root
same "the copy" "400 tdx-agent:tdx-agent" "$(stat -c '%a %U:%G' /run/tdx-agent/log/ccel)"
check "the copy is the original" cmp /etc/tdx-agent/ccel.root /run/tdx-agent/log/ccel

echo "== activation"
check "sockets" systemctl enable --now tdx-agent.socket tdx-agent-dstack.socket tdx-agent-tappd.socket tdx-agent-admin.socket
same "the agent waits for a caller" inactive "$(systemctl is-active $S)"
inodes > /tmp/inodes; cat /tmp/inodes
same "modes" "666 root:root;666 root:root;660 root:tdx-agent-app;600 root:root;" "$(stat -c '%a %U:%G' $SOCKETS | tr '\n' ';')"
check "a first quote starts it, for any user" as nobody tdx-agent quote --report-data 1234 -o /tmp/quote.json
same "the agent" active "$(systemctl is-active $S)"
check "ready" tdx-agent wait --for=ready --timeout 60s
check "log of the quote explains its registers" tdx-agent log replay /tmp/quote.json
cat $out
check "the agent's log explains the registers" tdx-agent log replay
for s in /run/dstack /var/run/dstack; do check "$s/dstack.sock" tdx-agent quote --runtime-dir $s; done

echo "== sandbox"
same "user" "tdx-agent" "$(ps -o user= -p "$(prop $S MainPID)" 2>/dev/null || stat -c %U /proc/"$(prop $S MainPID)")"
for c in CapInh CapPrm CapEff CapBnd CapAmb; do same $c 0000000000000000 "$(proc $c)"; done
same NoNewPrivs 1 "$(proc NoNewPrivs)"
same Seccomp 2 "$(proc Seccomp)"
check "network of its own" [ "$(readlink /proc/"$(prop $S MainPID)"/ns/net)" != "$(readlink /proc/1/ns/net)" ]
check "no device" inside test ! -e /dev/tdx_guest
for p in /usr /etc /sys/kernel/mm /run/tdx-agent/admin.sock; do check "cannot write $p" not inside runuser -u tdx-agent -- test -w $p; done
check "the other registers are not its own" not inside runuser -u tdx-agent -- test -w "${RTMR3%3:*}2:sha384"

echo "== access"
status "status for root" 0 tdx-agent status
cat $out
check "status for nobody is refused" not as nobody tdx-agent status
check "events for nobody are refused" not as nobody tdx-agent emit x 00
check "an event by root" tdx-agent emit release 1f2e
check "measured twice, the event stays" systemctl restart tdx-agent-measure.service

echo "== restart"
rm -f /tmp/enough
( while [ ! -e /tmp/enough ]; do tdx-agent quote -o /dev/null || exit 1; done ) >/tmp/client 2>&1 & client=$!
check "restart" systemctl restart $S
sleep 1; touch /tmp/enough; wait $client
same "a caller that asks without a pause notices nothing, exit status" 0 $?
cat /tmp/client
inodes > /tmp/inodes2
check "sockets are the same" cmp /tmp/inodes /tmp/inodes2
check "quote" tdx-agent quote --report-data 5678 -o /tmp/quote.json
check "log of the quote" tdx-agent log replay /tmp/quote.json
check "event is in it" has 72656c65617365\\\|release /tmp/quote.json
same "NRestarts" 0 "$(prop $S NRestarts)"

echo "== kill -9"
pid=$(prop $S MainPID); kill -9 "$pid"
check "a caller does not notice" tdx-agent quote --report-data 9abc -o /tmp/quote.json
check "log of the quote" tdx-agent log replay /tmp/quote.json
check "another process" [ "$(prop $S MainPID)" != "$pid" ]
same "NRestarts" 1 "$(prop $S NRestarts)"
i=0; while [ $i -lt 8 ]; do
	tdx-agent emit "kill$i" 00 >/dev/null 2>&1 & kill -9 "$(prop $S MainPID)" 2>/dev/null
	wait; poll 10 tdx-agent status; i=$((i+1))
done
check "killed 8 times while extending, log and register agree" tdx-agent log replay
same "events, one for each extend" "$(cat $K/n_extends)" "$(tdx-agent log show | grep -cE '[0-9a-f]{8} -> [0-9a-f]{8}')"
check "ready" tdx-agent wait --for=ready --timeout 60s
tdx-agent status --json > /tmp/status.json; same "status --json, exit status" 0 $?
same "registers that the log explains" 4 "$(tr -d ' \n' < /tmp/status.json | grep -o '"name":"RTMR[0-3]"[^}]*"verdict":"match"' | wc -l)"
check "measured" has '"measured": *true' /tmp/status.json
inodes > /tmp/inodes2
check "sockets are the same" cmp /tmp/inodes /tmp/inodes2

echo "== stop, with a quote running"
echo 6s > /run/simhost.delay
tdx-agent quote >/dev/null 2>&1 & sleep 1
t0=$(cut -d. -f1 /proc/uptime); systemctl stop $S 2>/dev/null; t1=$(cut -d. -f1 /proc/uptime)
check "stop takes less than 5 s: $((t1-t0))" [ $((t1-t0)) -lt 5 ]
same "result" success "$(prop $S Result)"
rm /run/simhost.delay; wait
check "answers again" tdx-agent quote

echo "== credential"
mkdir -p /etc/systemd/system/$S.d
cp /usr/share/doc/tdx-agent/drop-ins/20-appkeys.conf /etc/systemd/system/$S.d/
echo '{"key_provider":{"none":{"key":""}},"disk_crypt_key":"","env_crypt_key":"","k256_key":"","ca_cert":""}' > /dstack/.host-shared/.appkeys.json
chmod 600 /dstack/.host-shared/.appkeys.json
systemctl daemon-reload
check "restart with a credential" systemctl restart $S
check "the agent can read it" inside runuser -u tdx-agent -- cat /run/tdx-agent/credentials/appkeys.json
rm -r /etc/systemd/system/$S.d /dstack/.host-shared/.appkeys.json; systemctl daemon-reload
check "restart without" systemctl restart $S
inodes > /tmp/inodes2
check "sockets are the same" cmp /tmp/inodes /tmp/inodes2

echo "== watchdog"
mkdir -p /run/systemd/system/$S.d; printf '[Service]\nWatchdogSec=3s\nTimeoutAbortSec=2s\n' > /run/systemd/system/$S.d/w.conf
systemctl daemon-reload; systemctl restart $S
pid=$(prop $S MainPID); kill -STOP "$pid"
gone() { p=$(prop $S MainPID); [ "$p" != 0 ] && [ "$p" != "$pid" ]; }
check "a stuck agent is replaced" poll 20 gone
check "answers again" tdx-agent quote
rm -r /run/systemd/system/$S.d; systemctl daemon-reload

. /opt/endpoint.sh

echo "== a wrong configuration"
cp /etc/tdx-agent/agent.toml /tmp/agent.toml; echo 'nonsense = 1' >> /etc/tdx-agent/agent.toml
check "start fails" not systemctl restart $S
sleep 2
same "and is not tried again" "failed 78" "$(systemctl is-active $S) $(prop $S ExecMainStatus)"
# Each connection that waits starts the agent again, until its limit. An emulated
# machine is too slow for the limit as it is shipped.
mkdir -p /run/systemd/system/$S.d; printf '[Unit]\nStartLimitIntervalSec=60\nStartLimitBurst=5\n' > /run/systemd/system/$S.d/few.conf
systemctl daemon-reload
timeout 5 tdx-agent status >/dev/null 2>&1
closed() { [ "$(systemctl is-active tdx-agent.socket)" = failed ]; }
check "with callers waiting, the starts come to an end" poll 30 closed
cp /tmp/agent.toml /etc/tdx-agent/agent.toml
rm -r /run/systemd/system/$S.d; systemctl daemon-reload
systemctl reset-failed $S tdx-agent.socket tdx-agent-dstack.socket tdx-agent-tappd.socket tdx-agent-admin.socket
check "right again" systemctl restart $S
check "quote" tdx-agent quote

echo "== somebody else extends RTMR3"
head -c 48 /dev/urandom > $RTMR3
status "status" 7 tdx-agent status
status "log replay" 7 tdx-agent log replay
check "no quote" not tdx-agent quote
cat $out
check "no event" not tdx-agent emit late 00
check "not even after a restart" sh -c "systemctl restart $S; ! tdx-agent quote"

finish
