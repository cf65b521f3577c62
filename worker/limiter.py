"""The shared rate limit per endpoint and project, obeyed by every worker.

Generic cell rate algorithm (ITU-T I.371, "virtual scheduling"), with the cell's theoretical
arrival time in Redis and on its clock. A worker reserves a few slots ahead in one call and hands
them to its waiting calls as they come, so that all workers together make evenly spaced calls and
Redis is asked some times a second, not for every call.

A cloud counts the calls of any second as they arrive. The one that comes a second's calls after one
that was late would be too many, and so it is put off as much, and no other: the workers tell each
other of late calls.

A 429 that asks for a pause takes back what all workers have reserved. The second after the pause is
a clean one: as many calls as pass in it before the next refusal are the quota, if it has shrunk.
Without a pause the rate is cut by the share of calls that were refused (as DCTCP does, RFC 8257).
One stray refusal costs no rate. Where all is refused, the rate is halved and comes back by doubling
(slow start, Jacobson 1988) up to what was borne before. What is borne is kept for a while, and
twice as long after each further refusal of a little too much; then it probes for more, slowly at
first (the convex half of CUBIC, RFC 9438).
"""

from __future__ import annotations

import asyncio
import contextlib
import math
from collections import deque
from dataclasses import dataclass
from importlib.resources import files
from typing import TYPE_CHECKING

import structlog
from redis.exceptions import RedisError

from worker.ledger import keys
from worker.metrics import SLOT_WAIT_S, THROTTLED
from worker.retry import MAX_PAUSE_S
from worker.slots import NO_SLOTS, RedisClock, Slot, Slots, reserved_slots

if TYPE_CHECKING:
    from collections.abc import Mapping

    from redis.asyncio import Redis
    from redis.commands.core import AsyncScript

AIM = 0.99
"""The share of a quota that is made use of. No call arrives exactly on time: what is left, 10 ms of
each second, is room for that, and what makes up for calls that were later."""
LEAST_LATE_S = (1 - AIM) / 2
"""A call that is late by less takes room from no other: of a second, or of what makes its calls a
whole number, which is half a second at least, they leave that share free."""
MOST_WAY_S = 0.02
"""No call counts as more than so much longer on its way than the fastest: where answers take now
longer and now shorter, that says little of when the cloud counts a call."""
EARLY_S = 0.015
"""So long before a slot its process is awake."""
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
        burst: calls that may go at once after an idle time; never more than a second's, unless that
            has less than one.
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
            To be told when the call is made and answered; None: the project has no limit.

        Raises:
            LongWaitError: not patient, and the next slot is more than a minute ahead.
            redis.RedisError: the limit cannot be asked for; no call may be made.
        """
        project = self._project(project_id)
        if project.quota.rate <= 0:
            return None
        return await project.permit(urgent=urgent, patient=patient)

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
        (wait_ms,) = await self._script(
            keys=[key, keys.late_calls(self._endpoint, project_id)],
            args=["try", quota.rate, 1, quota.burst],
        )
        return float(wait_ms) / 1000

    async def throttled(
        self, project_id: str, retry_after_s: float | None, *, sent_ago_s: float
    ) -> None:
        """The cloud answered 429: slow down for everybody, and pause as long as it asks.

        Args:
            project_id: the project whose call was refused.
            retry_after_s: the answer's Retry-After in seconds, capped at ten minutes.
            sent_ago_s: seconds since the refused call was due, or was sent. One from before the
                last cut says nothing of the rate after it.
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
            self._projects[project_id] = _ProjectLimit(
                self._script, self._endpoint, project_id, quota
            )
        return self._projects[project_id]


class Permit:
    """The right to make one call."""

    __slots__ = ("_late_s", "_limit", "slot")

    def __init__(self, limit: _ProjectLimit, slot: Slot) -> None:
        self.slot = slot
        self._limit = limit
        self._late_s = 0.0

    def sent(self) -> None:
        """The call goes out now."""
        self._late_s = self.due_ago_s
        self._limit.tell(self.slot, self._late_s)

    @property
    def due_ago_s(self) -> float:
        """Seconds since the call was due."""
        return asyncio.get_running_loop().time() - self.slot.due

    def answered(self, duration_s: float) -> None:
        """The call is over.

        Args:
            duration_s: seconds from when it went out.
        """
        self._limit.tell(self.slot, self._late_s + self._limit.longer_s(duration_s))


@dataclass(frozen=True, slots=True)
class _Waiter:
    """A call that waits for its slot."""

    future: asyncio.Future[Slot]
    patient: bool


class _ProjectLimit:
    """Hands one project's slots to the waiting calls of this process."""

    def __init__(self, script: AsyncScript, endpoint: str, project_id: str, quota: Quota) -> None:
        self.quota = quota
        self._script = script
        self._project_id = project_id
        self._keys = keys.limiter(endpoint, project_id), keys.late_calls(endpoint, project_id)
        self._urgent: deque[_Waiter] = deque()
        self._ordinary: deque[_Waiter] = deque()
        self._slots = Slots(1 / quota.rate if quota.rate else 0, end=0)
        self._server: asyncio.Task[None] | None = None
        self._clock = RedisClock()
        self._late: dict[int, tuple[float, float]] = {}
        self._teller: asyncio.Task[None] | None = None
        self._fastest_s = math.inf
        self._waits = SLOT_WAIT_S.labels(endpoint)

    @property
    def rate(self) -> float:
        return 1 / self._slots.interval

    async def permit(self, *, urgent: bool, patient: bool) -> Permit:
        loop = asyncio.get_running_loop()
        asked = loop.time()
        future: asyncio.Future[Slot] = loop.create_future()
        (self._urgent if urgent else self._ordinary).append(_Waiter(future, patient))
        if self._server is None or self._server.done():
            self._server = asyncio.create_task(self._serve())
        permit = Permit(self, await future)
        permit.sent()  # unless there is more to do first, as signing in
        self._waits.observe(loop.time() - asked)
        return permit

    def wait_s(self, ahead: int) -> float:
        slots = self._slots
        until_next = slots.next_at - asyncio.get_running_loop().time()
        return max(0.0, until_next) + ahead * slots.interval

    def longer_s(self, duration_s: float) -> float:
        """How much longer a call was on its way than the fastest, of late."""
        self._fastest_s = min(duration_s, 1.01 * self._fastest_s)
        return min(MOST_WAY_S, duration_s - self._fastest_s)

    def tell(self, slot: Slot, late_s: float) -> None:
        """Let all workers know of a call if it was so late that it could matter."""
        if late_s <= LEAST_LATE_S:
            return
        self._late[slot.number] = slot.due_ms, late_s
        if self._teller is None or self._teller.done():
            self._teller = asyncio.create_task(self._tell())

    async def _tell(self) -> None:
        # Without Redis no further call is made anyway.
        with contextlib.suppress(RedisError):
            while self._late:
                late, self._late = self._late, {}
                told: list[float | str] = []
                for number, (due_ms, late_s) in late.items():
                    told += [number, f"{due_ms:.3f}", 1000 * late_s]
                await self._ask("late", 1000 * BLOCK_S, *told)

    async def throttled(self, pause_s: float, sent_ago_s: float) -> None:
        delay_ms, interval_ms = await self._ask(
            "throttle", pause_s * 1000, sent_ago_s * 1000, BLOCK_S * 1000
        )
        interval = float(interval_ms) / 1000
        if pause_s > 0:  # what was reserved lies within the pause
            end = asyncio.get_running_loop().time() + float(delay_ms) / 1000
            self._slots = Slots(interval, end)
        rate = round(1 / interval, 2)
        log.warning("throttled", project_id=self._project_id, rate=rate, pause_s=pause_s)

    async def _serve(self) -> None:
        loop = asyncio.get_running_loop()
        try:
            while self._next() is not None:
                slots = self._slots
                if (slot := slots.take(loop.time())) is None:
                    await self._reserve(slots)
                    continue
                # A long sleep ends late, and its process is slow at first.
                if (delay := slot.at - loop.time()) > EARLY_S:
                    await asyncio.sleep(delay - EARLY_S)
                if loop.time() - slot.reserved > BLOCK_S:
                    await self._check(slots, slot)
                    continue
                if (delay := slot.at - loop.time()) > 0:
                    await asyncio.sleep(delay)
                if slots is not self._slots:
                    continue  # taken back by a 429 in the meantime
                if (waiting := self._next()) is not None:
                    waiting.popleft().future.set_result(slot)
        except Exception as error:
            while (waiting := self._next()) is not None:
                waiting.popleft().future.set_exception(error)

    async def _reserve(self, slots: Slots) -> None:
        loop = asyncio.get_running_loop()
        asked = loop.time()
        wanted = len(self._urgent) + len(self._ordinary)
        now_ms, *answer = await self._ask(
            "reserve", self.quota.burst, wanted, BLOCK_S * 1000, PATIENCE_S * 1000
        )
        answered = loop.time()
        self._clock.heard(asked, answered, float(now_ms))
        if slots is not self._slots:
            return  # a pause was asked for in the meantime
        reserved, interval, end = reserved_slots(answer, self._clock, asked, answered)
        slots.add(reserved, interval, end)
        if len(answer) == NO_SLOTS:
            await self._wait_long(end - answered)

    async def _check(self, slots: Slots, slot: Slot) -> None:
        """Look at slots again that were reserved longer ago.

        Since then others may have been used late, or the cloud may have asked another worker for a
        pause.
        """
        answer = await self._ask("check", *slots.put_back(slot))
        slots.checked(answer, self._clock, asyncio.get_running_loop().time())

    async def _ask(self, what: str, *args: float | str) -> list[str]:
        asked = [what, self.quota.rate * AIM, AIM, *args]
        answer: list[str] = await self._script(keys=self._keys, args=asked)
        return answer

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
