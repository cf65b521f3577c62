"""Every night of a schedule is run once or recorded as missed once, whatever the clocks do."""

from __future__ import annotations

import itertools
import zoneinfo
from datetime import UTC, date, datetime, timedelta
from typing import TYPE_CHECKING
from zoneinfo import ZoneInfo

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from scheduler.nights import HORIZON, MOST_MISSED, Due, due, next_night

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

BERLIN = ZoneInfo("Europe/Berlin")
DAY = timedelta(days=1)
MINUTE = timedelta(minutes=1)

patient = settings(deadline=None)


def at(text: str) -> datetime:
    moment = datetime.fromisoformat(text)
    return moment if moment.tzinfo else moment.replace(tzinfo=UTC)


def nights(schedule: str, zone: ZoneInfo, start: datetime, end: datetime) -> Iterator[datetime]:
    """The nights after a moment, up to another."""
    night = next_night(schedule, zone, start)
    while night <= end:
        yield night
        night = next_night(schedule, zone, night)


# When the clocks change

CHANGES = [
    # zone, the day, a time in the hour that is skipped, when that hour ends in UTC
    ("Europe/Berlin", "2026-03-29", "02:30", "2026-03-29T01:00"),
    ("America/New_York", "2026-03-08", "02:30", "2026-03-08T07:00"),
    ("Australia/Lord_Howe", "2026-10-04", "02:15", "2026-10-03T15:30"),
    ("America/Santiago", "2026-09-06", "00:30", "2026-09-06T04:00"),
    ("Africa/Cairo", "2026-04-24", "00:30", "2026-04-23T22:00"),
    ("Antarctica/Troll", "2026-03-29", "01:30", "2026-03-29T01:00"),
]


@pytest.mark.parametrize(("name", "day", "clock", "ends"), CHANGES)
def test_a_night_in_an_hour_that_is_skipped_comes_at_its_end(
    name: str, day: str, clock: str, ends: str
) -> None:
    hour, minute = clock.split(":")
    zone, noon = ZoneInfo(name), datetime.fromisoformat(f"{day}T12:00")
    start, end = (noon + DAY * days for days in (-2, 1))
    schedule = f"{minute} {hour} * * *"
    found = list(nights(schedule, zone, start.replace(tzinfo=zone), end.replace(tzinfo=zone)))
    assert len(found) == 3
    assert found[1] == at(ends)
    for night in (found[0], found[2]):
        assert f"{night.astimezone(zone):%H:%M}" == clock


REPETITIONS = [
    # zone, the day, a time in the hour that is repeated, its first pass in UTC
    ("Europe/Berlin", "2026-10-25", "02:30", "2026-10-25T00:30"),
    ("America/New_York", "2026-11-01", "01:30", "2026-11-01T05:30"),
    ("Australia/Lord_Howe", "2026-04-05", "01:45", "2026-04-04T14:45"),
    ("America/Santiago", "2026-04-04", "23:30", "2026-04-05T02:30"),
    ("Africa/Cairo", "2026-10-29", "23:30", "2026-10-29T20:30"),
    ("Antarctica/Troll", "2026-10-25", "01:30", "2026-10-24T23:30"),
]


@pytest.mark.parametrize(("name", "day", "clock", "first"), REPETITIONS)
def test_a_night_in_an_hour_that_is_repeated_comes_at_its_first_pass(
    name: str, day: str, clock: str, first: str
) -> None:
    hour, minute = clock.split(":")
    zone, noon = ZoneInfo(name), datetime.fromisoformat(f"{day}T12:00")
    start, end = ((noon + DAY * days).replace(tzinfo=zone) for days in (-1, 1))
    found = list(nights(f"{minute} {hour} * * *", zone, start, end))
    assert found.count(at(first)) == 1
    assert len(found) == 2


def test_a_look_between_both_passes_of_an_hour_does_not_begin_the_night_again() -> None:
    night, second = at("2026-10-25T00:30"), at("2026-10-25T01:30")

    def found(*, handled: datetime, now: datetime) -> Due:
        return due("30 2 * * *", BERLIN, handled=handled, now=now, catch_up=6 * 60 * MINUTE)

    assert found(handled=night, now=second) == Due(None, ())
    assert found(handled=night, now=second + MINUTE) == Due(None, ())
    assert found(handled=night - MINUTE, now=second) == Due(night, ())
    # Somebody who starts during the second pass starts after the night.
    assert found(handled=second - MINUTE, now=second + MINUTE) == Due(None, ())


def test_an_hourly_schedule_runs_every_hour_whatever_the_clocks_say() -> None:
    for day in ("2026-03-29", "2026-10-25"):
        start = at(f"{day}T00:00") - DAY
        found = list(nights("0 * * * *", BERLIN, start, start + 3 * DAY))
        assert found == [start + timedelta(hours=hour) for hour in range(1, 73)]


ZONES = sorted(zoneinfo.available_timezones())
zones = st.sampled_from(ZONES).map(ZoneInfo)
years = st.integers(2013, 2036)  # before that, whole days were skipped


def moment_of(day: date, hour: int, minute: int, zone: ZoneInfo) -> datetime:
    """When a clock in a zone first shows a time on a day; if never, when that time is skipped."""
    naive = datetime(day.year, day.month, day.day, hour, minute)  # noqa: DTZ001
    before, after = (naive.replace(tzinfo=zone, fold=fold).astimezone(UTC) for fold in (0, 1))
    if before.astimezone(zone).replace(tzinfo=None) == naive:
        return before
    # In a gap the offset of before gives too late a moment, that of after too early a one.
    early, late = after, before
    offset = early.astimezone(zone).utcoffset()
    while late - early > timedelta(seconds=1):
        middle = early + (late - early) / 2
        if middle.astimezone(zone).utcoffset() == offset:
            early = middle
        else:
            late = middle
    return late.replace(microsecond=0)


@settings(deadline=None, max_examples=30)
@given(zones, years, st.integers(0, 23), st.integers(0, 59))
def test_a_daily_schedule_has_one_night_for_each_date_of_any_year_in_any_zone(
    zone: ZoneInfo, year: int, hour: int, minute: int
) -> None:
    first = date(year, 1, 1)
    days = (date(year + 1, 1, 1) - first).days
    expected = [moment_of(first + DAY * number, hour, minute, zone) for number in range(days)]
    found = nights(f"{minute} {hour} * * *", zone, expected[0] - MINUTE, expected[-1])
    assert list(found) == expected


# What is due


def look(
    schedule: str, zone: ZoneInfo, looks: Iterable[datetime], catch_up: timedelta
) -> list[tuple[datetime, str, datetime]]:
    """What becomes of the nights if somebody looks at these moments: (night, what, when)."""
    looks = iter(looks)
    handled = next(looks)
    found = []
    for now in looks:
        asked = due(schedule, zone, handled=handled, now=now, catch_up=catch_up)
        found += [(night, "missed", now) for night in asked.missed]
        found += [(asked.run, "run", now)] if asked.run else []
        handled = max([handled, *asked.missed, *([asked.run] if asked.run else [])])
    return found


def test_at_its_time_and_for_a_while_after_it_a_night_is_to_be_run() -> None:
    night = at("2026-06-02T00:00")
    for late, expected in (
        (timedelta(seconds=-1), Due(None, ())),
        (timedelta(0), Due(night, ())),
        (timedelta(hours=6), Due(night, ())),
        (timedelta(hours=6, seconds=1), Due(None, (night,))),
        (timedelta(hours=23), Due(None, (night,))),
    ):
        found = due(
            "0 2 * * *",
            BERLIN,
            handled=night - DAY,
            now=night + late,
            catch_up=timedelta(hours=6),
        )
        assert found == expected


def test_of_several_nights_the_latest_is_made_up_for_and_the_others_are_missed() -> None:
    first = at("2026-06-02T00:00")
    found = due(
        "0 2 * * *",
        BERLIN,
        handled=first - MINUTE,
        now=first + 3 * DAY + MINUTE,
        catch_up=timedelta(days=30),
    )
    assert found == Due(first + 3 * DAY, (first, first + DAY, first + 2 * DAY))


def test_no_more_nights_than_a_hundred_are_told_and_these_are_the_latest() -> None:
    now = at("2026-06-02T00:00")
    for catch_up in (timedelta(hours=1), MINUTE):
        found = due("*/10 * * * *", BERLIN, handled=now - 9 * DAY, now=now, catch_up=catch_up)
        told = [*found.missed, *([found.run] if found.run else [])]
        assert len(told) == MOST_MISSED + 1
        assert told[-1] == now
        assert all(later - earlier == 10 * MINUTE for earlier, later in itertools.pairwise(told))


def test_nights_of_long_ago_are_not_told() -> None:
    now = at("2026-06-02T00:00")
    found = due("0 2 * * *", BERLIN, handled=at("1990-01-01"), now=now, catch_up=MINUTE)
    assert found.run == now
    assert now - HORIZON < found.missed[0] <= now - HORIZON + DAY
    found = due("*/5 * * * * *", BERLIN, handled=at("1990-01-01"), now=now, catch_up=MINUTE)
    assert found.run == now
    assert len(found.missed) == MOST_MISSED


def test_nothing_is_due_when_the_clock_was_set_back() -> None:
    now = at("2026-06-02T00:00")
    assert due("* * * * *", BERLIN, handled=now + DAY, now=now, catch_up=DAY) == Due(None, ())


gaps = st.lists(
    st.sampled_from([MINUTE, 7 * MINUTE, timedelta(hours=5), timedelta(hours=11), 2 * DAY])
    | st.timedeltas(timedelta(seconds=1), timedelta(days=20)),
    min_size=1,
    max_size=40,
)
daily = st.builds("{} {} * * *".format, st.integers(0, 59), st.integers(0, 23))
schedules = daily | st.sampled_from(["0 */3 * * *", "30 2 * * 1-5", "0 0 1 * *", "15 1,2,3 * * *"])
starts = st.datetimes(datetime(2024, 1, 1), datetime(2028, 1, 1)).map(  # noqa: DTZ001
    lambda moment: moment.replace(tzinfo=UTC)
)
catch_ups = st.sampled_from([MINUTE, timedelta(hours=6), timedelta(hours=30), timedelta(days=10)])


@patient
@given(schedules, zones, starts, gaps, catch_ups)
def test_every_night_is_run_once_or_missed_once_however_seldom_somebody_looks(
    schedule: str, zone: ZoneInfo, start: datetime, gaps: list[timedelta], catch_up: timedelta
) -> None:
    looks = [start + sum(gaps[:number], timedelta()) for number in range(len(gaps) + 1)]
    told = look(schedule, zone, looks, catch_up)
    expected = list(nights(schedule, zone, start, looks[-1]))
    if schedule == "0 */3 * * *":  # more than a hundred may lie between two looks
        assert {night for night, _, _ in told} <= set(expected)
        assert len(told) == len({night for night, _, _ in told})
    else:
        assert [night for night, _, _ in told] == expected
    following = dict(itertools.pairwise(expected))
    for night, what, now in told:
        assert night <= now
        made_up_for_another = following.get(night, now + DAY) <= now
        assert (what == "run") == (now - night <= catch_up and not made_up_for_another)


@settings(deadline=None, max_examples=30)
@given(daily, zones, starts)
def test_who_looks_every_few_minutes_runs_every_night_and_misses_none(
    schedule: str, zone: ZoneInfo, start: datetime
) -> None:
    looks = [start + 17 * MINUTE * number for number in range(4 * 24 * 60 // 17)]
    told = look(schedule, zone, looks, timedelta(hours=1))
    assert [what for _, what, _ in told] == ["run"] * len(told)
    assert [night for night, _, _ in told] == list(nights(schedule, zone, start, looks[-1]))
    assert all(now - night < 17 * MINUTE for night, _, now in told)
