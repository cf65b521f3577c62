"""What stops a run before it starts: pure. What stops one midway is the ledger's to check."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from datetime import datetime
    from zoneinfo import ZoneInfo

    from scheduler.policy import Brakes


def held_by(
    brakes: Brakes, *, deletions: int, pools: int, now: datetime, zone: ZoneInfo
) -> str | None:
    """The brake that holds a run.

    Args:
        brakes: the policy's.
        deletions: how many pools the run would delete.
        pools: how many pools its project has.
        now: an aware time.
        zone: the time zone that the quiet windows go by.

    Returns:
        Which, and by which numbers, in one phrase; None: the run may start.
    """
    if deletions == 0:
        return None
    if deletions > brakes.max_deletions:
        return f"{deletions} deletions are more than max_deletions={brakes.max_deletions} allows"
    percent = 100 * deletions / pools if pools else 100.0
    if percent > brakes.max_percent:
        return (
            f"{deletions} deletions are {percent:.1f}% of the project's {pools} pools, more than "
            f"max_percent={brakes.max_percent:g} allows"
        )
    local = now.astimezone(zone)
    for window in brakes.quiet:
        if window.covers(local):
            return (
                f"it is {local:%a %H:%M} in {zone.key}, in the quiet window from "
                f"{window.start:%H:%M} to {window.end:%H:%M} on {', '.join(window.days)}"
            )
    return None
