"""The ledger's state machine against a model of it, in any order of events.

Time is not waited for: a lease is made to run out, and a retry to fall due, by moving its mark in
Redis into the past, which is what the passing of time does.
"""

from __future__ import annotations

import asyncio
import itertools
from dataclasses import replace
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule, run_state_machine_as_test
from redis.asyncio import Redis

from tests.ledger.conftest import damage
from worker.ledger import (
    Attempt,
    JobState,
    Ledger,
    Move,
    NewJob,
    NewRun,
    RunState,
    Source,
    keys,
    new_run_id,
)

if TYPE_CHECKING:
    from collections.abc import Coroutine, Iterable

JOBS = 6
MAX_ATTEMPTS = 4
FINAL = {
    JobState.DELETED,
    JobState.ALREADY_DELETED,
    JobState.SKIPPED,
    JobState.FAILED,
    JobState.CANCELLED,
}
CALL = Attempt(1_700_000_000_000, 5, 500, "E", "r")
numbers = st.integers(0, JOBS - 1)
owners = st.sampled_from(["a", "b"])


class LedgerMachine(RuleBasedStateMachine):
    url = ""

    def __init__(self) -> None:
        super().__init__()
        self.runner = asyncio.Runner()
        self.redis = Redis.from_url(self.url, decode_responses=True)
        self.ledger = Ledger(self.redis)
        self.run_id = new_run_id(datetime.now(UTC))
        self.do(self.ledger.create(NewRun(self.run_id, Source.CLI, "https://x.example.com")))
        self.do(self.ledger.add(self.run_id, (NewJob("p", f"pool-{n}") for n in range(JOBS))))
        self.do(self.ledger.start(self.run_id, JOBS))
        self.state = dict.fromkeys(range(JOBS), JobState.PENDING)
        self.owner: dict[int, str] = {}
        self.attempts = dict.fromkeys(range(JOBS), 0)
        self.later: set[int] = set()
        self.damaged: set[int] = set()
        self.calls = 0
        self.cancelled = False

    def do(self, work: Coroutine[Any, Any, Any]) -> Any:
        return self.runner.run(work)

    def teardown(self) -> None:
        self.do(self.redis.aclose())
        self.runner.close()

    @property
    def finished(self) -> bool:
        return all(state in FINAL for state in self.state.values())

    @rule(number=numbers)
    def record_is_damaged(self, number: int) -> None:
        if self.state[number] not in FINAL:
            self.do(damage(self.redis, self.run_id, number, "no record"))
            self.damaged.add(number)

    def found_damaged(self, seen: Iterable[int]) -> None:
        """The jobs that a script has read end, if their record is damaged."""
        for number in self.damaged.intersection(seen):
            self.damaged.remove(number)
            self.state[number], self.attempts[number] = JobState.FAILED, 0
            self.owner.pop(number, None)
            self.later.discard(number)

    @rule(wanted=st.lists(numbers, unique=True), owner=owners)
    def claim(self, wanted: list[int], owner: str) -> None:
        jobs = self.do(self.ledger.claim(self.run_id, wanted, owner=owner, lease_s=600))
        if not (self.cancelled or self.finished):
            self.found_damaged(wanted)
        free = {n for n in wanted if self.state[n] is JobState.PENDING and n not in self.later}
        mine = {n for n in wanted if self.owner.get(n) == owner}
        if self.cancelled:
            assert jobs == []
            return
        assert {job.number for job in jobs} == free | mine
        for n in free:
            self.state[n], self.owner[n] = JobState.LEASED, owner

    @rule(
        number=numbers,
        owner=owners,
        source=st.sampled_from([JobState.LEASED, JobState.ACCEPTED, JobState.PENDING]),
        goal=st.sampled_from(list(JobState)),
        wait=st.booleans(),
    )
    def record(self, number: int, owner: str, source: JobState, goal: JobState, wait: bool) -> None:
        wait_ms = 600_000 if wait else 0
        self.calls += 1
        call = replace(CALL, at_ms=CALL.at_ms + self.calls)
        move = Move(number, source, goal, owner, call, "why", wait_ms)
        (made,) = self.do(self.ledger.record(self.run_id, [move]))
        self.found_damaged([number])
        allowed = self.state[number] is source and (
            (source is JobState.LEASED and self.owner[number] == owner)
            or (source is JobState.ACCEPTED and goal in {JobState.DELETED, JobState.FAILED})
        )
        assert made == allowed
        if not made:
            return
        self.attempts[number] += 1
        if goal is JobState.PENDING and self.cancelled:
            goal = JobState.CANCELLED
        self.state[number] = goal
        self.later.discard(number)
        if goal is not JobState.LEASED:
            self.owner.pop(number, None)
        if goal is JobState.PENDING and wait:
            self.later.add(number)

    @rule(number=numbers)
    def lease_runs_out(self, number: int) -> None:
        expired = self.do(self.expire(number))
        taken_back = self.do(self.ledger.reclaim(self.run_id, max_attempts=MAX_ATTEMPTS))
        assert taken_back == expired == (self.state[number] is JobState.LEASED)
        if not taken_back:
            return
        self.found_damaged([number])
        if self.state[number] is JobState.FAILED:
            return
        self.owner.pop(number)
        self.attempts[number] += 1
        if self.attempts[number] >= MAX_ATTEMPTS:
            self.state[number] = JobState.FAILED
        else:
            self.state[number] = JobState.CANCELLED if self.cancelled else JobState.PENDING

    async def expire(self, number: int) -> int:
        leased = keys.leased(self.run_id)
        return int(await self.redis.zadd(leased, {str(number): 1}, xx=True, ch=True) or 0)

    @rule(window=st.integers(1, JOBS), batch=st.integers(1, 3))
    def take(self, window: int, batch: int) -> None:
        taken = self.do(
            self.ledger.take(self.run_id, window=window, batch_size=batch, resend_s=600)
        )
        assert len(taken) <= window
        assert all(self.state[n] is JobState.PENDING and n not in self.later for n in taken)

    @rule(wanted=st.lists(numbers, unique=True), owner=owners)
    def renew(self, wanted: list[int], owner: str) -> None:
        lost = self.do(self.ledger.renew(self.run_id, wanted, owner=owner, lease_s=600))
        self.found_damaged(wanted)
        assert lost == {n for n in wanted if self.owner.get(n) != owner}

    @rule()
    def cancel(self) -> None:
        assert self.do(self.ledger.cancel(self.run_id)) == (not self.finished)
        if self.finished:
            return
        self.cancelled = True
        self.found_damaged([n for n, at in self.state.items() if at is JobState.PENDING])
        for number, state in self.state.items():
            if state is JobState.PENDING:
                self.state[number] = JobState.CANCELLED
        self.later.clear()

    @rule()
    def everything_again(self) -> None:
        """Messages that come twice: making the run again changes nothing."""
        self.do(self.ledger.create(NewRun(self.run_id, Source.CLI, "https://y.example.com")))
        self.do(self.ledger.start(self.run_id, JOBS))
        assert not self.do(self.ledger.abort(self.run_id, "no"))

    @invariant()
    def the_ledger_is_as_the_model(self) -> None:
        jobs = self.do(self.ledger.jobs(self.run_id, limit=JOBS + 1))
        shown = self.state | dict.fromkeys(self.damaged, JobState.FAILED)
        assert {job.number: job.state for job in jobs} == shown
        attempts = self.attempts | dict.fromkeys(self.damaged, 0)
        assert {job.number: len(job.attempts) for job in jobs} == attempts

    @invariant()
    def counts_and_pages_agree_with_the_jobs(self) -> None:
        run = self.do(self.ledger.run(self.run_id))
        for state in JobState:
            expected = {n for n, at in self.state.items() if at is state}
            assert run.counts[state] == len(expected)
            page = self.do(self.ledger.jobs(self.run_id, outcome=state))
            listed = [job.number for job in page]
            assert set(listed) == expected
            assert len(listed) == len(expected), "each job in one index, once"
        assert (run.state is RunState.FINISHED) == self.finished
        assert run.done == sum(state in FINAL for state in self.state.values())


def test_the_ledger_keeps_to_its_states(redis_url: str) -> None:
    LedgerMachine.url = redis_url
    run_state_machine_as_test(
        LedgerMachine,
        settings=settings(
            max_examples=50,
            stateful_step_count=40,
            deadline=None,
            suppress_health_check=list(HealthCheck),
        ),
    )


@pytest.mark.parametrize(
    ("source", "target"),
    [(source, target) for source, target in itertools.product(sorted(FINAL), JobState)],
)
async def test_no_move_leads_out_of_an_end(
    redis_client: Redis, source: JobState, target: JobState
) -> None:
    ledger = Ledger(redis_client)
    run_id = new_run_id(datetime.now(UTC))
    await ledger.create(NewRun(run_id, Source.CLI, "https://x.example.com"))
    await ledger.add(run_id, [NewJob("p", "pool")])
    await ledger.start(run_id, 1)
    await ledger.claim(run_id, [0], owner="a", lease_s=60)
    await ledger.record(run_id, [Move(0, JobState.LEASED, source, "a")])
    assert await ledger.record(run_id, [Move(0, source, target, "a")]) == [False]
