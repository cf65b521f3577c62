"""Keeps every run moving, whatever was lost: the periodic work of the workers.

Each worker runs one of these; a short lock in Redis lets one at a time act for an endpoint. Two
acting at once would do no harm, since every move is checked by the ledger.
"""

from __future__ import annotations

import asyncio
import contextlib
from typing import TYPE_CHECKING, cast

import structlog
from redis.exceptions import RedisError

from worker.cancellation import cancel
from worker.deletion import told
from worker.leader import Leadership, process_name
from worker.ledger import (
    HALF_MADE_S,
    JobState,
    Ledger,
    Run,
    RunNotFoundError,
    RunState,
    Source,
    keys,
)
from worker.metrics import EXPIRED

if TYPE_CHECKING:
    from collections.abc import Coroutine

    from redis.asyncio import Redis

    from worker.feed import Feed
    from worker.pause import PauseWatch
    from worker.settings import Settings
    from worker.verifier import Verifier

TICK_S = 1.0
LEADER_S = 3.0
SEEN_S = 10.0
"""A worker not seen for this long counts as gone."""
NEW_S = 10.0
"""A run may end within a tick of its start, so those made so lately are looked at too."""

log = structlog.get_logger(__name__)


class Reconciler:
    """The periodic work of one worker process.

    Args:
        redis: for the lock and the sign of life.
        endpoint: the API whose runs it cares for.
        ledger: where the runs are.
        feed: sends due jobs.
        verifier: looks after accepted jobs.
        settings: attempts allowed and the time between two looks.
        pause: the kill switch: a run whose projects are paused is not fed.

    Attributes:
        endpoint: the API whose runs it cares for.
    """

    def __init__(
        self,
        *,
        redis: Redis,
        endpoint: str,
        ledger: Ledger,
        feed: Feed,
        verifier: Verifier,
        settings: Settings,
        pause: PauseWatch,
    ) -> None:
        self._redis = redis
        self.endpoint = endpoint
        self._ledger = ledger
        self._feed = feed
        self._verifier = verifier
        self._settings = settings
        self._pause = pause
        self._name = process_name()
        key = keys.reconciler(endpoint)
        self._leadership = Leadership(redis, key, self._name, ttl_s=LEADER_S)
        self._background: set[asyncio.Task[None]] = set()
        self._verified_at = float("-inf")
        self._stopping = asyncio.Event()
        self._led_at = self._seen_at = float("-inf")
        # From the start, so that the first increase is seen as one.
        self._expired = EXPIRED.labels(endpoint)
        self._open: set[str] = set()
        self._told: set[str] = set()

    @property
    def leads(self) -> bool:
        """Whether this worker is the one that reconciles the endpoint's runs."""
        return asyncio.get_running_loop().time() - self._led_at < LEADER_S

    @property
    def is_alive(self) -> bool:
        """Whether Redis has had a sign of life from it lately."""
        return asyncio.get_running_loop().time() - self._seen_at < SEEN_S

    def stop(self) -> None:
        """Let another worker take over, once what is under way is done.

        Cut short, it could have taken jobs to be sent, which then nobody sends for a while.
        """
        self._stopping.set()

    async def run(self) -> None:
        """Go on until stopped, or cancelled."""
        try:
            while not self._stopping.is_set():
                try:
                    await self._sign_of_life()
                    asked = asyncio.get_running_loop().time()
                    if await self._leadership.leads():
                        self._led_at = asked
                        await self._tick()
                    else:
                        self._led_at = float("-inf")
                        self._open, self._told = set(), set()
                except RedisError as error:
                    log.warning("redis_unreachable", reason=str(error))
                except Exception:
                    log.exception("reconciler_crashed")
                with contextlib.suppress(TimeoutError):
                    await asyncio.wait_for(self._stopping.wait(), TICK_S)
            with contextlib.suppress(RedisError):
                await self._leave()
        finally:
            await cancel(*self._background)

    async def _leave(self) -> None:
        async with self._redis.pipeline(transaction=False) as pipe:
            pipe.zrem(keys.workers(self.endpoint), self._name)
            await pipe.execute()
        await self._leadership.resign()

    async def _sign_of_life(self) -> None:
        now_ms = await self._ledger.now_ms()
        key = keys.workers(self.endpoint)
        async with self._redis.pipeline(transaction=False) as pipe:
            pipe.zadd(key, {self._name: now_ms})
            pipe.zremrangebyscore(key, "-inf", now_ms - SEEN_S * 1000)
            await pipe.execute()
        self._seen_at = asyncio.get_running_loop().time()

    async def _tick(self) -> None:
        runs = await self._ledger.active(self.endpoint)
        for run in runs:
            # A run of the intake is in the making as long as its request is there.
            if run.state is RunState.CREATING and run.source != Source.INTAKE:
                await self._abort_if_left_behind(run)
            elif run.state is RunState.RUNNING:
                await self._keep_moving(run)
        self._verify_now_and_then([run for run in runs if run.verify])
        await self._tell_ends({run.run_id for run in runs})

    async def _tell_ends(self, still_open: set[str]) -> None:
        """Log the runs that have ended since the last tick."""
        new_ms = await self._ledger.now_ms() - NEW_S * 1000
        found = await self._redis.zrangebyscore(keys.INDEX, new_ms, "+inf")
        new = set(cast("list[str]", found))
        self._told &= new
        for run_id in sorted((self._open | new) - still_open - self._told):
            try:
                run = await self._ledger.run(run_id)
            except RunNotFoundError:
                continue
            if run.ended and run.endpoint == self.endpoint:
                self._told.add(run_id)
                self._in_background(self._tell_end(run))
        self._open = still_open

    async def _tell_end(self, run: Run) -> None:
        try:
            await self._tell_jobs(run)
        except RedisError as error:
            log.warning("redis_unreachable", reason=str(error))
        except RunNotFoundError as error:  # lost since
            log.warning("run_lost", run_id=run.run_id, reason=str(error))
        log.info("run_ended", **run.told())

    async def _tell_jobs(self, run: Run) -> None:
        """Log the ends of those of a run's jobs that ended in the ledger and in no worker.

        Raises:
            RedisError: it cannot be read.
        """
        for outcome in (JobState.CANCELLED, JobState.FAILED):
            if not run.counts[outcome]:
                continue
            async for job in self._ledger.all_jobs(run.run_id, outcome=outcome):
                lost = job.attempts and job.attempts[-1].code == "lease_expired"
                if outcome is JobState.CANCELLED or lost or job.is_damaged:
                    log.info(
                        "job_moved",
                        run_id=run.run_id,
                        job_id=job.job_id,
                        project_id=job.project_id,
                        pool_name=job.pool_name,
                        state=outcome,
                        reason=job.reason,
                        attempts=[told(each) for each in job.attempts],
                    )

    async def _keep_moving(self, run: Run) -> None:
        lost = await self._ledger.reclaim(run.run_id, max_attempts=self._settings.max_attempts)
        if lost:
            self._expired.inc(lost)
            log.warning("leases_expired", run_id=run.run_id, count=lost)
        if run.cancelled_ms:
            # Whoever cancelled it may have been stopped halfway, and nobody claims what is left.
            await self._ledger.cancel(run.run_id)
        elif not self._pause.covers_all(run.projects):
            await self._feed(run.run_id, projects=len(run.projects))

    async def _abort_if_left_behind(self, run: Run) -> None:
        reason = "its maker stopped before all of its jobs were there; none was executed"
        if await self._ledger.abort(run.run_id, reason, min_age_s=HALF_MADE_S):
            log.warning("run_aborted", run_id=run.run_id, reason=reason)

    def _verify_now_and_then(self, runs: list[Run]) -> None:
        now = asyncio.get_running_loop().time()
        if now - self._verified_at >= self._settings.verify_interval_s:
            self._verified_at = now
            self._in_background(self._verify(runs))

    def _in_background(self, work: Coroutine[None, None, None]) -> None:
        """Have something done that takes long, without holding up the ticks."""
        task = asyncio.create_task(work)
        self._background.add(task)
        task.add_done_callback(self._background.discard)

    async def _verify(self, runs: list[Run]) -> None:
        try:
            await self._verifier.verify(runs)
        except RedisError as error:
            log.warning("redis_unreachable", reason=str(error))
        except Exception:
            log.exception("verification_crashed")


async def live_workers(redis: Redis, endpoint: str) -> int:
    """How many worker processes serve an endpoint right now.

    Args:
        redis: a connection that decodes responses.
        endpoint: the base URL of the API.
    """
    seconds, _ = await redis.time()
    return int(await redis.zcount(keys.workers(endpoint), (seconds - SEEN_S) * 1000, "+inf"))
