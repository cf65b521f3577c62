"""A report read out of Redis: page by page, so that the number of jobs does not matter."""

from __future__ import annotations

import contextlib
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Final, cast

from scheduler.marks import all_marks
from scheduler.review.credit import CLAIMING, Overlaps, pools, rivals_until_ms
from scheduler.review.figures import MOST_TOLD, Figures
from scheduler.review.records import mark_record
from scheduler.review.report import DueMarks
from worker.ledger import RunNotFoundError, SchemaError, keys

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable
    from datetime import timedelta

    from redis.asyncio import Redis

    from scheduler.prices import Prices
    from scheduler.review.report import Report
    from worker.ledger import Ledger, Run

CALLING_MS: Final = 2 * 86_400_000
"""A run that was made longer before another is taken to make no calls any more."""
RUNS_AT_ONCE: Final = 500
"""Runs that are read in one step."""


async def report_of_run(redis: Redis, ledger: Ledger, run_id: str, prices: Prices | None) -> Report:
    """What one run came to.

    Args:
        redis: a connection that decodes responses.
        ledger: the ledger in it.
        run_id: the run.
        prices: what nodes cost; None: not known.

    Raises:
        RunNotFoundError: it is not there.
        RedisError: the ledger cannot be read.
    """
    run = await ledger.run(run_id)
    rivals = await rivals_of(redis, ledger, run)
    figures = Figures({run_id} if rivals else ())
    for rival in rivals:
        await add_claims(figures, ledger, rival)
    await _add(figures, ledger, run)
    return figures.report(await ledger.now_ms(), run_id=run_id, prices=prices)


async def report_since(
    redis: Redis, ledger: Ledger, window: timedelta, prices: Prices | None
) -> Report:
    """What the runs came to that were made in the last while.

    Args:
        redis: a connection that decodes responses.
        ledger: the ledger in it.
        window: how long ago the first were made.
        prices: what nodes cost; None: not known.

    Raises:
        RedisError: Redis cannot be read.
    """
    made_ms = await ledger.now_ms()
    since_ms = made_ms - round(window.total_seconds() * 1000)
    overlaps = Overlaps()
    async for run in _newest_first(redis, ledger, since_ms - CALLING_MS, made_ms):
        overlaps.add(run)
    shared = overlaps.found()
    figures = Figures(shared)
    # What runs before that time freed is theirs.
    async for run in runs_between(redis, ledger, since_ms - CALLING_MS, since_ms - 1):
        if run.run_id in shared:
            await add_claims(figures, ledger, run)
    async for run in runs_between(redis, ledger, since_ms, made_ms, figures.add_unread):
        await _add(figures, ledger, run)
    marks = await _marks(redis, made_ms)
    return figures.report(made_ms, since_ms=since_ms, prices=prices, marks=marks)


async def runs_between(
    redis: Redis,
    ledger: Ledger,
    since_ms: int,
    until_ms: int,
    unread: Callable[[], None] = lambda: None,
) -> AsyncIterator[Run]:
    """The runs that were made in a time, the oldest first; without those that have aged out.

    Args:
        redis: a connection that decodes responses.
        ledger: the ledger in it.
        since_ms, until_ms: the time, both in ms since the epoch.
        unread: is called for each run that cannot be read, which is left out.
    """
    ids = await redis.zrangebyscore(keys.INDEX, since_ms, until_ms)
    for run_id in cast("list[str]", ids):
        try:
            yield await ledger.run(run_id)
        except SchemaError:
            unread()
        except RunNotFoundError:
            continue


async def rivals_of(redis: Redis, ledger: Ledger, run: Run) -> list[Run]:
    """The runs that may have called for the pools that a run freed, at the same time.

    Args:
        redis: a connection that decodes responses.
        ledger: the ledger in it.
        run: the run.

    Raises:
        RedisError: the ledger cannot be read.
    """
    found = []
    if run.started_ms and pools(run):
        since_ms = run.created_ms - CALLING_MS
        async for other in _newest_first(redis, ledger, since_ms, rivals_until_ms(run)):
            both = Overlaps()
            both.add(run)
            both.add(other)
            if both.found():
                found.append(other)
    return found


async def add_claims(figures: Figures, ledger: Ledger, run: Run) -> None:
    """Take into account what a run freed that a report is not about.

    Args:
        figures: those of the report.
        ledger: where its jobs are.
        run: that run.

    Raises:
        RedisError: the ledger cannot be read.
    """
    with contextlib.suppress(RunNotFoundError):  # it has aged out meanwhile
        for state in CLAIMING:
            async for job in ledger.all_jobs(run.run_id, outcome=state):
                figures.add_claim(run, job)


async def _newest_first(
    redis: Redis, ledger: Ledger, since_ms: int, until_ms: float
) -> AsyncIterator[Run]:
    """The runs made in a time that can be read."""
    offset = await redis.zcount(keys.INDEX, f"({until_ms}", "+inf")
    while offset < await redis.zcard(keys.INDEX):
        page = await ledger.runs(limit=RUNS_AT_ONCE, offset=offset, unread=lambda _: None)
        for run in page:
            if run.created_ms < since_ms:
                return
            yield run
        offset += RUNS_AT_ONCE


async def _add(figures: Figures, ledger: Ledger, run: Run) -> None:
    figures.add_run(run)
    if run.started_ms:  # the jobs of others, such as a dry run's, came to nothing
        async for job in ledger.all_jobs(run.run_id):
            figures.add_job(run, job, job.nodes)
    async for pool in ledger.all_kept(run.run_id):
        figures.add_kept(pool)


async def _marks(redis: Redis, now_ms: int) -> DueMarks:
    now = datetime.fromtimestamp(now_ms / 1000, UTC)
    found = await all_marks(redis)
    due = [mark for mark in found if mark.due_at <= now]
    first = tuple(mark_record(mark) for mark in due[:MOST_TOLD])
    return DueMarks(due=len(due), waiting=len(found) - len(due), first=first)
