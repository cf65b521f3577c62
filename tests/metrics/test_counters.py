"""What counts calls and outcomes: small observers, of a client and of a recorder."""

from __future__ import annotations

import asyncio
from datetime import UTC, datetime
from typing import TYPE_CHECKING
from uuid import uuid4

import pytest

from worker.ledger import JobState, Ledger, Move, NewJob, NewRun, Source, new_run_id
from worker.metrics import REGISTRY, CallCounter, OutcomeCounter
from worker.modelarts import Answer, Body, Failure
from worker.recorder import Recorder

if TYPE_CHECKING:
    from redis.asyncio import Redis


@pytest.fixture
def endpoint() -> str:
    """One that nobody else counts for: the counters are of the whole process."""
    return f"https://{uuid4().hex}.example.com"


def counted(name: str, **labels: str) -> float:
    return REGISTRY.get_sample_value(f"poolsweep_{name}", labels) or 0


def test_calls_are_counted_by_what_came_back_and_timed(endpoint: str) -> None:
    count = CallCounter(endpoint)
    for method, status, failure in (
        ("DELETE", 200, None),
        ("DELETE", 200, None),
        ("DELETE", None, Failure.TIMEOUT),
        ("GET", 404, None),
        ("GET", 999, None),
    ):
        body = Body.EMPTY
        count(Answer(method=method, status=status, body=body, failure=failure, duration_s=0.2))
    calls = {
        (sample.labels["method"], sample.labels["class"], sample.labels["status"]): sample.value
        for metric in REGISTRY.collect()
        for sample in metric.samples
        if sample.name == "poolsweep_api_calls_total" and sample.labels["endpoint"] == endpoint
    }
    assert calls == {
        ("DELETE", "2xx", "200"): 2,
        ("DELETE", "none", "timeout"): 1,
        ("GET", "4xx", "404"): 1,
        ("GET", "other", "other"): 1,
    }
    for method, times in (("DELETE", 3), ("GET", 2)):
        labels = {"endpoint": endpoint, "method": method}
        assert counted("api_call_seconds_count", **labels) == times
        assert counted("api_call_seconds_sum", **labels) == pytest.approx(times * 0.2)


async def test_an_outcome_counts_once_it_is_recorded_whoever_still_waits_for_it(
    endpoint: str, redis_client: Redis
) -> None:
    ledger = Ledger(redis_client)
    run = NewRun(new_run_id(datetime.now(UTC)), Source.CLI, endpoint)
    await ledger.create(run)
    await ledger.add(run.run_id, [NewJob("project", f"pool-{n}") for n in range(5)])
    await ledger.start(run.run_id, 5)
    await ledger.claim(run.run_id, range(5), owner="me", lease_s=60)
    recorder = Recorder(ledger, observe=OutcomeCounter(endpoint))

    def moved(number: int, target: JobState, owner: str = "me") -> asyncio.Task[bool]:
        move = Move(number, JobState.LEASED, target, owner)
        return asyncio.create_task(recorder.record(run.run_id, move))

    gone, left = moved(0, JobState.ALREADY_DELETED), moved(1, JobState.FAILED)
    refused = moved(2, JobState.FAILED, owner="another")
    back, noted = moved(3, JobState.PENDING), moved(4, JobState.LEASED)
    await asyncio.sleep(0)
    left.cancel()
    made = await asyncio.gather(gone, refused, back, noted)
    assert list(made) == [True, False, True, True]
    assert (await ledger.run(run.run_id)).counts[JobState.FAILED] == 1
    outcomes = {
        state: counted("jobs_total", endpoint=endpoint, outcome=state) for state in JobState
    }
    assert {state: count for state, count in outcomes.items() if count} == {
        JobState.ALREADY_DELETED: 1,
        JobState.FAILED: 1,
    }
