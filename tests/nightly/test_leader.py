"""One of several processes leads."""

from __future__ import annotations

import asyncio
import os
import socket
from typing import TYPE_CHECKING

from tests.conftest import until
from worker.leader import Leadership, process_name

if TYPE_CHECKING:
    from redis.asyncio import Redis

KEY = "poolsweep:{test}:leader"


def candidate(redis: Redis, name: str, ttl_s: float = 60) -> Leadership:
    return Leadership(redis, KEY, name, ttl_s=ttl_s)


async def test_of_many_candidates_at_once_exactly_one_leads(redis_client: Redis) -> None:
    many = [candidate(redis_client, f"process {number}") for number in range(20)]
    for _ in range(3):
        led = await asyncio.gather(*(each.leads() for each in many))
        assert sum(led) == 1
    assert await many[led.index(True)].leads()


async def test_a_leader_that_is_not_heard_of_is_replaced(redis_client: Redis) -> None:
    assert await candidate(redis_client, "first", ttl_s=0.2).leads()
    second = candidate(redis_client, "second")
    assert not await second.leads()
    await until(second.leads)
    assert not await candidate(redis_client, "first").leads()


async def test_leading_again_renews_the_lead(redis_client: Redis) -> None:
    await candidate(redis_client, "first", ttl_s=1).leads()
    assert await candidate(redis_client, "first", ttl_s=60).leads()
    assert await redis_client.pttl(KEY) > 50_000


async def test_whoever_resigns_is_replaced_at_once(redis_client: Redis) -> None:
    first, second = candidate(redis_client, "first"), candidate(redis_client, "second")
    assert await first.leads()
    await first.resign()
    assert await second.leads()


async def test_resigning_takes_the_lead_from_nobody_else(redis_client: Redis) -> None:
    first, second = candidate(redis_client, "first"), candidate(redis_client, "second")
    await second.resign()  # nobody leads
    assert await first.leads()
    await second.resign()
    assert await redis_client.get(KEY) == "first"


async def test_the_script_may_be_lost_by_a_restarted_redis(redis_client: Redis) -> None:
    first = candidate(redis_client, "first")
    assert await first.leads()
    await redis_client.script_flush()
    assert await first.leads()


def test_a_name_says_where_the_process_is_and_is_never_given_twice() -> None:
    names = {process_name() for _ in range(100)}
    assert len(names) == 100
    assert all(name.startswith(f"{socket.gethostname()}:{os.getpid()}:") for name in names)
