"""Real servers for the tests: each test session starts its own redis-server."""

from __future__ import annotations

import asyncio
import random
import signal
import socket
import subprocess
import time
from typing import TYPE_CHECKING, TypeVar

import pytest
import redis
from hypothesis import HealthCheck, settings
from redis.asyncio import Redis

from worker import embedded_redis

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
    from pathlib import Path

T = TypeVar("T")

# How long an example takes says how busy the machine is: the tests run several at a time.
settings.register_profile(
    "busy machine", deadline=None, suppress_health_check=[HealthCheck.too_slow]
)
settings.load_profile("busy machine")


@pytest.fixture(scope="session", autouse=True)
def _ctrl_c_is_heeded() -> None:
    """What runs in a shell's background ignores Ctrl-C, and so do the processes that it starts."""
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="session")
def redis_url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A redis-server of this test session."""
    with embedded_redis.join(tmp_path_factory.mktemp("state")) as server:
        yield server.url


@pytest.fixture(scope="session")
def cluster_url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A redis-server in cluster mode that owns every slot.

    It refuses any command or script whose keys lie in more than one slot.
    """
    directory: Path = tmp_path_factory.mktemp("cluster")
    path = directory / "redis.sock"
    options = ["--port", str(_free_port()), "--bind", "127.0.0.1", "--unixsocket", str(path)]
    options += ["--dir", str(directory), "--cluster-enabled", "yes", "--save", ""]
    with subprocess.Popen(
        [embedded_redis.find_server_binary(), *options], stdout=subprocess.DEVNULL
    ) as server:
        client = redis.Redis(unix_socket_path=str(path))
        deadline = time.monotonic() + 20
        while True:
            try:
                client.ping()
                break
            except redis.ConnectionError:
                assert time.monotonic() < deadline, "the cluster node did not start"
        client.cluster("ADDSLOTS", *range(16_384))
        while client.cluster("INFO")["cluster_state"] != "ok":
            assert time.monotonic() < deadline, "the cluster did not come up"
            time.sleep(0.05)
        yield f"unix://{path}"
        server.terminate()


def _free_port() -> int:
    # The bus takes the port + 10000, which must be a port too. Tests that run at the same time must
    # not find the same one.
    for port in random.sample(range(20_000, 50_000), 1_000):
        with socket.socket() as probe, socket.socket() as bus:
            try:
                probe.bind(("127.0.0.1", port))
                bus.bind(("127.0.0.1", port + 10_000))
            except OSError:
                continue
            return port
    raise AssertionError("no free port")


@pytest.fixture
async def redis_client(redis_url: str) -> AsyncIterator[Redis]:
    """An empty Redis."""
    client = Redis.from_url(redis_url, decode_responses=True)
    await client.flushdb()
    yield client
    await client.aclose()


async def until(condition: Callable[[], Awaitable[T]], *, within_s: float = 20) -> T:
    """Ask again and again until the answer is truthy; fail if it takes too long."""
    async with asyncio.timeout(within_s):
        while not (answer := await condition()):  # noqa: ASYNC110 - the event is in Redis
            await asyncio.sleep(0.01)
        return answer
