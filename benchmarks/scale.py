"""What runs cost as they grow: `python -m benchmarks.scale`.

Puts runs of 1,000 to 1,000,000 jobs into a redis-server of its own through the ledger, with ids,
reasons and attempts as long as real ones, finishes them in batches as workers do, and reads them
as a reviewer does:

  enqueue   microseconds and Redis' memory for each job until the run has started
  finish    microseconds and Redis' memory for each job from its claim to `deleted`
  page      microseconds for each job to page through all results
  summary   milliseconds to show the run and its counts

Prints a table and writes JSON. A million jobs take some minutes and 0.6 GB of memory.
"""

from __future__ import annotations

import argparse
import asyncio
import hashlib
import json
import statistics
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from redis.asyncio import Redis
from rich.console import Console
from rich.table import Table

from benchmarks import stage
from worker.garbage import collect_seldom
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

if TYPE_CHECKING:
    from collections.abc import Sequence

PROJECT = "0123456789abcdef0123456789abcdef"
CHUNK = 500
LOOKS = 50


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


async def _enqueue(ledger: Ledger, run_id: str, jobs: int) -> None:
    await ledger.create(NewRun(run_id, Source.SCHEDULE, "https://modelarts.example.com"))
    await ledger.add(run_id, (_job(number) for number in range(jobs)))
    await ledger.start(run_id, jobs)


async def _finish(ledger: Ledger, run_id: str, jobs: int) -> None:
    for start in range(0, jobs, CHUNK):
        numbers = range(start, min(start + CHUNK, jobs))
        await ledger.claim(run_id, numbers, owner="benchmark", lease_s=600)
        called = [
            Attempt(time.time_ns() // 1_000_000, 87, 200, "", hashlib.md5(bytes(n)).hexdigest())  # noqa: S324
            for n in range(len(numbers))
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
    run = await ledger.run(run_id)
    if not run.ended:
        raise RuntimeError(f"{run.done} of {jobs} jobs have ended")


async def _page(ledger: Ledger, run_id: str, jobs: int) -> None:
    seen = 0
    async for _ in ledger.all_jobs(run_id, outcome=JobState.DELETED):
        seen += 1
    if seen != jobs:
        raise RuntimeError(f"{seen} of {jobs} jobs were seen")


async def measure(url: str, jobs: int) -> dict[str, float]:
    """One run of so many jobs: what each step costs, for each job."""
    row: dict[str, float] = {"jobs": jobs}
    async with Redis.from_url(url, decode_responses=True) as redis:
        await redis.flushall()
        ledger, run_id = Ledger(redis), new_run_id(datetime.now(UTC))

        async def memory() -> int:
            return int((await redis.info("memory"))["used_memory"])

        before = await memory()
        for name, step in (("enqueue", _enqueue), ("finish", _finish), ("page", _page)):
            begun = time.perf_counter()
            await step(ledger, run_id, jobs)
            row[f"{name}_us"] = 1e6 * (time.perf_counter() - begun) / jobs
            row[f"{name}_bytes"] = (await memory() - before) / jobs
        looks = []
        for _ in range(LOOKS):
            begun = time.perf_counter()
            await ledger.run(run_id)
            looks.append(1000 * (time.perf_counter() - begun))
        row["summary_ms"] = statistics.median(looks)
    return row


async def run(sizes: Sequence[int]) -> dict[str, Any]:
    """Measure every size; returns what the JSON file holds."""
    rows = []
    for jobs in sizes:
        with stage.redis_server() as (url, _):
            rows.append(await measure(url, jobs))
    return {"machine": stage.machine(), "rows": rows}


def show(rows: Sequence[dict[str, float]]) -> None:
    """Print the table."""
    table = Table("jobs", "enqueue", "", "finish", "", "page", "summary")
    for row in rows:
        table.add_row(
            f"{row['jobs']:,}",
            f"{row['enqueue_us']:.0f} µs",
            f"{row['enqueue_bytes']:.0f} B",
            f"{row['finish_us']:.0f} µs",
            f"{row['finish_bytes']:.0f} B",
            f"{row['page_us']:.1f} µs",
            f"{row['summary_ms']:.2f} ms",
        )
    Console(width=100).print(table)


def main() -> None:
    """Measure, print the table and write the JSON."""
    collect_seldom()  # as the command and the worker do
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("jobs", type=int, nargs="*", default=[1_000, 10_000, 100_000, 1_000_000])
    parser.add_argument("--json", type=Path, default=Path("scale.json"))
    given = parser.parse_args()
    document = asyncio.run(run(given.jobs))
    given.json.write_text(json.dumps(document, indent=1) + "\n")
    show(document["rows"])


if __name__ == "__main__":
    main()
