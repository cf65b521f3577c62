"""What is read for the overview: bounded, however many runs and marks there are."""

from __future__ import annotations

import json
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any, Final, cast

from scheduler.almanac import Almanac
from scheduler.marks import Mark, Marks
from scheduler.review.web import chart, rates
from worker.ledger import keys
from worker.limiter import AIM
from worker.pause import EVERYTHING, pauses
from worker.reconciler import live_workers

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Sequence

    from redis.asyncio import Redis

    from scheduler.almanac import Night
    from scheduler.review.web.access import Viewer
    from scheduler.review.web.chart import Chart
    from scheduler.review.web.rates import Rate
    from worker.ledger import Ledger, Run, SchemaError
    from worker.limiter import Quota
    from worker.pause import Pause

DAYS: Final = 14
RUNS: Final = 50
"""Runs on a page, up to twice as many where there are others' among them."""
SCAN: Final = 500
"""Runs, the latest, that are looked at for one page."""
LATEST: Final = 10
MARKS: Final = 20
MOST_MARKS: Final = 5_000
"""With more than these only their number is told."""
PAIRS: Final = 100
"""Projects whose rate is told."""


@dataclass(frozen=True, slots=True)
class RunsPage:
    """A page of runs, newest first.

    Attributes:
        runs: those that the viewer sees.
        next: the cursor from which on there may be more; None: there are no more.
        unread: how many were left out since a newer version made them: anybody's, as nobody can
            tell whose they are.
    """

    runs: list[Run]
    next: int | None
    unread: int


@dataclass(frozen=True, slots=True)
class MarksSeen:
    """The marks that a viewer sees.

    Attributes:
        total: how many there are.
        due: how many of them are due; None: too many to look at.
        first: those that are due first.
    """

    total: int
    due: int | None
    first: Sequence[Mark]


@dataclass(frozen=True, slots=True)
class PolicyNights:
    """A policy's next night and its latest ones.

    Attributes:
        policy: its name.
        next: when the next is; None: the scheduler says of none.
        past: the latest, newest first.
    """

    policy: str
    next: datetime | None
    past: list[Night]


@dataclass(frozen=True, slots=True)
class ProjectRate:
    """How fast one project's calls go; no rate: there were none for an hour, or no limit."""

    endpoint: str
    project_id: str
    rate: Rate | None


@dataclass(frozen=True, slots=True)
class Overview:
    """All that the overview shows."""

    chart: Chart
    runs: Sequence[Run]
    scanned_all: bool
    unread: int
    marks: MarksSeen
    led: bool
    rejected: str
    nights: list[PolicyNights]
    pauses: list[Pause]
    workers: dict[str, int]
    rates: list[ProjectRate]
    now_ms: int


async def overview(
    redis: Redis,
    ledger: Ledger,
    viewer: Viewer,
    *,
    quota: Callable[[str], Quota],
    endpoints: Sequence[str],
) -> Overview:
    """What the overview shows to somebody.

    Args:
        redis: a connection that decodes responses.
        ledger: the runs in it.
        viewer: who looks.
        quota: a project's rate limit.
        endpoints: those that are configured; told of besides the ones that runs name.
    """
    now_ms = await ledger.now_ms()
    page = await runs_page(redis, ledger, viewer, cursor=0, wanted=SCAN)
    pairs = dict.fromkeys((run.endpoint, each) for run in page.runs for each in run.projects)
    # Where others have their runs is for those who see everything.
    named = dict.fromkeys(endpoints if viewer.projects is None else ())
    named |= dict.fromkeys(run.endpoint for run in page.runs)
    almanac = Almanac(redis)
    said = await almanac.said()
    on = (await pauses(redis)).values()
    return Overview(
        chart=chart.by_day(page.runs, now_ms, days=DAYS),
        runs=page.runs[:LATEST],
        scanned_all=page.next is None,
        unread=page.unread,
        marks=await _marks(redis, viewer, now_ms),
        led=said is not None,
        # It quotes the policy file, which is no one project's.
        rejected=str(said.get("rejected", "")) if said and viewer.projects is None else "",
        nights=await _nights(almanac, viewer, (said or {}).get("next") or {}),
        pauses=[each for each in on if each.scope == EVERYTHING or viewer.sees(each.scope)],
        workers={each: await live_workers(redis, each) for each in list(named)[:PAIRS]},
        rates=await _rates(redis, list(pairs)[:PAIRS], quota, now_ms),
        now_ms=now_ms,
    )


async def runs_page(
    redis: Redis, ledger: Ledger, viewer: Viewer, *, cursor: int, wanted: int = RUNS
) -> RunsPage:
    """Runs that somebody sees, newest first.

    Args:
        redis: a connection that decodes responses.
        ledger: the runs in it.
        viewer: who looks.
        cursor: how many runs, anybody's, lie before.
        wanted: how many are enough.
    """
    total = int(await redis.zcard(keys.INDEX))
    found: list[Run] = []
    unread: list[SchemaError] = []
    position, end = cursor, min(total, cursor + SCAN)
    while position < end and len(found) < wanted:
        size = min(RUNS, end - position)
        chunk = await ledger.runs(limit=size, offset=position, unread=unread.append)
        found += (run for run in chunk if viewer.sees_run(run))
        position += size
    return RunsPage(found, position if position < total else None, len(unread))


async def _marks(redis: Redis, viewer: Viewer, now_ms: int) -> MarksSeen:
    members = cast("Awaitable[set[str]]", redis.smembers(keys.MARKED))
    places = [tuple(json.loads(text)) for text in sorted(await members)]
    places = [place for place in places if viewer.sees(place[1])]
    async with redis.pipeline(transaction=False) as pipe:
        for place in places:
            pipe.hlen(keys.marks(*place))
        total = sum(await pipe.execute())
    if total > MOST_MARKS:
        return MarksSeen(total, None, ())
    marks: list[Mark] = []
    for endpoint, project_id, policy in places:
        marks += (await Marks(redis, endpoint).of(project_id, policy)).values()
    marks.sort(key=lambda mark: (mark.due_at, mark.project_id, mark.pool_id))
    now = datetime.fromtimestamp(now_ms / 1000, UTC)
    due = sum(mark.due_at <= now for mark in marks)
    return MarksSeen(len(marks), due, marks[:MARKS])


async def _nights(almanac: Almanac, viewer: Viewer, coming: dict[str, Any]) -> list[PolicyNights]:
    found = []
    for policy in sorted(coming.keys() | await almanac.policies()):
        past = await almanac.past(policy, limit=5)
        if viewer.projects is None or any(viewer.sees(*night.runs) for night in past):
            shown = [night for night in past if viewer.projects is None or viewer.sees(*night.runs)]
            found.append(PolicyNights(policy, _moment(coming.get(policy)), shown))
    return found


def _moment(said: Any) -> datetime | None:
    try:
        return datetime.fromisoformat(said).astimezone(UTC)
    except (TypeError, ValueError):
        return None


async def _rates(
    redis: Redis, pairs: Sequence[tuple[str, str]], quota: Callable[[str], Quota], now_ms: int
) -> list[ProjectRate]:
    async with redis.pipeline(transaction=False) as pipe:
        for endpoint, project_id in pairs:
            pipe.hgetall(keys.limiter(endpoint, project_id))
        states = await pipe.execute()
    return [
        ProjectRate(
            endpoint, project_id, rates.rate_of(state, quota(project_id).rate * AIM, now_ms)
        )
        for (endpoint, project_id), state in zip(pairs, states, strict=True)
    ]
