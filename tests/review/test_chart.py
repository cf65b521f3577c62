"""The bars of outcomes: pure."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from datetime import UTC, datetime

from hypothesis import given
from hypothesis import strategies as st

from scheduler.review.web import chart
from worker.ledger import JobState, Run, RunState

NOW_MS = 1_790_000_000_000
HEIGHT = 120.0


def run_of(back_ms: int, counts: dict[JobState, int]) -> Run:
    return Run(
        run_id="r",
        source="cli",
        endpoint="",
        requester="",
        reason="",
        verify=True,
        policy="",
        client="",
        selector="",
        projects=(),
        state=RunState.RUNNING,
        total=sum(counts.values()),
        created_ms=NOW_MS - back_ms,
        planned_ms=0,
        started_ms=NOW_MS - back_ms,
        finished_ms=0,
        cancelled_ms=0,
        braked_ms=0,
        note="",
        counts={state: counts.get(state, 0) for state in JobState},
    )


runs = st.lists(
    st.builds(
        run_of,
        st.integers(0, 20 * 86_400_000),
        st.dictionaries(st.sampled_from(JobState), st.integers(0, 100_000)),
    ),
    max_size=12,
)


@given(runs)
def test_every_job_of_the_days_shown_is_in_one_bar(made: list[Run]) -> None:
    drawn = chart.bars(made, NOW_MS, days=14, height=HEIGHT)
    days = {day.day for day in drawn.days}
    assert len(days) == 14
    expected: Counter[JobState] = Counter()
    for run in made:
        if datetime.fromtimestamp(run.created_ms / 1000, UTC).date() in days:
            expected.update(run.counts)
    told: Counter[JobState] = Counter()
    for day in drawn.days:
        told.update({part.state: part.count for part in day.segments})
    assert +told == +expected
    assert set(drawn.states) == set(+expected)


@given(runs)
def test_parts_stand_on_each_other_and_stay_in_the_picture(made: list[Run]) -> None:
    drawn = chart.bars(made, NOW_MS, days=14, height=HEIGHT)
    for day in drawn.days:
        foot = HEIGHT
        for part in day.segments:
            assert abs(part.y + part.height - foot) < 0.05
            assert part.height >= chart.LEAST_HEIGHT - 0.01
            foot = part.y
        assert foot >= -0.05


def test_the_jobs_of_a_run_that_was_never_started_are_in_no_bar() -> None:
    planned = replace(run_of(0, {JobState.PENDING: 5_000}), started_ms=0)
    today = chart.bars([planned], NOW_MS, days=14, height=HEIGHT).days[-1]
    assert (today.runs, today.counts.total()) == (1, 0)


def test_a_failure_among_a_hundred_thousand_jobs_is_seen() -> None:
    run = run_of(0, {JobState.DELETED: 99_999, JobState.FAILED: 1})
    today = chart.bars([run], NOW_MS, days=14, height=HEIGHT).days[-1]
    failed = next(part for part in today.segments if part.state is JobState.FAILED)
    assert failed.height >= chart.LEAST_HEIGHT
