"""What is told of the limiter is what the limiter does."""

from __future__ import annotations

import math
from importlib.resources import files
from typing import TYPE_CHECKING, cast

import pytest

from scheduler.review.web.rates import rate_of
from tests.intake.api import ENDPOINT, PROJECTS
from worker.ledger import keys
from worker.limiter import AIM, Limiter

if TYPE_CHECKING:
    from collections.abc import Awaitable

    from redis.asyncio import Redis

KEY = keys.limiter(ENDPOINT, PROJECTS[0])


async def state_of(redis: Redis) -> tuple[dict[str, str], float]:
    found = await cast("Awaitable[dict[str, str]]", redis.hgetall(KEY))
    seconds, micros = await redis.time()
    return found, seconds * 1000 + micros / 1000


async def test_without_refusals_a_project_is_at_its_limit(redis_client: Redis) -> None:
    limiter = Limiter(redis_client, endpoint=ENDPOINT, rate=100, burst=1)
    await limiter.permit(PROJECTS[0])
    state, now_ms = await state_of(redis_client)
    rate = rate_of(state, 100 * AIM, now_ms)
    assert rate is not None
    assert (rate.now, rate.reduced, rate.refused) == (100 * AIM, False, 0)
    assert rate.sent >= 1
    assert rate.paused_ms == 0


async def test_a_pause_that_the_cloud_asks_for_is_told(redis_client: Redis) -> None:
    limiter = Limiter(redis_client, endpoint=ENDPOINT, rate=100, burst=1)
    await limiter.permit(PROJECTS[0])
    await limiter.throttled(PROJECTS[0], 30, sent_ago_s=0)
    state, now_ms = await state_of(redis_client)
    rate = rate_of(state, 100 * AIM, now_ms)
    assert rate is not None
    assert 25_000 < rate.paused_ms <= 30_020
    assert rate.reduced


@pytest.mark.parametrize("ago_s", [1, 10, 35, 50])
async def test_the_rate_that_is_told_is_the_one_that_is_kept(
    redis_client: Redis, ago_s: int
) -> None:
    limit = 50 * AIM
    seconds, _ = await redis_client.time()
    cut = {
        "rate": "5",
        "plateau": "20",
        "hold": "25",
        "cut": f"{(seconds - ago_s) * 1000}.000",
    }
    for name, value in {"tat": "0", "at": str(seconds * 1000), **cut}.items():
        await redis_client.hset(KEY, name, value)
    script = redis_client.register_script((files("worker") / "limiter.lua").read_text())
    # What it reserves with tells the time between two slots, and so the rate, at that moment.
    before, before_ms = await state_of(redis_client)
    late = keys.late_calls(ENDPOINT, PROJECTS[0])
    answer = await script(keys=[KEY, late], args=["reserve", limit, AIM, 1, 1, 100, 60_000])
    _, after_ms = await state_of(redis_client)
    kept = 1000 / float(answer[2])
    low, high = rate_of(before, limit, before_ms), rate_of(before, limit, after_ms)
    assert low is not None
    assert high is not None
    assert low.now <= kept * 1.0001
    assert kept <= high.now * 1.0001
    assert low.reduced


@pytest.mark.parametrize(
    ("seconds", "expected"),
    [
        (0, 5),
        (2, 10),
        (4, 20),
        (4 + 40, 20),
        (4 + 40 + 15, 20 + 50 / 8),
        (1_000, 50),
        (-5, 5),
    ],
)
def test_the_rate_doubles_up_to_the_plateau_and_after_a_while_probes(
    seconds: float, expected: float
) -> None:
    state = {"rate": "5", "plateau": "20", "hold": "40", "cut": "1000000", "tat": "0"}
    rate = rate_of(state, 50, 1_000_000 + seconds * 1000)
    assert rate is not None
    assert math.isclose(rate.now, expected)


def test_nothing_is_told_where_nothing_is_known() -> None:
    assert rate_of({}, 10, 0) is None
    assert rate_of({"tat": "1"}, 0, 0) is None
