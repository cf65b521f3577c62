"""The ledger against a real Redis, alone and in cluster mode."""

from __future__ import annotations

from dataclasses import replace
from datetime import UTC, datetime
from typing import TYPE_CHECKING

import pytest

from tests.conftest import until
from tests.ledger.conftest import ENDPOINT, PROJECT, begun, jobs, running
from worker.ledger import (
    Attempt,
    JobState,
    Kept,
    Ledger,
    Move,
    NewRun,
    RunNotFoundError,
    RunState,
    Source,
    keys,
    new_run_id,
)

if TYPE_CHECKING:
    from redis.asyncio import Redis

CALL = Attempt(at_ms=1_700_000_000_000, duration_ms=12, status=200, code="", request_id="r1")


def end(number: int, target: JobState = JobState.FAILED, owner: str = "me") -> Move:
    return Move(number, JobState.LEASED, target, owner, CALL, reason="because")


async def test_a_job_goes_from_pending_to_deleted(ledger: Ledger) -> None:
    run_id = await running(ledger, 1)
    (job,) = await ledger.claim(run_id, [0], owner="me", lease_s=60)
    assert (job.pool_name, job.project_id, job.display_name) == ("pool-0", PROJECT, "Pool 0 ü")
    assert await ledger.record(run_id, [end(0, JobState.ACCEPTED)]) == [True]
    assert (await ledger.run(run_id)).counts[JobState.ACCEPTED] == 1
    assert not (await ledger.run(run_id)).ended
    gone = Move(0, JobState.ACCEPTED, JobState.DELETED, reason="gone")
    assert await ledger.record(run_id, [gone]) == [True]
    run = await ledger.run(run_id)
    assert (run.state, run.done, run.counts[JobState.DELETED]) == (RunState.FINISHED, 1, 1)
    (job,) = await ledger.jobs(run_id)
    assert (job.state, job.reason, job.attempts) == (JobState.DELETED, "gone", (CALL,))


async def test_without_verification_accepted_is_an_end(ledger: Ledger) -> None:
    run_id = await running(ledger, 1, verify=False)
    await ledger.claim(run_id, [0], owner="me", lease_s=60)
    await ledger.record(run_id, [end(0, JobState.ACCEPTED)])
    assert (await ledger.run(run_id)).state is RunState.FINISHED
    assert len(await ledger.jobs(run_id, outcome=JobState.ACCEPTED)) == 1


async def test_a_run_without_jobs_is_finished_at_its_start(ledger: Ledger) -> None:
    run_id = await running(ledger, 0)
    assert (await ledger.run(run_id)).state is RunState.FINISHED


async def test_nothing_is_claimed_or_sent_before_the_start(ledger: Ledger) -> None:
    run_id = await begun(ledger, 2)
    assert await ledger.claim(run_id, [0, 1], owner="me", lease_s=60) == []
    assert await ledger.take(run_id, window=10, batch_size=10, resend_s=60) == []


async def test_a_run_that_misses_jobs_does_not_start_and_can_be_aborted(ledger: Ledger) -> None:
    run_id = await begun(ledger, 2)
    assert not await ledger.start(run_id, 3)
    assert not await ledger.abort(run_id, "left behind", min_age_s=600)
    assert await ledger.abort(run_id, "left behind")
    run = await ledger.run(run_id)
    assert (run.state, run.note) == (RunState.ABORTED, "left behind")
    with pytest.raises(RunNotFoundError):
        await ledger.add(run_id, jobs(1), first=2)


async def test_a_running_run_is_never_aborted(ledger: Ledger) -> None:
    run_id = await running(ledger, 1)
    assert not await ledger.abort(run_id, "no")
    assert (await ledger.run(run_id)).state is RunState.RUNNING


async def test_making_the_same_run_twice_changes_nothing(ledger: Ledger) -> None:
    run_id = await running(ledger, 2)
    assert not await ledger.create(NewRun(run_id, Source.INTAKE, "https://other.example.com"))
    assert await ledger.start(run_id, 2)  # its maker asks again, since the answer was lost
    assert not await ledger.start(run_id, 2, maker="another")
    run = await ledger.run(run_id)
    assert (run.endpoint, run.counts[JobState.PENDING]) == (ENDPOINT, 2)


async def test_a_run_that_waits_to_be_planned_is_seen_and_taken_up_once(ledger: Ledger) -> None:
    run = NewRun(new_run_id(datetime.now(UTC)), Source.INTAKE, ENDPOINT, client="ci")
    assert await ledger.queue(run)
    assert not await ledger.queue(run)
    (waiting,) = await ledger.active(ENDPOINT)
    assert (waiting.state, waiting.ended, waiting.client) == (RunState.QUEUED, False, "ci")
    assert await ledger.create(run, maker="m")
    assert not await ledger.queue(run)
    assert await ledger.add(run.run_id, jobs(2), maker="m") == 2
    assert await ledger.start(run.run_id, 2, maker="m")
    started = await ledger.run(run.run_id)
    assert started.state is RunState.RUNNING
    assert started.created_ms == waiting.created_ms <= started.planned_ms


async def test_a_maker_that_is_replaced_can_add_nothing_more(ledger: Ledger) -> None:
    run = NewRun(new_run_id(datetime.now(UTC)), Source.CLI, ENDPOINT)
    assert await ledger.create(run, maker="first")
    await ledger.keep(run.run_id, [Kept("p", "kept-by-first", "", "")], maker="first")
    await ledger.add(run.run_id, jobs(3), maker="first")
    assert await ledger.create(run, maker="second")
    assert await ledger.jobs(run.run_id) == []
    with pytest.raises(RunNotFoundError):
        await ledger.add(run.run_id, jobs(3), maker="first")
    with pytest.raises(RunNotFoundError):
        await ledger.keep(run.run_id, [Kept("p", "late", "", "")], maker="first")
    assert not await ledger.start(run.run_id, 0, maker="first")
    assert not await ledger.abort(run.run_id, "its maker failed", maker="first")
    await ledger.add(run.run_id, jobs(1), maker="second")
    assert await ledger.create(run, maker="second"), "asked again, since the answer was lost"
    assert await ledger.start(run.run_id, 1, maker="second")
    assert await ledger.kept(run.run_id) == []


async def test_what_only_was_to_be_planned_keeps_its_jobs_and_executes_none(
    ledger: Ledger,
) -> None:
    run_id = await begun(ledger, 3)
    assert await ledger.abort(run_id, "a dry run", state=RunState.PLANNED)
    run = await ledger.run(run_id)
    assert (run.state, run.ended, run.total, run.done) == (RunState.PLANNED, True, 3, 0)
    assert [job.state for job in await ledger.jobs(run_id)] == [JobState.PENDING] * 3
    assert not await ledger.start(run_id, 3)
    assert await ledger.take(run_id, window=9, batch_size=9, resend_s=60) == []
    assert await ledger.claim(run_id, [0], owner="me", lease_s=60) == []


@pytest.mark.parametrize("opened", ["queue", "create"])
async def test_a_run_that_has_not_started_can_be_cancelled(ledger: Ledger, opened: str) -> None:
    run = NewRun(new_run_id(datetime.now(UTC)), Source.INTAKE, ENDPOINT)
    assert await getattr(ledger, opened)(run)
    assert await ledger.cancel(run.run_id)
    found = await ledger.run(run.run_id)
    assert (found.state, found.ended) == (RunState.ABORTED, True)
    assert found.cancelled_ms > 0
    assert not await ledger.create(run, maker="late")
    assert not await ledger.start(run.run_id, 0)
    assert not await ledger.cancel(run.run_id)


async def test_a_claim_has_one_owner_and_may_be_repeated_by_it(ledger: Ledger) -> None:
    run_id = await running(ledger, 2)
    first = await ledger.claim(run_id, [0, 1], owner="me", lease_s=60)
    assert await ledger.claim(run_id, [0, 1], owner="other", lease_s=60) == []
    assert await ledger.claim(run_id, [0, 1], owner="me", lease_s=60) == first
    assert (await ledger.run(run_id)).counts[JobState.LEASED] == 2


async def test_a_move_of_anothers_lease_is_refused(ledger: Ledger) -> None:
    run_id = await running(ledger, 1)
    await ledger.claim(run_id, [0], owner="me", lease_s=60)
    assert await ledger.record(run_id, [end(0, owner="other")]) == [False]
    assert (await ledger.jobs(run_id))[0].attempts == ()


async def test_an_end_is_final(ledger: Ledger) -> None:
    run_id = await running(ledger, 2)
    await ledger.claim(run_id, [0], owner="me", lease_s=60)
    assert await ledger.record(run_id, [end(0), end(0, JobState.DELETED)]) == [True, False]
    assert await ledger.claim(run_id, [0], owner="me", lease_s=60) == []
    (job, _) = await ledger.jobs(run_id)
    assert job.state is JobState.FAILED


async def test_a_retry_is_claimed_only_when_it_is_due(ledger: Ledger) -> None:
    run_id = await running(ledger, 1)
    await ledger.claim(run_id, [0], owner="me", lease_s=60)
    retry = Move(0, JobState.LEASED, JobState.PENDING, "me", CALL, "busy", wait_ms=150)
    await ledger.record(run_id, [retry])
    assert await ledger.claim(run_id, [0], owner="you", lease_s=60) == []
    assert await ledger.take(run_id, window=10, batch_size=10, resend_s=60) == []
    await until(lambda: ledger.take(run_id, window=10, batch_size=10, resend_s=60))
    (job,) = await ledger.claim(run_id, [0], owner="you", lease_s=60)
    assert job.attempts == (CALL,)


async def test_the_window_bounds_what_is_sent_and_leased(ledger: Ledger) -> None:
    run_id = await running(ledger, 100)
    sent = await ledger.take(run_id, window=45, batch_size=20, resend_s=60)
    assert len(sent) == 40, "whole batches while there is more to come"
    assert await ledger.take(run_id, window=45, batch_size=20, resend_s=60) == []
    await ledger.claim(run_id, sent, owner="me", lease_s=60)
    assert await ledger.take(run_id, window=45, batch_size=20, resend_s=60) == []
    await ledger.record(run_id, [end(n) for n in sent])
    assert len(await ledger.take(run_id, window=45, batch_size=20, resend_s=60)) == 40


async def test_the_rest_is_sent_though_it_fills_no_batch(ledger: Ledger) -> None:
    run_id = await running(ledger, 7)
    assert len(await ledger.take(run_id, window=40, batch_size=20, resend_s=60)) == 7


async def test_a_job_whose_message_was_lost_is_sent_again(ledger: Ledger) -> None:
    run_id = await running(ledger, 3)
    assert len(await ledger.take(run_id, window=9, batch_size=9, resend_s=60)) == 3
    assert await ledger.take(run_id, window=9, batch_size=9, resend_s=60) == []
    other = await running(ledger, 3)
    assert len(await ledger.take(other, window=9, batch_size=9, resend_s=0)) == 3
    assert len(await ledger.take(other, window=9, batch_size=9, resend_s=0)) == 3


async def test_a_lease_that_ran_out_goes_back_and_its_owner_is_shut_out(ledger: Ledger) -> None:
    run_id = await running(ledger, 2)
    await ledger.claim(run_id, [0, 1], owner="me", lease_s=0.02)
    await ledger.renew(run_id, [1], owner="me", lease_s=60)
    await until(lambda: ledger.reclaim(run_id, max_attempts=5))
    assert await ledger.renew(run_id, [0, 1], owner="me", lease_s=60) == {0}
    assert await ledger.record(run_id, [end(0), end(1)]) == [False, True]
    (job,) = await ledger.claim(run_id, [0], owner="you", lease_s=60)
    assert [attempt.code for attempt in job.attempts] == ["lease_expired"]


async def test_a_job_that_loses_every_lease_is_given_up(ledger: Ledger) -> None:
    run_id = await running(ledger, 1)
    for _ in range(3):
        await ledger.claim(run_id, [0], owner="me", lease_s=0)
        assert await ledger.reclaim(run_id, max_attempts=3) == 1
    (job,) = await ledger.jobs(run_id)
    assert job.state is JobState.FAILED
    assert "given up after 3 attempts" in job.reason
    assert (await ledger.run(run_id)).state is RunState.FINISHED


async def test_cancelling_ends_what_is_not_claimed_and_lets_the_rest_end(ledger: Ledger) -> None:
    run_id = await running(ledger, 5)
    await ledger.take(run_id, window=2, batch_size=1, resend_s=60)
    await ledger.claim(run_id, [0, 1], owner="me", lease_s=60)
    assert await ledger.cancel(run_id)
    assert (await ledger.run(run_id)).counts[JobState.CANCELLED] == 3
    retry = Move(0, JobState.LEASED, JobState.PENDING, "me", CALL, "busy", wait_ms=9_000)
    assert await ledger.record(run_id, [retry, end(1, JobState.ALREADY_DELETED)]) == [True, True]
    run = await ledger.run(run_id)
    assert run.state is RunState.FINISHED
    assert run.counts[JobState.CANCELLED] == 4
    assert not await ledger.cancel(run_id)


async def test_an_attempt_that_is_recorded_again_counts_once(ledger: Ledger) -> None:
    run_id = await running(ledger, 1)
    await ledger.claim(run_id, [0], owner="me", lease_s=60)
    again = Move(0, JobState.LEASED, JobState.LEASED, "me", CALL, "busy")
    for _ in range(2):
        assert await ledger.record(run_id, [again]) == [True]
    (job,) = await ledger.jobs(run_id)
    assert job.attempts == (CALL,)


@pytest.mark.parametrize(("status", "known"), [(0, False), (503, False), (409, True), (429, True)])
async def test_a_cancelled_job_whose_call_may_have_been_obeyed_says_so(
    ledger: Ledger, status: int, known: bool
) -> None:
    run_id = await running(ledger, 2)
    await ledger.claim(run_id, [0], owner="me", lease_s=60)
    call = replace(CALL, status=status)
    back = Move(0, JobState.LEASED, JobState.PENDING, "me", call, "again", wait_ms=9_000)
    assert await ledger.record(run_id, [back]) == [True]
    assert await ledger.cancel(run_id)
    called, never = await ledger.jobs(run_id)
    assert (called.reason == "the run was cancelled") == known
    assert never.reason == "the run was cancelled"


async def test_a_wait_for_other_pools_counts_anew_after_any_other_wait(ledger: Ledger) -> None:
    run_id = await running(ledger, 1)
    seen = []
    for blocked in (True, True, False, True):
        await ledger.claim(run_id, [0], owner="me", lease_s=60)
        wait = Move(0, JobState.LEASED, JobState.PENDING, "me", reason="waits", blocked=blocked)
        assert await ledger.record(run_id, [wait]) == [True]
        (job,) = await ledger.jobs(run_id)
        seen.append(job.blocked_ms)
    first, second, between, last = seen
    assert first == second > 0
    assert between == 0
    assert last >= first


async def test_pages_by_outcome_hold_every_job_once(ledger: Ledger) -> None:
    run_id = await running(ledger, 30)
    await ledger.claim(run_id, range(30), owner="me", lease_s=60)
    await ledger.record(run_id, [end(n) for n in range(0, 30, 2)])
    seen: list[int] = []
    while page := await ledger.jobs(run_id, outcome=JobState.FAILED, offset=len(seen), limit=4):
        seen += [job.number for job in page]
    assert seen == list(range(0, 30, 2))
    leased = await ledger.jobs(run_id, outcome=JobState.LEASED)
    assert {job.number for job in leased} == set(range(1, 30, 2))
    everything = [job.number async for job in ledger.all_jobs(run_id)]
    assert everything == list(range(30))


async def test_pending_jobs_are_paged_over_both_indexes(ledger: Ledger) -> None:
    run_id = await running(ledger, 10)
    await ledger.take(run_id, window=4, batch_size=4, resend_s=60)
    seen: list[int] = []
    while page := await ledger.jobs(run_id, outcome=JobState.PENDING, offset=len(seen), limit=3):
        seen += [job.number for job in page]
    assert sorted(seen) == list(range(10))


async def test_only_a_finished_run_ages(ledger: Ledger, redis: Redis) -> None:
    run_id = await running(ledger, 2)
    await ledger.claim(run_id, [0, 1], owner="me", lease_s=60)
    await ledger.record(run_id, [end(0)])
    there = [key for key in keys.of_run(run_id) if await redis.exists(key)]
    assert [await redis.ttl(key) for key in there] == [-1] * len(there)
    await ledger.record(run_id, [end(1)])
    there = [key for key in keys.of_run(run_id) if await redis.exists(key)]
    assert keys.jobs(run_id) in there
    for key in there:
        assert 0 < await redis.ttl(key) <= 2 * 86_400


async def test_active_runs_are_those_not_finished_at_the_endpoint(ledger: Ledger) -> None:
    first, second = await running(ledger, 1), await running(ledger, 1)
    assert {run.run_id for run in await ledger.active(ENDPOINT)} == {first, second}
    assert await ledger.active("https://elsewhere.example.com") == []
    await ledger.cancel(first)
    assert [run.run_id for run in await ledger.active(ENDPOINT)] == [second]
    assert {run.run_id for run in await ledger.runs()} == {first, second}


async def test_a_run_that_redis_lost_is_said_to_be_missing(ledger: Ledger, redis: Redis) -> None:
    run_id = await running(ledger, 1)
    await redis.flushdb()
    with pytest.raises(RunNotFoundError, match=run_id):
        await ledger.run(run_id)
    assert await ledger.claim(run_id, [0], owner="me", lease_s=60) == []
    assert await ledger.record(run_id, [end(0)]) == [False]


async def test_reading_scans_no_keys(ledger: Ledger, redis: Redis) -> None:
    run_id = await running(ledger, 3)
    await redis.config_resetstat()
    await ledger.runs()
    await ledger.active(ENDPOINT)
    await ledger.run(run_id)
    for state in (None, *JobState):
        await ledger.jobs(run_id, outcome=state)
    called = {name.removeprefix("cmdstat_") for name in await redis.info("commandstats")}
    assert "hmget" in called
    assert not called & {"keys", "scan", "hscan", "sscan", "zscan"}
