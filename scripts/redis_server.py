# SPDX-License-Identifier: GPL-2.0
"""A real redis-server on a Unix socket, its cgroup with the async-fork switch, and the kernel's counters."""

import os
import socket
import subprocess
import time
from pathlib import Path

CGROUP_ROOT = Path("/sys/fs/cgroup")
START_TIMEOUT = 30
PREFIX = "async_fork_"


class Failure(Exception):
    """The run has failed; the text says what and, where known, what to do."""


class Cgroup:
    """The cgroup that Redis runs in: memory.async_fork is the switch a user would use."""

    def __init__(self, name):
        self.path = CGROUP_ROOT / name
        self.switch = self.path / "memory.async_fork"
        controllers = CGROUP_ROOT / "cgroup.controllers"
        if not controllers.exists() or "memory" not in controllers.read_text().split():
            raise Failure(f"no cgroup v2 with the memory controller at {CGROUP_ROOT}: start this through scripts/run")
        (CGROUP_ROOT / "cgroup.subtree_control").write_text("+memory")
        self.path.mkdir(exist_ok=True)
        if not self.switch.exists():
            raise Failure(f"{self.switch} does not exist: this kernel is not patched; use scripts/vm --kernel release")

    def set_workers(self, workers):
        try:
            self.switch.write_text(str(workers))
        except OSError as e:
            raise Failure(f"writing {workers} to {self.switch}: {e.strerror}") from e
        if int(self.switch.read_text()) != workers:
            raise Failure(f"{self.switch} reads {self.switch.read_text().strip()!r} after {workers} was written")


def counters():
    """The async_fork_* counters of /proc/vmstat, without the prefix."""
    pairs = (line.split() for line in Path("/proc/vmstat").read_text().splitlines())
    return {name.removeprefix(PREFIX): int(value) for name, value in pairs if name.startswith(PREFIX)}


class Server:
    """One redis-server that keeps its files in `folder`, and one connection to it."""

    def __init__(self, folder, cgroup=None):
        self.folder = Path(folder)
        self.folder.mkdir(exist_ok=True)
        self.socket_path = str(self.folder / "redis.sock")
        self.rdb = self.folder / "dump.rdb"
        self.log = self.folder / "redis.log"
        command = ["redis-server", "--port", "0", "--unixsocket", self.socket_path, "--dir", str(self.folder),
                   "--logfile", str(self.log), "--save", "", "--appendonly", "no", "--rdbcompression", "no"]
        if cgroup:
            enter = f"echo 0 > {cgroup.path}/cgroup.procs"
            command = ["sh", "-c", enter + ' && exec "$@"', "sh", *command]
        try:
            self.process = subprocess.Popen(command, stdin=subprocess.DEVNULL)
        except FileNotFoundError as e:
            raise Failure(f"{e.filename} is not installed: run scripts/setup") from e
        self.connection = None
        self.replies = None

    def connect(self):
        """Waits until the server listens."""
        deadline = time.monotonic() + START_TIMEOUT
        while True:
            if self.process.poll() is not None:
                raise Failure(f"redis-server ended at once, status {self.process.returncode}\n{self.log_tail()}")
            try:
                self.connection = socket.socket(socket.AF_UNIX)
                self.connection.connect(self.socket_path)
                break
            except OSError as e:
                self.connection.close()
                if time.monotonic() > deadline:
                    raise Failure(f"redis-server does not listen after {START_TIMEOUT} s: {e}") from e
            time.sleep(0.1)
        self.replies = self.connection.makefile("rb")

    def wait_loaded(self, timeout):
        """Waits until the server has loaded its RDB file; a file it refuses ends the server."""
        deadline = time.monotonic() + timeout
        while b"LOADING" in self.ask_raw("PING"):
            if time.monotonic() > deadline:
                raise Failure(f"the RDB file is not loaded after {timeout} s")
            time.sleep(0.2)

    def ask_raw(self, *words):
        """One command; the reply's line, or the content of a bulk string."""
        parts = [f"*{len(words)}\r\n"] + [f"${len(w)}\r\n{w}\r\n" for w in words]
        try:
            self.connection.sendall("".join(parts).encode())
            line = self.replies.readline()
            if line.startswith(b"$"):
                line = self.replies.read(int(line[1:]) + 2)
        except OSError:
            line = b""
        if not line:
            try:
                status = f"ended with status {self.process.wait(timeout=5)}"
            except subprocess.TimeoutExpired:
                status = "is alive but closed the connection"
            raise Failure(f"redis-server {status}, asked {' '.join(words)}\n{self.log_tail()}")
        return line[:-2]

    def ask(self, *words):
        reply = self.ask_raw(*words)
        if reply.startswith(b"-"):
            raise Failure(f"redis-server answers {' '.join(words)} with {reply.decode()}")
        return reply.decode()

    def info(self, section):
        lines = (line.split(":", 1) for line in self.ask("INFO", section).splitlines() if ":" in line)
        return dict(lines)

    def dbsize(self):
        return int(self.ask("DBSIZE").removeprefix(":"))

    def log_tail(self):
        if not self.log.exists():
            return ""
        return "".join(f"    redis: {line}\n" for line in self.log.read_text(errors="replace").splitlines()[-15:])

    def stop(self):
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait()


def vm_rss(pid):
    """Resident bytes, and bytes of page tables, of a process."""
    status = dict(line.split(":", 1) for line in Path(f"/proc/{pid}/status").read_text().splitlines())
    return tuple(int(status[field].split()[0]) * 1024 for field in ("VmRSS", "VmPTE"))


def machine():
    """How this machine runs: the words for the report. scripts/vm says what runs the guest."""
    accel = os.environ.get("ASYNC_FORK_ACCEL", "no guest")
    kind = {"tcg": "QEMU TCG (emulated: times compare with each other, not with hardware)",
            "icount": "QEMU TCG, counting instructions as time",
            "kvm": "QEMU with KVM"}.get(accel, accel)
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return f"{kind}, {os.cpu_count()} CPUs, {memory / (1 << 30):.1f} GiB, Linux {os.uname().release}"
