"""What the benchmarks run on: a Redis, a sandbox and processes of their own, all on loopback."""

from __future__ import annotations

import contextlib
import json
import os
import platform
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psutil

from worker import embedded_redis

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence


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
    with (
        tempfile.TemporaryDirectory(prefix="poolsweep-bench-") as directory,
        embedded_redis.join(Path(directory)) as server,
    ):
        found = [
            process
            for process in psutil.process_iter()
            if "redis-server" in process.name() and _lives_in(process, directory)
        ]
        yield server.url, found[0]


def _lives_in(process: psutil.Process, directory: str) -> bool:
    try:
        return Path(process.cwd()).is_relative_to(directory)
    except psutil.Error:
        return False


@contextlib.contextmanager
def sandbox(*options: str) -> Iterator[Sandbox]:
    """A sandbox in a process of its own."""
    command = [sys.executable, "-m", "sandbox", "--port", "0", *options]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        try:
            line = process.stdout.readline() if process.stdout else ""
            told: dict[str, Any] = json.loads(line)
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
        started = subprocess.Popen(command, env={**os.environ, **env}, stdout=output, stderr=output)
        try:
            yield psutil.Process(started.pid)
        finally:
            started.terminate()
            try:
                started.wait(30)
            except subprocess.TimeoutExpired:
                started.kill()


def cpu_s(process: psutil.Process, *, children: bool = True) -> float:
    """CPU seconds that a process, and perhaps its children, have used."""
    total = 0.0
    for each in _family(process, children):
        times = each.cpu_times()
        total += times.user + times.system
    return total


def peak_mb(process: psutil.Process, *, children: bool = True) -> float:
    """The most resident memory that a process, and each of its children, ever had, in MB."""
    total = 0
    for each in _family(process, children):
        for line in Path(f"/proc/{each.pid}/status").read_text().splitlines():
            if line.startswith("VmHWM"):
                total += int(line.split()[1])
    return total / 1024


def _family(process: psutil.Process, children: bool) -> list[psutil.Process]:
    return [process, *(process.children(recursive=True) if children else ())]


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
