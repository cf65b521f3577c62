"""A run is held exactly from its bounds on, and within its quiet windows."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Any
from zoneinfo import ZoneInfo

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from scheduler.brakes import held as held_whole
from scheduler.brakes import held_by
from scheduler.policy import DAYS, Brakes, QuietWindow

if TYPE_CHECKING:
    from collections.abc import Sequence

BERLIN = ZoneInfo("Europe/Berlin")
NOON = datetime(2026, 1, 7, 12, tzinfo=UTC)  # a Wednesday, and 13:00 in Berlin

patient = settings(deadline=None, max_examples=70)


def held(
    deletions: int = 1,
    pools: int = 1_000,
    *,
    now: datetime = NOON,
    zone: ZoneInfo = BERLIN,
    **brakes: Any,
) -> str | None:
    asked = Brakes.model_validate({"max_percent": 100, **brakes})
    return held_by(asked, deletions=deletions, pools=pools, now=now, zone=zone)


def test_a_run_within_all_bounds_may_start() -> None:
    assert held(50, 100) is None


@pytest.mark.parametrize(
    ("deletions", "bound", "stops"), [(5, 5, False), (6, 5, True), (1, 0, True), (0, 0, False)]
)
def test_more_deletions_than_the_bound_are_held(deletions: int, bound: int, stops: bool) -> None:
    why = held(deletions, max_deletions=bound)
    assert (why is not None) == stops
    if why:
        assert why == f"{deletions} deletions are more than max_deletions={bound} allows"


@pytest.mark.parametrize(
    ("deletions", "pools", "bound", "stops"),
    [
        (3, 10, 30, False),
        (4, 10, 30, True),
        (1, 3, 33.3, True),
        (1, 3, 33.4, False),
        (7, 70, 10, False),
        (1, 1_000, 0.1, False),
        (2, 1_000, 0.1, True),
        (10, 10, 100, False),
        (1, 10, 0, True),
        (0, 10, 0, False),
        (0, 0, 0, False),
        # Deletions of a project that has no pools: something is amiss.
        (1, 0, 99, True),
    ],
)
def test_a_larger_share_than_the_bound_is_held(
    deletions: int, pools: int, bound: float, stops: bool
) -> None:
    assert (held(deletions, pools, max_percent=bound) is not None) == stops


def test_a_brake_tells_its_numbers() -> None:
    assert held(4, 10, max_percent=30) == (
        "4 deletions are 40.0% of the project's 10 pools, more than max_percent=30 allows"
    )
    window = {"days": ["wed", "thu"], "from": "08:00", "to": "20:00"}
    assert held(quiet=[window]) == (
        "it is Wed 13:00 in Europe/Berlin, in the quiet window from 08:00 to 20:00 on wed, thu"
    )


@patient
@given(st.integers(0, 10**6), st.integers(1, 10**6), st.integers(0, 100))
def test_the_share_is_weighed_exactly(deletions: int, pools: int, percent: int) -> None:
    why = held(deletions, pools, max_percent=percent, max_deletions=10**6)
    assert (why is not None) == (deletions * 100 > percent * pools)


@patient
@given(st.integers(0, 100), st.integers(0, 100), st.integers(0, 100), st.floats(0, 100))
def test_fewer_deletions_are_never_held_where_more_are_not(
    deletions: int, fewer: int, bound: int, percent: float
) -> None:
    brakes: dict[str, Any] = {"max_deletions": bound, "max_percent": percent}
    if fewer <= deletions and held(deletions, 100, **brakes) is None:
        assert held(fewer, 100, **brakes) is None


# A run over several projects

projects = st.dictionaries(
    st.sampled_from(["p1", "p2", "p3", "p4"]),
    st.integers(0, 200).flatmap(lambda pools: st.tuples(st.integers(0, pools), st.just(pools))),
    min_size=1,
)


def held_over(counts: dict[str, tuple[int, int]], **brakes: Any) -> str | None:
    asked = Brakes.model_validate({"max_percent": 100, "max_deletions": 10**6, **brakes})
    return held_whole(asked, counts, now=NOON, zone=BERLIN)


def test_deletions_are_bounded_over_the_whole_run() -> None:
    counts = {"p1": (3, 100), "p2": (3, 100)}
    assert held_over(counts, max_deletions=6) is None
    assert held_over(counts, max_deletions=5) == (
        "6 deletions are more than max_deletions=5 allows"
    )


def test_shares_are_bounded_in_each_project() -> None:
    counts = {"p1": (1, 100), "p2": (6, 10)}
    assert held_over(counts, max_percent=60) is None
    assert held_over(counts, max_percent=50) == (
        "6 deletions are 60.0% of project p2's 10 pools, more than max_percent=50 allows"
    )


def test_a_project_without_deletions_holds_no_other() -> None:
    assert held_over({"p1": (0, 0), "p2": (1, 10)}, max_percent=10) is None
    assert held_over({"p1": (0, 0)}, max_percent=0, max_deletions=0, quiet=[WEEKEND, WORK]) is None
    assert held_over({"p1": (0, 5), "p2": (1, 9)}, quiet=[WORK]) is not None


@patient
@given(projects, st.integers(0, 500), st.integers(0, 100))
def test_a_run_is_held_by_its_sum_or_by_any_of_its_projects(
    counts: dict[str, tuple[int, int]], bound: int, percent: int
) -> None:
    too_many = sum(deletions for deletions, _ in counts.values()) > bound
    too_large = any(100 * deletions > percent * pools for deletions, pools in counts.values())
    why = held_over(counts, max_deletions=bound, max_percent=percent)
    assert (why is not None) == (too_many or too_large)


@patient
@given(projects, st.integers(0, 500), st.integers(0, 100))
def test_a_run_over_one_project_is_held_as_a_policys_is(
    counts: dict[str, tuple[int, int]], bound: int, percent: int
) -> None:
    brakes: dict[str, Any] = {"max_deletions": bound, "max_percent": percent}
    for project, (deletions, pools) in counts.items():
        assert held_over({project: (deletions, pools)}, **brakes) == held(
            deletions, pools, **brakes
        )


# Quiet windows

WORK = {"days": ["mon", "tue", "wed", "thu", "fri"], "from": "08:00", "to": "20:00"}
NIGHT = {"days": ["fri"], "from": "22:00", "to": "06:00"}
WEEKEND = {"days": ["sat", "sun"]}
EVENING = {"days": ["mon"], "from": "18:00"}
AROUND = {"days": ["mon"], "from": "08:00", "to": "08:00"}


@pytest.mark.parametrize(
    ("window", "moment", "quiet"),
    [
        (WORK, "2026-01-07T07:59:59", False),
        (WORK, "2026-01-07T08:00:00", True),
        (WORK, "2026-01-07T19:59:59", True),
        (WORK, "2026-01-07T20:00:00", False),
        (WORK, "2026-01-10T12:00:00", False),
        (NIGHT, "2026-01-09T21:59:59", False),
        (NIGHT, "2026-01-09T22:00:00", True),
        (NIGHT, "2026-01-10T00:00:00", True),
        (NIGHT, "2026-01-10T05:59:59", True),
        (NIGHT, "2026-01-10T06:00:00", False),
        # What began on Friday goes on; what would begin on another day does not.
        (NIGHT, "2026-01-09T03:00:00", False),
        (NIGHT, "2026-01-10T23:00:00", False),
        (WEEKEND, "2026-01-09T23:59:59", False),
        (WEEKEND, "2026-01-10T00:00:00", True),
        (WEEKEND, "2026-01-11T23:59:59", True),
        (WEEKEND, "2026-01-12T00:00:00", False),
        (EVENING, "2026-01-12T17:59:59", False),
        (EVENING, "2026-01-12T23:59:59", True),
        (EVENING, "2026-01-13T00:00:00", False),
        (AROUND, "2026-01-12T07:59:59", False),
        (AROUND, "2026-01-12T08:00:00", True),
        (AROUND, "2026-01-13T07:59:59", True),
        (AROUND, "2026-01-13T08:00:00", False),
    ],
)
def test_a_window_is_quiet_from_its_beginning_to_just_before_its_end(
    window: dict[str, Any], moment: str, quiet: bool
) -> None:
    now = datetime.fromisoformat(moment).replace(tzinfo=BERLIN)
    assert (held(quiet=[window], now=now) is not None) == quiet
    # The same moment, told in another zone.
    assert (held(quiet=[window], now=now.astimezone(UTC)) is not None) == quiet


def test_any_of_several_windows_is_quiet_and_a_run_without_deletions_is_not_held() -> None:
    assert held(quiet=[WEEKEND, WORK]) is not None
    assert held(quiet=[WEEKEND, NIGHT]) is None
    assert held(0, quiet=[WORK]) is None


def test_windows_go_by_the_policys_own_zone() -> None:
    evening = datetime(2026, 1, 9, 23, 30, tzinfo=UTC)
    assert held(quiet=[WEEKEND], now=evening, zone=ZoneInfo("UTC")) is None
    assert held(quiet=[WEEKEND], now=evening) is not None, "it is Saturday in Berlin"
    assert held(quiet=[WEEKEND], now=evening, zone=ZoneInfo("America/New_York")) is None


def test_windows_go_by_what_clocks_show_on_the_days_when_they_change() -> None:
    window = {"from": "02:00", "to": "04:00"}

    def quiet_minutes(day: datetime) -> int:
        minutes = (day + timedelta(minutes=each) for each in range(24 * 60))
        return sum(held(quiet=[window], now=each) is not None for each in minutes)

    assert quiet_minutes(datetime(2026, 3, 29, tzinfo=UTC)) == 60
    assert quiet_minutes(datetime(2026, 7, 1, tzinfo=UTC)) == 120
    assert quiet_minutes(datetime(2026, 10, 25, tzinfo=UTC)) == 180


clocks = st.integers(0, 24 * 60 - 1).map(lambda at: f"{at // 60:02}:{at % 60:02}")
days = st.lists(st.sampled_from(DAYS), min_size=1, unique=True)


@patient
@given(days, clocks, clocks, st.datetimes(datetime(2025, 1, 1), datetime(2028, 1, 1)))  # noqa: DTZ001
def test_a_window_covers_what_comes_within_its_length_after_its_beginning(
    days: Sequence[str], start: str, end: str, moment: datetime
) -> None:
    window = QuietWindow.model_validate({"days": days, "from": start, "to": end})

    def minutes(clock: str) -> int:
        return int(clock[:2]) * 60 + int(clock[3:])

    length = (minutes(end) - minutes(start)) % (24 * 60) or 24 * 60
    begun = []
    for back in (0, 1):
        day = moment - timedelta(days=back)
        begins = day.replace(hour=0, minute=0, second=0, microsecond=0)
        begins += timedelta(minutes=minutes(start))
        if DAYS[day.weekday()] in days:
            begun.append(begins)
    expected = any(timedelta(0) <= moment - begins < timedelta(minutes=length) for begins in begun)
    assert window.covers(moment) == expected
