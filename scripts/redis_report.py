# SPDX-License-Identifier: GPL-2.0
"""Latencies of the load generator's samples, and the table that sets plain and async side by side."""

import array
import statistics
from dataclasses import dataclass, field

PERCENTILES = ((50, "p50"), (99, "p99"), (99.9, "p99.9"), (100, "max"))


@dataclass
class Round:
    """One snapshot under load."""
    number: int
    mode: str
    fork_usec: int
    duration: float
    reply_ms: float
    inside: list = field(repr=False)     # latencies in ns, sorted
    outside: list = field(repr=False)
    generator_late: int = 0              # ns, the worst
    counters: dict = field(default_factory=dict)


def read_samples(path, begin, end):
    """Sorted latencies of the writes that met the window [begin, end] and of those that did not; worst own delay."""
    numbers = array.array("Q")
    with open(path, "rb") as f:
        numbers.frombytes(f.read())
    due, handed, done = numbers[0::3], numbers[1::3], numbers[2::3]
    inside, outside = [], []
    for d, a in zip(due, done):
        (inside if d <= end and a >= begin else outside).append(a - d)
    inside.sort()
    outside.sort()
    late = max((h - d for d, h in zip(due, handed)), default=0)
    return inside, outside, late


def percentile(ordered, p):
    """Nearest rank: the smallest sample that p percent of all do not exceed."""
    if not ordered:
        return float("nan")
    rank = -(-len(ordered) * p // 100)
    return ordered[max(int(rank) - 1, 0)]


def milliseconds(ns):
    return f"{ns / 1e6:.3f}"


def ratio(plain, other):
    return f"{plain / other:.1f}x" if other else "-"


def round_line(r):
    tail = "  ".join(f"{name} {milliseconds(percentile(r.inside, p))}" for p, name in PERCENTILES)
    return (f"latest_fork_usec {r.fork_usec}; snapshot {r.duration:.2f} s; {len(r.inside)} writes inside, "
            f"ms: {tail}; {len(r.outside)} outside; load generator itself late by at most "
            f"{milliseconds(r.generator_late)} ms")


def comparison(rounds):
    """The table's lines, and the ratio of the median fork times (None without async rounds)."""
    by_mode = {}
    for r in rounds:
        by_mode.setdefault(r.mode, []).append(r)
    modes = [m for m in ("plain", "async") if m in by_mode]

    def row(name, values, text):
        cells = [text(values[m]) for m in modes]
        if len(modes) == 2:
            cells.append(ratio(values["plain"], values["async"]))
        return f"  {name:<34}" + "".join(f"{c:>14}" for c in cells)

    lines = [f"  {'':<34}" + "".join(f"{m:>14}" for m in modes) + (f"{'plain/async':>14}" if len(modes) == 2 else "")]
    forks = {m: statistics.median(r.fork_usec for r in by_mode[m]) for m in modes}
    lines.append(row("latest_fork_usec, median", forks, lambda v: f"{v:g}"))
    durations = {m: statistics.median(r.duration for r in by_mode[m]) for m in modes}
    lines.append(row("snapshot's duration, median, s", durations, lambda v: f"{v:.2f}"))
    for where in ("inside", "outside"):
        merged = {m: sorted(x for r in by_mode[m] for x in getattr(r, where)) for m in modes}
        for p, name in PERCENTILES:
            values = {m: percentile(merged[m], p) for m in modes}
            lines.append(row(f"writes {where} snapshots, {name}, ms", values, milliseconds))
        lines.append(f"  {f'writes {where} snapshots, number':<34}" + "".join(f"{len(merged[m]):>14}" for m in modes))
    lines.append("  each latest_fork_usec: " +
                 "; ".join(f"{m} {', '.join(str(r.fork_usec) for r in by_mode[m])}" for m in modes))
    return lines, forks["plain"] / max(forks["async"], 1) if len(modes) == 2 else None
