"""The connection to Redis that a process shares among its parts."""

from __future__ import annotations

from typing import TYPE_CHECKING

from redis.asyncio import BlockingConnectionPool, ConnectionPool, Redis
from redis.asyncio.retry import Retry
from redis.backoff import EqualJitterBackoff

if TYPE_CHECKING:
    from worker.settings import Settings

SOCKET_TIMEOUT_S = 10.0
RETRIES = 6
MOST_CONNECTIONS = 50


def connect(settings: Settings) -> Redis:
    """A pool of connections to the configured Redis; nothing is sent yet.

    Short outages (a restart, a failover) are bridged by retries over eight to sixteen seconds;
    every ledger script may be repeated safely. What no encoding takes (half a character, as a
    cloud's message may hold) is replaced, rather than failing all that is sent with it.

    Args:
        settings: names the server.

    Returns:
        A client whose answers are text.
    """
    # Whoever finds all connections in use waits for one, where the usual pool would fail.
    pool: ConnectionPool = BlockingConnectionPool.from_url(
        settings.redis_location,
        max_connections=MOST_CONNECTIONS,
        timeout=SOCKET_TIMEOUT_S,
        decode_responses=True,
        socket_timeout=SOCKET_TIMEOUT_S,
        socket_connect_timeout=SOCKET_TIMEOUT_S / 2,
        health_check_interval=30,
        retry=Retry(EqualJitterBackoff(cap=4, base=0.25), RETRIES),
        encoding_errors="replace",
        client_name="poolsweep",
    )
    return Redis.from_pool(pool)
