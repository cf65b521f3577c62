"""How well workers keep to a quota: `python -m benchmarks.quota`.

The sandbox enforces a quota with 429, and workers are told the same rate:

  use       the share of the quota that is used in steady state, and of calls answered 429, with
            several quotas and numbers of worker processes
  cut       the sandbox halves its quota midway: how long until the workers are within 5 % of it
  fairness  two projects share the workers, each with its own quota: Jain's index over what they
            got, and what one gets while the other is throttled hard

Prints a table and writes JSON. Every call counts, the reads too. A cell takes 20 to 40 seconds.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import math
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import aiohttp
from redis.asyncio import Redis
from rich.console import Console
from rich.table import Table

from benchmarks import stage
from scheduler.dispatch import Order, dispatch
from worker.ledger import Source
from worker.reconciler import live_workers

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Mapping, Sequence

POLL_S = 0.05
WARM_UP_S = 3.0
THROTTLED = 429


@dataclass(frozen=True, slots=True)
class Call:
    """A call as the sandbox saw it: when, in seconds of its clock, to which project, its answer."""

    at: float
    project_id: str
    status: int


@dataclass(frozen=True, slots=True)
class Scene:
    """Workers at work against a sandbox with a quota."""

    cloud: stage.Sandbox

    async def steer(self, **faults: float) -> None:
        """Change the sandbox's quota and the like."""
        async with aiohttp.ClientSession() as session:
            await session.post(f"{self.cloud.url}/_sandbox/faults", json=faults)

    async def calls(self) -> list[Call]:
        """All calls so far."""
        url = f"{self.cloud.url}/_sandbox/calls"
        async with aiohttp.ClientSession() as session, session.get(url) as answer:
            found = await answer.json()
        return [
            Call(at, path.split("/")[2], status)
            for at, _, path, _, status in found
            if path.startswith("/v2/") and status
        ]


@contextlib.asynccontextmanager
async def working(
    quota: float, workers: int, pools: Mapping[int, int], *, burst: int = 0
) -> AsyncIterator[Scene]:
    """Workers that delete pools under a quota, from when the first call was made.

    Args:
        quota: calls a second and project, of the sandbox and of the workers.
        workers: how many processes.
        pools: how many pools are to be deleted, by the number of their project.
        burst: calls above the quota that the sandbox lets pass in a second.
    """
    projects = len(pools)
    made = str(round(max(pools.values()) * projects * stage.SPARE) + 200)
    options = ["--pools", made, "--projects", str(projects), "--delete-seconds", "3600"]
    command = [sys.executable, "-m", "scheduler.cli", "worker"]
    with contextlib.ExitStack() as stack:
        logs = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        redis_url, _ = stack.enter_context(stage.redis_server())
        cloud = stack.enter_context(stage.sandbox(*options))
        plans = [
            stage.plan_of(
                cloud, project_id, await stage.deletable(cloud, project_id, pools[number])
            )
            for number, project_id in enumerate(cloud.project_ids[:projects])
        ]
        scene = Scene(cloud)
        await scene.steer(quota=quota, quota_burst=burst)
        seen = len(await scene.calls())
        env = stage.worker_env(redis_url, cloud, quota)
        for number in range(workers):
            log = logs / f"worker-{number}.log"
            stack.enter_context(stage.process(command, env, log=log))
        async with Redis.from_url(redis_url, decode_responses=True) as redis:
            while await live_workers(redis, cloud.url) < workers:  # noqa: ASYNC110
                await asyncio.sleep(POLL_S)
            office = stage.office(redis, redis_url, cloud, quota)
            order = Order(cloud.url, Source.CLI, "benchmark", verify=False)
            feed = office.feed(cloud.url)
            for plan in plans:
                await dispatch([plan], order, ledger=office.ledger, feed=feed)
            while len(await scene.calls()) <= seen:  # noqa: ASYNC110 - it is in the sandbox
                await asyncio.sleep(POLL_S)
            yield scene


def rate(calls: Sequence[Call], since: float, until: float) -> float:
    """Calls a second that were not answered 429."""
    passed = [call for call in calls if since <= call.at < until and call.status != THROTTLED]
    return len(passed) / (until - since)


async def use(quota: float, workers: int, seconds: float) -> dict[str, float]:
    """The share of a quota that is used, and of calls that are answered 429."""
    pools = math.ceil(quota * (seconds + WARM_UP_S) * 1.3) + 20
    async with working(quota, workers, {0: pools}) as scene:
        await asyncio.sleep(WARM_UP_S + seconds)
        calls = await scene.calls()
    end = max(call.at for call in calls)
    window = [call for call in calls if call.at >= end - seconds]
    refused = sum(call.status == THROTTLED for call in window)
    return {
        "used": rate(calls, end - seconds, end) / quota,
        "refused": refused / len(window),
    }


async def cut(quota: float, workers: int) -> dict[str, float]:
    """Seconds after a halving of the quota until ten seconds' calls are within 5 % of the new one.

    And the share of the new quota that is used from ten seconds after it on, and of the calls that
    are answered 429: from time to time more is tried, since nobody tells when the quota comes back.
    """
    before_s, after_s, window_s = 6.0, 30.0, 10.0
    pools = math.ceil(quota * (before_s + after_s)) + 20
    async with working(quota, workers, {0: pools}) as scene:
        await asyncio.sleep(before_s)
        halved = max(call.at for call in await scene.calls())
        await scene.steer(quota=quota / 2)
        await asyncio.sleep(after_s)
        calls = await scene.calls()
    at, settled, end = halved, math.inf, max(call.at for call in calls)
    while math.isinf(settled) and at + window_s <= end:
        if abs(rate(calls, at, at + window_s) / (quota / 2) - 1) <= 0.05:
            settled = at - halved
        at += 0.5
    late = [call for call in calls if call.at > halved + 10]
    refused = sum(call.status == THROTTLED for call in late)
    return {
        "settled_s": settled,
        "used_after_10_s": rate(calls, halved + 10, end) / (quota / 2),
        "refused_after_10_s": refused / max(1, len(late)),
    }


async def fairness(quota: float, workers: int, seconds: float) -> dict[str, float]:
    """How evenly two projects that share the workers are served."""
    pools = math.ceil(quota * (seconds + WARM_UP_S) * 1.3) + 20
    async with working(quota, workers, {0: pools, 1: pools}) as scene:
        await asyncio.sleep(WARM_UP_S + seconds)
        calls = await scene.calls()
    end = max(call.at for call in calls)
    got = [
        rate([call for call in calls if call.project_id == project_id], end - seconds, end)
        for project_id in scene.cloud.project_ids[:2]
    ]
    return {
        "jain": sum(got) ** 2 / (len(got) * sum(each**2 for each in got)),
        "least_used": min(got) / quota,
    }


async def run(quotas: Sequence[float], workers: Sequence[int], seconds: float) -> dict[str, Any]:
    """Measure everything; returns what the JSON file holds."""
    rows: list[dict[str, Any]] = []
    console = Console(stderr=True)
    for quota in quotas:
        for count in workers:
            row = {"quota": quota, "workers": count}
            row |= await use(quota, count, seconds)
            row |= await cut(quota, count)
            row |= await fairness(quota, count, seconds)
            console.print(row)
            rows.append(row)
    return {"machine": stage.machine(), "rows": rows}


def show(rows: Sequence[Mapping[str, float]]) -> None:
    """Print the table."""
    table = Table("quota", "workers", "used", "429", "settled after", "Jain", "least used")
    for row in rows:
        table.add_row(
            f"{row['quota']:g}/s",
            f"{row['workers']}",
            f"{row['used']:.1%}",
            f"{row['refused']:.2%}",
            f"{row['settled_s']:.1f} s",
            f"{row['jain']:.3f}",
            f"{row['least_used']:.1%}",
        )
    Console(width=100).print(table)


def main() -> None:
    """Measure, print the table and write the JSON."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quotas", type=float, nargs="+", default=[5, 20, 100])
    parser.add_argument("--workers", type=int, nargs="+", default=[1, 2, 4])
    parser.add_argument("--seconds", type=float, default=20, help="of each measurement")
    parser.add_argument("--json", type=Path, default=Path("quota.json"))
    given = parser.parse_args()
    document = asyncio.run(run(given.quotas, given.workers, given.seconds))
    given.json.write_text(json.dumps(document, indent=1) + "\n")
    show(document["rows"])


if __name__ == "__main__":
    main()
