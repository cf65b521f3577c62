"""A pool that several runs wanted is freed once, by the run whose call was accepted first: pure."""

from __future__ import annotations

from dataclasses import replace
from itertools import combinations
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from scheduler.review.credit import DELETION_MS, Credit, Overlaps, called_at
from scheduler.review.figures import Figures
from tests.scheduler.test_report_figures import CPU, GPU, JOB, NOW, RUN
from worker.ledger import Attempt, Job, JobState, Run

PROJECTS = ("a", "b")


def a_run(name: str, **changes: Any) -> Run:
    return replace(RUN, run_id=name, projects=("a",), **changes)


def a_job(run: Run, at_ms: int = NOW, **changes: Any) -> Job:
    calls = (Attempt(at_ms, 40, 200, "", ""),)
    return replace(JOB, run_id=run.run_id, **({"attempts": calls} | changes))


# Which call a pool's end is put down to


@pytest.mark.parametrize(
    ("answers", "claim"),
    [
        ([], None),
        ([(409, ""), (429, ""), (404, "")], None),
        ([(202, "")], (0, 0)),
        ([(503, ""), (200, "")], (0, 1)),
        ([(409, ""), (0, "timeout")], (1, 1)),
        ([(500, "ModelArts.0010"), (0, "reset")], (1, 0)),
        # The call was under way when its worker was lost, or stopped.
        ([(0, "lease_expired")], (1, 0)),
        ([(0, "cut_short")], (1, 0)),
        # No call was made, or none arrived.
        ([(0, "sign_in_failed"), (0, "KeyError"), (0, "connect"), (0, "tls")], None),
        # Reads before a call that was not made.
        ([(0, "GET timeout"), (503, "GET ModelArts.0010"), (500, "GET")], None),
        ([(200, "GET invalid_answer"), (0, "timeout")], (1, 1)),
    ],
)
def test_a_pool_s_end_is_put_down_to_a_call_that_may_have_begun_it(
    answers: list[tuple[int, str]], claim: tuple[int, int] | None
) -> None:
    calls = tuple(Attempt(at, 40, status, code, "") for at, (status, code) in enumerate(answers))
    assert called_at(replace(JOB, attempts=calls)) == claim


def test_a_pool_that_somebody_else_was_deleting_already_is_not_freed_by_the_run() -> None:
    figures = Figures()
    figures.add_job(RUN, replace(JOB, attempts=()), {CPU: 1})
    found = figures.report(NOW, run_id=RUN.run_id)
    assert (found.outcomes, found.freed.pools) == ({"deleted": 1}, 0)


# Each pool once

ANSWERS = [(200, ""), (404, ""), (409, ""), (0, "timeout"), (0, "GET timeout")]
CLAIMS = st.lists(
    st.tuples(
        st.sampled_from(["run-0", "run-1", "run-2", "run-3"]),
        st.sampled_from(PROJECTS),
        st.sampled_from(["pool-0", "pool-1"]),
        st.sampled_from(["", "2026-01-01T00:00:00Z"]),
        st.lists(st.tuples(st.integers(0, 5), st.sampled_from(ANSWERS)), max_size=3),
        st.sampled_from([JobState.DELETED, JobState.ACCEPTED]),
        st.none() | st.dictionaries(st.sampled_from([CPU, GPU]), st.integers(1, 3)),
    ),
    max_size=20,
)


@given(CLAIMS, st.sets(st.sampled_from(["run-0", "run-1"])), st.randoms())
def test_each_pool_counts_once_and_for_the_run_whose_call_was_accepted_first(
    claims: list[Any], outside: set[str], random: Any
) -> None:
    jobs = [
        (
            a_run(name, verify=name != "run-3"),
            replace(
                JOB,
                run_id=name,
                number=number,
                project_id=project,
                pool_name=pool,
                created=created,
                attempts=tuple(Attempt(at, 1, status, code, "") for at, (status, code) in calls),
                state=state,
                nodes=nodes,
            ),
        )
        for number, (name, project, pool, created, calls, state, nodes) in enumerate(claims)
    ]
    first: dict[Any, tuple[Any, Run, Job]] = {}
    for run, job in jobs:
        if (called := called_at(job)) is None:
            continue
        claim = ((called, run.run_id, job.number), run, job)
        pool = (job.project_id, job.pool_name, job.created)
        first[pool] = min(first.get(pool, claim), claim, key=lambda each: each[0])
    wanted = [
        job.nodes
        for _, run, job in first.values()
        if run.run_id not in outside and (job.state is JobState.DELETED or not run.verify)
    ]
    random.shuffle(jobs)
    figures = Figures({run.run_id for run, _ in jobs})
    for run, job in jobs:
        if run.run_id in outside:
            figures.add_claim(run, job)
        else:
            figures.add_job(run, job, job.nodes)
    freed = figures.report(NOW, since_ms=NOW).freed
    assert (freed.pools, freed.unsized) == (len(wanted), wanted.count(None))
    for flavor in (CPU, GPU):
        assert freed.nodes.get(flavor, 0) == sum((each or {}).get(flavor, 0) for each in wanted)


def test_the_same_id_at_another_endpoint_or_made_anew_is_another_pool() -> None:
    credit, run = Credit(), a_run("run")
    for each, created in (
        (run, ""),
        (run, "2026-01-01T00:00:00Z"),
        (replace(run, endpoint="https://other.example.com"), ""),
    ):
        credit.add(each, a_job(each, created=created), {CPU: 1}, counts=True)
    assert len(list(credit.freed())) == 3


# Which runs are looked at pool by pool

SPANS = st.lists(
    st.tuples(
        st.integers(0, 12),
        st.integers(1, 6),
        st.booleans(),
        st.sets(st.sampled_from(PROJECTS), min_size=1),
    ),
    max_size=8,
)


@given(SPANS)
def test_runs_overlap_that_worked_on_a_project_at_the_same_time(spans: list[Any]) -> None:
    runs = [
        replace(
            RUN,
            run_id=str(n),
            projects=tuple(projects),
            started_ms=start,
            finished_ms=0 if goes_on else start + length,
        )
        for n, (start, length, goes_on, projects) in enumerate(spans)
    ]
    overlaps = Overlaps()
    for run in runs:
        overlaps.add(run)

    def meet(one: Run, other: Run) -> bool:
        first, second = sorted((one, other), key=lambda run: run.started_ms)
        in_time = not first.finished_ms or second.started_ms <= first.finished_ms
        worked = bool(one.started_ms and other.started_ms)
        return worked and in_time and bool(set(one.projects) & set(other.projects))

    wanted = {run.run_id for pair in combinations(runs, 2) if meet(*pair) for run in pair}
    assert overlaps.found() == wanted


def test_where_nobody_looks_a_pool_is_taken_to_be_there_for_some_hours() -> None:
    overlaps, end = Overlaps(), NOW + 1_000
    overlaps.add(a_run("unverified", verify=False, finished_ms=end))
    overlaps.add(a_run("later", started_ms=end + DELETION_MS))
    assert overlaps.found() == {"unverified", "later"}
    overlaps = Overlaps()
    overlaps.add(a_run("verified", finished_ms=end))
    overlaps.add(a_run("later", started_ms=end + 1))
    assert not overlaps.found()
