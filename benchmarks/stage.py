"""What the benchmarks run on: a Redis, a sandbox and processes of their own, all on loopback."""

from __future__ import annotations

import contextlib
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psutil

from worker import embedded_redis

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

READY_S = 60.0


@dataclass(frozen=True, slots=True)
class Sandbox:
    """A sandbox that runs.

    Attributes:
        url: its base URL.
        project_id: its first project.
        token: one that it takes.
        process: it.
    """

    url: str
    project_ids: list[str]
    token: str
    process: psutil.Process

    @property
    def project_id(self) -> str:
        """Its first project."""
        return self.project_ids[0]


@contextlib.contextmanager
def redis_server() -> Iterator[tuple[str, psutil.Process]]:
    """A redis-server on a socket of its own: its URL and its process."""
    with tempfile.TemporaryDirectory(prefix="poolsweep-bench-") as directory:
        with embedded_redis.join(Path(directory)) as server:
            found = [
                process
                for process in psutil.process_iter()
                if "redis-server" in process.name() and _lives_in(process, directory)
            ]
            yield server.url, found[0]


def _lives_in(process: psutil.Process, directory: str) -> bool:
    try:
        return process.cwd().startswith(directory)
    except psutil.Error:
        return False


@contextlib.contextmanager
def sandbox(*options: str) -> Iterator[Sandbox]:
    """A sandbox in a process of its own."""
    command = [sys.executable, "-m", "sandbox", "--port", "0", *options]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            told: dict[str, Any] = json.loads(process.stdout.readline())
            yield Sandbox(
                told["url"], told["project_ids"], told["token"], psutil.Process(process.pid)
            )
        finally:
            process.terminate()


@contextlib.contextmanager
def process(
    command: Sequence[str], env: Mapping[str, str], *, log: Path
) -> Iterator[psutil.Process]:
    """A process for the time of the block; what it prints goes to a file."""
    with log.open("w") as output:
        started = subprocess.Popen(
            command, env={**os.environ, **env}, stdout=output, stderr=output
        )
        try:
            yield psutil.Process(started.pid)
        finally:
            started.terminate()
            try:
                started.wait(30)
            except subprocess.TimeoutExpired:
                started.kill()


def said(log: Path, words: str) -> None:
    """Wait until a process has written certain words."""
    deadline = time.monotonic() + READY_S
    while words not in log.read_text():
        if time.monotonic() > deadline:
            raise TimeoutError(f"{log} never said {words!r}:\n{log.read_text()[-2_000:]}")
        time.sleep(0.02)


def cpu_s(*processes: psutil.Process) -> float:
    """CPU seconds that processes and their children have used."""
    total = 0.0
    for each in processes:
        for one in [each, *each.children(recursive=True)]:
            times = one.cpu_times()
            total += times.user + times.system
    return total


def peak_mb(*processes: psutil.Process) -> float:
    """The largest resident memory that processes and their children ever had, in MB, summed."""
    total = 0
    for each in processes:
        for one in [each, *each.children(recursive=True)]:
            for line in Path(f"/proc/{one.pid}/status").read_text().splitlines():
                if line.startswith("VmHWM"):
                    total += int(line.split()[1])
    return total / 1024


def machine() -> dict[str, Any]:
    """What the numbers were measured on."""
    model = ""
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                model = line.partition(":")[2].strip()
                break
    return {
        "cpus": os.cpu_count(),
        "model": model,
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.release()}",
    }
