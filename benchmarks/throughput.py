"""How many pools a second are deleted: `python -m benchmarks.throughput`.

Four contenders delete the pools of a sandbox, interleaved in several rounds, at several latencies:

  bare      an aiohttp loop with 100 calls in flight; no Celery, no Redis: the limit
  poolsweep one worker process with its defaults, but no rate limit
  prefork   one Celery task for each pool, `requests`, one process
  threads   the same in a pool of 100 threads

Prints a table of medians and writes JSON. The sandbox is a process of its own; what it could serve
is measured first.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import statistics
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import aiohttp
from pydantic import SecretStr
from redis.asyncio import Redis
from rich.console import Console
from rich.table import Table

from benchmarks import stage
from scheduler.dispatch import Order, dispatch
from scheduler.planner import Plan
from scheduler.selection import Decision
from scheduler.sweep import Office
from worker.ledger import JobState, Ledger, Source
from worker.projects import Directory
from worker.settings import Settings

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Sequence

    import psutil

IN_FLIGHT = 100
POLL_S = 0.02


@dataclass(frozen=True, slots=True)
class Measured:
    """What one contender came to in one round.

    Attributes:
        contender, latency_ms, round_: which.
        pools: how many were deleted.
        seconds: how long that took.
        cpu_s: CPU seconds of the contender's processes meanwhile.
        redis_cpu_s: those of redis-server.
        sandbox_cpu_s: those of the sandbox.
        peak_mb: the most memory that the contender's processes ever had.
    """

    contender: str
    latency_ms: float
    round_: int
    pools: int
    seconds: float
    cpu_s: float
    redis_cpu_s: float
    sandbox_cpu_s: float
    peak_mb: float

    @property
    def rate(self) -> float:
        """Pools a second."""
        return self.pools / self.seconds


class Meter:
    """Times a piece of work, and the CPU of processes meanwhile."""

    def __init__(
        self,
        contender: Sequence[psutil.Process],
        redis: psutil.Process,
        sandbox: psutil.Process,
    ) -> None:
        self._parts = (contender, [redis], [sandbox])

    async def __call__(self, work: Awaitable[None], **about: Any) -> Measured:
        before = [stage.cpu_s(*part) for part in self._parts]
        begun = time.perf_counter()
        await work
        seconds = time.perf_counter() - begun
        used = [
            stage.cpu_s(*part) - then for part, then in zip(self._parts, before, strict=True)
        ]
        return Measured(
            seconds=seconds,
            cpu_s=used[0],
            redis_cpu_s=used[1],
            sandbox_cpu_s=used[2],
            peak_mb=stage.peak_mb(*self._parts[0]),
            **about,
        )


@dataclass(frozen=True, slots=True)
class Ground:
    """What a round runs on.

    Attributes:
        redis_url: a Redis.
        redis: its process.
        cloud: a sandbox.
        pools: its pools that may be deleted.
        logs: where processes write.
    """

    redis_url: str
    redis: psutil.Process
    cloud: stage.Sandbox
    pools: Sequence[Pool]
    logs: Path

    def meter(self, *contender: psutil.Process) -> Meter:
        """What measures a contender's processes."""
        return Meter(contender, self.redis, self.cloud.process)

    def url(self, pool: Pool) -> str:
        """Where a pool is deleted."""
        return f"{self.cloud.url}/v2/{self.cloud.project_id}/pools/{pool.pool_id}"


Contender = Callable[[Ground], "Awaitable[Measured]"]


async def bare(ground: Ground) -> Measured:
    """As fast as aiohttp goes, with as many calls in flight as poolsweep makes."""
    me = psutil.Process()
    waiting = iter(ground.pools)
    headers = {"X-Auth-Token": ground.cloud.token}

    async def work() -> None:
        connector = aiohttp.TCPConnector(limit=IN_FLIGHT)
        async with aiohttp.ClientSession(connector=connector, headers=headers) as session:

            async def go_on() -> None:
                for pool in waiting:
                    async with session.delete(ground.url(pool)) as answer:
                        await answer.read()

            await asyncio.gather(*(go_on() for _ in range(IN_FLIGHT)))

    # Its helpers, such as the sandbox, are children of this process too.
    return await ground.meter()(work(), own=me, pools=len(ground.pools))


async def poolsweep(ground: Ground) -> Measured:
    """One worker with its defaults, but no rate limit; from the plan to the last answer."""
    settings = Settings(
        redis_url=SecretStr(ground.redis_url),
        endpoint=ground.cloud.url,
        token=SecretStr(ground.cloud.token),
        rate_limit=0,
    )
    env = {
        "POOLSWEEP_REDIS_URL": ground.redis_url,
        "POOLSWEEP_ENDPOINT": ground.cloud.url,
        "POOLSWEEP_TOKEN": ground.cloud.token,
        "POOLSWEEP_RATE_LIMIT": "0",
    }
    decisions = [Decision(pool, True, "measured") for pool in ground.pools]
    project, url = ground.cloud.project_id, ground.cloud.url
    plan = Plan(project, url, decisions, datetime.now(UTC), len(decisions))
    command = [sys.executable, "-m", "scheduler.cli", "worker"]
    async with Redis.from_url(ground.redis_url, decode_responses=True) as redis:
        ledger = Ledger(redis)
        office = Office(Directory(settings, {}), redis, ledger)
        with stage.process(command, env, log=ground.logs / "poolsweep.log") as worker:
            while not await live_workers(redis, url):
                await asyncio.sleep(POLL_S)

            async def work() -> None:
                order = Order(url, Source.CLI, "benchmark")
                run = await dispatch([plan], order, ledger=ledger, feed=office.feed(url))
                while True:
                    found = await ledger.run(run.run_id)
                    if not found.counts[JobState.PENDING] + found.counts[JobState.LEASED]:
                        break
                    await asyncio.sleep(POLL_S)
                failed = found.counts[JobState.FAILED] + found.counts[JobState.SKIPPED]
                assert not failed, f"{failed} of {found.total} jobs failed"

            return await ground.meter(worker)(work(), pools=len(decisions))


async def _celery(ground: Ground, *options: str, pools: int) -> Measured:
    chosen = ground.pools[:pools]
    naive.app.conf.update(broker_url=ground.redis_url, result_backend=ground.redis_url)
    command = [sys.executable, "-m", "celery", "-A", "benchmarks.naive", "worker", *options]
    env = {"NAIVE_REDIS_URL": ground.redis_url}
    log = ground.logs / "celery.log"
    with stage.process(command, env, log=log) as worker:
        stage.said(log, "ready.")

        def work() -> None:
            results = [
                naive.delete.delay(ground.url(pool), ground.cloud.token) for pool in chosen
            ]
            for result in results:
                assert result.get(timeout=120, interval=0.01) in {200, 202}

        return await ground.meter(worker)(asyncio.to_thread(work), pools=len(chosen))
