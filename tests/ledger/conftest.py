"""The ledger under test, over a Redis alone and one in cluster mode."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import TYPE_CHECKING, TypedDict, Unpack

import pytest
from redis.asyncio import Redis

from worker.ledger import JobState, Ledger, NewJob, NewRun, Source, keys, new_run_id

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

PROJECT = "0123456789abcdef0123456789abcdef"
ENDPOINT = "https://modelarts.example.com"


@pytest.fixture(params=["redis_url", "cluster_url"])
async def redis(request: pytest.FixtureRequest) -> AsyncIterator[Redis]:
    url = request.getfixturevalue(request.param)
    # As `connect` has it.
    client = Redis.from_url(url, decode_responses=True, encoding_errors="replace")
    await client.flushdb()
    yield client
    await client.aclose()


@pytest.fixture
def ledger(redis: Redis) -> Ledger:
    return Ledger(redis, retention_days=2)


class Terms(TypedDict, total=False):
    verify: bool
    max_failures: int | None
    max_failure_percent: float | None


def new(run_id: str | None = None, **terms: Unpack[Terms]) -> NewRun:
    return NewRun(run_id or new_run_id(datetime.now(UTC)), Source.CLI, ENDPOINT, **terms)


def jobs(count: int) -> list[NewJob]:
    return [NewJob(PROJECT, f"pool-{i}", f"Pool {i} ü", chosen="asked for") for i in range(count)]


async def begun(ledger: Ledger, count: int, *, maker: str = "", **terms: Unpack[Terms]) -> str:
    """A run in the making."""
    run = new(**terms)
    assert await ledger.create(run, maker=maker)
    assert await ledger.add(run.run_id, jobs(count), maker=maker) == count
    return run.run_id


async def running(ledger: Ledger, count: int, *, maker: str = "", **terms: Unpack[Terms]) -> str:
    """A run that has started, and of which nothing was sent yet."""
    run_id = await begun(ledger, count, maker=maker, **terms)
    assert await ledger.start(run_id, count, maker=maker)
    return run_id


async def check(ledger: Ledger, run_id: str) -> None:
    """The counts are those of the jobs, and each job is in one index."""
    run, everything = await ledger.run(run_id), await ledger.jobs(run_id)
    assert len(everything) == run.total == sum(run.counts.values())
    for state in JobState:
        numbers = [job.number for job in everything if job.state is state]
        assert run.counts[state] == len(numbers)
        listed = await ledger.jobs(run_id, outcome=state)
        assert sorted(job.number for job in listed) == numbers


async def damage(redis: Redis, run_id: str, number: int, record: str | bytes | None) -> None:
    """Put something else where a job's record was; None: nothing."""
    key, field = keys.jobs(run_id), str(number)
    # Either says whether there was a record.
    done = redis.hdel(key, field) if record is None else redis.hset(key, field, record)
    assert await done == (record is None)
