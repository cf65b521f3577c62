"""Whatever comes back over the wire of a DELETE: a verdict, and a success only if it is one."""

from __future__ import annotations

import asyncio
import json
import re
from contextlib import AsyncExitStack
from typing import TYPE_CHECKING

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.api.servers import POOL, PROJECT, calling, read_request, talking
from tests.fuzz.mutation import broken_bytes, is_fit_to_show
from tests.modelarts.pool_documents import EXAMPLE
from worker.modelarts import Answer, Verdict, VerdictKind, classify

if TYPE_CHECKING:
    from collections.abc import Iterator

    from worker.modelarts.client import ModelArtsClient

NOT_FOUND = b'{"error_code": "ModelArts.50015001", "error_msg": "pool not found"}'
JSON = "Content-Type: application/json\r\nX-Request-Id: r1\r\n"


def answer(status: str, body: bytes = b"", headers: str = JSON) -> bytes:
    head = f"HTTP/1.1 {status}\r\n{headers}Content-Length: {len(body)}\r\nConnection: close\r\n\r\n"
    return head.encode() + body


ANSWERS = {
    answer("200 OK", json.dumps(EXAMPLE).encode()): VerdictKind.ACCEPTED,
    answer("202 Accepted", b"{}"): VerdictKind.ACCEPTED,
    answer("204 No Content"): VerdictKind.ACCEPTED,
    answer("404 Not Found", NOT_FOUND): VerdictKind.ALREADY_DELETED,
    answer("404 Not Found", NOT_FOUND.replace(b"ModelArts.50015001", b"APIG.0101")): (
        VerdictKind.FAILED
    ),
    answer("404 Not Found", b"<html>not here</html>", "Content-Type: text/html\r\n"): (
        VerdictKind.FAILED
    ),
    answer("200 OK", NOT_FOUND): VerdictKind.FAILED,
    answer("200 OK", b"<html>sign in</html>", "Content-Type: text/html\r\n"): VerdictKind.FAILED,
    answer("302 Found", b"", "Location: https://login.example.com/\r\n"): VerdictKind.FAILED,
    answer("401 Unauthorized", NOT_FOUND): VerdictKind.RENEW,
    answer("409 Conflict", b"{}"): VerdictKind.RETRY,
    answer("429 Too Many", b"{}", "Retry-After: 7\r\n"): VerdictKind.RETRY,
    answer("503 Away", NOT_FOUND): VerdictKind.RETRY,
}
PIECES = [
    b"200", b"202", b"204", b"404", b"500", b"100", b"HTTP/1.1 200 OK\r\n\r\n", b"\r\n",
    b"Content-Length: 3\r\n", b"Content-Length: 99999999999\r\n", b"Transfer-Encoding: chunked\r\n",
    b"Content-Encoding: gzip\r\n", b"Retry-After: -1\r\n", b"ModelArts.50015001", b"\xff", b"\x00",
    b'"', b"}", NOT_FOUND,
]  # fmt: skip


class Wire:
    """A server that says what it is told to, and a client that asks it."""

    def __init__(self, runner: asyncio.Runner) -> None:
        self._runner = runner
        self._stack = AsyncExitStack()
        self._says = b""
        self._client: ModelArtsClient = runner.run(self._open())

    async def _open(self) -> ModelArtsClient:
        url = await self._stack.enter_async_context(talking(self._talk))
        return await self._stack.enter_async_context(calling(url))

    async def _talk(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await read_request(reader)
        writer.write(self._says)
        writer.close()

    def asks(self, says: bytes) -> tuple[Answer, Verdict]:
        """What a DELETE comes to, of which the server says this."""
        self._says = says
        found = self._runner.run(self._client.delete_pool(PROJECT, POOL))
        return found, classify(found)

    def close(self) -> None:
        self._runner.run(self._stack.aclose())


@pytest.fixture(scope="module")
def wire() -> Iterator[Wire]:
    with asyncio.Runner() as runner:
        opened = Wire(runner)
        yield opened
        opened.close()


def test_unbroken_answers_mean_what_they_say(wire: Wire) -> None:
    for raw, kind in ANSWERS.items():
        assert wire.asks(raw)[1].kind is kind, raw


@given(st.sampled_from(list(ANSWERS)).flatmap(lambda raw: broken_bytes(raw, PIECES)))
def test_broken_answers_are_weighed_and_none_becomes_a_success(wire: Wire, raw: bytes) -> None:
    found, verdict = wire.asks(raw)
    assert verdict.reason
    assert is_fit_to_show(verdict.reason)
    statuses = set(re.findall(rb"HTTP/1\.[0-9] ([0-9]{3})", raw))
    if verdict.kind is VerdictKind.ACCEPTED:
        assert statuses & {b"200", b"202", b"204"}, raw
        assert found.status in {200, 202, 204}
        assert not found.error_code
    if verdict.kind is VerdictKind.ALREADY_DELETED:
        assert b"404" in statuses, raw
        assert b'"ModelArts.50015001"' in raw
    assert verdict.retry_after_s is None or verdict.retry_after_s >= 0
