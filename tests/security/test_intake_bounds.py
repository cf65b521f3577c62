"""What the intake spends on strangers, and what it tells them."""

from __future__ import annotations

import asyncio
import contextlib
import sys
from typing import TYPE_CHECKING, Any

import pytest
from aiohttp import ClientSession

from scheduler.intake import clients as clients_file
from scheduler.intake.clients import Clients, new_token
from scheduler.intake.http import Bounds
from tests.conftest import until
from tests.intake.api import PROJECTS, Api, Caller, serving
from worker.yaml_source import YamlError, read_yaml

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from pathlib import Path

    from redis.asyncio import Redis

SLOW_CLIENTS = 300


@pytest.fixture
async def api(redis_client: Redis) -> AsyncIterator[Api]:
    async with serving(redis_client, Bounds(body_s=60, idle_s=60)) as running:
        yield running


@pytest.fixture
async def caller(api: Api) -> AsyncIterator[Caller]:
    async with ClientSession() as session:
        yield Caller(api, session)


async def test_clients_that_send_a_byte_at_a_time_hold_up_nobody(api: Api, caller: Caller) -> None:
    host, port = api.url.removeprefix("http://").split(":")
    head = f"POST /v1/runs HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {api.tokens['ci']}\r\n"
    body = "Content-Type: application/json\r\nContent-Length: 1000\r\n\r\n{"
    async with contextlib.AsyncExitStack() as stack:
        connections = []
        for number in range(SLOW_CLIENTS):
            _, writer = await asyncio.open_connection(host, int(port))
            stack.callback(writer.close)
            # Half of them are slow with the head, half with the body.
            writer.write((head + body if number % 2 else head).encode())
            connections.append(writer)
        sent = 0

        async def trickle() -> None:
            nonlocal sent
            while True:
                for writer in connections:
                    writer.write(b"x")
                sent += 1
                await asyncio.sleep(0.05)

        trickling = asyncio.create_task(trickle())
        stack.callback(trickling.cancel)
        for number in range(5):
            before = sent
            await caller.asks(key=f"in-between-{number}")

            async def more(before: int = before) -> bool:
                return sent > before

            await until(more)
        assert not [writer for writer in connections if writer.is_closing()]


async def test_more_headers_than_anybody_needs_are_refused(api: Api) -> None:
    host, port = api.url.removeprefix("http://").split(":")
    reader, writer = await asyncio.open_connection(host, int(port))
    lines = "".join(f"X-{number}: {'x' * 100}\r\n" for number in range(100_000))
    with contextlib.suppress(ConnectionError):
        writer.write(f"GET /healthz HTTP/1.1\r\nHost: x\r\n{lines}".encode())
        await writer.drain()
    async with asyncio.timeout(20):
        # It does not wait for the end of them, which does not come.
        with contextlib.suppress(ConnectionError):
            answer = await reader.read()
            assert not answer or b"400" in answer.split(b"\r\n")[0]
    writer.close()


async def test_no_answer_is_a_page(api: Api, caller: Caller) -> None:
    script = "<script>alert(1)</script>"
    run_id = await caller.asks(reason=script, requester=script)
    paths = {
        "/healthz": 200,
        "/readyz": 200,
        "/v1/openapi.json": 200,
        f"/v1/runs/{run_id}": 200,
        f"/v1/runs/{run_id}/jobs": 200,
        f"/v1/runs/{run_id}/jobs?outcome={script}": 400,
        f"/v1/runs/{script}": 404,
        f"/{script}": 404,
        "/": 404,
        "/docs": 404,
    }
    for path, status in paths.items():
        answer = await caller.get(path)
        assert answer.status == status, path
        assert answer.headers["Content-Type"].split(";")[0] in {
            "application/json",
            "application/problem+json",
        }
        assert answer.headers["X-Content-Type-Options"] == "nosniff"


# Tokens


def comparisons(clients: Clients, token: str) -> int:
    """How many comparisons it takes to say whose token this is."""
    count = 0

    def watch(_: Any, event: str, function: Any) -> None:
        nonlocal count
        count += event == "c_call" and function.__name__ == "compare_digest"

    sys.setprofile(watch)
    try:
        clients.authenticate(token)
    finally:
        sys.setprofile(None)
    return count


def test_every_token_takes_the_same_comparisons() -> None:
    """Whose it is, whether it is anybody's, and whether it is one, are not told by the time."""
    tokens = [new_token()[0] for _ in range(20)]
    entries = "\n".join(
        f"  client-{number}:\n    tokens: [{clients_file.token_hash(token)}]\n"
        f"    projects: [{PROJECTS[0]}]"
        for number, token in enumerate(tokens)
    )
    clients = clients_file.parse(f"clients:\n{entries}\n")
    strangers = [new_token()[0], tokens[0] + "x", tokens[0][:-1], "", "x", "pst_", "\ud800"]
    taken = {comparisons(clients, token) for token in [*tokens, *strangers]}
    assert taken == {len(tokens)}


def test_a_file_makes_no_objects(tmp_path: Path) -> None:
    """Clients, projects, policies and prices are all read in this way."""
    made = tmp_path / "made"
    path = tmp_path / "file.yaml"
    path.write_text(f"a: !!python/object/apply:os.mkdir ['{made}']\n")
    with pytest.raises(YamlError, match="tags with ! are not taken"):
        read_yaml(path)
    assert not made.exists()
