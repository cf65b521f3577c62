"""Outcomes by day, of the latest runs: pure."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING

from scheduler.review import bars
from scheduler.review.figures import day_of

if TYPE_CHECKING:
    from collections.abc import Iterable
    from datetime import date

    from scheduler.review.bars import Picture
    from worker.ledger import JobState, Run


@dataclass(frozen=True, slots=True)
class Day:
    """A bar, and the row of the table that says the same.

    Attributes:
        day: the day, in UTC.
        runs: how many runs were made on it.
        counts: their jobs by outcome.
    """

    day: date
    runs: int
    counts: Counter[JobState]


@dataclass(frozen=True, slots=True)
class Chart:
    """A bar for each of some days.

    Attributes:
        days: what the bars stand for, oldest first.
        picture: the bars.
    """

    days: tuple[Day, ...]
    picture: Picture


def by_day(runs: Iterable[Run], now_ms: int, *, days: int) -> Chart:
    """Jobs by outcome and by the day on which their runs were made.

    Args:
        runs: the runs.
        now_ms: now, in ms since the epoch: the last day is today.
        days: how many days.
    """
    today = day_of(now_ms)
    counts: dict[date, Counter[JobState]] = {
        today - timedelta(days=back): Counter() for back in reversed(range(days))
    }
    made: Counter[date] = Counter()
    for run in runs:
        if (day := day_of(run.created_ms)) in counts:
            made[day] += 1
            if run.started_ms:  # the jobs of others, such as a dry run's, come to nothing
                counts[day].update(run.counts)
    shown = tuple(Day(day, made[day], outcomes) for day, outcomes in counts.items())
    named = [
        (str(each.day), {str(state): count for state, count in each.counts.items()})
        for each in shown
    ]
    return Chart(shown, bars.stacked(named))
