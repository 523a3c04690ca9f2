#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""Compare what two TDs have measured of the same application: the events of RTMR3 must
have the same names, payloads and digests. A boot's own key and random instance id are
compared by name only.

usage: samelog.py LOG LOG      two outputs of "tdx-agent log export" """
import json
import sys


def rtmr3(path):
    with open(path) as f:
        return [e for e in json.load(f) if e["imr"] == 3]


a, b = rtmr3(sys.argv[1]), rtmr3(sys.argv[2])
names = [e["event"] for e in a]
if not a or names != [e["event"] for e in b]:
    sys.exit(f"samelog: {names} here, {[e['event'] for e in b]} there")
differ = [x["event"] for x, y in zip(a, b) if x != y and x["event"] not in ("agent-key", "instance-id")]
if differ:
    sys.exit(f"samelog: {', '.join(differ)} measured differently")
print(f"  the simulated TD measures the same: {', '.join(names)}")
