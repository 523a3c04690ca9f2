#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""Make a boot event log as firmware leaves it behind the ACPI table CCEL, and the
registers that it explains: a TCG2 log (PC Client Platform Firmware Profile, section 10)
with one SHA-384 digest an event.

usage: mkccel.py OUT        prints ktdx's init_mr= for that log"""
import hashlib
import struct
import sys

SHA384 = 0x000C
NO_ACTION, SEPARATOR, EVENT_TAG = 3, 4, 6


def header():
    spec = b"Spec ID Event03\0" + struct.pack("<IBBBBIHHB", 0, 0, 2, 0, 2, 1, SHA384, 48, 0)
    return struct.pack("<II20xI", 0, NO_ACTION, len(spec)) + spec


def event(index, kind, data):
    digest = hashlib.sha384(data).digest()
    return digest, struct.pack("<IIIH48sI", index, kind, 1, SHA384, digest, len(data)) + data


registers = [bytes(48)] * 4
log = header()
for rtmr, kind, data in [
    (0, EVENT_TAG, b"test bed: virtual firmware"),
    (0, SEPARATOR, bytes(4)),
    (1, EVENT_TAG, b"test bed: kernel"),
    (2, EVENT_TAG, b"test bed: command line"),
    (2, EVENT_TAG, b"test bed: initrd"),
]:
    digest, record = event(rtmr + 1, kind, data)
    registers[rtmr] = hashlib.sha384(registers[rtmr] + digest).digest()
    log += record
with open(sys.argv[1], "wb") as f:
    f.write(log.ljust(64 << 10, b"\xff"))
mrtd = hashlib.sha384(b"test bed: MRTD").hexdigest()
# mrconfigid, mrowner, mrownerconfig stay zero; RTMR3 is the agent's
print(",".join([mrtd, "", "", ""] + [r.hex() for r in registers[:3]]))
