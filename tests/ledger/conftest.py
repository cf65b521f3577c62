"""The ledger under test, over a Redis alone and one in cluster mode."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
from redis.asyncio import Redis

from worker.ledger import Ledger

if TYPE_CHECKING:
    from collections.abc import AsyncIterator


@pytest.fixture(params=["redis_url", "cluster_url"])
async def redis(request: pytest.FixtureRequest) -> AsyncIterator[Redis]:
    client = Redis.from_url(request.getfixturevalue(request.param), decode_responses=True)
    await client.flushdb()
    yield client
    await client.aclose()


@pytest.fixture
def ledger(redis: Redis) -> Ledger:
    return Ledger(redis, retention_days=2)
