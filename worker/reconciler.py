"""Keeps every run moving, whatever was lost: the periodic work of the workers.

Each worker runs one of these; a short lock in Redis lets one at a time act for an endpoint. Two
acting at once would do no harm, since every move is checked by the ledger.
"""

from __future__ import annotations

import asyncio
import os
import secrets
import socket
from typing import TYPE_CHECKING

import structlog
from redis.exceptions import RedisError

from worker.ledger import HALF_MADE_S, Ledger, Run, RunState, keys

if TYPE_CHECKING:
    from redis.asyncio import Redis

    from worker.feed import Feed
    from worker.settings import Settings
    from worker.verifier import Verifier

TICK_S = 1.0
LEADER_S = 5.0
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
    ) -> None:
        self._redis = redis
        self._endpoint = endpoint
        self._ledger = ledger
        self._feed = feed
        self._verifier = verifier
        self._settings = settings
        self._name = f"{socket.gethostname()}:{os.getpid()}:{secrets.token_hex(4)}"
        self._verification: asyncio.Task[None] | None = None
        self._verified_at = float("-inf")

    async def run(self) -> None:
        """Go on until cancelled."""
        try:
            while True:
                try:
                    await self._sign_of_life()
                    if await self._leads():
                        await self._tick()
                except RedisError as error:
                    log.warning("redis_unreachable", reason=str(error))
                except Exception:
                    log.exception("reconciler_crashed")
                await asyncio.sleep(TICK_S)
        finally:
            if self._verification:
                self._verification.cancel()

    async def leave(self) -> None:
        """Let another worker take over at once."""
        async with self._redis.pipeline(transaction=False) as pipe:
            pipe.zrem(keys.workers(self._endpoint), self._name)
            await pipe.execute()
        if await self._redis.get(keys.reconciler(self._endpoint)) == self._name:
            await self._redis.delete(keys.reconciler(self._endpoint))

    async def _sign_of_life(self) -> None:
        now_ms = await self._ledger.now_ms()
        key = keys.workers(self._endpoint)
        async with self._redis.pipeline(transaction=False) as pipe:
            pipe.zadd(key, {self._name: now_ms})
            pipe.zremrangebyscore(key, "-inf", now_ms - SEEN_S * 1000)
            await pipe.execute()

    async def _leads(self) -> bool:
        key = keys.reconciler(self._endpoint)
        ttl_ms = round(LEADER_S * 1000)
        if await self._redis.set(key, self._name, nx=True, px=ttl_ms):
            return True
        if await self._redis.get(key) != self._name:
            return False
        return bool(await self._redis.pexpire(key, ttl_ms))

    async def _tick(self) -> None:
        runs = await self._ledger.active(self._endpoint)
        for run in runs:
            if run.state is RunState.CREATING:
                await self._abort_if_left_behind(run)
            else:
                lost = await self._ledger.reclaim(
                    run.run_id, max_attempts=self._settings.max_attempts
                )
                if lost:
                    log.warning("leases_expired", run_id=run.run_id, count=lost)
                await self._feed(run.run_id)
        self._verify_now_and_then([run for run in runs if run.verify])

    async def _abort_if_left_behind(self, run: Run) -> None:
        reason = "its maker stopped before all of its jobs were there; none was executed"
        if await self._ledger.abort(run.run_id, reason, min_age_s=HALF_MADE_S):
            log.warning("run_aborted", run_id=run.run_id, reason=reason)

    def _verify_now_and_then(self, runs: list[Run]) -> None:
        now = asyncio.get_running_loop().time()
        if self._verification and not self._verification.done():
            return
        if now - self._verified_at >= self._settings.verify_interval_s:
            self._verified_at = now
            self._verification = asyncio.create_task(self._verify(runs))

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
