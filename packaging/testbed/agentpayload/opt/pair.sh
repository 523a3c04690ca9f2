# SPDX-License-Identifier: Apache-2.0
# One of two machines that differ in MRTD and attest each other with the installed units.
# run.sh has defined check and the rest. Notes to the other machine keep both in step.
. /opt/channel.sh
other=$((3-id))
echo "127.0.0.1 localhost
10.9.0.$other other.test" > /etc/hosts
ip link set lo up; ip addr add 10.9.0.$id/24 dev eth0; ip link set eth0 up
systemd-run --quiet --unit=board /opt/simhost board 10.9.0.$id:9000 /run/board
# meet NOTE: both machines have come to this point
meet() { check "the other machine: $1" meet_ "$1"; }
meet_() { /opt/simhost tell 10.9.0.$other:9000 "$1" && poll 90 test -e /run/board/"$1"; }
ask() { says "$1" as nobody /opt/simhost ask /run/tdx-agent-connect/echo.sock "$1"; }
# dial POLICY
dial() { echo hello | tdx-agent connect --policy "$1" --collateral /etc/tdx-agent/collateral.json --expect other --service echo 10.9.0.$other:8443; }

echo "== machine $id of two"
check "users" systemd-sysusers /usr/lib/sysusers.d/tdx-agent.conf
check "folders" systemd-tmpfiles --create /usr/lib/tmpfiles.d/tdx-agent.conf
chmod 400 /etc/tdx-agent/ccel.root; chown root:root /etc/tdx-agent/ccel.root
theirs=$(cat /etc/tdx-agent/registers$other)
policy "$theirs" > /etc/tdx-agent/policy.toml
policy "$(flip "$theirs")" > /etc/tdx-agent/wrong.toml
same "MRTD" "$(cut -c1-16 /etc/tdx-agent/registers$id)" "$(od -An -v -tx1 "${RTMR3%/*}/mrtd:sha384" | tr -d ' \n' | cut -c1-16)"
check "the machines differ" [ "$(cut -c1-96 /etc/tdx-agent/registers1)" != "$(cut -c1-96 /etc/tdx-agent/registers2)" ]
printf '\n[ratls]\nendpoint = true\n' >> /etc/tdx-agent/agent.toml # measured
check "boot step" systemctl start tdx-agent-measure.service
check "sockets" systemctl start tdx-agent.socket tdx-agent-channel.socket tdx-agent-egress.socket tdx-agent-endpoint.socket echo.socket
check "a local socket that leads to the other" systemctl start $C
same "nothing else runs yet" "inactive inactive" "$(systemctl is-active $E) $(systemctl is-active $G)"

meet listening
# Both start everything by activation and emulated, which may take longer than a handshake may.
through() { i=3; while [ $i -gt 0 ]; do ask "$1" && return; sleep 3; i=$((i-1)); done; return 1; }
check "each attests the other, and bytes come back" through "hello from $id"
meet through
check "endpoint and egress" systemctl is-active $E $G
journalctl -q -u $E -u $C -o cat --no-pager | grep 'msg=channel' | tail -2
check "peers" tdx-agent peers
cat $out
check "the other was accepted by its entry, for its service" sh -c "journalctl -q -u $E -o cat --no-pager | grep 'msg=channel .*service=echo .*entry=other'"

echo "== dstack's RA-TLS, by a drop-in"
ratls=/run/systemd/system/$E.d/ratls.conf
policy "$theirs" | sed 's/^allow_unattested_clients.*/require = "certificate"\nrequire_measured_agent_key = false/' > /etc/tdx-agent/ratls.toml
mkdir -p ${ratls%/*}
cat > $ratls <<U
[Service]
ExecStart=
ExecStart=/usr/bin/tdx-agent endpoint --ratls --egress --policy /etc/tdx-agent/ratls.toml --collateral /etc/tdx-agent/collateral.json --service echo=127.0.0.1:7007
U
systemctl daemon-reload
check "the endpoint with certificates" systemctl restart $E
meet ratls
# certified POLICY
certified() { echo hello | tdx-agent connect --ratls --policy "$1" --collateral /etc/tdx-agent/collateral.json --expect other 10.9.0.$other:8443; }
check "each accepts the other's certificate, and bytes come back" says hello certified /etc/tdx-agent/ratls.toml
cat $out
check "the other was accepted by its certificate" sh -c "journalctl -q -u $E -o cat --no-pager | grep 'msg=channel .*entry=other assurance=certificate'"
status "the policy for channels takes no certificate" 5 certified /etc/tdx-agent/policy.toml
meet certified
rm $ratls
systemctl daemon-reload
check "the endpoint with channels again" systemctl restart $E
meet channels

echo "== a policy with another MRTD"
status "this machine refuses the other that it dials" 5 dial /etc/tdx-agent/wrong.toml
cp $out /tmp/said
check "because of MRTD" has mrtd /tmp/said
meet dialled
cp /etc/tdx-agent/wrong.toml /etc/tdx-agent/policy.toml
check "reload" systemctl reload $E
reloaded() { journalctl -q -u $E -o cat --no-pager | grep -q 'policy is reloaded'; }
check "the endpoint has the policy" poll 3 reloaded
meet wrong
policy "$theirs" > /tmp/right.toml
status "the other refuses this machine that dials it" 5 dial /tmp/right.toml
cp $out /tmp/said; cat /tmp/said
check "it says no more than that" has "the peer refused: policy_denied: no entry of its policy accepts us for this service; its log says why (ref [0-9a-f]*)\$" /tmp/said
meet refused
check "and knows that it was MRTD" sh -c "journalctl -q -u $E -o cat --no-pager | grep 'msg=\"no channel\".*code=policy_denied.*mrtd'"
cat $out | cut -c1-300
meet end
