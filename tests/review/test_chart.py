"""The bars of outcomes: pure."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from datetime import UTC, datetime

import pytest
from hypothesis import given
from hypothesis import strategies as st

from scheduler.review import bars
from scheduler.review.web.chart import by_day
from worker.ledger import JobState, Run, RunState

NOW_MS = 1_790_000_000_000


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
    drawn = by_day(made, NOW_MS, days=14)
    days = {day.day for day in drawn.days}
    assert len(days) == 14
    expected: Counter[str] = Counter()
    for run in made:
        if (day := datetime.fromtimestamp(run.created_ms / 1000, UTC).date()) in days:
            expected.update({f"{day} {state}": count for state, count in run.counts.items()})
    bar, row = Counter[str](), Counter[str]()
    for piece in drawn.picture.pieces:
        bar[f"{piece.day} {piece.kind}"] += piece.count
    for each in drawn.days:
        row.update({f"{each.day} {state}": count for state, count in each.counts.items()})
    assert +bar == +row == +expected
    assert set(drawn.picture.kinds) == {key.partition(" ")[2] for key in +expected}


@given(runs)
def test_parts_stand_on_each_other_and_stay_in_the_picture(made: list[Run]) -> None:
    picture = by_day(made, NOW_MS, days=14).picture
    edges: dict[str, float] = {}
    for piece in picture.pieces:
        assert piece.y + piece.height == pytest.approx(edges.get(piece.day, picture.bottom))
        assert piece.height >= bars.LEAST_HEIGHT
        edges[piece.day] = piece.y
        assert piece.y >= picture.ticks[-1].at - 1e-6


def test_the_jobs_of_a_run_that_was_never_started_are_in_no_bar() -> None:
    planned = replace(run_of(0, {JobState.PENDING: 5_000}), started_ms=0)
    drawn = by_day([planned], NOW_MS, days=14)
    assert (drawn.days[-1].runs, drawn.days[-1].counts.total()) == (1, 0)
    assert drawn.picture.pieces == ()


def test_a_failure_among_a_hundred_thousand_jobs_is_seen() -> None:
    run = run_of(0, {JobState.DELETED: 99_999, JobState.FAILED: 1})
    deleted, failed = by_day([run], NOW_MS, days=14).picture.pieces
    assert failed.height == bars.LEAST_HEIGHT
    # The bar as a whole is as tall as its count.
    ticks = by_day([run], NOW_MS, days=14).picture.ticks
    assert ticks[-1].text == "100,000"
    assert deleted.height + failed.height == pytest.approx(ticks[0].at - ticks[-1].at)
