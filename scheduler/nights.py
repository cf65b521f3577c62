"""When a policy runs: cron in a time zone, what is due, what was missed; pure.

"Night" is one occurrence of a policy's schedule, whatever the time of day. On the days when the
clocks change a daily schedule runs once: a skipped hour's run comes at its end, a repeated hour's
at its first pass (as in Debian's cron).
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass
from datetime import UTC, timedelta
from typing import TYPE_CHECKING

from cronsim import CronSim

if TYPE_CHECKING:
    from datetime import datetime
    from zoneinfo import ZoneInfo

MOST_MISSED = 100
"""No more missed nights than these are told one by one."""
HORIZON = timedelta(days=31)
"""Nights longer ago than this are not told at all."""
HORIZON_WITH_SECONDS = timedelta(hours=1)


@dataclass(frozen=True, slots=True)
class Due:
    """What the time asks for.

    Attributes:
        run: the night to run now; None: none.
        missed: the nights that are not made up for, oldest first, the latest hundred at most.
    """

    run: datetime | None
    missed: tuple[datetime, ...]


def next_night(schedule: str, zone: ZoneInfo, after: datetime) -> datetime:
    """The first night after a moment, in UTC.

    Args:
        schedule: five cron fields, or six with seconds first.
        zone: the time zone that they go by.
        after: an aware time.
    """
    return next(CronSim(schedule, after.astimezone(zone))).astimezone(UTC)


def due(
    schedule: str, zone: ZoneInfo, *, handled: datetime, now: datetime, catch_up: timedelta
) -> Due:
    """What is due.

    Args:
        schedule: five cron fields, or six with seconds first.
        zone: the time zone that they go by.
        handled: the latest night that was run or recorded as missed; an aware time.
        now: an aware time.
        catch_up: a night that is later than this is not made up for.

    Returns:
        At most one night to run, however many were missed: the latest.
    """
    # However long nobody looked, no more than a bounded number of nights is counted through.
    horizon = HORIZON if len(schedule.split()) == 5 else HORIZON_WITH_SECONDS
    nights: deque[datetime] = deque(maxlen=MOST_MISSED + 1)
    for night in CronSim(schedule, max(handled, now - horizon).astimezone(zone)):
        if night > now:
            break
        if night > handled:
            nights.append(night.astimezone(UTC))
    if nights and now - nights[-1] <= catch_up:
        return Due(nights.pop(), tuple(nights))
    return Due(None, tuple(nights))
