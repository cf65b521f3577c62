"""The judge of the episodes: it finds what does not hold, and nothing else."""

from __future__ import annotations

import itertools
import random
from dataclasses import replace
from typing import TYPE_CHECKING

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.faults import faults
from tests.faults.invariants import INVARIANTS, Call, Evidence, Harm, check
from worker.ledger import Attempt, Job, JobState, Run, RunState, Source

if TYPE_CHECKING:
    from collections.abc import Callable

RUN = "20260101-000000-0123456789"
SUCCESS = Attempt(1_000, 50, 200, "", "r-1")
LOST = Attempt(3_000, 0, 0, "lease_expired", "")
RESET = Attempt(1_000, 50, 0, "reset", "")


def job(number: int, state: JobState, *attempts: Attempt, done_ms: int = 5_000) -> Job:
    return Job(
        run_id=RUN,
        number=number,
        project_id="p",
        pool_name=f"pool-{number}",
        display_name="",
        created="",
        fingerprint="",
        chosen="",
        check_nodes=False,
        state=state,
        reason="",
        due_ms=0,
        blocked_ms=0,
        done_ms=done_ms,
        attempts=attempts,
    )


def evidence() -> Evidence:
    """Of a run of two pools that went well: one was called once, one twice, by two workers."""
    jobs = [job(0, JobState.DELETED, SUCCESS), job(1, JobState.DELETED, LOST)]
    jobs[1] = replace(jobs[1], attempts=(LOST, replace(SUCCESS, at_ms=4_000)))
    counts = {state: 2 if state is JobState.DELETED else 0 for state in JobState}
    fields = dict.fromkeys(Run.__dataclass_fields__, "")
    times = {name: 0 for name in fields if name.endswith("_ms")}
    run = Run(
        **fields  # type: ignore[arg-type]
        | times
        | {
            "run_id": RUN,
            "source": Source.INTAKE,
            "state": RunState.FINISHED,
            "total": 2,
            "started_ms": 500,
            "finished_ms": 5_000,
            "counts": counts,
        }
    )
    return Evidence(
        runs=[run],
        jobs={RUN: jobs},
        listed={RUN: [1, 0]},
        kept={RUN: {}},
        calls=[
            Call(960, "pool-0", 200),
            Call(1_200, "pool-1", 200),
            Call(3_960, "pool-1", 200),
        ],
        there={"pool-9"},
        wanted={"pool-0": False, "pool-1": False},
        spared={"pool-9"},
        acknowledged={RUN: ["pool-0", "pool-1"]},
        seen_ended={RUN: (2, 2)},
        harms=[Harm("kill", "worker0", 1_210, 1_500)],
        lease_ms=1_500,
    )


def test_a_run_that_went_well_holds_all_of_them() -> None:
    check(evidence())


def _job(found: Evidence, number: int, **changes: object) -> None:
    jobs = found.jobs[RUN]
    jobs[number] = replace(jobs[number], **changes)  # type: ignore[arg-type]


def _run(found: Evidence, **changes: object) -> None:
    found.runs[0] = replace(found.runs[0], **changes)  # type: ignore[arg-type]


def _lose_a_worker_without_harm(found: Evidence) -> None:
    found.harms.clear()
    found.calls.pop(1)


def _lose_a_call_without_harm(found: Evidence) -> None:
    found.calls.pop(0)
    _job(found, 0, attempts=(RESET,))


SPOILT: dict[str, list[Callable[[Evidence], object]]] = {
    "every_job_is_final": [
        lambda e: _run(e, state=RunState.RUNNING),
        lambda e: _job(e, 0, state=JobState.LEASED),
        lambda e: _job(e, 0, state=JobState.ACCEPTED),
    ],
    "counts_are_those_of_the_jobs": [
        lambda e: _run(e, total=3),
        lambda e: _run(e, counts={JobState.DELETED: 1, JobState.FAILED: 1}),
        lambda e: e.listed.update({RUN: [0, 0]}),
    ],
    "what_is_called_gone_is_gone": [lambda e: e.there.add("pool-1")],
    "only_planned_pools_were_called": [
        lambda e: e.calls.append(Call(2_000, "pool-8", 404)),
        lambda e: e.calls.append(Call(2_000, "pool-9", 403)),
        lambda e: e.there.clear(),
        lambda e: e.spared.add("pool-0"),
    ],
    "no_call_for_a_job_that_was_settled": [
        lambda e: e.calls.append(Call(5_200, "pool-1", 404)),
        lambda e: e.calls.append(Call(1_200, "pool-0", 200)),
    ],
    "every_call_is_an_attempt": [
        lambda e: e.calls.append(Call(980, "pool-0", 200)),
        lambda e: e.calls.append(Call(1_300, "pool-1", 200)),
        lambda e: _job(e, 0, attempts=()),
    ],
    "every_attempt_is_a_call": [
        lambda e: e.calls.pop(0),
        lambda e: e.calls.__setitem__(0, Call(960, "pool-0", 503)),
        _lose_a_worker_without_harm,
        _lose_a_call_without_harm,
    ],
    "no_run_ended_before_its_jobs": [
        lambda e: _run(e, finished_ms=4_999),
        lambda e: e.seen_ended.update({RUN: (1, 2)}),
    ],
    "no_acknowledged_request_is_lost": [
        lambda e: e.acknowledged.update({"other": ["pool-7"]}),
        lambda e: e.acknowledged.update({RUN: ["pool-0", "pool-1", "pool-2"]}),
        lambda e: e.acknowledged.update({"other": e.acknowledged.pop(RUN)}),
    ],
    "what_was_wanted_is_done": [
        lambda e: e.wanted.update({"pool-2": False}),
        lambda e: e.wanted.update({"pool-1": True}),
        lambda e: _job(e, 1, state=JobState.FAILED),
    ],
    "no_process_did_what_it_should_not": [
        lambda e: e.complaints.append("worker0 ended by itself"),
        lambda e: e.logged.update(["job_crashed"]),
    ],
}


def test_each_of_them_is_tried() -> None:
    assert list(SPOILT) == [invariant.__name__ for invariant in INVARIANTS]


@pytest.mark.parametrize(
    ("name", "spoil"), [(name, spoil) for name, ways in SPOILT.items() for spoil in ways]
)
def test_what_does_not_hold_is_found(name: str, spoil: Callable[[Evidence], object]) -> None:
    found = evidence()
    spoil(found)
    with pytest.raises(AssertionError, match=name):
        check(found)


@given(st.integers(0, 2**32), st.integers(1, 200))
def test_a_seed_makes_one_plan_of_faults(seed: int, count: int) -> None:
    planned = faults.plan(random.Random(seed), count)
    assert planned == faults.plan(random.Random(seed), count)
    assert len(planned) == count
    times = [0.0, *(each.at_s for each in planned)]
    assert all(0.1 <= b - a <= 0.3 + 1e-9 for a, b in itertools.pairwise(times))
    assert {each.kind for each in planned} <= faults.KINDS.keys()
