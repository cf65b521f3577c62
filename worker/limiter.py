"""The shared rate limit per endpoint and project, obeyed by every worker.

Generic cell rate algorithm (ITU-T I.371, "virtual scheduling"), with the cell's theoretical
arrival time in Redis and on its clock. A worker reserves a few slots ahead in one call and hands
them to its waiting calls as they come, so that all workers together make evenly spaced calls and
Redis is asked a few times a second, not for every call. A 429 cuts the rate for everybody, which
then recovers by additive increase (Chiu and Jain, 1989).
"""

from __future__ import annotations

import asyncio
import math
from collections import deque
from dataclasses import dataclass
from importlib.resources import files
from typing import TYPE_CHECKING

import structlog

from worker.ledger import keys

if TYPE_CHECKING:
    from redis.asyncio import Redis

RECOVERY = 0.05
"""Share of the limit that the rate regains in a second."""
CUT = 0.5
"""What a 429 leaves of the rate."""
CUT_COOLDOWN_S = 1.0
FLOOR = 0.02
"""Share of the limit that the rate never falls below."""
BLOCK_S = 0.25
"""Slots are reserved for this long ahead: long enough to ask Redis seldom, short enough that
a cut reaches every worker soon."""
MAX_PAUSE_S = 600.0

log = structlog.get_logger(__name__)


class Limiter:
    """Rate limits of one worker process: one for each project, made on first use.

    Args:
        redis: a connection that decodes responses.
        endpoint: the base URL of the API.
        rate: calls a second to one project, by all workers together; 0 means no limit.
        burst: calls that may go at once after an idle time.
    """

    def __init__(self, redis: Redis, *, endpoint: str, rate: float, burst: int) -> None:
        self._redis = redis
        self._endpoint = endpoint
        self._rate = rate
        self._burst = burst
        self._script = redis.register_script((files("worker") / "limiter.lua").read_text())
        self._projects: dict[str, _ProjectLimit] = {}

    async def permit(self, project_id: str, *, urgent: bool = False) -> None:
        """Wait for the next free slot of a project, first come, first served.

        Args:
            project_id: the project that the call goes to.
            urgent: go before those that are not: for a call that others wait for.

        Raises:
            redis.RedisError: the limit cannot be asked for; no call may be made.
        """
        if self._rate > 0:
            await self._project(project_id).permit(urgent=urgent)

    async def throttled(self, project_id: str, retry_after_s: float | None) -> None:
        """The cloud answered 429: slow down for everybody, and pause as long as it asks.

        Args:
            project_id: the project whose call was refused.
            retry_after_s: the answer's Retry-After in seconds, capped at ten minutes.
        """
        if self._rate > 0:
            await self._project(project_id).throttled(min(retry_after_s or 0, MAX_PAUSE_S))

    def _project(self, project_id: str) -> _ProjectLimit:
        if project_id not in self._projects:
            self._projects[project_id] = _ProjectLimit(self, project_id)
        return self._projects[project_id]

    async def _reserve(self, key: str, permits: int) -> _Slots:
        delay_ms, interval_ms = await self._script(
            keys=[key], args=["reserve", self._rate, RECOVERY, permits, self._burst]
        )
        # Counted from when the answer came, so that its way back only ever delays a call.
        now = asyncio.get_running_loop().time()
        return _Slots(now + float(delay_ms) / 1000, float(interval_ms) / 1000, permits)

    async def _throttle(self, key: str, pause_s: float) -> float:
        settings = [self._rate, RECOVERY, CUT, CUT_COOLDOWN_S * 1000, pause_s * 1000, FLOOR]
        (rate,) = await self._script(keys=[key], args=["throttle", *settings])
        return float(rate)


@dataclass
class _Slots:
    """Reserved slots: the loop's time in s of the first, s between them, and how many are left."""

    first: float
    interval: float
    left: int

    def take(self) -> float:
        slot = self.first
        self.first += self.interval
        self.left -= 1
        return slot


class _ProjectLimit:
    """Hands one project's slots to the waiting calls of this process."""

    def __init__(self, limiter: Limiter, project_id: str) -> None:
        self._limiter = limiter
        self._project_id = project_id
        self._key = keys.limiter(limiter._endpoint, project_id)
        self._block = max(1, math.ceil(limiter._rate * BLOCK_S))
        self._urgent: deque[asyncio.Future[None]] = deque()
        self._ordinary: deque[asyncio.Future[None]] = deque()
        self._slots = _Slots(0, 0, 0)
        self._server: asyncio.Task[None] | None = None

    async def permit(self, *, urgent: bool) -> None:
        future = asyncio.get_running_loop().create_future()
        (self._urgent if urgent else self._ordinary).append(future)
        if self._server is None or self._server.done():
            self._server = asyncio.create_task(self._serve())
        await future

    async def throttled(self, pause_s: float) -> None:
        self._slots = _Slots(0, 0, 0)  # what was reserved belongs to the old rate
        rate = await self._limiter._throttle(self._key, pause_s)
        log.warning("throttled", project_id=self._project_id, rate=round(rate, 2), pause_s=pause_s)

    async def _serve(self) -> None:
        loop = asyncio.get_running_loop()
        try:
            while self._next() is not None:
                if self._slots.left <= 0:
                    permits = min(self._block, len(self._urgent) + len(self._ordinary))
                    self._slots = await self._limiter._reserve(self._key, permits)
                slots = self._slots
                if (delay := slots.take() - loop.time()) > 0:
                    await asyncio.sleep(delay)
                if slots is not self._slots:
                    continue  # taken back by a 429 in the meantime
                if (waiting := self._next()) is not None:
                    waiting.popleft().set_result(None)
        except Exception as error:
            while (waiting := self._next()) is not None:
                waiting.popleft().set_exception(error)

    def _next(self) -> deque[asyncio.Future[None]] | None:
        """The queue whose head is next, after dropping those that wait no longer."""
        for queue in (self._urgent, self._ordinary):
            while queue and queue[0].done():
                queue.popleft()
            if queue:
                return queue
        return None
