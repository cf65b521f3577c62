"""The rate that the limiter finds when the cloud refuses calls: the real script, simulated time."""

from __future__ import annotations

import asyncio
import itertools
import json
import random
import uuid
from collections import deque
from dataclasses import dataclass
from functools import partial
from heapq import heappop, heappush
from importlib.resources import files
from typing import TYPE_CHECKING

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from redis.asyncio import Redis

from worker.limiter import AIM, BLOCK_S, EARLY_S, LEAST_LATE_S, MOST_WAY_S, PATIENCE_S
from worker.slots import NO_SLOTS, RedisClock, Slot, Slots, reserved_slots

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Sequence

SCRIPT = (files("worker") / "limiter.lua").read_text()
CLOCK = "redis.call('TIME')"
assert SCRIPT.count(CLOCK) == 1


@dataclass(frozen=True, slots=True)
class Call:
    """A call at a time in seconds, and whether the cloud let it pass."""

    at: float
    passed: bool


class Cloud:
    """Lets so many calls pass in any second.

    Args:
        quota: how many, at a time in seconds.
    """

    def __init__(self, quota: Callable[[float], float]) -> None:
        self._quota = quota
        self._recent = deque[float]()

    def passes(self, at: float) -> bool:
        quota = self._quota(at)
        whole = int(quota)
        second = whole / quota if whole else 1
        while self._recent and self._recent[0] <= at - second:
            self._recent.popleft()
        if len(self._recent) >= whole:
            return False
        self._recent.append(at)
        return True


@dataclass(frozen=True, slots=True)
class Way:
    """How long things take, in seconds.

    Attributes:
        out: the way of a call to the cloud.
        back: the way of its answer.
        late: a call goes out up to so long after its slot.
        share: of the calls, that are late.
        longer: its way takes up to so much longer.
    """

    out: float = 0.02
    back: float = 0.03
    late: float = 0
    share: float = 1
    longer: float = 0


class Simulation:
    """Workers whose calls always wait, as fast as the limiter lets them, in a time of its own.

    Args:
        redis: a connection that decodes responses.
        limit: calls a second that are configured.
        cloud: what refuses calls.
        retry_after_s: what it then asks for; 0: nothing.
        workers: how many there are.
        way: how long things take.
    """

    def __init__(
        self,
        redis: Redis,
        limit: float,
        cloud: Cloud,
        *,
        retry_after_s: float,
        workers: int,
        way: Way,
    ) -> None:
        self._script = redis.register_script(SCRIPT.replace(CLOCK, "cjson.decode(KEYS[3])"))
        self._keys = [uuid.uuid4().hex, uuid.uuid4().hex]
        self._limit = limit * AIM
        self._cloud = cloud
        self._retry_after_s = retry_after_s
        self._slots = [Slots(1 / limit, end=0) for _ in range(workers)]
        self._way = way
        self._random = random.Random(1)
        self._begin = 1e9
        self._clock = RedisClock()
        self._clock.heard(0, 0, 1000 * self._begin)
        self._now = 0.0
        self._steps = itertools.count()
        self._ahead: list[tuple[float, int, Callable[[], Awaitable[None]]]] = []
        self.calls: list[Call] = []

    async def run(self, seconds: float) -> None:
        end = self._now + seconds
        for worker in range(len(self._slots)):
            self._later(self._now, partial(self._turn, worker))
        while self._ahead[0][0] < end:
            self._now, _, step = heappop(self._ahead)
            await step()
        self._ahead.clear()
        self._now = end

    def rest(self, seconds: float) -> None:
        self._now += seconds

    def _later(self, at: float, step: Callable[[], Awaitable[None]]) -> None:
        heappush(self._ahead, (at, next(self._steps), step))

    async def _turn(self, worker: int) -> None:
        slots = self._slots[worker]
        slot = slots.take(self._now)
        if slot is None:
            wait_s = await self._reserve(slots)
            return self._later(self._now + wait_s, partial(self._turn, worker))
        awake = max(self._now, slot.at - EARLY_S)
        self._later(awake, partial(self._look, worker, slots, slot))
        return None

    async def _look(self, worker: int, slots: Slots, slot: Slot) -> None:
        if self._now - slot.reserved > BLOCK_S:
            answer = await self._ask("check", *slots.put_back(slot))
            slots.checked(answer, self._clock, self._now)
            await self._turn(worker)
        else:
            self._later(max(self._now, slot.at), partial(self._call, worker, slots, slot))

    async def _reserve(self, slots: Slots) -> float:
        """More slots for a worker, or the seconds until it asks again."""
        now_ms, *answer = await self._ask("reserve", 1, 1000, 1000 * BLOCK_S, 1000 * PATIENCE_S)
        slots.add(*reserved_slots(answer, self._clock, self._now, self._now))
        return 0 if answer[NO_SLOTS:] else (float(answer[0]) - float(now_ms)) / 1000

    async def _call(self, worker: int, slots: Slots, slot: Slot) -> None:
        self._later(self._now, partial(self._turn, worker))
        if slots is not self._slots[worker]:
            return  # taken back
        is_late = self._random.random() < self._way.share
        late_s = self._random.uniform(0, self._way.late) if is_late else 0.0
        self._later(self._now + late_s, partial(self._send, worker, slot))

    async def _send(self, worker: int, slot: Slot) -> None:
        late_s, longer_s = self._now - slot.due, self._random.uniform(0, self._way.longer)
        await self._tell(worker, slot, late_s)
        arrive = partial(self._arrive, worker, slot, late_s + longer_s)
        self._later(self._now + self._way.out + longer_s, arrive)

    async def _arrive(self, worker: int, slot: Slot, late_s: float) -> None:
        passed = self._cloud.passes(self._now)
        self.calls.append(Call(self._now, passed))
        answered = partial(self._answered, worker, slot, late_s, passed=passed)
        self._later(self._now + self._way.back, answered)

    async def _answered(self, worker: int, slot: Slot, late_s: float, *, passed: bool) -> None:
        await self._tell(worker, slot, late_s)
        if passed:
            return
        pause_ms, ago_ms = 1000 * self._retry_after_s, 1000 * (self._now - slot.due)
        delay_ms, interval_ms = await self._ask("throttle", pause_ms, ago_ms, 1000 * BLOCK_S)
        if pause_ms:
            end = self._now + float(delay_ms) / 1000
            self._slots[worker] = Slots(float(interval_ms) / 1000, end)

    async def _tell(self, worker: int, slot: Slot, late_s: float) -> None:
        if late_s > LEAST_LATE_S:
            await self._ask("late", 1000 * BLOCK_S, slot.number, slot.due_ms, 1000 * late_s)

    async def _ask(self, what: str, *args: float) -> list[str]:
        whole, part = divmod(self._begin + self._now, 1)
        clock = json.dumps([int(whole), part * 1e6])
        asked: list[str | float] = [what, self._limit, AIM, *args]
        answer: list[str] = await self._script(keys=[*self._keys, clock], args=asked)
        return answer

    def used(self, since: float, until: float, quota: float) -> float:
        """The share of a quota that was used."""
        passed = sum(since <= call.at < until and call.passed for call in self.calls)
        return passed / (until - since) / quota

    def refused(self, since: float, until: float) -> float:
        """The share of the calls that was refused."""
        calls = [call for call in self.calls if since <= call.at < until]
        return sum(not call.passed for call in calls) / len(calls)


def simulated(
    redis_url: str,
    limit: float,
    quota: Callable[[float], float],
    *,
    retry_after_s: float = 0,
    workers: int = 1,
    way: Way | None = None,
    spans: Sequence[float],
) -> Simulation:
    """Simulate spans of seconds, a positive one at work, a negative one at rest."""

    async def run() -> Simulation:
        redis = Redis.from_url(redis_url, decode_responses=True)
        simulation = Simulation(
            redis,
            limit,
            Cloud(quota),
            retry_after_s=retry_after_s,
            workers=workers,
            way=way or Way(),
        )
        for span in spans:
            if span > 0:
                await simulation.run(span)
            else:
                simulation.rest(-span)
        await redis.aclose()
        return simulation

    return asyncio.run(run())


@pytest.mark.parametrize("workers", [1, 4])
@pytest.mark.parametrize("limit", [5, 20, 100])
def test_at_the_quota_nothing_is_refused(redis_url: str, limit: int, workers: int) -> None:
    simulation = simulated(redis_url, limit, lambda _: limit, workers=workers, spans=[10])
    assert simulation.refused(0, 10) == 0
    assert simulation.used(0, 10, limit) >= 0.98


@settings(max_examples=25)
@given(
    limit=st.integers(4, 80),
    workers=st.integers(1, 12),
    late_s=st.floats(0, 0.3),
    longer_s=st.floats(0, MOST_WAY_S),
    back_s=st.floats(0, 0.3),
)
def test_however_late_calls_are_none_is_refused(
    redis_url: str, limit: int, workers: int, late_s: float, longer_s: float, back_s: float
) -> None:
    way = Way(back=back_s, late=late_s, longer=longer_s)
    simulation = simulated(redis_url, limit, lambda _: limit, workers=workers, way=way, spans=[15])
    assert simulation.refused(0, 15) == 0
    # What a call is later on average is lost of every second, if it is more than the aim leaves;
    # and as much again at the most, as calls are not late by turns.
    lost = max(1 / AIM - 1, late_s + longer_s) + 0.03
    assert simulation.used(5, 15, limit) >= 1 / (1 + lost) - 0.1 / limit


@pytest.mark.parametrize(("late_s", "share"), [(0.4, 0.05), (0.12, 0.2), (0.05, 0.05)])
@pytest.mark.parametrize(("limit", "workers"), [(5, 1), (20, 4), (60, 2)])
def test_that_some_calls_are_late_again_and_again_gets_none_refused(
    redis_url: str, limit: int, workers: int, late_s: float, share: float
) -> None:
    way = Way(late=late_s, share=share)
    simulation = simulated(redis_url, limit, lambda _: limit, workers=workers, way=way, spans=[60])
    assert simulation.refused(0, 60) == 0
    assert simulation.used(5, 60, limit) >= 0.94


@pytest.mark.parametrize("workers", [1, 4])
@pytest.mark.parametrize("limit", [5, 20, 100])
def test_a_quota_that_is_halved_is_measured_in_a_few_seconds(
    redis_url: str, limit: int, workers: int
) -> None:
    simulation = simulated(
        redis_url,
        limit,
        lambda at: limit if at < 5 else limit / 2,
        retry_after_s=1,
        workers=workers,
        way=Way(out=0.002, back=0.002, late=0.01),
        spans=[22],
    )
    assert simulation.used(8, 20, limit / 2) >= 0.95
    # It shows in the first second after the pause that the first refusal asks for.
    assert simulation.refused(8, 20) == 0


@pytest.mark.parametrize("retry_after_s", [0, 1])
@pytest.mark.parametrize("limit", [10, 40])
def test_a_quota_that_stays_halved_is_kept_to(
    redis_url: str, limit: int, retry_after_s: float
) -> None:
    simulation = simulated(
        redis_url,
        limit,
        lambda at: limit if at < 5 else limit / 2,
        retry_after_s=retry_after_s,
        spans=[45],
    )
    # A probe in half a minute, and the second of silence that it costs.
    assert simulation.used(15, 45, limit / 2) >= (AIM - 0.04 if retry_after_s else 0.9)
    # Two cuts, if need be, each of which takes two refusals where no pause is asked for.
    late = [call for call in simulation.calls if 15 <= call.at < 45]
    assert sum(not call.passed for call in late) <= max(4, 0.02 * len(late))


def test_a_refusal_right_after_the_start_costs_its_pause_alone(redis_url: str) -> None:
    quotas = iter([10, 10, 10, 0])
    simulation = simulated(redis_url, 10, lambda _: next(quotas, 10), retry_after_s=1, spans=[12])
    assert sum(not call.passed for call in simulation.calls) == 1
    assert simulation.used(2, 12, 10) >= 0.98


@settings(max_examples=15)
@given(
    limit=st.integers(8, 60),
    share=st.floats(0.25, 0.95),
    retry_after_s=st.sampled_from([0, 1]),
    latency_s=st.floats(0, 0.4),
)
def test_whatever_the_quota_is_most_of_it_is_used_and_little_refused(
    redis_url: str, limit: int, share: float, retry_after_s: float, latency_s: float
) -> None:
    quota = int(limit * share)
    simulation = simulated(
        redis_url,
        limit,
        lambda _: quota,
        retry_after_s=retry_after_s,
        way=Way(back=latency_s),
        spans=[40],
    )
    assert simulation.used(15, 40, quota) >= (0.75 if quota > 3 else 0.5)
    assert simulation.refused(15, 40) <= 0.15


@pytest.mark.parametrize("retry_after_s", [0, 1])
def test_a_closed_door_is_knocked_at_seldom_and_an_open_one_found_soon(
    redis_url: str, retry_after_s: float
) -> None:
    simulation = simulated(
        redis_url,
        20,
        lambda at: 0 if 5 <= at < 35 else 20,
        retry_after_s=retry_after_s,
        spans=[60],
    )
    knocks = [call for call in simulation.calls if 15 <= call.at < 35]
    assert 5 <= len(knocks) <= 40
    assert simulation.used(50, 60, 20) >= 0.95


def test_a_stray_refusal_costs_no_rate(redis_url: str) -> None:
    once = iter([0])
    simulation = simulated(redis_url, 50, lambda at: next(once, 50) if at > 5 else 50, spans=[15])
    assert sum(not call.passed for call in simulation.calls) == 1
    assert simulation.used(6, 15, 50) >= 0.98


@pytest.mark.parametrize("retry_after_s", [0, 1])
@pytest.mark.parametrize("low_s", [17, 300])
def test_the_rate_comes_back_when_the_quota_does(
    redis_url: str, low_s: int, retry_after_s: float
) -> None:
    again = 3 + low_s
    simulation = simulated(
        redis_url,
        5,
        lambda at: 2 if 3 <= at < again else 5,
        retry_after_s=retry_after_s,
        spans=[again + 120],
    )
    assert simulation.used(again + 100, again + 120, 5) >= 0.97


def test_a_quota_that_stays_low_is_probed_ever_more_seldom(redis_url: str) -> None:
    simulation = simulated(
        redis_url, 20, lambda at: 20 if at < 5 else 10, retry_after_s=1, spans=[605]
    )
    refused = [call.at for call in simulation.calls if not call.passed and call.at > 10]
    waits = [later - at for at, later in itertools.pairwise(refused)]
    assert waits[0] > 1.5 * (refused[0] - 10)
    assert waits[1] > 1.2 * waits[0]
    assert simulation.used(305, 605, 10) >= 0.97
    assert 0 < simulation.refused(305, 605) <= 0.002


def test_a_rest_earns_nothing_but_the_burst(redis_url: str) -> None:
    simulation = simulated(redis_url, 20, lambda _: 20, spans=[5, -500, 5])
    assert simulation.refused(0, 600) == 0
