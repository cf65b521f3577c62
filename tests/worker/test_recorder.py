"""Group commit: many moves in few calls, and each caller hears of its own."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

import pytest
from pydantic import SecretStr
from redis.exceptions import RedisError

from tests.worker.conftest import Runs
from worker.ledger import Attempt, JobState, Move, NewJob, keys
from worker.recorder import MOST, Recorder
from worker.redis_connection import connect
from worker.settings import Settings

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from redis.asyncio import Redis

    from tests.worker.conftest import RedisServer


@pytest.fixture
async def runs(server: RedisServer) -> AsyncIterator[Runs]:
    """Runs over the connection that workers have."""
    settings = Settings(redis_url=SecretStr(server.url), endpoint="https://modelarts.example.com")
    redis = connect(settings)
    yield Runs(redis, settings)
    await redis.aclose()


async def leased(runs: Runs, count: int) -> str:
    jobs = [NewJob("project", f"pool-{number}") for number in range(count)]
    run_id = await runs.make(jobs, feed=False)
    assert len(await runs.ledger.claim(run_id, range(count), owner="me", lease_s=60)) == count
    return run_id


def end(number: int, owner: str = "me", reason: str = "because") -> Move:
    return Move(number, JobState.LEASED, JobState.FAILED, owner=owner, reason=reason)


async def calls(redis: Redis) -> int:
    stats = await redis.info("commandstats")
    return int(stats["cmdstat_evalsha"]["calls"])


async def test_moves_that_come_together_share_a_call(runs: Runs) -> None:
    count = 2 * MOST + 50
    run_id, recorder = await leased(runs, count), Recorder(runs.ledger)
    await recorder.record(run_id, end(0))  # from now on the server knows the script
    before = await calls(runs.redis)
    made = await asyncio.gather(*(recorder.record(run_id, end(n)) for n in range(1, count)))
    assert made == [True] * (count - 1)
    assert await calls(runs.redis) - before <= 4
    assert (await runs.ledger.run(run_id)).ended


async def test_each_caller_hears_whether_its_own_move_was_made(runs: Runs) -> None:
    run_id, recorder = await leased(runs, 9), Recorder(runs.ledger)
    owners = ["me" if number % 3 else "another" for number in range(9)]
    made = await asyncio.gather(
        *(recorder.record(run_id, end(number, owner)) for number, owner in enumerate(owners))
    )
    assert made == [owner == "me" for owner in owners]


async def test_the_moves_of_a_job_are_made_in_order(runs: Runs) -> None:
    run_id, recorder = await leased(runs, 1), Recorder(runs.ledger)
    notes = [
        Move(0, JobState.LEASED, JobState.LEASED, "me", Attempt(at_ms, 1, 503, "", ""), "again")
        for at_ms in range(1, 6)
    ]
    moves = [*notes, end(0), notes[0]]
    made = await asyncio.gather(*(recorder.record(run_id, move) for move in moves))
    assert made == [True] * 6 + [False]
    (job,) = await runs.jobs(run_id)
    assert [attempt.at_ms for attempt in job.attempts] == [1, 2, 3, 4, 5]


async def test_a_caller_that_is_cancelled_takes_no_others_move_with_it(runs: Runs) -> None:
    run_id, recorder = await leased(runs, 3), Recorder(runs.ledger)
    callers = [asyncio.create_task(recorder.record(run_id, end(number))) for number in range(3)]
    await asyncio.sleep(0)
    callers[1].cancel()
    results = await asyncio.gather(*callers, return_exceptions=True)
    assert results[0] is results[2] is True
    assert isinstance(results[1], asyncio.CancelledError)
    # Its own was under way already.
    assert (await runs.ended(run_id)).counts[JobState.FAILED] == 3


async def test_runs_do_not_mix(runs: Runs) -> None:
    first, second, recorder = await leased(runs, 2), await leased(runs, 2), Recorder(runs.ledger)
    await asyncio.gather(
        recorder.record(first, end(0)), recorder.record(second, end(1, reason="other"))
    )
    assert [job.state for job in await runs.jobs(first)] == [JobState.FAILED, JobState.LEASED]
    assert [job.reason for job in await runs.jobs(second)] == ["", "other"]


async def test_all_callers_hear_of_trouble_and_later_moves_are_made(runs: Runs) -> None:
    run_id, recorder = await leased(runs, 4), Recorder(runs.ledger)
    key = keys.run(run_id)
    await runs.redis.rename(key, f"{key}:aside")
    await runs.redis.set(key, "not a run")
    results = await asyncio.gather(
        *(recorder.record(run_id, end(number)) for number in range(3)), return_exceptions=True
    )
    await runs.redis.rename(f"{key}:aside", key)
    assert all(isinstance(result, RedisError) for result in results)
    assert await asyncio.gather(*(recorder.record(run_id, end(n)) for n in range(4))) == [True] * 4


async def test_text_that_no_encoding_takes_spoils_nobody_elses_move(runs: Runs) -> None:
    run_id, recorder = await leased(runs, 3), Recorder(runs.ledger)
    reasons = ["fine", "half a \ud800 character", "fine «too»"]
    made = await asyncio.gather(
        *(recorder.record(run_id, end(n, reason=text)) for n, text in enumerate(reasons))
    )
    assert made == [True] * 3
    assert [job.reason for job in await runs.jobs(run_id)] == [
        "fine",
        "half a ? character",
        "fine «too»",
    ]
