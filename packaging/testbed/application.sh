#!/bin/sh
# SPDX-License-Identifier: Apache-2.0
# application.sh UNITS PROGRAM: a declared application under this machine's systemd, in a
# container of its own. The agent has a simulated TD; its sockets, its sandbox and what
# the kernel tells of its callers are real. UNITS is the folder systemd/, PROGRAM the agent.
# Exit: 0 good, 1 not, 77 cannot be run here.
set -eu
U=$1; B=$2; systemd=/lib/systemd/systemd
skip() { echo "application: SKIPPED: $*" >&2; exit 77; }
[ "$(id -u)" = 0 ] || skip "wants root (unshare)"
for c in $systemd "$(command -v unshare || echo unshare)" "$(command -v setpriv || echo setpriv)"; do [ -x "$c" ] || skip "no $c"; done
unshare -m -p -f -u -i -C true 2>/dev/null || skip "this machine gives no namespaces"
T=$(mktemp -d); trap 'rm -rf "$T"' EXIT
chmod 755 "$T"; mkdir "$T/u"
cp "$B" "$T/tdx-agent"
for s in '' -dstack -tappd -admin -app@; do
  cp "$U/tdx-agent$s.socket" "$T/u/"
  mkdir "$T/u/tdx-agent$s.socket.d"; printf '[Unit]\nDefaultDependencies=no\n' > "$T/u/tdx-agent$s.socket.d/test.conf"
done
# There is nobody else's user here, no kernel interface to wait for, no boot step.
printf '[Socket]\nSocketGroup=nogroup\n' >> "$T/u/tdx-agent.socket.d/test.conf"
cp "$U/tdx-agent.service" "$T/u/"; mkdir "$T/u/tdx-agent.service.d"
cat > "$T/u/tdx-agent.service.d/test.conf" <<'I'
[Unit]
DefaultDependencies=no
Wants=
After=
[Service]
ExecStartPre=
ExecStart=
ExecStart=/run/t/tdx-agent serve --simulate --runtime-dir /run/tdx-agent/log --config /run/t/agent.toml
User=nobody
Group=nogroup
StandardError=append:/run/t/log
I
cat > "$T/agent.toml" <<'I'
[[application]]
name = "web"
grants = ["quote", "raw_report_data"]
uids = [0]
I
cat > "$T/u/t.target" <<'I'
[Unit]
DefaultDependencies=no
Wants=tdx-agent.socket tdx-agent-dstack.socket tdx-agent-tappd.socket tdx-agent-admin.socket tdx-agent-app@web.socket caller.service
I
cat > "$T/u/caller.service" <<'I'
[Unit]
DefaultDependencies=no
After=tdx-agent.socket tdx-agent-dstack.socket tdx-agent-tappd.socket tdx-agent-admin.socket tdx-agent-app@web.socket
[Service]
Type=oneshot
ExecStart=/run/t/caller
StandardOutput=append:/run/t/out
StandardError=append:/run/t/out
I
cat > "$T/caller" <<'I'
#!/bin/sh
bad=7 # systemd's status when all is good
A=/run/t/tdx-agent; W=/run/tdx-agent/app/web
check() { w=$1; shift; if "$@" > /run/t/said 2>&1; then echo "ok    $w"; else echo "FAIL  $w"; cat /run/t/said; bad=1; fi; }
status() { w=$1 want=$2; shift 2; "$@" > /run/t/text 2>&1; got=$?; check "$w: exit status $got, want $want" [ $got = "$want" ]; [ $got = "$want" ] || cat /run/t/text; }
has() { grep -q -- "$1" /run/t/text || { cat /run/t/text; return 1; }; }
check "the folder is open, and root's" [ "$(stat -c '%a %U' $W)" = "755 root" ]
check "the socket is open, and root's" [ "$(stat -c '%a %U' $W/dstack.sock)" = "666 root" ]
check "a first call starts the agent, and gets its quote" $A quote --runtime-dir $W -o /dev/null
status "another user is refused" 8 setpriv --reuid=1 --regid=1 --clear-groups $A quote --runtime-dir $W
status "one of dstack.sock is not" 0 setpriv --reuid=1 --regid=1 --clear-groups $A quote --runtime-dir /run -o /dev/null
$A log audit /run/tdx-agent/log/log > /run/t/text 2>&1
for line in 'app-web *ok *GetQuote .*uid 0 gid 0 pid [0-9]* cgroup /system.slice/caller.service$' \
  'app-web *denied *GetQuote .*uid 1 gid 1 .*cgroup /system.slice/caller.service$' 'dstack *ok *GetQuote .*uid 1 ' 'chain intact: line 4'; do
  check "the audit record has $line" has "$line"
done
check "the second socket is open, and root's" [ "$(stat -c '%a %U' $W/tappd.sock)" = "666 root" ]
if command -v curl > /dev/null; then
  curl -s --max-time 20 --unix-socket $W/tappd.sock 'http://localhost/prpc/Tappd.TdxQuote?report_data=00' > /run/t/text 2>&1
  check "it speaks Tappd" has '"hash_algorithm":"sha512"'
  curl -s --max-time 20 --unix-socket $W/dstack.sock 'http://localhost/GetQuote?report_data=00' > /run/t/text 2>&1
  check "the first does not" has '"vm_config"'
fi
systemctl exit $bad
I
chmod 755 "$T/caller"
status=0
T=$T timeout -k 5 90 unshare -m -p -f -u -i -C --mount-proc sh -c '
  mount --make-rprivate /
  mount -t tmpfs -o mode=755 tmpfs /run
  mkdir -p /run/systemd/system /run/lock /run/t
  mount --bind "$T" /run/t
  mount -t tmpfs -o mode=1777 tmpfs /tmp
  mount -t tmpfs -o mode=1777 tmpfs /var/tmp
  cp -r /run/t/u/* /run/systemd/system/
  exec env container=test /lib/systemd/systemd --system --unit=t.target --log-target=console --log-level=warning' > "$T/console" 2>&1 || status=$?
cat "$T/out" 2>/dev/null || :
[ $status = 7 ] && exit 0
echo "application: FAILED: systemd ended with status $status" >&2
tail -20 "$T/console" "$T/log" >&2 2>/dev/null || :
exit 1
