"""The shared rate limit per endpoint and project, obeyed by every worker.

Generic cell rate algorithm (ITU-T I.371, "virtual scheduling"), with the cell's theoretical
arrival time in Redis and on its clock. A worker reserves a few slots ahead in one call and hands
them to its waiting calls as they come, so that all workers together make evenly spaced calls and
Redis is asked a few times a second, not for every call.

A 429 cuts the rate for everybody by the share of calls that were refused (as DCTCP does, RFC 8257),
so that one stray refusal costs little and a quota that shrank is found in a second or two. Where
all is refused, the rate is halved and comes back by doubling (slow start, Jacobson 1988) up to what
was borne before. What is borne is kept for a while, and twice as long after each further refusal of
a little too much; then it probes for more, slowly at first (the convex half of CUBIC, RFC 9438).
"""

from __future__ import annotations

import asyncio
from collections import deque
from dataclasses import dataclass
from importlib.resources import files
from typing import TYPE_CHECKING

import structlog

from worker.ledger import keys
from worker.metrics import SLOT_WAIT_S, THROTTLED
from worker.retry import MAX_PAUSE_S

if TYPE_CHECKING:
    from collections.abc import Mapping

    from redis.asyncio import Redis

AIM = 0.985
"""The share of a quota that is made use of. A cloud counts the calls of a second as they arrive,
and none arrives exactly on time: what is left, 15 ms of each second, is room for that."""
LATENESS_S = 0.012
"""A slot may be used so much later; the rest of what the aim leaves is for the way to the cloud."""
BLOCK_S = 0.1
"""A reservation reaches no further than this: long enough to ask Redis seldom, short enough that
a cut reaches every worker soon."""
PATIENCE_S = 60.0
"""No slot is reserved farther ahead."""

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


class LongWaitError(Exception):
    """No slot is free for a while.

    Attributes:
        wait_s: seconds until one is.
    """

    def __init__(self, wait_s: float) -> None:
        super().__init__(f"no call may be made for {wait_s:.0f} s")
        self.wait_s = wait_s


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

    async def permit(
        self, project_id: str, *, urgent: bool = False, patient: bool = True
    ) -> Permit | None:
        """Wait for the next free slot of a project, first come, first served.

        Args:
            project_id: the project that the call goes to.
            urgent: go before those that are not: for a call that others wait for.
            patient: wait however long it takes, as through a pause that the cloud asked for.

        Returns:
            The slot, for `used`; None: the project has no limit.

        Raises:
            LongWaitError: not patient, and the next slot is more than a minute ahead.
            redis.RedisError: the limit cannot be asked for; no call may be made.
        """
        project = self._project(project_id)
        if project.quota.rate <= 0:
            return None
        return await project.permit(urgent=urgent, patient=patient)

    def used(self, project_id: str, permit: Permit) -> None:
        """A call goes out now: if that is later than its slot, those after it are put off.

        Else the cloud would see them closer together than the limit has it.

        Args:
            project_id: the project that the call goes to.
            permit: its slot.
        """
        self._project(project_id).used(permit)

    def wait_s(self, project_id: str, ahead: int) -> float:
        """How long a call would wait for its slot, as far as this process can tell.

        Args:
            project_id: the project that the call goes to.
            ahead: calls of this process that go before it.

        Returns:
            Seconds; at least so long, since other processes take their share of the slots.
        """
        project = self._project(project_id)
        return project.wait_s(ahead) if project.quota.rate > 0 else 0.0

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
        (wait_ms,) = await self._script(keys=[key], args=["try", quota.rate, quota.burst])
        return float(wait_ms) / 1000

    async def throttled(
        self, project_id: str, retry_after_s: float | None, *, sent_ago_s: float
    ) -> None:
        """The cloud answered 429: slow down for everybody, and pause as long as it asks.

        Args:
            project_id: the project whose call was refused.
            retry_after_s: the answer's Retry-After in seconds, capped at ten minutes.
            sent_ago_s: seconds since the refused call was sent. One from before the last cut says
                nothing of the rate after it.
        """
        THROTTLED.labels(self._endpoint).inc()
        project = self._project(project_id)
        if project.quota.rate > 0:
            await project.throttled(min(retry_after_s or 0, MAX_PAUSE_S), sent_ago_s)

    def rates(self) -> dict[str, float]:
        """Calls a second that each project with a limit was given when Redis was last asked."""
        return {
            project_id: project.rate
            for project_id, project in self._projects.items()
            if project.quota.rate > 0
        }

    def _project(self, project_id: str) -> _ProjectLimit:
        if project_id not in self._projects:
            quota = self._own.get(project_id, self._quota)
            self._projects[project_id] = _ProjectLimit(self, project_id, quota)
        return self._projects[project_id]

    async def _reserve(self, key: str, quota: Quota, permits: int, put_off_s: float) -> Slots:
        args = [
            quota.rate * AIM,
            quota.burst,
            permits,
            BLOCK_S * 1000,
            PATIENCE_S * 1000,
            put_off_s * 1000,
        ]
        delay_ms, interval_ms, granted = await self._script(keys=[key], args=["reserve", *args])
        return _slots(delay_ms, interval_ms, int(granted), quota.burst)

    async def _throttle(self, key: str, quota: Quota, pause_s: float, sent_ago_s: float) -> Slots:
        args = [quota.rate * AIM, pause_s * 1000, sent_ago_s * 1000, AIM]
        delay_ms, interval_ms = await self._script(keys=[key], args=["throttle", *args])
        return _slots(delay_ms, interval_ms, 0, quota.burst)


def _slots(delay_ms: str, interval_ms: str, left: int, burst: int) -> Slots:
    interval = float(interval_ms) / 1000
    return Slots(
        # Counted from when the answer came, so that its way back only ever delays a call.
        first=asyncio.get_running_loop().time() + float(delay_ms) / 1000,
        interval=interval,
        left=left,
        lateness=LATENESS_S + (burst - 1) * interval,
    )


@dataclass(frozen=True, slots=True)
class Permit:
    """The slot of a call.

    Attributes:
        at: when it is, in seconds of the event loop's clock.
        put_off: seconds by which this process had put off slots by then, all in all.
    """

    at: float
    put_off: float


@dataclass(slots=True)
class Slots:
    """Reserved slots, to be used at their time.

    Attributes:
        first: when the first of those left comes, in seconds of the event loop's clock.
        interval: seconds between them.
        left: how many are left.
        lateness: seconds after its time that a slot may still be used. Whoever is later than that
            must not make up for it: slots that others followed are lost, and what is left of the
            delay puts off those that come, as GCRA has it. With the burst as the bound, a second
            never sees more calls than the rate and the burst.
        put_off: seconds by which that has put off the slots.
    """

    first: float = 0
    interval: float = 1
    left: int = 0
    lateness: float = 0
    put_off: float = 0

    def take(self, now: float) -> float | None:
        """Use the next slot: when to call; None if none is left."""
        if (late := now - self.lateness - self.first) > 0:
            lost, rest = divmod(late, self.interval)
            self._drop(int(lost))
            if self.left:
                self.shift(rest)
        if self.left <= 0:
            return None
        slot = self.first
        self._drop(1)
        return slot

    def shift(self, seconds: float) -> None:
        """Put off what is left."""
        self.first += seconds
        self.put_off += seconds

    def _drop(self, count: int) -> None:
        self.first += count * self.interval
        self.left -= min(count, self.left)


@dataclass(frozen=True, slots=True)
class _Waiter:
    """A call that waits for its slot."""

    future: asyncio.Future[Permit]
    patient: bool


class _ProjectLimit:
    """Hands one project's slots to the waiting calls of this process."""

    def __init__(self, limiter: Limiter, project_id: str, quota: Quota) -> None:
        self.quota = quota
        self._limiter = limiter
        self._project_id = project_id
        self._key = keys.limiter(limiter._endpoint, project_id)
        self._urgent: deque[_Waiter] = deque()
        self._ordinary: deque[_Waiter] = deque()
        self._slots = Slots(interval=1 / quota.rate if quota.rate else 0)
        self._put_off = 0.0
        self._server: asyncio.Task[None] | None = None
        self._waits = SLOT_WAIT_S.labels(limiter._endpoint)

    @property
    def rate(self) -> float:
        return 1 / self._slots.interval

    async def permit(self, *, urgent: bool, patient: bool) -> Permit:
        loop = asyncio.get_running_loop()
        asked = loop.time()
        future: asyncio.Future[Permit] = loop.create_future()
        (self._urgent if urgent else self._ordinary).append(_Waiter(future, patient))
        if self._server is None or self._server.done():
            self._server = asyncio.create_task(self._serve())
        permit = await future
        self._waits.observe(loop.time() - asked)
        return permit

    def used(self, permit: Permit) -> None:
        slots = self._slots
        late = asyncio.get_running_loop().time() - permit.at - slots.lateness
        if (shift := late - (self._put_off + slots.put_off - permit.put_off)) > 0:
            slots.shift(shift)

    def wait_s(self, ahead: int) -> float:
        now, slots = asyncio.get_running_loop().time(), self._slots
        return max(0.0, slots.first - now) + ahead * slots.interval

    async def throttled(self, pause_s: float, sent_ago_s: float) -> None:
        slots = await self._limiter._throttle(self._key, self.quota, pause_s, sent_ago_s)
        if pause_s > 0:
            self._put_off += self._slots.put_off
            self._slots = slots  # what was reserved lies within the pause
        rate = round(1 / slots.interval, 2)
        log.warning("throttled", project_id=self._project_id, rate=rate, pause_s=pause_s)

    async def _serve(self) -> None:
        loop = asyncio.get_running_loop()
        try:
            while self._next() is not None:
                slots = self._slots
                if (slot := slots.take(loop.time())) is None:
                    wanted = len(self._urgent) + len(self._ordinary)
                    told = slots.put_off
                    reserved = await self._limiter._reserve(self._key, self.quota, wanted, told)
                    if slots is self._slots:  # else a pause was asked for in the meantime
                        reserved.shift(slots.put_off - told)
                        self._put_off += told
                        self._slots = reserved
                        if not reserved.left:
                            await self._wait_long(reserved.first - loop.time())
                    continue
                if (delay := slot - loop.time()) > 0:
                    await asyncio.sleep(delay)
                if slots is not self._slots:
                    continue  # taken back by a 429 in the meantime
                if (waiting := self._next()) is not None:
                    permit = Permit(slot, self._put_off + slots.put_off)
                    waiting.popleft().future.set_result(permit)
        except Exception as error:
            while (waiting := self._next()) is not None:
                waiting.popleft().future.set_exception(error)

    async def _wait_long(self, wait_s: float) -> None:
        """Send away who is not patient, and wait with the others for slots to be given again."""
        for queue in (self._urgent, self._ordinary):
            waiting = list(queue)
            queue.clear()
            for each in waiting:
                if each.patient:
                    queue.append(each)
                elif not each.future.done():
                    each.future.set_exception(LongWaitError(wait_s))
        if self._next() is not None:
            await asyncio.sleep(min(wait_s, PATIENCE_S / 2))

    def _next(self) -> deque[_Waiter] | None:
        """The queue whose head is next, after dropping those that wait no longer."""
        for queue in (self._urgent, self._ordinary):
            while queue and queue[0].future.done():
                queue.popleft()
            if queue:
                return queue
        return None
