"""What runs freed: little is added up for a page on the spot, much in the background and once.

So no page waits for the jobs of a large run.
"""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Final

import structlog
from redis.exceptions import RedisError

from scheduler.review.credit import CLAIMING, frees, pools
from scheduler.review.figures import Figures
from scheduler.review.gathering import add_claims, rivals_of
from worker.cancellation import cancel
from worker.ledger import RunNotFoundError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from redis.asyncio import Redis

    from scheduler.prices import Prices
    from scheduler.review.report import Freed
    from worker.ledger import Ledger, Run

AT_ONCE: Final = 5_000
"""Freed pools that are added up while somebody waits for the page."""
REMEMBERED: Final = 100
"""Runs whose figures are kept."""

log = structlog.get_logger(__name__)


class FreedByRun:
    """What each run freed.

    Args:
        redis: a connection that decodes responses.
        ledger: the ledger in it, where the jobs are.
        prices: what nodes cost; None: not known.
    """

    def __init__(self, redis: Redis, ledger: Ledger, prices: Prices | None) -> None:
        self._redis = redis
        self._ledger = ledger
        self._prices = prices
        self._known: dict[str, Freed] = {}
        self._adding: asyncio.Task[None] | None = None

    async def of(self, run: Run) -> Freed | None:
        """What a run freed; of one that goes on, what it has freed by now.

        Args:
            run: the run.

        Pools that another run's call was accepted for first are that run's.

        Returns:
            None: it is more than `AT_ONCE` pools. Once the run has ended they are added up in the
            background, one run after another, so ask again.

        Raises:
            RedisError: the ledger cannot be read.
        """
        if (known := self._known.get(run.run_id)) is not None:
            return known
        if pools(run) <= AT_ONCE:
            rivals = await rivals_of(self._redis, self._ledger, run)
            claims = sum(rival.counts[state] for rival in rivals for state in CLAIMING)
            if pools(run) + claims <= AT_ONCE:
                return await self._add_up(run, rivals)
        if run.ended and (self._adding is None or self._adding.done()):
            self._adding = asyncio.create_task(self._in_background(run))
        return None

    async def close(self) -> None:
        """Stop adding up."""
        if self._adding is not None:
            await cancel(self._adding)

    async def _in_background(self, run: Run) -> None:
        try:
            await self._add_up(run, await rivals_of(self._redis, self._ledger, run))
        except RedisError as error:
            log.warning("redis_unreachable", reason=str(error))
        except RunNotFoundError:
            pass  # it has aged out meanwhile
        except Exception:
            # Nobody waits for it, and whoever asks again begins it anew.
            log.exception("freed_not_added_up", run_id=run.run_id)

    async def _add_up(self, run: Run, rivals: Sequence[Run]) -> Freed:
        figures = Figures({run.run_id} if rivals else ())
        for rival in rivals:
            await add_claims(figures, self._ledger, rival)
        for state in CLAIMING:
            if frees(run, state):
                async for job in self._ledger.all_jobs(run.run_id, outcome=state):
                    figures.add_job(run, job, job.nodes)
        freed = figures.report(run.created_ms, run_id=run.run_id, prices=self._prices).freed
        if run.ended:
            while len(self._known) >= REMEMBERED:
                del self._known[next(iter(self._known))]
            self._known[run.run_id] = freed
        return freed
