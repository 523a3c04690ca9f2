#!/bin/sh
# SPDX-License-Identifier: Apache-2.0
# Run in the systemd machine with the agent installed: its units from an empty machine
# to a foreign extend. /opt/shape says which guest this is: "sysfs" (Linux 6.16 and
# later) or "device" (dstack OS 0.5: no configfs-tsm, registers through the device).
# One line for each check; the exit status is the verdict.
SHAPE=$(cat /opt/shape)
R=/sys/kernel/config/tsm/report; M=/sys/devices/virtual/misc/tdx_guest/measurements; K=/sys/module/ktdx/parameters
bad=0
ok() { echo "OK|$1"; }
fail() { echo "FAIL|$1"; bad=$((bad + 1)); shift; [ $# = 0 ] || printf '%s\n' "$@" | sed 's/^/     /'; }
# check WHAT COMMAND...: it must succeed
check() { what=$1; shift; if out=$("$@" 2>&1); then ok "$what"; else fail "$what" "status $?: $*" "$out"; fi; }
# exits STATUS WHAT COMMAND...: it must end with this status
exits() { want=$1 what=$2; shift 2; out=$("$@" 2>&1); rc=$?; if [ $rc = "$want" ]; then ok "$what"; else fail "$what" "status $rc, want $want: $*" "$out"; fi; }
# same WHAT GOT WANT
same() { if [ "$2" = "$3" ]; then ok "$1"; else fail "$1" "got  $2" "want $3"; fi; }
has() { case $2 in *"$3"*) ok "$1" ;; *) fail "$1" "got  $2" "want $3 in it" ;; esac; }
prop() { systemctl show -P "$1" "${2:-tdx-agent.service}"; }
as_app() { setpriv --reuid=nobody --regid=nogroup --clear-groups "$@"; }
quote() { tdx-agent quote --report-data "$1" -o /run/q.json && tdx-agent log replay /run/q.json; }
extends() { cat $K/n_extends; }
events() { tdx-agent log show | grep -c -- '->  *[0-9a-f]* ' ; }
# within SECONDS COMMAND...: until it succeeds
within() { end=$(($(cut -d. -f1 /proc/uptime) + $1)); shift; until "$@" >/dev/null 2>&1; do [ "$(cut -d. -f1 /proc/uptime)" -lt $end ] || return 1; sleep 0.1; done; }
finish() { [ $bad = 0 ] || journalctl -q -b -o short-monotonic --no-pager -u 'tdx-agent*' | tail -60 | sed 's/^/JRN|/'; echo "CHECKS|$bad failed"; [ $bad = 0 ]; exit; }
SOCKETS="tdx-agent.socket tdx-agent-dstack.socket tdx-agent-tappd.socket tdx-agent-admin.socket"

echo "== installed, with $(systemd-analyze --version | sed -n '1s/ (.*//p')"
check "users" systemd-sysusers tdx-agent.conf
check "folders and links" systemd-tmpfiles --create tdx-agent.conf
check "units: verify and exposure" /opt/units.sh /opt/systemd /usr/bin/tdx-agent
echo "$out" | sed 's/^/UNITS|/'
systemctl preset tdx-agent.service tdx-agent-measure.service $SOCKETS 2>/dev/null
same "preset leaves everything off" "$(systemctl is-enabled tdx-agent.service tdx-agent-measure.service $SOCKETS 2>/dev/null | sort -u)" disabled
exits 4 "without sockets no agent answers" tdx-agent status
exits 2 "--simulate is refused in a guest" setpriv --reuid=tdx-agent --regid=tdx-agent --clear-groups tdx-agent serve --simulate --runtime-dir /tmp/sim

echo "== sockets"
check "enable and start" systemctl enable --now $SOCKETS
for s in "/run/dstack.sock 666 root:root" "/run/tappd.sock 666 root:root" "/run/tdx-agent/agent.sock 660 root:tdx-agent-app" "/run/tdx-agent/admin.sock 600 root:root"; do
  same "${s%% *}" "$(stat -c '%n %a %U:%G' "${s%% *}")" "$s"
done
for s in /var/run/dstack.sock /var/run/dstack/dstack.sock /run/dstack/dstack.sock /run/dstack/tappd.sock; do check "$s is a socket" test -S $s; done
same "and no agent runs yet" "$(prop ActiveState)" inactive

echo "== boot step"
check "measure" systemctl start tdx-agent-measure.service
n=$(extends)
check "again" systemctl restart tdx-agent-measure.service
same "extends nothing twice" "$(extends)" "$n"
same "the log is the agent's" "$(stat -c '%U %a' /run/tdx-agent/log)" "tdx-agent 700"
same "its folder is root's" "$(stat -c '%U %a' /run/tdx-agent)" "root 755"
if [ $SHAPE = sysfs ]; then
  same "the entry's files are the agent's" "$(stat -c %U $R/tdx-agent/inblob $R/tdx-agent/outblob "$M/rtmr3:sha384" | sort -u)" tdx-agent
  same "RTMR0 is not" "$(stat -c %U "$M/rtmr0:sha384")" root
  same "the boot event log is a copy for the agent" "$(stat -c '%U %a' /run/tdx-agent/log/ccel)" "tdx-agent 400"
else
  same "the device is the agent's" "$(stat -c %U /dev/tdx_guest)" tdx-agent
fi

echo "== serve"
# The agent is started by whoever comes first, and by its own unit's name later.
check "the first connection starts the agent" tdx-agent status
same "it is" "$(prop ActiveState)" active
has "what it says of itself" "$(prop StatusText)" "RTMR3 ok seq=$n"
tdx-agent status | sed 's/^/STATUS|/'
same "every event is in RTMR3" "$(events)" "$n"
echo "LOG|$(tdx-agent log export)"
pid=$(prop MainPID)
same "its user" "$(stat -c %U:%G /proc/"$pid")" tdx-agent:tdx-agent
same "no user id of root" "$(awk '/^(Uid|Gid):/ { for (i = 2; i <= 5; i++) if ($i == 0) n++ } END { print n + 0 }' /proc/"$pid"/status)" 0
same "no capabilities" "$(awk '/^Cap/ { print $2 }' /proc/"$pid"/status | sort -u)" 0000000000000000
same "no new privileges, system calls filtered" "$(awk '/^(NoNewPrivs|Seccomp):/ { print $2 }' /proc/"$pid"/status | tr '\n' ' ')" "1 2 "
same "no network but lo" "$(nsenter -t "$pid" -n ip -o link 2>/dev/null | awk '{ print $2 }')" lo:
same "it may write nowhere else" "$(nsenter -t "$pid" -m sh -c 'for d in /etc /usr /var /dstack /sys/kernel /sys/kernel/config; do [ ! -w $d ] || echo $d; done')" ""
if [ $SHAPE = sysfs ]; then
  same "nor to the other registers" "$(nsenter -t "$pid" -m setpriv --reuid=tdx-agent --regid=tdx-agent --clear-groups sh -c 'for f in /sys/devices/virtual/misc/tdx_guest/measurements/*; do [ ! -w $f ] || echo ${f##*/}; done')" rtmr3:sha384
fi

if [ $SHAPE = device ]; then
  echo "== quotes by vsock"
  # No host listens there; what matters is that the sandbox lets the question out.
  out=$(tdx-agent quote 2>&1); has "the host is asked" "$out" QGS
  case $out in *"address family not supported"*) fail "the sandbox allows vsock" "$out" ;; *) ok "the sandbox allows vsock" ;; esac
  check "an event goes through the device" tdx-agent emit bed 01
  same "and is extended" "$(extends)" $((n + 1))
  check "the log replays to the register" tdx-agent log replay
  check "restart" systemctl restart tdx-agent.service
  check "and the log still does" tdx-agent log replay
  finish
fi

echo "== quotes"
check "ready" tdx-agent wait --for=ready --timeout 30s
check "a quote and its log agree" quote 1234
check "status: every register is explained" sh -c 'tdx-agent status --json > /run/s.json && ! grep -q mismatch /run/s.json'
check "an application gets a quote" as_app tdx-agent quote -o /dev/null
exits 8 "but no operator's answer" as_app tdx-agent status
exits 8 "and no event" as_app tdx-agent emit bed 01
check "a member of tdx-agent-app gets it" setpriv --reuid=nobody --regid=nogroup --groups tdx-agent-app tdx-agent status
check "root emits" tdx-agent emit bed 01
n=$(extends)

echo "== restart"
inode=$(stat -c %i /run/dstack.sock)
( i=0; while [ ! -e /run/enough ]; do tdx-agent quote -o /dev/null || echo x; i=$((i + 1)); done > /run/client 2>&1; echo "$i quotes" > /run/count ) &
check "restart under a client" systemctl restart tdx-agent.service
sleep 1; touch /run/enough; wait
same "the client noticed nothing ($(cat /run/count))" "$(cat /run/client)" ""
same "the socket is the same" "$(stat -c %i /run/dstack.sock)" "$inode"
check "status" tdx-agent status
same "nothing was extended" "$(extends)" "$n"

echo "== killed"
check "ready" tdx-agent wait --for=ready --timeout 30s
echo 4000 > $K/quote_delay_ms
( tdx-agent quote -o /dev/null >/dev/null 2>&1; echo $? > /run/cut ) &
sleep 1; pid=$(prop MainPID); kill -9 "$pid"; echo 0 > $K/quote_delay_ms; wait
same "the quote that ran is lost" "$(cat /run/cut | tr 123456789 x)" x
check "status after SIGKILL in a quote" tdx-agent status
if [ "$(prop MainPID)" = "$pid" ]; then fail "the agent is a new process"; else ok "the agent is a new process"; fi
check "ready" tdx-agent wait --for=ready --timeout 60s
check "a quote and its log agree" quote 55
( while [ ! -e /run/enough2 ]; do tdx-agent emit storm 02; done >/dev/null 2>&1 ) &
for i in 1 2 3 4 5 6; do within 10 sh -c '[ "$(systemctl show -P ActiveState tdx-agent.service)" = active ]' || :; sleep 0.7; kill -9 "$(prop MainPID)" 2>/dev/null; done
touch /run/enough2; wait
check "status after SIGKILL among events" within 10 tdx-agent status
check "the log replays to the register" tdx-agent log replay
same "an event for every extend" "$(events)" "$(extends)"
same "restarts" "$(prop NRestarts)" 7

echo "== watchdog"
mkdir -p /run/systemd/system/tdx-agent.service.d
printf '[Service]\nWatchdogSec=2\nTimeoutAbortSec=1\n' > /run/systemd/system/tdx-agent.service.d/fast.conf
systemctl daemon-reload; check "restart" systemctl restart tdx-agent.service
pid=$(prop MainPID); kill -STOP "$pid"
check "a frozen agent is replaced" within 15 sh -c '[ "$(systemctl show -P MainPID,ActiveState tdx-agent.service | tr "\n" " ")" != "'"$pid"' active " ] && tdx-agent status'
same "by the watchdog" "$(journalctl -q -b -o cat -u tdx-agent.service | grep -c 'Watchdog timeout')" 1
rm -r /run/systemd/system/tdx-agent.service.d; systemctl daemon-reload; systemctl restart tdx-agent.service

echo "== stop"
check "ready" tdx-agent wait --for=ready --timeout 60s
echo 8000 > $K/quote_delay_ms
( tdx-agent quote -o /dev/null >/dev/null 2>&1 ) &
sleep 1; t0=$(cut -d. -f1 /proc/uptime); systemctl stop tdx-agent.service; t1=$(cut -d. -f1 /proc/uptime)
check "stopping does not wait for the host ($((t1 - t0)) s)" test $((t1 - t0)) -lt 5
same "and is no failure" "$(prop Result)" success
check "the entry stays" test -d $R/tdx-agent
check "so does the log" test -s /run/tdx-agent/log/ccel
echo 0 > $K/quote_delay_ms; wait

echo "== configuration that cannot work"
cp /etc/tdx-agent/agent.toml /run/good.toml; echo 'nonsense = 1' > /etc/tdx-agent/agent.toml
timeout 5 tdx-agent status >/dev/null 2>&1
check "the starts end" within 15 sh -c '[ "$(systemctl show -P ActiveState tdx-agent.service)" = failed ] && [ "$(systemctl show -P ActiveState tdx-agent.socket)" = failed ]'
starts=$(journalctl -q -b -o cat -u tdx-agent.service | grep -c 'nonsense')
check "after a few ($starts)" test "$starts" -le 70
cp /run/good.toml /etc/tdx-agent/agent.toml
systemctl reset-failed tdx-agent.service $SOCKETS
check "it starts again" systemctl start $SOCKETS tdx-agent.service
check "and has its log" tdx-agent log replay

echo "== a foreign extend"
head -c 48 /dev/zero > "$M/rtmr3:sha384"
exits 7 "status says so" tdx-agent status
exits 7 "no quote" tdx-agent quote
exits 7 "no event" tdx-agent emit bed 03
check "restart" systemctl restart tdx-agent.service
exits 7 "and it is not forgotten" tdx-agent status
finish
