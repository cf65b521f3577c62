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
    from collections.abc import Mapping

    from redis.asyncio import Redis

RECOVERY = 0.05
"""Share of the limit that the rate regains in a second."""
CUT = 0.5
"""What a 429 leaves of the rate."""
CUT_COOLDOWN_S = 1.0
FLOOR = 0.02
"""Share of the limit that the rate never falls below."""
BLOCK_S = 0.1
"""A reservation reaches no further than this: long enough to ask Redis seldom, short enough that
a cut reaches every worker soon."""
LEAST_LATENESS_S = 0.002
"""An event loop is never more punctual."""
MAX_PAUSE_S = 600.0

log = structlog.get_logger(__name__)


@dataclass(frozen=True, slots=True)
class Quota:
    """A project's rate limit.

    Attributes:
        rate: calls a second, by all workers together; 0 means no limit.
        burst: calls that may go at once after an idle time.
    """

    rate: float
    burst: int


class Limiter:
    """Rate limits of one worker process: one for each project, made on first use.

    Args:
        redis: a connection that decodes responses.
        endpoint: the base URL of the API.
        rate: calls a second to one project, by all workers together; 0 means no limit.
        burst: calls that may go at once after an idle time.
        own: the quotas of projects that have their own.
    """

    def __init__(
        self,
        redis: Redis,
        *,
        endpoint: str,
        rate: float,
        burst: int,
        own: Mapping[str, Quota] | None = None,
    ) -> None:
        self._redis = redis
        self._endpoint = endpoint
        self._quota = Quota(rate, burst)
        self._own = own or {}
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
        project = self._project(project_id)
        if project.quota.rate > 0:
            await project.permit(urgent=urgent)

    async def try_permit(self, project_id: str) -> float:
        """Take a slot if one is free now, without waiting for one.

        A quota that `own` has changed by now holds from this call on.

        Args:
            project_id: the project, or whoever else a limit is kept for.

        Returns:
            0 if a slot was free: it is taken. Else the seconds until one is: nothing is taken.

        Raises:
            redis.RedisError: the limit cannot be asked for; no slot may be used.
        """
        quota = self._own.get(project_id, self._quota)
        if quota.rate <= 0:
            return 0.0
        key = keys.limiter(self._endpoint, project_id)
        settings = [quota.rate, RECOVERY, quota.burst]
        (wait_ms,) = await self._script(keys=[key], args=["try", *settings])
        return float(wait_ms) / 1000

    async def throttled(self, project_id: str, retry_after_s: float | None) -> None:
        """The cloud answered 429: slow down for everybody, and pause as long as it asks.

        Args:
            project_id: the project whose call was refused.
            retry_after_s: the answer's Retry-After in seconds, capped at ten minutes.
        """
        project = self._project(project_id)
        if project.quota.rate > 0:
            await project.throttled(min(retry_after_s or 0, MAX_PAUSE_S))

    def _project(self, project_id: str) -> _ProjectLimit:
        if project_id not in self._projects:
            quota = self._own.get(project_id, self._quota)
            self._projects[project_id] = _ProjectLimit(self, project_id, quota)
        return self._projects[project_id]

    async def _reserve(self, key: str, quota: Quota, permits: int) -> Slots:
        settings = [quota.rate, RECOVERY, permits, quota.burst, BLOCK_S * 1000]
        delay_ms, interval_ms, granted = await self._script(keys=[key], args=["reserve", *settings])
        # Counted from when the answer came, so that its way back only ever delays a call.
        now = asyncio.get_running_loop().time()
        interval = float(interval_ms) / 1000
        return Slots(
            first=now + float(delay_ms) / 1000,
            interval=interval,
            left=int(granted),
            lateness=max(quota.burst * interval, LEAST_LATENESS_S),
        )

    async def _throttle(self, key: str, quota: Quota, pause_s: float) -> float:
        settings = [quota.rate, RECOVERY, CUT, CUT_COOLDOWN_S * 1000, pause_s * 1000, FLOOR]
        (rate,) = await self._script(keys=[key], args=["throttle", *settings])
        return float(rate)


@dataclass(slots=True)
class Slots:
    """Reserved slots, to be used at their time.

    Attributes:
        first: when the first of those left comes, in seconds of the event loop's clock.
        interval: seconds between them.
        left: how many are left.
        lateness: seconds after which a slot that nobody used is lost. A process that was held up
            must not make up for it all at once: with the burst as the bound, as GCRA has it, a
            second never sees more calls than the rate and the burst.
    """

    first: float = 0
    interval: float = 1
    left: int = 0
    lateness: float = 0

    def take(self, now: float) -> float | None:
        """Use the next slot: when to call; None if none is left."""
        if (late := now - self.lateness - self.first) > 0:
            self._drop(math.ceil(late / self.interval))
        if self.left <= 0:
            return None
        slot = self.first
        self._drop(1)
        return slot

    def _drop(self, count: int) -> None:
        self.first += count * self.interval
        self.left -= min(count, self.left)


class _ProjectLimit:
    """Hands one project's slots to the waiting calls of this process."""

    def __init__(self, limiter: Limiter, project_id: str, quota: Quota) -> None:
        self.quota = quota
        self._limiter = limiter
        self._project_id = project_id
        self._key = keys.limiter(limiter._endpoint, project_id)
        self._urgent: deque[asyncio.Future[None]] = deque()
        self._ordinary: deque[asyncio.Future[None]] = deque()
        self._slots = Slots()
        self._server: asyncio.Task[None] | None = None

    async def permit(self, *, urgent: bool) -> None:
        future = asyncio.get_running_loop().create_future()
        (self._urgent if urgent else self._ordinary).append(future)
        if self._server is None or self._server.done():
            self._server = asyncio.create_task(self._serve())
        await future

    async def throttled(self, pause_s: float) -> None:
        rate = await self._limiter._throttle(self._key, self.quota, pause_s)
        self._slots = Slots()  # what was reserved belongs to the old rate
        log.warning("throttled", project_id=self._project_id, rate=round(rate, 2), pause_s=pause_s)

    async def _serve(self) -> None:
        loop = asyncio.get_running_loop()
        try:
            while self._next() is not None:
                slots = self._slots
                if (slot := slots.take(loop.time())) is None:
                    wanted = len(self._urgent) + len(self._ordinary)
                    reserved = await self._limiter._reserve(self._key, self.quota, wanted)
                    if slots is self._slots:  # else the rate was cut in the meantime
                        self._slots = reserved
                    continue
                if (delay := slot - loop.time()) > 0:
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
