# SPDX-License-Identifier: GPL-2.0
"""Redis snapshots under load, by plain fork and by async fork in turn: the guest's side of `make run`.

How it proves what it prints

- The switch is the user's: Redis runs in the cgroup /sys/fs/cgroup/redis, and memory.async_fork there is set to 0 or to
  the number of copy workers before each snapshot. /proc/vmstat must show one session for each async snapshot, ended by
  the time the snapshot is over, with most of the dataset in its pieces; and none for a plain one.
- Every value carries the number of the write that made it (its epoch), and every byte of it follows from that number
  (tests/redis/model.h). Next to each BGSAVE Redis itself says which write of each connection was its last
  (tests/redis/snapshot.c): this cut is exact. tests/redis/rdbcheck.c replays the writes up to the cut and demands that
  the file holds just that, byte for byte: no earlier and no later epoch, no key more or less.
- A second redis-server loads each file (it checks the checksum) and must report the right number of keys.
- At the end the live dataset is written by SAVE, which does not fork, and checked like the snapshots: the parent has
  lost and mixed up nothing either. Then two deliberately wrong checks must fail, so that the check itself is checked.
- Writes come at fixed times, however slow the server is, and latency counts from the time a write was due. Inside the
  snapshot: a write that was waiting or in work at any time between BGSAVE's sending and rdb_bgsave_in_progress:0.

With --counted: forks of an idle server, in a guest whose clock counts instructions (scripts/vm --icount), so that figures
repeat; no load, and only the last file is checked.

With --native: no guest, no switch, plain snapshots only; to work on this test itself.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from redis_report import Round, comparison, read_samples, round_line
from redis_server import Cgroup, Failure, Server, counters, machine, vm_rss

KEY_COST = 1024         # bytes of the dataset for one key, at least: Redis puts 1000 bytes into jemalloc's class of 1024
VALUE_LEN = 1000
CONNS = 8
MIN_ASYNC_SIZE = 128 << 20      # the dataset must exceed vm.async_fork_min_mb
PIECE = 2 << 20
GIB = 1 << 30
LOAD_TIMEOUT = 600
SESSION_TIMEOUT = 10
COARSEST_CLOCK = 1e-5   # s
UNITS = {"K": 1 << 10, "M": 1 << 20, "G": 1 << 30}
STARTED = time.monotonic()


def say(text):
    print(f"[{time.monotonic() - STARTED:4.0f} s] {text}", flush=True)


def size_arg(text):
    unit = UNITS.get(text[-1:].upper())
    digits = text[:-1] if unit else text
    if not digits.isdigit() or int(digits) == 0:
        raise argparse.ArgumentTypeError(f"want a size such as 512M or 2G, got {text!r}")
    return int(digits) * (unit or 1)


def parse_args():
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument("--size", type=size_arg, default=GIB, help="dataset, e.g. 512M or 2G (default 1G)")
    p.add_argument("--rounds", type=int, default=3, help="snapshots each way (default 3)")
    p.add_argument("--rate", type=int, default=1000, help="writes a second; 0 = each after its predecessor's reply")
    p.add_argument("--workers", type=int, default=1, choices=range(1, 9), metavar="1..8", help="what memory.async_fork is set to")
    p.add_argument("--before", type=int, default=4000, help="ms of load before each snapshot")
    p.add_argument("--after", type=int, default=3000, help="ms of load after each snapshot")
    p.add_argument("--min-fork-ratio", type=float, default=0, help="fail if async is not so many times faster to fork")
    p.add_argument("--bin", type=Path, required=True, help="folder with the built helpers load and rdbcheck")
    p.add_argument("--counted", action="store_true", help="no load: only how long forks take")
    p.add_argument("--native", action="store_true", help="no switch, plain snapshots only")
    args = p.parse_args()
    if args.counted and args.native:
        p.error("--counted wants a guest")
    if args.rounds < 1:
        p.error("--rounds must be at least 1")
    if not args.native and args.size < MIN_ASYNC_SIZE:
        p.error(f"--size must be at least {MIN_ASYNC_SIZE >> 20}M: smaller processes fork the plain way")
    return args


class Run:
    """One boot's snapshots."""

    def __init__(self, args, folder):
        self.args = args
        self.folder = Path(folder)
        self.keys_per_conn = max(args.size // KEY_COST // CONNS, 1)
        self.keys = self.keys_per_conn * CONNS + CONNS      # and the heads
        self.gib = args.size / GIB
        self.state = str(self.folder / "state")
        self.samples = str(self.folder / "samples")
        self.cgroup = None if args.native else Cgroup("redis")
        self.server = None
        self.checker = None     # the second server, while it lives

    def helper(self, name, *words):
        """Runs a C helper; its progress, on standard error, is shown as it comes."""
        command = [str(self.args.bin / name), *map(str, words)]
        result = subprocess.run(command, stdout=subprocess.PIPE, stderr=sys.stdout, text=True, check=False)
        if result.returncode and self.server.process.poll() is not None:
            raise Failure(f"redis-server died, status {self.server.process.returncode}\n{self.server.log_tail()}")
        if result.returncode:
            raise Failure(f"{name} failed (status {result.returncode}), see above\n{result.stdout}{self.server.log_tail()}")
        return result.stdout

    def check_room(self):
        """One RDB file fits into /tmp, so that a full /tmp never looks like a bug of the kernel."""
        stat = os.statvfs(self.folder)
        free = stat.f_bavail * stat.f_frsize
        need = self.args.size * 5 // 4
        if free < need:
            raise Failure(f"{self.folder.parent} has {free >> 20} MiB free, the snapshot needs {need >> 20}: "
                          "give the guest more memory (MEM=)")

    @staticmethod
    def check_clock():
        """The guest's clock is fine enough; a guest whose TSC could not be calibrated falls back to timer ticks."""
        step = time.clock_getres(time.CLOCK_MONOTONIC)
        if step > COARSEST_CLOCK:
            source = Path("/sys/devices/system/clocksource/clocksource0/current_clocksource").read_text().strip()
            raise Failure(f"the clock moves in steps of {step * 1000:g} ms (clocksource {source}), so nothing can be "
                          "measured: boot with tsc_early_khz=, or run again on a less busy machine")

    def start(self):
        if self.cgroup:
            self.cgroup.set_workers(0)
        self.server = Server(self.folder / "live", self.cgroup)
        self.server.connect()
        say(f"filling {self.keys} keys with {VALUE_LEN} bytes each (a minute a GiB under TCG, seconds on hardware)")
        self.helper("load", "fill", self.server.socket_path, self.state, self.keys_per_conn, VALUE_LEN, CONNS)
        used = int(self.server.info("memory")["used_memory"])
        rss, tables = vm_rss(self.server.process.pid)
        if self.server.dbsize() != self.keys or used < self.args.size:
            raise Failure(f"the fill left {self.server.dbsize()} keys in {used} bytes, "
                          f"want {self.keys} in at least {self.args.size}")
        self.dataset = (f"{self.keys} keys x {VALUE_LEN} bytes: used_memory {used / GIB:.2f} GiB, "
                        f"resident {rss / GIB:.2f} GiB, page tables {tables >> 10} KiB")
        say(self.dataset)

    def settle(self, before):
        """Waits until every session has ended; returns what each counter gained."""
        deadline = time.monotonic() + SESSION_TIMEOUT
        while (now := counters()).get("session", 0) != now.get("end", 0):
            if time.monotonic() > deadline:
                raise Failure(f"a session is still alive {SESSION_TIMEOUT} s after its snapshot ended")
            time.sleep(0.05)
        return {name: now[name] - before.get(name, 0) for name in now if now[name] != before.get(name, 0)}

    def judge_counters(self, mode, gained):
        if gained.get("poison"):
            raise Failure(f"a session was poisoned: {gained}")
        sessions = gained.get("session", 0)
        if mode == "plain" and sessions:
            raise Failure(f"{sessions} async sessions during a plain snapshot: {gained}")
        if mode == "async":
            if sessions != 1:
                raise Failure(f"{sessions} async sessions for one async snapshot, want 1; was the fork plain? {gained}")
            copied = sum(gained.get(f"piece_{who}", 0) for who in ("worker", "parent", "child"))
            if copied * PIECE < self.args.size // 2:
                raise Failure(f"the session copied only {copied} pieces of 2 MiB, less than half the dataset: {gained}")

    def snapshot(self, number, mode):
        if self.cgroup:
            self.cgroup.set_workers(self.args.workers if mode == "async" else 0)
        forks = int(self.server.info("stats")["total_forks"])
        before = counters()
        out = json.loads(self.helper("load", "round", self.server.socket_path, self.state, self.args.rate,
                                     self.args.before, self.args.after, self.samples))
        gained = self.settle(before)
        stats = self.server.info("stats")
        if int(stats["total_forks"]) != forks + 1:
            raise Failure(f"Redis counts {int(stats['total_forks']) - forks} forks for one snapshot")
        inside, outside, late = read_samples(self.samples, out["bgsave_ns"], out["over_ns"])
        os.unlink(self.samples)
        result = Round(number, mode, int(stats["latest_fork_usec"]), (out["over_ns"] - out["bgsave_ns"]) / 1e9,
                       (out["reply_ns"] - out["bgsave_ns"]) / 1e6, inside, outside, late, gained)
        say(round_line(result))
        if self.cgroup:
            say("counters: " + (", ".join(f"{k} +{v}" for k, v in sorted(gained.items())) or "no change"))
        self.judge_counters(mode, gained)
        self.verify(out["cut"])
        return result

    def count_fork(self, mode):
        """One snapshot without load; returns what Redis measured of its fork, in us."""
        self.cgroup.set_workers(self.args.workers if mode == "async" else 0)
        before = counters()
        self.server.ask("BGSAVE")
        usec = int(self.server.info("stats")["latest_fork_usec"])
        while self.server.info("persistence")["rdb_bgsave_in_progress"] != "0":
            time.sleep(0.5)
        if self.server.info("persistence")["rdb_last_bgsave_status"] != "ok":
            raise Failure(f"the snapshot failed\n{self.server.log_tail()}")
        self.judge_counters(mode, self.settle(before))
        say(f"{mode} fork: latest_fork_usec {usec}")
        return usec

    def count_forks(self):
        """Forks each way in turn: {mode: [us, ...]}."""
        usec = {"plain": [], "async": []}
        self.check_room()
        self.start()
        for _ in range(self.args.rounds):
            for mode, taken in usec.items():
                taken.append(self.count_fork(mode))
        self.verify(self.written())
        return usec

    def written(self):
        """Each connection's last write so far: the cut of a snapshot that is made now."""
        return [int(n) for n in Path(self.state).read_text().split()[3:]]

    def rdbcheck(self, path, cuts):
        return subprocess.Popen([str(self.args.bin / "rdbcheck"), str(path), str(self.keys_per_conn), str(VALUE_LEN),
                                 *map(str, cuts)], stdout=subprocess.PIPE, text=True)

    def verify(self, cuts):
        """The file holds what the writes up to `cuts` made, and a second server loads it. Removes the file."""
        second = self.folder / "second"
        second.mkdir(exist_ok=True)
        path = second / "dump.rdb"
        self.server.rdb.rename(path)
        check = self.rdbcheck(path, cuts)
        self.checker = Server(second)
        self.checker.connect()
        self.checker.wait_loaded(LOAD_TIMEOUT)
        found = self.checker.dbsize()
        self.checker.stop()
        verdict = check.communicate()[0].strip()
        if check.returncode:
            raise Failure(f"the RDB file is NOT the dataset at the snapshot's instant:\n{verdict}")
        if found != self.keys:
            raise Failure(f"a second redis-server loaded {found} keys from the RDB file, want {self.keys}")
        say(f"RDB file: loads; {verdict}")
        path.unlink()

    def must_refuse(self, what, cuts):
        check = self.rdbcheck(self.server.rdb, cuts)
        check.communicate()
        if check.returncode != 1:
            raise Failure(f"the check accepted {what}: it proves nothing")

    def finish(self):
        """The live dataset, written without a fork; then the check of the check."""
        say("SAVE of the live dataset, to check what the parent holds after all snapshots (20 s a GiB under TCG)")
        self.server.ask("SAVE")
        cuts = self.written()
        self.must_refuse("a snapshot that is one write too new", [cuts[0] - 1, *cuts[1:]])
        self.must_refuse("a snapshot that lacks one write", [cuts[0] + 1, *cuts[1:]])
        with open(self.server.rdb, "r+b") as f:
            middle = os.path.getsize(self.server.rdb) // 2
            f.seek(middle)
            byte = f.read(1)
            f.seek(middle)
            f.write(bytes([byte[0] ^ 1]))
            f.flush()
            self.must_refuse("a file with one wrong bit", cuts)
            f.seek(middle)
            f.write(byte)
        self.verify(cuts)

    def all(self):
        self.check_clock()
        self.check_room()
        self.start()
        modes = ("plain",) if self.args.native else ("plain", "async")
        rounds = []
        for i in range(self.args.rounds):
            for mode in modes:
                number = len(rounds) + 1
                say(f"snapshot {number} of {self.args.rounds * len(modes)}, {mode} fork "
                    "(with its checks 45 s a GiB under TCG)")
                rounds.append(self.snapshot(number, mode))
        self.finish()
        return rounds

    def close(self):
        for server in (self.server, self.checker):
            if server:
                server.stop()


def fast_enough(args, fork_ratio):
    if args.min_fork_ratio and fork_ratio and fork_ratio < args.min_fork_ratio:
        print(f"FAIL: the fork is {fork_ratio:.1f} times faster, want {args.min_fork_ratio:g}")
        return False
    return True


def report_counted(args, run, usec):
    """Prints the forks of an idle server; returns whether async is fast enough."""
    median = {mode: statistics.median(taken) for mode, taken in usec.items()}
    fork_ratio = median["plain"] / median["async"]
    print("\nRedis forks without load, plain and async in one boot, 1 instruction = 1 ns")
    print(f"  machine: {machine()}")
    print(f"  dataset: {run.dataset}")
    for mode, taken in usec.items():
        print(f"  latest_fork_usec, {mode}: {', '.join(map(str, taken))}; median {median[mode]:g}")
    print(f"  plain/async: {fork_ratio:.1f}x; the last RDB file loads, and holds exactly the dataset")
    return fast_enough(args, fork_ratio)


def report(args, run, rounds):
    """Prints the table; returns whether async is fast enough."""
    lines, fork_ratio = comparison(rounds)
    load = f"{args.rate} writes/s, open loop" if args.rate else "closed loop"
    print("\nRedis snapshots, plain fork and async fork in one boot")
    print(f"  machine: {machine()}")
    print(f"  dataset: {run.dataset}")
    print(f"  load: {load}, {CONNS} connections, MSET of one random key and the connection's head; RDB uncompressed" +
          ("" if args.native else f", to tmpfs; memory.async_fork {args.workers}"))
    print("\n".join(lines))
    print(f"  all {len(rounds)} RDB files and the final SAVE load, and hold exactly the writes of their instant")
    return fast_enough(args, fork_ratio)


def main():
    args = parse_args()
    sys.stdout.reconfigure(line_buffering=True)
    with tempfile.TemporaryDirectory(prefix="redis-", dir="/tmp") as folder:
        run = None
        try:
            run = Run(args, folder)
            ok = report_counted(args, run, run.count_forks()) if args.counted else report(args, run, run.all())
        except Failure as e:
            print(f"FAIL: {e}", flush=True)
            ok = False
        finally:
            if run:
                run.close()
    return 0 if ok else 1


if __name__ == "__main__":
    sys.exit(main())
