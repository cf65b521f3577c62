"""The HTTP API while Redis is dead, hangs, or comes back: nothing acknowledged is lost."""

from __future__ import annotations

import asyncio
import contextlib
import signal
from typing import TYPE_CHECKING

import pytest
from aiohttp import ClientSession
from redis.asyncio import Redis
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff

from scheduler.intake.http import Bounds
from tests.conftest import until
from tests.intake.api import Api, Caller, body, serving
from tests.intake.test_http import watching
from tests.worker.conftest import RedisServer
from worker.ledger import RunState

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterator
    from pathlib import Path

    from tests.intake.api import Answer

# Longer than a connection that is there again needs, far shorter than a frozen server would take.
BOUNDS = Bounds(answer_s=1)


@pytest.fixture
def server(tmp_path: Path) -> Iterator[RedisServer]:
    started = RedisServer(tmp_path)
    yield started
    started.kill()


@pytest.fixture
async def api(server: RedisServer) -> AsyncIterator[Api]:
    async with server.connected() as redis, serving(redis, BOUNDS) as running:
        yield running


@pytest.fixture
async def caller(api: Api) -> AsyncIterator[Caller]:
    async with ClientSession() as session:
        yield Caller(api, session)


@contextlib.contextmanager
def frozen(server: RedisServer) -> Iterator[None]:
    """Have a server take connections and answer nothing for the time of the `with` block."""
    assert server._process is not None
    server._process.send(signal.SIGSTOP)
    try:
        yield
    finally:
        server._process.send(signal.SIGCONT)


async def answered(caller: Caller, path: str) -> Answer:
    """The first answer that is not that Redis does not answer."""

    async def ask() -> Answer | None:
        answer = await caller.get(path)
        return answer if answer.status != 503 else None

    found = await until(ask)
    assert found is not None
    return found


async def test_what_was_acknowledged_is_there_after_redis_was_killed(
    server: RedisServer, api: Api, caller: Caller
) -> None:
    run_ids = await asyncio.gather(*(caller.asks() for _ in range(20)))
    server.kill()
    server.start()
    for run_id in run_ids:
        run = (await answered(caller, f"/v1/runs/{run_id}")).document
        assert run["state"] == RunState.QUEUED
    assert {waiting.run_id for waiting in await api.requests.waiting()} == set(run_ids)


async def test_without_redis_every_answer_is_to_come_again(
    server: RedisServer, api: Api, caller: Caller
) -> None:
    run_id = await caller.asks()
    server.kill()
    for answer in (
        await caller.request(body(), "one"),
        await caller.get(f"/v1/runs/{run_id}"),
        await caller.get(f"/v1/runs/{run_id}/jobs"),
        await caller.get(f"/v1/runs/{run_id}/events"),
        await caller.post(f"/v1/runs/{run_id}/cancel"),
    ):
        assert answer.refusal == (503, "unavailable")
        assert int(answer.headers["Retry-After"]) >= 1
        assert "redis" not in answer.document["detail"].lower()
    assert (await caller.get("/healthz")).status == 200
    server.start()

    async def accepted() -> Answer | None:
        answer = await caller.request(body(), "one")
        return answer if answer.status == 202 else None

    first = await until(accepted)
    again = await caller.request(body(), "one")
    assert first is not None
    assert first.document == again.document
    assert len(await api.requests.waiting()) == 2


async def test_a_redis_that_hangs_is_waited_for_only_so_long(
    server: RedisServer, api: Api, caller: Caller
) -> None:
    run_id = await caller.asks()
    with frozen(server):
        asked = [caller.request(body(), "one"), caller.get(f"/v1/runs/{run_id}")]
        for answer in await asyncio.gather(*asked):
            assert answer.refusal == (503, "unavailable")
    # Perhaps it was accepted all the same: the key makes one run of both.
    assert (await answered(caller, f"/v1/runs/{run_id}")).status == 200
    twice = [await caller.asks(key="one") for _ in range(2)]
    assert twice[0] == twice[1]
    assert len(await api.requests.waiting()) == 2


async def test_a_watcher_sees_the_end_of_a_run_that_outlived_redis(server: RedisServer) -> None:
    bounds = Bounds(heartbeat_s=0.1)
    # Nothing is tried again, so that a look is over as soon as it has failed.
    redis = Redis.from_url(server.url, decode_responses=True, retry=Retry(NoBackoff(), 0))
    async with redis, serving(redis, bounds) as api, ClientSession() as session:
        caller = Caller(api, session)
        run_id = await caller.asks()
        async with watching(caller, run_id) as stream:
            assert await stream.event()
            server.kill()
            assert (await caller.get(f"/v1/runs/{run_id}")).status == 503
            waiting = asyncio.create_task(stream.event())
            before = stream.heartbeats

            async def goes_on() -> bool:
                # A second apart, which is longer than from one look to the next.
                return stream.heartbeats >= before + 3

            await until(goes_on)
            server.start()
            await answered(caller, f"/v1/runs/{run_id}")
            assert (await caller.post(f"/v1/runs/{run_id}/cancel")).status == 202
            event = await waiting
            assert event is not None
            assert event["event"] == "end"
            assert await stream.event() is None
