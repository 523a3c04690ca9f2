# SPDX-License-Identifier: Apache-2.0
# What tests of attested channels share; run.sh has defined check and the rest.
E=tdx-agent-endpoint.service
G=tdx-agent-egress.service
C=tdx-agent-connect.service

# policy REGISTERS: one that accepts a machine with these registers (MRTD first, RTMR0 to
# RTMR2 in places 5 to 7) which runs the same application
policy() {
	IFS=, read -r mrtd _ _ _ rtmr0 rtmr1 rtmr2 _ <<R
$1
R
	cat <<P
version = 1
[image.other]
mrtd = ["$mrtd"]
rtmr0 = ["$rtmr0"]
rtmr1 = ["$rtmr1"]
rtmr2 = ["$rtmr2"]
[[peer]]
name = "other"
root = "intel"
image = ["other"]
compose_hash = ["$(sha256sum /dstack/.host-shared/app-compose.json | cut -d' ' -f1)"]
service = ["echo", "open"]
allow_unattested_clients = true
P
}
# flip REGISTERS: with another first digit of MRTD
flip() { case $1 in 0*) echo "1${1#?}" ;; *) echo "0${1#?}" ;; esac; }

# sandboxed UNIT USER: no capability, no way to the agent's secrets
sandboxed() {
	S=$1
	same "$1: user" "$2" "$(stat -c %U /proc/"$(prop "$1" MainPID)")"
	for c in CapPrm CapEff CapBnd; do same "$1: $c" 0000000000000000 "$(proc $c)"; done
	same "$1: NoNewPrivs" 1 "$(proc NoNewPrivs)"
	same "$1: Seccomp" 2 "$(proc Seccomp)"
	S=tdx-agent.service
	check "$1: cannot read the agent key" not as "$2" cat /run/tdx-agent/log/agent.key
	check "$1: cannot emit events" not as "$2" tdx-agent emit x 00
}
netns() { readlink "/proc/$(prop "$1" MainPID)/ns/net"; }
