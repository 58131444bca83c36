#!/usr/bin/env python3
# SPDX-License-Identifier: GPL-2.0
"""Compares two listings of a kernel's code, as scripts/lint-series makes them.

    scripts/same_code.py WITHOUT WITH

WITHOUT is that of the kernel without the series, WITH that of one with it and
with ASYNC_FORK=n. A function is the same if it has the same instructions; their
order may differ, as the compiler places blocks differently around a call that
is empty. Prints what differs; exit status 1 if anything does that may not.
"""
import collections
import re
import sys

# What may differ, and why.
ALLOWED = {
    ("./mm/memory.o", "copy_page_range"): "its loop is a function of its own",
    ("./kernel/configs.o", "ikconfig_init"): "the object holds the .config",
}
START = re.compile(r"(?:[0-9a-f]+ )?<([^>]+)>:$")
# Where a jump or a relocation goes inside its section moves with what is before;
# which function it goes to does not.
PLACE = re.compile(r"0x[0-9a-f]+ (?=<)|(?<=[^>+])\+0x[0-9a-f]+(?=>)|(?<=\.text)\+0x[0-9a-f]+")


def functions(path):
    """{(object, function): instructions and how often each}, padding left out."""
    found, name, counts = {}, None, None
    with open(path, encoding="utf-8", errors="replace") as listing:
        for line in map(str.strip, listing):
            start = START.match(line)
            if line.startswith("== "):
                name, counts = line[3:], None
            elif start:
                counts = found.setdefault((name, start[1]), collections.Counter())
            elif line and counts is not None and not line.startswith(("nop", "int3")):
                counts[PLACE.sub("", line)] += 1
    return found


def main():
    if len(sys.argv) != 3:
        sys.exit(__doc__)
    without, with_off = functions(sys.argv[1]), functions(sys.argv[2])
    if not without:
        sys.exit(f"{sys.argv[1]} lists no code")
    bad = 0
    for key in sorted(without.keys() | with_off.keys()):
        if without.get(key) == with_off.get(key):
            continue
        reason = ALLOWED.get(key)
        print(f"{key[0]}: {key[1]} differs: {reason or 'may not'}")
        bad += not reason
    print(f"{len(without)} functions compared, {bad} differ that may not")
    return bad > 0


if __name__ == "__main__":
    sys.exit(main())
