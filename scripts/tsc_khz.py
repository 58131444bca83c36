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


def counter():
    """A function that reads the counter, and the memory that holds it."""
    memory = mmap.mmap(-1, len(CODE), prot=mmap.PROT_READ | mmap.PROT_WRITE | mmap.PROT_EXEC)
    memory.write(CODE)
    address = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    return ctypes.CFUNCTYPE(ctypes.c_uint64)(address), memory


def main():
    read, _memory = counter()
    start_ns, start = time.monotonic_ns(), read()
    time.sleep(SECONDS)
    end, end_ns = read(), time.monotonic_ns()
    print(round((end - start) * 1_000_000 / (end_ns - start_ns)))


main()
