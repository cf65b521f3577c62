"""A report read out of Redis: page by page, so that the number of jobs does not matter."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import TYPE_CHECKING, cast

from scheduler.marks import all_marks
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


async def report_of_run(ledger: Ledger, run_id: str, prices: Prices | None) -> Report:
    """What one run came to.

    Args:
        ledger: where it is recorded.
        run_id: the run.
        prices: what nodes cost; None: not known.

    Raises:
        RunNotFoundError: it is not there.
        RedisError: the ledger cannot be read.
    """
    figures = Figures()
    await _add(figures, ledger, await ledger.run(run_id))
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
    figures = Figures()
    made_ms = await ledger.now_ms()
    since_ms = made_ms - round(window.total_seconds() * 1000)
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
        unread: is called for each run that a newer version made, which is left out.
    """
    ids = await redis.zrangebyscore(keys.INDEX, since_ms, until_ms)
    for run_id in cast("list[str]", ids):
        try:
            yield await ledger.run(run_id)
        except SchemaError:
            unread()
        except RunNotFoundError:
            continue


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
