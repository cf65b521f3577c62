"""The review page over a Redis of this test session."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
from aiohttp import ClientSession

from tests.review.site import Site, serving

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from redis.asyncio import Redis


@pytest.fixture
async def site(redis_client: Redis) -> AsyncIterator[Site]:
    """The page for this machine alone: without a clients' file."""
    async with serving(redis_client) as running:
        yield running


@pytest.fixture
async def session(site: Site) -> AsyncIterator[ClientSession]:
    async with ClientSession(site.url) as open_session:
        yield open_session
