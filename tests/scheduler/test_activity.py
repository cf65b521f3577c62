"""What runs in a pool and how busy it is: a hole in what is known is never taken for rest."""

from __future__ import annotations

import itertools
import random
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.modelarts.pool_documents import json_values
from worker.modelarts.activity import (
    GAP,
    OVER,
    UsageSeries,
    is_busy,
    parse_usage,
    period_for,
    title,
)
from worker.modelarts.schema import Workload

END = datetime(2026, 1, 2, 3, 4, 5, tzinfo=UTC)
PERIOD = timedelta(minutes=5)
WINDOW = timedelta(hours=2)

patient = settings(deadline=None, max_examples=70)


def workload(**fields: Any) -> Workload:
    return Workload.model_validate(fields)


# Workloads


@pytest.mark.parametrize("status", ["Queue", "Pending", "Creating", "Running"])
def test_a_workload_that_runs_or_will_run_uses_its_pool(status: str) -> None:
    assert is_busy(workload(status=status))


@pytest.mark.parametrize("status", ["Abnormal", "Terminating", "Completed", "Terminated", "Failed"])
def test_a_workload_that_is_over_does_not(status: str) -> None:
    assert not is_busy(workload(status=status))
    assert status in OVER


@pytest.mark.parametrize("status", [None, "", "completed", "Suspended", 5, ["Completed"], {}])
def test_a_workload_of_an_unknown_status_uses_its_pool(status: Any) -> None:
    assert is_busy(workload(status=status))
    assert is_busy(workload())


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"jobName": "train", "name": "pod"}, "train"),
        ({"jobName": "", "name": "pod"}, "pod"),
        ({"jobName": 5, "name": "pod"}, "pod"),
        ({"name": None}, "a workload"),
    ],
)
def test_a_workload_is_called_as_people_know_it(fields: dict[str, Any], expected: str) -> None:
    assert title(workload(**fields)) == expected


# Utilisation


def ms(moment: datetime) -> int:
    return round(moment.timestamp() * 1000)


def series(*points: tuple[timedelta, float]) -> UsageSeries:
    """Points at times before the end."""
    return UsageSeries(sorted((ms(END - back), value) for back, value in points), PERIOD)


def steady(
    value: float = 0, *, back: timedelta = WINDOW, until: timedelta = timedelta(0)
) -> list[tuple[timedelta, float]]:
    """A point each period, from so long before the end until so long before it."""
    count = (back - until) // PERIOD
    return [(until + PERIOD * number, value) for number in range(count + 1)]


def peak(found: UsageSeries) -> float | None:
    return found.peak(END - WINDOW, END)


def test_the_peak_is_the_highest_value_in_the_window() -> None:
    assert peak(series(*steady(3), (timedelta(minutes=61), 40))) == 40
    assert peak(series(*steady(3))) == 3
    # Long ago it was busy, and that is not asked about.
    assert peak(series(*steady(3), (WINDOW * 2, 99))) == 3


def test_a_window_that_is_not_covered_whole_has_no_peak() -> None:
    at_most = GAP * PERIOD
    tick = timedelta(milliseconds=1)
    for back, until, known in (
        (WINDOW, at_most, True),
        (WINDOW, at_most + tick, False),
        (WINDOW - at_most, timedelta(0), True),
        (WINDOW - at_most - PERIOD, timedelta(0), False),
    ):
        assert (peak(series(*steady(back=back, until=until))) is not None) == known


def test_a_hole_in_the_middle_may_hide_a_peak() -> None:
    def with_hole(length: timedelta) -> UsageSeries:
        hour = timedelta(hours=1)
        return series(*steady(back=WINDOW, until=hour + length), *steady(back=hour))

    assert peak(with_hole(GAP * PERIOD)) == 0
    assert peak(with_hole(GAP * PERIOD + timedelta(milliseconds=1))) is None


def test_no_points_are_no_peak() -> None:
    assert peak(UsageSeries([], PERIOD)) is None
    assert peak(series((WINDOW * 3, 0.0))) is None
    # Seconds instead of milliseconds: fifty years ago.
    assert (
        peak(UsageSeries([(at // 1000, 0.0) for at, _ in series(*steady()).points], PERIOD)) is None
    )


@patient
@given(st.lists(st.tuples(st.timedeltas(-WINDOW, WINDOW * 3), st.floats(0, 100)), max_size=120))
def test_a_peak_is_told_only_if_there_is_no_hole_and_then_none_is_higher(
    points: list[tuple[timedelta, float]],
) -> None:
    found = peak(series(*points))
    inside = sorted(back for back, _ in points if timedelta(0) <= back <= WINDOW)
    if found is not None:
        assert found >= max((v for back, v in points if timedelta(0) <= back <= WINDOW), default=0)
        marks = [timedelta(0), *inside, WINDOW]
        widest = max(later - earlier for earlier, later in itertools.pairwise(marks))
        assert widest <= 2 * GAP * PERIOD, "a point just outside may cover up to a gap on its side"


# The monitor's answer


def answer(*points: dict[str, Any], name: Any = "gpuUtil") -> dict[str, Any]:
    return {"metrics": [{"metric": {"metricName": name}, "dataPoints": list(points)}]}


def point(at: Any, *values: Any, **more: Any) -> dict[str, Any]:
    return {"timestamp": at, "statistics": [{"value": value} for value in values], **more}


def points(document: Any) -> Any:
    return {name: found.points for name, found in parse_usage(document, PERIOD).items()}


def test_an_answer_becomes_a_series_for_each_metric() -> None:
    document = {
        "metrics": [
            {
                "metric": {"metricName": "gpuUtil", "dimensions": [], "namespace": "PAAS.AGGR"},
                "dataPoints": [
                    point(2_000, 5, unit="Percent"),
                    point(1_000, 7.5, 3, unit="Percent"),
                ],
            },
            {"metric": {"metricName": "cpuUsage"}, "dataPoints": [point(1_000, 1)]},
        ]
    }
    assert points(document) == {
        "gpuUtil": [(1_000, 7.5), (2_000, 5.0)],
        "cpuUsage": [(1_000, 1.0)],
    }
    assert parse_usage(document, PERIOD)["gpuUtil"].period == PERIOD


def test_of_several_values_at_one_time_the_highest_counts() -> None:
    assert points(answer(point(1, 3), point(1, 9), point(1, 4))) == {"gpuUtil": [(1, 9.0)]}


@pytest.mark.parametrize(
    "odd",
    [
        point(1, -1),
        point(1, None),
        point(1, "0"),
        point(1, True),
        point(1, float("nan")),
        point(1, float("inf")),
        point(1, 10**400),
        point(10**400, 0),
        point("1", 0),
        point(None, 0),
        point(True, 0),
        point(1),
        point(1, 0, unit="Bytes"),
        point(1, 0, unit="Count"),
        # A share from 0 to 1 would look like a pool that sleeps.
        point(1, 0.9, unit="Ratio"),
        point(1, 0, unit=["Percent"]),
        {"timestamp": 1},
        {"timestamp": 1, "statistics": {"value": 0}},
        "text",
        None,
    ],
    ids=repr,
)
def test_what_cannot_be_read_or_means_no_data_is_left_out(odd: Any) -> None:
    assert points(answer(odd)) == {}
    assert points(answer(odd, point(2, 5))) == {"gpuUtil": [(2, 5.0)]}


@pytest.mark.parametrize(
    "document",
    [
        {},
        {"metrics": None},
        {"metrics": {}},
        {"metrics": [None, "text", {}]},
        {"metrics": [{"metric": "gpuUtil", "dataPoints": [point(1, 0)]}]},
        answer(point(1, 0), name=5),
        {"cpuUsage": 3.0, "gpuUtil": 0.0},
    ],
    ids=repr,
)
def test_an_answer_of_another_form_tells_nothing(document: dict[str, Any]) -> None:
    assert points(document) == {}


@patient
@given(json_values(), json_values(), json_values(), st.integers())
def test_no_answer_makes_reading_fail(one: Any, two: Any, three: Any, seed: int) -> None:
    shapes = [
        {"metrics": one},
        answer(one, two, three),
        answer(point(one, two, three), name="gpuUtil"),
        answer(point(1, one, unit=two), name=three),
    ]
    document = random.Random(seed).choice(shapes)
    for found in parse_usage(document, PERIOD).values():
        times = [at for at, _ in found.points]
        assert times == sorted(set(times))
        assert all(value >= 0 for _, value in found.points)
        found.peak(END - WINDOW, END)


@pytest.mark.parametrize(
    ("window", "seconds"),
    [
        (timedelta(hours=1), 60),
        (timedelta(hours=5), 60),
        (timedelta(hours=6), 300),
        (timedelta(days=1), 300),
        (timedelta(days=2), 900),
        (timedelta(days=7), 3600),
        (timedelta(days=30), 3600),
    ],
)
def test_the_longer_the_window_the_farther_apart_the_points(
    window: timedelta, seconds: int
) -> None:
    assert period_for(window) == timedelta(seconds=seconds)
