"""The rate that the limiter finds when the cloud refuses calls: the real script, simulated time."""

from __future__ import annotations

import asyncio
import itertools
import json
import uuid
from collections import deque
from dataclasses import dataclass
from importlib.resources import files
from typing import TYPE_CHECKING

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from redis.asyncio import Redis

from worker.limiter import AIM, BLOCK_S, PATIENCE_S

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

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
        whole = int(self._quota(at))
        while self._recent and self._recent[0] <= at - 1:
            self._recent.popleft()
        if len(self._recent) >= whole:
            return False
        self._recent.append(at)
        return True


class Simulation:
    """Calls that always wait, as fast as the limiter lets them, in a time of its own.

    Args:
        redis: a connection that decodes responses.
        limit: calls a second that are configured.
        cloud: what refuses calls.
        retry_after_s: what it then asks for; 0: nothing.
        latency_s: how long its answers take.
    """

    def __init__(
        self, redis: Redis, limit: float, cloud: Cloud, retry_after_s: float, latency_s: float
    ) -> None:
        self._script = redis.register_script(SCRIPT.replace(CLOCK, "cjson.decode(ARGV[#ARGV])"))
        self._key = uuid.uuid4().hex
        self._limit = limit * AIM
        self._cloud = cloud
        self._retry_after_s = retry_after_s
        self._latency_s = latency_s
        self._now = 1e9
        self._begin = self._now
        self.calls: list[Call] = []

    async def run(self, seconds: float) -> None:
        refusals = deque[float]()
        end = self._now + seconds
        while self._now < end:
            delay_s = await self._ask("reserve", 1, 1, BLOCK_S * 1000, PATIENCE_S * 1000, 0)
            slot, paused = self._now + max(0.0, delay_s), False
            while refusals and refusals[0] <= slot and not paused:
                self._now = refusals.popleft()
                pause_ms, ago_ms = self._retry_after_s * 1000, self._latency_s * 1000
                await self._ask("throttle", pause_ms, ago_ms, AIM)
                paused = pause_ms > 0
            if paused:
                continue
            self._now = slot
            at = slot - self._begin
            passed = self._cloud.passes(at)
            self.calls.append(Call(at, passed))
            if not passed:
                refusals.append(slot + self._latency_s)

    def rest(self, seconds: float) -> None:
        self._now += seconds

    async def _ask(self, what: str, *args: float) -> float:
        whole = int(self._now)
        clock = json.dumps([whole, (self._now - whole) * 1e6])
        wait_ms, *_ = await self._script(keys=[self._key], args=[what, self._limit, *args, clock])
        return float(wait_ms) / 1000

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
    latency_s: float = 0.05,
    spans: Sequence[float],
) -> Simulation:
    """Simulate spans of seconds, a positive one at work, a negative one at rest."""

    async def run() -> Simulation:
        redis = Redis.from_url(redis_url, decode_responses=True)
        simulation = Simulation(redis, limit, Cloud(quota), retry_after_s, latency_s)
        for span in spans:
            if span > 0:
                await simulation.run(span)
            else:
                simulation.rest(-span)
        await redis.aclose()
        return simulation

    return asyncio.run(run())


@pytest.mark.parametrize("limit", [5, 20, 100])
def test_at_the_quota_nothing_is_refused(redis_url: str, limit: int) -> None:
    simulation = simulated(redis_url, limit, lambda _: limit, spans=[10])
    assert simulation.refused(0, 10) == 0
    assert simulation.used(0, 10, limit) >= 0.97


@pytest.mark.parametrize("retry_after_s", [0, 1])
@pytest.mark.parametrize("limit", [10, 40])
def test_a_quota_that_is_halved_is_found_in_ten_seconds(
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
        latency_s=latency_s,
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
