"""What stops a run before it starts: pure. What stops one midway is the ledger's to check."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Mapping
    from datetime import datetime
    from zoneinfo import ZoneInfo

    from scheduler.policy import Brakes


def held(
    brakes: Brakes, counts: Mapping[str, tuple[int, int]], *, now: datetime, zone: ZoneInfo
) -> str | None:
    """The brake that holds a run, which may be over several projects.

    Args:
        brakes: the bounds: `max_deletions` counts the whole run, `max_percent` each project.
        counts: by project id: how many pools the run would delete, and how many there are.
        now: an aware time.
        zone: the time zone that the quiet windows go by.

    Returns:
        Which, and by which numbers, in one phrase; None: the run may start.
    """
    total = sum(deletions for deletions, _ in counts.values())
    if total == 0:
        return None
    if total > brakes.max_deletions:
        return f"{total} deletions are more than max_deletions={brakes.max_deletions} allows"
    for project_id, (deletions, pools) in counts.items():
        percent = 100 * deletions / pools if pools else 100.0
        if deletions and percent > brakes.max_percent:
            whose = "the project's" if len(counts) == 1 else f"project {project_id}'s"
            return (
                f"{deletions} deletions are {percent:.1f}% of {whose} {pools} pools, more than "
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


def held_by(
    brakes: Brakes, *, deletions: int, pools: int, now: datetime, zone: ZoneInfo
) -> str | None:
    """The brake that holds a run over one project; see `held`.

    Args:
        brakes: the policy's.
        deletions: how many pools the run would delete.
        pools: how many pools its project has.
        now: an aware time.
        zone: the time zone that the quiet windows go by.
    """
    return held(brakes, {"": (deletions, pools)}, now=now, zone=zone)
