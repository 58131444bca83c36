#!/usr/bin/env python3
# SPDX-License-Identifier: GPL-2.0
"""Lists the places of a vmlinux that call a hook of async fork; scripts/mutants calls it.

Prints a line each: the return address, as debugfs' async_fork/skip takes it, and the site's name,
CALLER:HOOK, with #2, #3 ... where a function has several calls of one hook.
"""

import collections
import re
import subprocess
import sys

HOOKS = re.compile(r"<(?:__async_fork_(sync_addr|sync_range|drain|exit|exec|reap|start)|async_fork_(is_parent))>$")
SYMBOL = re.compile(r"^[0-9a-f]+ <(.+)>:$")
LINE = re.compile(r"^\s*([0-9a-f]+):\s+(\S+)\s*(.*)$")


def sites(vmlinux):
    """Yields (return address, name)."""
    command = ["llvm-objdump-19", "-d", "--no-show-raw-insn", vmlinux]
    caller, pending, seen = None, None, collections.Counter()
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as dump:
        for line in dump.stdout:
            if symbol := SYMBOL.match(line):
                caller = symbol[1]
                continue
            match = LINE.match(line)
            if not match:
                continue
            if pending:
                seen[pending] += 1
                number = seen[pending]
                yield int(match[1], 16), pending + (f"#{number}" if number > 1 else "")
                pending = None
            hook = HOOKS.search(match[3])
            if hook and match[2].startswith("call"):
                pending = f"{caller}:{hook[1] or hook[2]}"
            elif hook and match[2].startswith("jmp"):
                sys.exit(f"{caller} jumps to {hook[0]}: no return address tells this site")
    if dump.returncode:
        sys.exit(f"llvm-objdump-19 cannot read {vmlinux}")


def main():
    if len(sys.argv) != 2:
        sys.exit("usage: hook_sites.py VMLINUX")
    for address, name in sites(sys.argv[1]):
        print(f"{address:#x} {name}")


main()
