"""What stops a run midway or before its start, against a real Redis, alone and in cluster mode."""

from __future__ import annotations

import asyncio
from datetime import UTC, datetime
from typing import TYPE_CHECKING, TypedDict, Unpack

import pytest

from tests.conftest import until
from tests.ledger.conftest import check
from worker.ledger import (
    Attempt,
    JobState,
    Kept,
    Ledger,
    Move,
    NewJob,
    NewRun,
    RunNotFoundError,
    RunState,
    Source,
    keys,
    new_run_id,
)

if TYPE_CHECKING:
    from collections.abc import Iterable

    from redis.asyncio import Redis

    from worker.ledger import Run

PROJECT = "0123456789abcdef0123456789abcdef"
OTHER = "fedcba9876543210fedcba9876543210"
ENDPOINT = "https://modelarts.example.com"
CALL = Attempt(at_ms=1_700_000_000_000, duration_ms=12, status=403, code="no", request_id="r1")


class Bounds(TypedDict, total=False):
    verify: bool
    max_failures: int | None
    max_failure_percent: float | None


def pools(count: int) -> list[Kept]:
    return [Kept(PROJECT, f"pool-{i}", f"Pool {i} ü", f"protected: «{i}»") for i in range(count)]


async def created(ledger: Ledger, **bounds: Unpack[Bounds]) -> str:
    run_id = new_run_id(datetime.now(UTC))
    assert await ledger.create(NewRun(run_id, Source.SCHEDULE, ENDPOINT, **bounds))
    return run_id


async def running(ledger: Ledger, count: int, **bounds: Unpack[Bounds]) -> str:
    """A run of which every job is leased to `me`, except the last two."""
    run_id = await created(ledger, **bounds)
    await ledger.add(run_id, [NewJob(PROJECT, f"pool-{i}") for i in range(count)])
    assert await ledger.start(run_id, count)
    claimed = await ledger.claim(run_id, range(count - 2), owner="me", lease_s=60)
    assert len(claimed) == count - 2
    return run_id


async def end(ledger: Ledger, run_id: str, numbers: Iterable[int], state: JobState) -> Run:
    moves = [Move(n, JobState.LEASED, state, "me", CALL, "because") for n in numbers]
    assert await ledger.record(run_id, moves) == [True] * len(moves)
    return await ledger.run(run_id)


# Too many failures


async def test_as_many_failures_as_allowed_stop_nothing(ledger: Ledger) -> None:
    run_id = await running(ledger, 9, max_failures=3)
    run = await end(ledger, run_id, range(3), JobState.FAILED)
    assert (run.cancelled_ms, run.braked_ms, run.note) == (0, 0, "")
    assert len(await ledger.claim(run_id, [7], owner="you", lease_s=60)) == 1


async def test_one_failure_more_stops_the_rest(ledger: Ledger) -> None:
    run_id = await running(ledger, 9, max_failures=3)
    run = await end(ledger, run_id, range(4), JobState.FAILED)
    assert run.state is RunState.RUNNING
    assert run.braked_ms == run.cancelled_ms > 0
    assert run.note == "braked: 4 of 4 jobs tried failed, more than max_failures=3"
    assert await ledger.claim(run_id, [7, 8], owner="you", lease_s=60) == []
    assert await ledger.cancel(run_id)
    run = await ledger.run(run_id)
    assert (run.state, run.counts[JobState.CANCELLED]) == (RunState.RUNNING, 2)
    await check(ledger, run_id)
    # What is under way ends as it ends; what would be tried again is not.
    retry = Move(4, JobState.LEASED, JobState.PENDING, "me", CALL, "busy", wait_ms=9_000)
    assert await ledger.record(run_id, [retry]) == [True]
    await end(ledger, run_id, [5, 6], JobState.ALREADY_DELETED)
    run = await ledger.run(run_id)
    assert (run.state, run.done) == (RunState.FINISHED, 9)
    assert run.counts[JobState.CANCELLED] == 3
    assert {job.reason for job in await ledger.jobs(run_id, outcome=JobState.CANCELLED)} == {
        run.note
    }
    await check(ledger, run_id)


async def test_no_failure_allowed_means_none(ledger: Ledger) -> None:
    run_id = await running(ledger, 4, max_failures=0)
    assert not (await end(ledger, run_id, [0], JobState.ALREADY_DELETED)).braked_ms
    assert (await end(ledger, run_id, [1], JobState.FAILED)).braked_ms


async def test_a_run_without_brakes_stops_for_no_failure(ledger: Ledger) -> None:
    run_id = await running(ledger, 42)
    assert not (await end(ledger, run_id, range(40), JobState.FAILED)).cancelled_ms


async def test_a_share_of_failures_counts_from_ten_jobs_on(ledger: Ledger) -> None:
    run_id = await running(ledger, 14, max_failures=99, max_failure_percent=12.5)
    assert not (await end(ledger, run_id, range(2), JobState.FAILED)).braked_ms
    assert not (await end(ledger, run_id, range(2, 9), JobState.SKIPPED)).braked_ms
    run = await end(ledger, run_id, [9], JobState.ALREADY_DELETED)
    assert run.braked_ms
    assert run.note == "braked: 2 of 10 jobs tried failed, more than max_failure_percent=12.5"


async def test_exactly_the_share_allowed_stops_nothing(ledger: Ledger) -> None:
    run_id = await running(ledger, 22, max_failures=99, max_failure_percent=10)
    await end(ledger, run_id, range(9), JobState.ALREADY_DELETED)
    run = await end(ledger, run_id, [9], JobState.FAILED)
    assert not run.braked_ms
    assert (await end(ledger, run_id, [10], JobState.FAILED)).braked_ms


@pytest.mark.parametrize("verify", [True, False])
async def test_accepted_jobs_count_as_tried(ledger: Ledger, verify: bool) -> None:
    run_id = await running(ledger, 32, verify=verify, max_failures=99, max_failure_percent=20)
    await end(ledger, run_id, range(20), JobState.ACCEPTED)
    assert not (await end(ledger, run_id, range(20, 25), JobState.FAILED)).braked_ms
    run = await end(ledger, run_id, [25], JobState.FAILED)
    assert run.note == "braked: 6 of 26 jobs tried failed, more than max_failure_percent=20"


async def test_a_failed_verification_brakes_too(ledger: Ledger) -> None:
    run_id = await running(ledger, 4, max_failures=1)
    await end(ledger, run_id, range(2), JobState.ACCEPTED)
    overdue = [Move(n, JobState.ACCEPTED, JobState.FAILED, reason="still there") for n in range(2)]
    assert await ledger.record(run_id, overdue) == [True, True]
    assert (await ledger.run(run_id)).braked_ms


async def test_lost_workers_brake_too(ledger: Ledger) -> None:
    run_id = await created(ledger, max_failures=1)
    await ledger.add(run_id, [NewJob(PROJECT, f"pool-{i}") for i in range(3)])
    await ledger.start(run_id, 3)
    await ledger.claim(run_id, [0, 1], owner="me", lease_s=0)
    assert await ledger.reclaim(run_id, max_attempts=1) == 2
    assert (await ledger.run(run_id)).braked_ms
    assert await ledger.claim(run_id, [2], owner="me", lease_s=60) == []


async def test_a_run_that_somebody_cancelled_keeps_that_reason(ledger: Ledger) -> None:
    run_id = await running(ledger, 6, max_failures=0)
    assert await ledger.cancel(run_id)
    run = await end(ledger, run_id, range(4), JobState.FAILED)
    assert (run.state, run.braked_ms, run.note) == (RunState.FINISHED, 0, "")
    (job, _) = await ledger.jobs(run_id, outcome=JobState.CANCELLED)
    assert job.reason == "the run was cancelled"


async def test_what_a_braked_run_left_ages_with_it(ledger: Ledger, redis: Redis) -> None:
    run_id = await running(ledger, 4, max_failures=0)
    await end(ledger, run_id, range(2), JobState.FAILED)
    assert await ledger.cancel(run_id)
    assert (await ledger.run(run_id)).state is RunState.FINISHED
    late = Move(0, JobState.LEASED, JobState.DELETED, "me", CALL, "late")
    assert await ledger.record(run_id, [late]) == [False]
    assert await ledger.reclaim(run_id, max_attempts=1) == 0
    assert await ledger.renew(run_id, [0, 1], owner="me", lease_s=60) == {0, 1}
    there = [key for key in keys.of_run(run_id) if await redis.exists(key)]
    assert keys.outcome(run_id, "cancelled") in there
    assert all([0 < await redis.ttl(key) <= 2 * 86_400 for key in there])


# What a plan keeps


async def test_kept_pools_are_noted_once_and_read_in_order(ledger: Ledger) -> None:
    run_id, kept = await created(ledger), pools(2_500)
    await ledger.keep(run_id, kept)
    await ledger.keep(run_id, kept)
    assert [pool async for pool in ledger.all_kept(run_id)] == kept
    assert await ledger.kept(run_id, offset=2_400, limit=500) == kept[2_400:]
    assert await ledger.kept(run_id, offset=2_500) == []


async def test_a_run_that_was_started_notes_no_more(ledger: Ledger) -> None:
    run_id = await created(ledger)
    await ledger.keep(run_id, pools(1))
    await ledger.start(run_id, 0)
    with pytest.raises(RunNotFoundError):
        await ledger.keep(run_id, pools(2))
    assert len(await ledger.kept(run_id)) == 1


async def test_a_run_that_keeps_nothing_has_nothing_kept(ledger: Ledger) -> None:
    run_id = await created(ledger)
    await ledger.keep(run_id, [])
    assert await ledger.kept(run_id) == []
    assert [pool async for pool in ledger.all_kept(run_id)] == []


# A brake before the start


async def test_a_run_that_a_brake_holds_is_recorded_and_executes_nothing(
    ledger: Ledger, redis: Redis
) -> None:
    run_id = await created(ledger)
    await ledger.keep(run_id, pools(3))
    await ledger.add(run_id, [NewJob(PROJECT, "pool-9")])
    assert await ledger.abort(run_id, "too many", state=RunState.BRAKED)
    run = await ledger.run(run_id)
    assert (run.state, run.note, run.ended) == (RunState.BRAKED, "too many", True)
    assert run.braked_ms == run.finished_ms > 0
    assert not await ledger.start(run_id, 1)
    assert await ledger.take(run_id, window=9, batch_size=9, resend_s=60) == []
    assert await ledger.claim(run_id, [0], owner="me", lease_s=60) == []
    assert not await ledger.cancel(run_id)
    assert await ledger.active(ENDPOINT) == []
    assert len(await ledger.kept(run_id)) == 3
    for key in (keys.run(run_id), keys.kept(run_id)):
        assert 0 < await redis.ttl(key) <= 2 * 86_400
    assert await ledger.jobs(run_id) == []
    assert not await redis.exists(keys.jobs(run_id))
    assert not await redis.exists(keys.waiting(run_id))


async def test_a_run_that_ended_before_its_start_keeps_its_first_reason(ledger: Ledger) -> None:
    run_id = await created(ledger)
    assert await ledger.abort(run_id, "left behind")
    assert not await ledger.abort(run_id, "too many", state=RunState.BRAKED)
    run = await ledger.run(run_id)
    assert (run.state, run.note, run.braked_ms) == (RunState.ABORTED, "left behind", 0)


# One run of a project at a time


async def test_a_project_is_held_until_its_run_has_ended(ledger: Ledger) -> None:
    first, second = await created(ledger), await created(ledger)
    assert await ledger.hold_project(ENDPOINT, PROJECT, first) is None
    assert await ledger.hold_project(ENDPOINT, PROJECT, first) is None, "asking twice is safe"
    assert await ledger.hold_project(ENDPOINT, PROJECT, second) == first
    await ledger.add(first, [NewJob(PROJECT, "pool-0")])
    await ledger.start(first, 1)
    assert await ledger.hold_project(ENDPOINT, PROJECT, second) == first
    await ledger.cancel(first)
    assert await ledger.hold_project(ENDPOINT, PROJECT, second) is None
    assert await ledger.hold_project(ENDPOINT, PROJECT, await created(ledger)) == second


async def test_a_run_with_jobs_to_verify_still_holds_its_project(ledger: Ledger) -> None:
    run_id = await running(ledger, 3)
    assert await ledger.hold_project(ENDPOINT, PROJECT, run_id) is None
    await end(ledger, run_id, [0], JobState.ACCEPTED)
    await ledger.cancel(run_id)
    assert await ledger.hold_project(ENDPOINT, PROJECT, await created(ledger)) == run_id


async def test_other_projects_and_endpoints_are_not_held(ledger: Ledger) -> None:
    first, second = await created(ledger), await created(ledger)
    assert await ledger.hold_project(ENDPOINT, PROJECT, first) is None
    assert await ledger.hold_project(ENDPOINT, OTHER, second) is None
    assert await ledger.hold_project("https://other.example.com", PROJECT, second) is None


@pytest.mark.parametrize("state", [RunState.ABORTED, RunState.BRAKED])
async def test_a_run_that_never_started_gives_its_project_up(
    ledger: Ledger, state: RunState
) -> None:
    first, second = await created(ledger), await created(ledger)
    assert await ledger.hold_project(ENDPOINT, PROJECT, first) is None
    await ledger.abort(first, "no", state=state)
    assert await ledger.hold_project(ENDPOINT, PROJECT, second) is None


async def test_a_run_that_redis_lost_gives_its_project_up(ledger: Ledger, redis: Redis) -> None:
    first, second = await created(ledger), await created(ledger)
    assert await ledger.hold_project(ENDPOINT, PROJECT, first) is None
    await redis.delete(keys.run(first))
    assert await ledger.hold_project(ENDPOINT, PROJECT, second) is None


@pytest.mark.parametrize("before", [True, False], ids=["taken over", "free"])
async def test_of_many_that_want_a_project_at_once_one_gets_it(
    ledger: Ledger, before: bool
) -> None:
    if before:
        ended = await created(ledger)
        assert await ledger.hold_project(ENDPOINT, PROJECT, ended) is None
        await ledger.abort(ended, "no")
    wanting = [await created(ledger) for _ in range(20)]
    # Each has its own connection by then, so that they go step by step side by side.
    await asyncio.gather(*(ledger.run(run_id) for run_id in wanting))
    holders = await asyncio.gather(
        *(ledger.hold_project(ENDPOINT, PROJECT, run_id) for run_id in wanting)
    )
    (winner,) = [run for run, holder in zip(wanting, holders, strict=True) if holder is None]
    assert {holder for holder in holders if holder is not None} == {winner}


async def test_a_project_may_be_asked_for_until_it_is_free(ledger: Ledger) -> None:
    run_id, next_id = await running(ledger, 3), await created(ledger)
    assert await ledger.hold_project(ENDPOINT, PROJECT, run_id) is None

    async def free() -> bool:
        return await ledger.hold_project(ENDPOINT, PROJECT, next_id) is None

    async def finish() -> None:
        await end(ledger, run_id, [0], JobState.ALREADY_DELETED)
        await ledger.cancel(run_id)

    await asyncio.gather(until(free), finish())
    assert (await ledger.run(run_id)).ended
