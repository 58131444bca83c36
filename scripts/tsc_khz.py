#!/usr/bin/env python3
# SPDX-License-Identifier: GPL-2.0
"""Prints the frequency of the host's time stamp counter in kHz; scripts/vm calls it.

QEMU's microvm has nothing that a guest could measure the counter against, and under TCG the counter
is the host's. Without its frequency the guest would keep time in ticks of 4 ms.
"""

import ctypes
import mmap
import time

# rdtsc; shl $32, %rdx; or %rdx, %rax; ret
CODE = bytes.fromhex("0f3148c1e2204809d0c3")
SECONDS = 0.2
TRIES = 5


def counter():
    """A function that reads the counter, and the memory that holds it."""
    memory = mmap.mmap(-1, len(CODE), prot=mmap.PROT_READ | mmap.PROT_WRITE | mmap.PROT_EXEC)
    memory.write(CODE)
    address = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    return ctypes.CFUNCTYPE(ctypes.c_uint64)(address), memory


def both(read):
    """The time in ns and the counter, read as close to each other as can be: this may lose the CPU in between."""
    tries = []
    for _ in range(TRIES):
        before, ticks, after = time.monotonic_ns(), read(), time.monotonic_ns()
        tries.append((after - before, (before + after) / 2, ticks))
    return min(tries)[1:]


def main():
    read, _memory = counter()
    start_ns, start = both(read)
    time.sleep(SECONDS)
    end_ns, end = both(read)
    print(round((end - start) * 1_000_000 / (end_ns - start_ns)))


main()
