"""How many pools a second are deleted: `python -m benchmarks.throughput`.

Four contenders delete the pools of a sandbox, interleaved in several rounds, at several latencies:

  bare       an aiohttp loop with 100 calls in flight; no Celery, no Redis: the limit
  poolsweep  one worker process with its defaults, but no rate limit
  prefork    one Celery task for each pool, `requests`, results in Redis, one process
  threads    the same in a pool of 100 threads

Every contender of a round and latency has a sandbox of its own, in a process of its own, with
pools enough; what a sandbox could serve is measured first. The table shows medians; CPU is in
milliseconds for each pool, of the contender's processes and of redis-server.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import statistics
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import aiohttp
import psutil
from redis.asyncio import Redis
from rich.console import Console
from rich.table import Table

from benchmarks import naive, stage
from scheduler.dispatch import Order, dispatch
from worker.ledger import JobState, Source
from worker.reconciler import live_workers

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Sequence

    from worker.modelarts import Pool


IN_FLIGHT = 100
POLL_S = 0.02
READY_S = 60.0


@dataclass(frozen=True, slots=True)
class Measured:
    """What one contender came to in one round.

    Attributes:
        pools: how many were deleted.
        seconds: how long that took.
        cpu_s: CPU seconds of the contender's processes meanwhile.
        redis_cpu_s: those of redis-server.
        sandbox_cpu_s: those of the sandbox.
        peak_mb: the most memory that the contender's processes ever had.
    """

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


@dataclass(frozen=True, slots=True)
class Ground:
    """What a contender runs on.

    Attributes:
        redis_url: an empty Redis.
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

    def url(self, pool: Pool) -> str:
        """Where a pool is deleted."""
        return f"{self.cloud.url}/v2/{self.cloud.project_id}/pools/{pool.pool_id}"

    async def measure(
        self, contender: psutil.Process, work: Awaitable[None], pools: int, *, alone: bool = False
    ) -> Measured:
        """Time a piece of work, and the CPU of processes meanwhile.

        Args:
            contender: its process.
            work: what to wait for.
            pools: how many pools it deletes.
            alone: whether the contender's children are not its own.
        """
        parts = [(contender, not alone), (self.redis, True), (self.cloud.process, True)]
        before = [stage.cpu_s(each, children=children) for each, children in parts]
        begun = time.perf_counter()
        await work
        seconds = time.perf_counter() - begun
        used = [
            stage.cpu_s(each, children=children) - then
            for (each, children), then in zip(parts, before, strict=True)
        ]
        peak_mb = stage.peak_mb(contender, children=not alone)
        return Measured(pools, seconds, used[0], used[1], used[2], peak_mb)


async def bare(ground: Ground) -> Measured:
    """As fast as aiohttp goes, with as many calls in flight as poolsweep makes."""
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

    # The sandbox and the servers are children of this process too.
    return await ground.measure(psutil.Process(), work(), len(ground.pools), alone=True)


async def poolsweep(ground: Ground) -> Measured:
    """One worker with its defaults, but no rate limit; from the plan to the last answer."""
    cloud, url = ground.cloud, ground.cloud.url
    plan = stage.plan_of(cloud, cloud.project_id, ground.pools)
    env = stage.worker_env(ground.redis_url, cloud, 0)
    command = [sys.executable, "-m", "scheduler.cli", "worker"]
    async with Redis.from_url(ground.redis_url, decode_responses=True) as redis:
        office = stage.office(redis, ground.redis_url, cloud, 0)
        ledger = office.ledger
        with stage.process(command, env, log=ground.logs / "poolsweep.log") as worker:
            while not await live_workers(redis, url):  # noqa: ASYNC110 - it is in Redis
                await asyncio.sleep(POLL_S)

            async def work() -> None:
                order = Order(url, Source.CLI, "benchmark")
                run = await dispatch([plan], order, ledger=ledger, feed=office.feed(url))
                while True:
                    found = await ledger.run(run.run_id)
                    if not found.counts[JobState.PENDING] + found.counts[JobState.LEASED]:
                        break
                    await asyncio.sleep(POLL_S)
                lost = found.counts[JobState.FAILED] + found.counts[JobState.SKIPPED]
                if lost:
                    raise RuntimeError(f"{lost} of {found.total} jobs were not done")

            return await ground.measure(worker, work(), len(ground.pools))


async def prefork(ground: Ground) -> Measured:
    """One process that works on one task at a time."""
    return await _celery(ground, "--pool", "prefork", "--concurrency", "1")


async def threads(ground: Ground) -> Measured:
    """One process with 100 threads."""
    return await _celery(ground, "--pool", "threads", "--concurrency", "100")


async def _celery(ground: Ground, *options: str) -> Measured:
    url = ground.redis_url.replace("unix://", "redis+socket://")
    app = naive.make_app(url)
    command = [sys.executable, "-m", "celery", "-A", "benchmarks.naive", "worker", *options]
    log = ground.logs / "celery.log"
    with stage.process(command, {"NAIVE_REDIS_URL": url}, log=log) as worker:
        deadline = time.monotonic() + READY_S
        while not app.control.ping(timeout=0.5):
            if time.monotonic() > deadline:
                raise TimeoutError(f"Celery did not start:\n{log.read_text()[-2_000:]}")

        def work() -> None:
            token = ground.cloud.token
            results = [
                app.tasks["naive.delete"].delay(ground.url(pool), token) for pool in ground.pools
            ]
            for result in results:
                result.get(timeout=300, interval=POLL_S)

        return await ground.measure(worker, asyncio.to_thread(work), len(ground.pools))


CONTENDERS: dict[str, Callable[[Ground], Awaitable[Measured]]] = {
    "bare": bare,
    "poolsweep": poolsweep,
    "prefork": prefork,
    "threads": threads,
}


def pools_for(contender: str, latency_ms: float, seconds: float) -> int:
    """How many pools keep a contender busy for about so long."""
    fastest = 1_500 if latency_ms < 60 else 100_000 / latency_ms
    rate = {
        "prefork": min(250, 900 / (latency_ms + 4)),
        "threads": min(400, fastest),
    }.get(contender, fastest)
    return max(50, round(rate * seconds))


async def on_fresh_ground(contender: str, latency_ms: float, pools: int) -> Measured:
    """Run a contender once, against a sandbox and a Redis of its own."""
    options = ["--pools", str(round(pools * stage.SPARE) + 50), "--latency-ms", str(latency_ms)]
    with (
        tempfile.TemporaryDirectory() as logs,
        stage.redis_server() as (redis_url, redis),
        stage.sandbox(*options, "--delete-seconds", "3600") as cloud,
    ):
        chosen = await stage.deletable(cloud, cloud.project_id, pools)
        return await CONTENDERS[contender](Ground(redis_url, redis, cloud, chosen, Path(logs)))


async def most_of_the_sandbox(seconds: float) -> float:
    """Answers a second that a sandbox gives to two processes that only shout at it."""
    with stage.sandbox("--pools", "10") as cloud:
        path = f"/v2/{cloud.project_id}/pools/{'x' * 36}"
        shouters = [
            await asyncio.create_subprocess_exec(
                sys.executable,
                "-m",
                "benchmarks.shout",
                cloud.url,
                path,
                cloud.token,
                str(seconds),
                stdout=asyncio.subprocess.PIPE,
            )
            for _ in range(2)
        ]
        told = await asyncio.gather(*(each.communicate() for each in shouters))
    return sum(float(out) for out, _ in told)


async def run(latencies: Sequence[float], rounds: int, seconds: float) -> dict[str, Any]:
    """Measure everything; returns what the JSON file holds."""
    results: dict[str, dict[str, list[Measured]]] = {}
    console = Console(stderr=True)
    ceiling = await most_of_the_sandbox(3)
    console.print(f"A sandbox could answer {ceiling:.0f} calls a second")
    for number in range(rounds):
        for latency_ms in latencies:
            for contender in CONTENDERS:
                pools = pools_for(contender, latency_ms, seconds)
                measured = await on_fresh_ground(contender, latency_ms, pools)
                by_contender = results.setdefault(f"{latency_ms:g}", {})
                by_contender.setdefault(contender, []).append(measured)
                console.print(
                    f"round {number + 1}, {latency_ms:g} ms, {contender}: {measured.rate:.0f}/s"
                )
    return {
        "machine": stage.machine(),
        "sandbox_ceiling": ceiling,
        "rounds": rounds,
        "latencies": {
            latency: {
                name: [asdict(each) | {"rate": each.rate} for each in measured]
                for name, measured in by_contender.items()
            }
            for latency, by_contender in results.items()
        },
    }


def show(latencies: dict[str, dict[str, list[dict[str, float]]]]) -> None:
    """Print the table of medians."""
    table = Table("latency", "contender", "pools/s", "of bare", "CPU ms", "Redis ms", "peak MB")
    for latency, by_contender in latencies.items():
        limit = _median(by_contender["bare"], "rate")
        for name, rows in by_contender.items():
            rate = _median(rows, "rate")
            table.add_row(
                f"{latency} ms",
                name,
                f"{rate:.0f}",
                f"{rate / limit:.2f}",
                *(f"{1000 * _median(rows, part) / _median(rows, 'pools'):.2f}" for part in _CPU),
                f"{_median(rows, 'peak_mb'):.0f}",
            )
    Console(width=100).print(table)


_CPU = ("cpu_s", "redis_cpu_s")


def _median(rows: Sequence[dict[str, float]], name: str) -> float:
    return statistics.median(row[name] for row in rows)


def main() -> None:
    """Run the contenders, print the table and write the JSON."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--latencies", type=float, nargs="+", default=[0, 50, 200])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=6, help="of each measurement, about")
    parser.add_argument("--json", type=Path, default=Path("throughput.json"))
    given = parser.parse_args()
    document = asyncio.run(run(given.latencies, given.rounds, given.seconds))
    given.json.write_text(json.dumps(document, indent=1) + "\n")
    show(document["latencies"])


if __name__ == "__main__":
    main()
