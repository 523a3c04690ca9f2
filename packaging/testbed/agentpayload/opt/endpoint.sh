# SPDX-License-Identifier: Apache-2.0
# Attested channels by the installed units, from a client in this machine that proves
# nothing and judges the machine's evidence. run.sh has defined check and the rest.
. /opt/channel.sh
# dial TEXT POLICY
dial() { echo "$1" | tdx-agent connect --unattested --policy "$2" --collateral /etc/tdx-agent/collateral.json --expect other --service open 127.0.0.1:8443; }

echo "== attested channels"
policy "$(cat /etc/tdx-agent/registers1)" > /etc/tdx-agent/policy.toml
policy "$(flip "$(cat /etc/tdx-agent/registers1)")" > /tmp/wrong.toml
check "sockets" systemctl start tdx-agent-endpoint.socket tdx-agent-egress.socket echo.socket
same "channel.sock and egress.sock" "660 root:tdx-agent-endpoint;660 root:tdx-agent-egress;" "$(stat -c '%a %U:%G' /run/tdx-agent/channel.sock /run/tdx-agent/egress.sock | tr '\n' ';')"
same "nothing runs yet" "inactive inactive" "$(systemctl is-active $E) $(systemctl is-active $G)"
check "a first client starts everything, and gets through" says hello dial hello /etc/tdx-agent/policy.toml
cat $out
same "endpoint and egress" "active active" "$(systemctl is-active $E) $(systemctl is-active $G)"
status "a client whose policy pins another MRTD" 5 dial hello /tmp/wrong.toml
cp $out /tmp/said; cat /tmp/said
check "which says so" has mrtd /tmp/said
sandboxed $E tdx-agent-endpoint
sandboxed $G tdx-agent-egress
check "the endpoint has no network" [ "$(netns $E)" != "$(netns init.scope)" ]
check "egress has the machine's" [ "$(netns $G)" = "$(readlink /proc/1/ns/net)" ]
check "egress.sock is not for everybody" not as nobody /opt/simhost ask /run/tdx-agent/egress.sock x
check "nor channel.sock" not as nobody /opt/simhost ask /run/tdx-agent/channel.sock x
as tdx-agent-endpoint /opt/simhost ask /run/tdx-agent/egress.sock "$(printf 'CONNECT 127.0.0.1:8443 HTTP/1.1\r\n\r\n ')" > /tmp/refused 2>&1
check "egress refuses what is not listed" has "403 Forbidden" /tmp/refused
kill -9 "$(prop $E MainPID)" "$(prop $G MainPID)"
check "both killed, a client does not notice" says again dial again /etc/tdx-agent/policy.toml
check "what it accepted is shown" says '"accepted": *[1-9]' tdx-agent peers --json
check "reload" systemctl reload $E
check "after a reload" says reloaded dial reloaded /etc/tdx-agent/policy.toml
echo nonsense >> /etc/tdx-agent/policy.toml
check "a policy that cannot be read: start fails" not systemctl restart $E
sleep 1
same "and is not tried again" "failed 78" "$(systemctl is-active $E) $(prop $E ExecMainStatus)"
systemctl stop tdx-agent-endpoint.socket tdx-agent-egress.socket
