"""What a command works with: the settings' Redis, joined, and the ledger in it."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING

from rich.console import Console

from worker import embedded_redis
from worker.ledger import Ledger
from worker.redis_connection import connect

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterator

    from redis.asyncio import Redis

    from worker.settings import Settings

stdout = Console(highlight=False)
stderr = Console(stderr=True, highlight=False)


@contextlib.contextmanager
def joined_redis(settings: Settings) -> Iterator[None]:
    """Use the embedded Redis, and say so in a line, unless a Redis is configured."""
    if settings.redis_url is not None:
        yield
        return
    with embedded_redis.join(settings.state_dir) as server:
        verb = "Started" if server.started else "Joined"
        stderr.print(f"{verb} the embedded Redis in {settings.state_dir}", style="dim")
        yield


@contextlib.asynccontextmanager
async def open_ledger(settings: Settings) -> AsyncIterator[tuple[Redis, Ledger]]:
    """The ledger of the settings' Redis.

    Raises:
        RedisError: it does not answer.
        EmbeddedRedisError: the embedded one cannot be used.
    """
    with joined_redis(settings):
        redis = connect(settings)
        try:
            await redis.ping()
            yield redis, Ledger(redis, retention_days=settings.retention_days)
        finally:
            await redis.aclose()
