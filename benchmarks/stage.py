"""What the benchmarks run on: a Redis, a sandbox and processes of their own, all on loopback."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import platform
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import aiohttp
import psutil
import structlog
from pydantic import SecretStr

from scheduler.planner import Plan
from scheduler.selection import Decision
from scheduler.sweep import Office
from worker import embedded_redis
from worker.ledger import Ledger
from worker.modelarts import Pool
from worker.projects import Directory
from worker.settings import Settings

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from redis.asyncio import Redis


# A line for each of thousands of decisions would bury what is measured.
structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(logging.WARNING))

SPARE = 2.2
"""So many pools are made for each that is to be deleted: some are prepaid, protected and so on."""
PLAIN = {"expired", "tagged"}
"""Categories of the sandbox whose pools are deleted when that is asked for."""


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


def worker_env(redis_url: str, cloud: Sandbox, rate_limit: float) -> dict[str, str]:
    """The settings of a worker, as variables: the defaults, but for the rate.

    Args:
        redis_url: the Redis.
        cloud: the sandbox.
        rate_limit: calls a second to one project; 0: no limit.
    """
    return {
        "POOLSWEEP_REDIS_URL": redis_url,
        "POOLSWEEP_ENDPOINT": cloud.url,
        "POOLSWEEP_TOKEN": cloud.token,
        "POOLSWEEP_RATE_LIMIT": f"{rate_limit:g}",
    }


def office(redis: Redis, redis_url: str, cloud: Sandbox, rate_limit: float) -> Office:
    """What makes runs against a sandbox.

    Args:
        redis: a connection that decodes responses.
        redis_url: its server.
        cloud: the sandbox.
        rate_limit: calls a second to one project, as the workers have it; 0: no limit.
    """
    settings = Settings(
        redis_url=SecretStr(redis_url),
        endpoint=cloud.url,
        token=SecretStr(cloud.token),
        rate_limit=rate_limit,
    )
    return Office(Directory(settings, {}), redis, Ledger(redis))


async def deletable(cloud: Sandbox, project_id: str, count: int) -> list[Pool]:
    """So many pools of a project that are deleted when that is asked for."""
    async with aiohttp.ClientSession() as session:
        async with session.get(f"{cloud.url}/_sandbox/state") as answer:
            state = await answer.json()
        url, headers = f"{cloud.url}/v2/{project_id}/pools", {"X-Auth-Token": cloud.token}
        async with session.get(url, headers=headers) as answer:
            listed = map(Pool.parse, (await answer.json(content_type=None))["items"])
    found = [pool for pool in listed if state[pool.pool_id]["category"] in PLAIN]
    if len(found) < count:
        raise RuntimeError(f"the sandbox has {len(found)} pools that may go, of {count} wanted")
    return found[:count]


def plan_of(cloud: Sandbox, project_id: str, pools: Sequence[Pool]) -> Plan:
    """A plan that deletes pools."""
    decisions = [Decision(pool, True, "measured") for pool in pools]
    return Plan(project_id, cloud.url, decisions, datetime.now(UTC), len(decisions))


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
