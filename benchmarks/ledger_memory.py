"""What a finished job costs in Redis' memory: `python -m benchmarks.ledger_memory`.

Starts a redis-server of its own, puts runs of finished jobs into it through the ledger, with ids,
reasons and attempts as long as real ones, and prints what the server says that it uses.
"""

from __future__ import annotations

import argparse
import asyncio
import hashlib
import tempfile
import time
from datetime import UTC, datetime
from pathlib import Path

from redis.asyncio import Redis

from worker import embedded_redis
from worker.ledger import (
    Attempt,
    JobState,
    Ledger,
    Move,
    NewJob,
    NewRun,
    Source,
    new_run_id,
)

PROJECT = "0123456789abcdef0123456789abcdef"
CHUNK = 500


def _job(number: int) -> NewJob:
    identity = hashlib.sha256(str(number).encode()).hexdigest()
    return NewJob(
        project_id=PROJECT,
        pool_name=f"train-atlas-{number % 100}-{identity[:32]}",
        display_name=f"train-atlas-{number % 100}",
        created="2026-09-16T03:10:40Z",
        fingerprint="-".join(identity[start : start + 8] for start in (0, 8, 16, 24)),
        chosen="expired: expires-at=2026-10-01T00:00:00Z",
    )


async def _fill(ledger: Ledger, jobs: int) -> None:
    run_id = new_run_id(datetime.now(UTC))
    await ledger.create(NewRun(run_id, Source.SCHEDULE, "https://modelarts.example.com"))
    await ledger.add(run_id, (_job(number) for number in range(jobs)))
    await ledger.start(run_id, jobs)
    for start in range(0, jobs, CHUNK):
        numbers = range(start, min(start + CHUNK, jobs))
        await ledger.claim(run_id, numbers, owner="benchmark", lease_s=600)
        called = [
            Attempt(time.time_ns() // 1_000_000, 87, 200, "", hashlib.md5(bytes(n)).hexdigest())  # noqa: S324
            for n in numbers
        ]
        accepted = [
            Move(n, JobState.LEASED, JobState.ACCEPTED, "benchmark", attempt, "accepted")
            for n, attempt in zip(numbers, called, strict=True)
        ]
        await ledger.record(run_id, accepted)
        gone = [
            Move(n, JobState.ACCEPTED, JobState.DELETED, reason="the pool is gone") for n in numbers
        ]
        await ledger.record(run_id, gone)
    assert (await ledger.run(run_id)).ended  # noqa: S101


async def _measure(url: str, sizes: list[int]) -> None:
    redis = Redis.from_url(url, decode_responses=True)
    ledger = Ledger(redis)
    print(f"{'jobs':>9}  {'bytes a job':>11}  {'jobs/s':>8}")  # noqa: T201
    for jobs in sizes:
        await redis.flushall()
        before = int((await redis.info("memory"))["used_memory"])
        started = time.perf_counter()
        await _fill(ledger, jobs)
        seconds = time.perf_counter() - started
        used = int((await redis.info("memory"))["used_memory"]) - before
        print(f"{jobs:>9,}  {used / jobs:>11.0f}  {jobs / seconds:>8,.0f}")  # noqa: T201
    await redis.aclose()


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("jobs", type=int, nargs="*", default=[1_000, 10_000, 100_000])
    sizes = parser.parse_args().jobs
    with (
        tempfile.TemporaryDirectory() as directory,
        embedded_redis.join(Path(directory)) as server,
    ):
        asyncio.run(_measure(server.url, sizes))


if __name__ == "__main__":
    main()
