"""Keeps every run moving, whatever was lost: the periodic work of the workers.

Each worker runs one of these; a short lock in Redis lets one at a time act for an endpoint. Two
acting at once would do no harm, since every move is checked by the ledger.
"""

from __future__ import annotations

import asyncio
import contextlib
from typing import TYPE_CHECKING

import structlog
from redis.exceptions import RedisError

from worker.cancellation import cancel
from worker.leader import Leadership, process_name
from worker.ledger import HALF_MADE_S, Ledger, Run, RunState, Source, keys

if TYPE_CHECKING:
    from redis.asyncio import Redis

    from worker.feed import Feed
    from worker.pause import PauseWatch
    from worker.settings import Settings
    from worker.verifier import Verifier

TICK_S = 1.0
LEADER_S = 3.0
SEEN_S = 10.0
"""A worker not seen for this long counts as gone."""

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
        self._endpoint = endpoint
        self._ledger = ledger
        self._feed = feed
        self._verifier = verifier
        self._settings = settings
        self._pause = pause
        self._name = process_name()
        key = keys.reconciler(endpoint)
        self._leadership = Leadership(redis, key, self._name, ttl_s=LEADER_S)
        self._verifications: set[asyncio.Task[None]] = set()
        self._verified_at = float("-inf")
        self._stopping = asyncio.Event()

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
                    if await self._leadership.leads():
                        await self._tick()
                except RedisError as error:
                    log.warning("redis_unreachable", reason=str(error))
                except Exception:
                    log.exception("reconciler_crashed")
                with contextlib.suppress(TimeoutError):
                    await asyncio.wait_for(self._stopping.wait(), TICK_S)
            with contextlib.suppress(RedisError):
                await self._leave()
        finally:
            await cancel(*self._verifications)

    async def _leave(self) -> None:
        async with self._redis.pipeline(transaction=False) as pipe:
            pipe.zrem(keys.workers(self._endpoint), self._name)
            await pipe.execute()
        await self._leadership.resign()

    async def _sign_of_life(self) -> None:
        now_ms = await self._ledger.now_ms()
        key = keys.workers(self._endpoint)
        async with self._redis.pipeline(transaction=False) as pipe:
            pipe.zadd(key, {self._name: now_ms})
            pipe.zremrangebyscore(key, "-inf", now_ms - SEEN_S * 1000)
            await pipe.execute()

    async def _tick(self) -> None:
        runs = await self._ledger.active(self._endpoint)
        for run in runs:
            # A run of the intake is in the making as long as its request is there.
            if run.state is RunState.CREATING and run.source != Source.INTAKE:
                await self._abort_if_left_behind(run)
            elif run.state is RunState.RUNNING:
                await self._keep_moving(run)
        self._verify_now_and_then([run for run in runs if run.verify])

    async def _keep_moving(self, run: Run) -> None:
        lost = await self._ledger.reclaim(run.run_id, max_attempts=self._settings.max_attempts)
        if lost:
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
            verification = asyncio.create_task(self._verify(runs))
            self._verifications.add(verification)
            verification.add_done_callback(self._verifications.discard)

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
