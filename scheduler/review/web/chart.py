"""Bars of outcomes by day, as numbers to draw: pure."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from datetime import UTC, date, datetime, timedelta
from typing import TYPE_CHECKING, Final

from worker.ledger import JobState

if TYPE_CHECKING:
    from collections.abc import Iterable

    from worker.ledger import Run

ORDER: Final = (
    JobState.DELETED,
    JobState.ALREADY_DELETED,
    JobState.ACCEPTED,
    JobState.SKIPPED,
    JobState.FAILED,
    JobState.CANCELLED,
    JobState.LEASED,
    JobState.PENDING,
)
"""The outcomes from the foot of a bar to its top."""
LEAST_HEIGHT: Final = 2.0
"""Few among many must be seen too."""


@dataclass(frozen=True, slots=True)
class Segment:
    """A part of a bar.

    Attributes:
        state: the outcome.
        count: how many jobs.
        y, height: where it is, from the top, in the chart's own units.
    """

    state: JobState
    count: int
    y: float
    height: float


@dataclass(frozen=True, slots=True)
class Day:
    """A bar, and the row of the table that says the same.

    Attributes:
        day: the day, in UTC.
        runs: how many runs were made on it.
        counts: their jobs by outcome.
        segments: the bar's parts, from its foot.
    """

    day: date
    runs: int
    counts: Counter[JobState]
    segments: tuple[Segment, ...]


@dataclass(frozen=True, slots=True)
class Chart:
    """A bar for each of some days, oldest first.

    Attributes:
        days: the bars.
        most: jobs that the chart's height stands for.
        states: the outcomes that there are, from the foot.
    """

    days: tuple[Day, ...]
    most: int
    states: tuple[JobState, ...]


def bars(runs: Iterable[Run], now_ms: int, *, days: int, height: float) -> Chart:
    """Jobs by outcome and by the day on which their runs were made.

    Args:
        runs: the runs.
        now_ms: now, in ms since the epoch: the last day is today.
        days: how many days.
        height: of the chart, in its own units.
    """
    today = _day(now_ms)
    shown = [today - timedelta(days=back) for back in reversed(range(days))]
    counts: dict[date, Counter[JobState]] = {day: Counter() for day in shown}
    made: Counter[date] = Counter()
    for run in runs:
        if (day := _day(run.created_ms)) in counts:
            made[day] += 1
            if run.started_ms:  # the jobs of others, such as a dry run's, come to nothing
                counts[day].update(run.counts)
    most = max((total.total() for total in counts.values()), default=0)
    scale = height / most if most else 0.0
    found = tuple(
        Day(day, made[day], counts[day], _segments(counts[day], scale, height)) for day in shown
    )
    states = tuple(state for state in ORDER if any(counts[day][state] for day in shown))
    return Chart(found, most, states)


def _segments(counts: Counter[JobState], scale: float, height: float) -> tuple[Segment, ...]:
    sizes = {state: max(LEAST_HEIGHT, counts[state] * scale) for state in ORDER if counts[state]}
    # What small parts got too much, the largest gives.
    over = sum(sizes.values()) - height
    if over > 0:
        sizes[max(sizes, key=lambda state: sizes[state])] -= over
    segments = []
    top = height
    for state, size in sizes.items():
        top -= size
        segments.append(Segment(state, counts[state], round(top, 2), round(size, 2)))
    return tuple(segments)


def _day(at_ms: int) -> date:
    return datetime.fromtimestamp(at_ms / 1000, UTC).date()
