#!/bin/sh
# SPDX-License-Identifier: Apache-2.0
# A guest like dstack OS 0.5: no configfs-tsm, registers only through /dev/tdx_guest.
# The units need the drop-in that is shipped for it. Quotes would come over vsock, which
# this machine has without a host. run.sh has defined check, same and the rest.
drop() { for u in tdx-agent tdx-agent-measure; do mkdir -p "/etc/systemd/system/$u.service.d"; cp "/usr/share/doc/tdx-agent/drop-ins/$1" "/etc/systemd/system/$u.service.d/"; done; systemctl daemon-reload; }

echo "== dstack OS 0.5"
check "users" systemd-sysusers /usr/lib/sysusers.d/tdx-agent.conf
check "folders and links" systemd-tmpfiles --create /usr/lib/tmpfiles.d/tdx-agent.conf
chmod 400 /etc/tdx-agent/ccel.root; chown root:root /etc/tdx-agent/ccel.root
echo "port = 4050" > /etc/tdx-attest.conf
check "without the drop-in the boot step fails" not systemctl start tdx-agent-measure.service
drop 10-old-kernel.conf; drop 10-vsock.conf
check "drop-ins verify" sh -c 'o=$(systemd-analyze verify tdx-agent.service tdx-agent-measure.service 2>&1); echo "$o"; ! echo "$o" | grep -q tdx-agent'
check "boot step" systemctl restart tdx-agent-measure.service
same "the device" "tdx-agent:tdx-agent" "$(stat -c %U:%G /dev/tdx_guest)"
check "sockets" systemctl start tdx-agent.socket tdx-agent-dstack.socket tdx-agent-tappd.socket tdx-agent-admin.socket
check "agent" systemctl start $S
check "the log explains RTMR3" tdx-agent log replay
cat $out
check "an event through the device" tdx-agent emit release 1f2e
check "the log explains RTMR3" tdx-agent log replay
status "status" 0 tdx-agent status
cat $out
# char-rtc comes with ProtectClock=, which takes it back by seccomp
same "devices beside the harmless ones" "closed char-rtc r /dev/tdx_guest rw" "$(echo $(prop $S DevicePolicy) $(prop $S DeviceAllow))"
check "the agent opens it" inside runuser -u tdx-agent -- sh -c 'exec 3<>/dev/tdx_guest'
for c in CapPrm CapEff CapBnd; do same $c 0000000000000000 "$(proc $c)"; done
# The kernel has vsock and no host behind it: the question must get that far.
tdx-agent quote >/tmp/vsock 2>&1
check "the sandbox lets vsock out" has "no such device" /tmp/vsock
cat /tmp/vsock
