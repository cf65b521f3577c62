"""What runs in a pool, and how busy it is: pure facts from the workloads and monitor calls."""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    from collections.abc import Sequence
    from datetime import datetime

    from worker.modelarts.schema import Workload

OVER: Final = frozenset({"Abnormal", "Terminating", "Completed", "Terminated", "Failed"})
"""The workload statuses that mean that the pool is not in use (by this workload)."""

GAP: Final = 3
"""So many periods may lie between two points of a series that has no hole."""


_PERCENT: Final = (None, "", "Percent", "%")
"""Units of a point; a share from 0 to 1 would look like a pool that sleeps."""


def title(workload: Workload) -> str:
    """A workload as people know it: its job's name, else its own; `a workload` if neither."""
    for text in (workload.job_name, workload.name):
        if isinstance(text, str) and text:
            return text
    return "a workload"


def is_busy(workload: Workload) -> bool:
    """Whether a workload uses its pool; one of unknown status does.

    Source: the API document, workloads, status.
    """
    status = workload.status
    return not isinstance(status, str) or status not in OVER


@dataclass(frozen=True, slots=True)
class UsageSeries:
    """A utilisation over time.

    Attributes:
        points: (ms since the epoch, percent), in order.
        period: how far apart they are.
    """

    points: Sequence[tuple[int, float]]
    period: timedelta

    def peak(self, start: datetime, end: datetime) -> float | None:
        """The highest percentage in a window; None if the window is not covered whole.

        Args:
            start, end: aware times.
        """
        start_ms, end_ms = start.timestamp() * 1000, end.timestamp() * 1000
        gap_ms = GAP * self.period.total_seconds() * 1000
        within = [(at, value) for at, value in self.points if at >= start_ms - gap_ms]
        times = [start_ms, *(at for at, _ in within), end_ms]
        # A gap may hide a peak, so there must be none.
        if not within or any(
            later - earlier > gap_ms for earlier, later in itertools.pairwise(times)
        ):
            return None
        return max(value for _, value in within)


def parse_usage(document: dict[str, Any], period: timedelta) -> dict[str, UsageSeries]:
    """Read the monitor's answer.

    Args:
        document: `{"metrics": [{"metric": {"metricName"}, "dataPoints": [{"timestamp",
            "statistics": [{"value"}]}]}]}`.
        period: how far apart its points are.

    Returns:
        A series for each metric that has points; what cannot be read or is no percentage, and the
        negative values that stand for "no data", are left out.

    Source: the cloud's document "Monitoring a Resource Pool" (ShowPoolMonitor).
    """
    found: dict[str, dict[int, float]] = {}
    for metric in _sequence(document.get("metrics")):
        name = _mapping(_mapping(metric).get("metric")).get("metricName")
        if not isinstance(name, str):
            continue
        points = found.setdefault(name, {})
        for point in _sequence(_mapping(metric).get("dataPoints")):
            if _mapping(point).get("unit") not in _PERCENT:
                continue
            at = _number(_mapping(point).get("timestamp"))
            for statistic in _sequence(_mapping(point).get("statistics")):
                value = _number(_mapping(statistic).get("value"))
                if at is not None and value is not None and value >= 0:
                    points[int(at)] = max(value, points.get(int(at), 0.0))
    return {
        name: UsageSeries(sorted(points.items()), period)
        for name, points in found.items()
        if points
    }


def period_for(window: timedelta) -> timedelta:
    """The finest period whose points over a window stay few: the API takes four.

    Args:
        window: the time that is asked about.
    """
    for seconds in (60, 300, 900):
        if window.total_seconds() / seconds <= 300:
            return timedelta(seconds=seconds)
    return timedelta(hours=1)


def _number(value: Any) -> float | None:
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    try:
        number = float(value)
    except OverflowError:
        return None
    return number if math.isfinite(number) else None


def _mapping(value: Any) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}


def _sequence(value: Any) -> list[Any]:
    return value if isinstance(value, list) else []
