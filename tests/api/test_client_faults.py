"""The client and the sign-in against servers that do what none should.

Whatever comes back ends in an answer that is understood: never in a traceback, a hang or a success.
"""

from __future__ import annotations

import asyncio
import contextlib
import gzip
import json
import os
import socket
import struct
import sys
import tracemalloc
import zlib
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from typing import TYPE_CHECKING, Any

import pytest
from aiohttp import web
from hypothesis import given
from hypothesis import strategies as st
from pydantic import SecretStr

from tests.api.servers import (
    POOL,
    PROJECT,
    CertificateAuthority,
    calling,
    read_request,
    recording,
    talking,
)
from worker.modelarts import (
    AccessKey,
    ApiError,
    AuthError,
    Endpoint,
    Failure,
    IamUser,
    UnreadableTagsError,
    VerdictKind,
    classify,
)
from worker.modelarts.auth import fetch_token
from worker.modelarts.client import MOST_PAGES

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable
    from pathlib import Path

    from tests.api.servers import Talk
    from worker.modelarts import Answer

    Writer = asyncio.StreamWriter
    Reader = asyncio.StreamReader

GOOD = json.dumps({"metadata": {"name": POOL}}).encode()
SOON_S = 0.3
"""The timeout of calls that are to run into it."""


def http(
    body: bytes, *headers: bytes, status: bytes = b"200 OK", connection: bytes = b"close"
) -> bytes:
    """An answer after which the connection ends, as `saying` has it."""
    own = [b"Connection: " + connection, b"Content-Length: %d" % len(body)]
    return b"\r\n".join([b"HTTP/1.1 " + status, *own, *headers, b"", body])


def saying(text: bytes) -> Talk:
    async def talk(reader: Reader, writer: Writer) -> None:
        await read_request(reader)
        writer.write(text)
        with contextlib.suppress(ConnectionError):  # the other side may have heard enough
            await writer.drain()
        writer.close()

    return talk


def user(url: str) -> IamUser:
    return IamUser(Endpoint.parse(url), "name", SecretStr("password-is-secret"), "domain")


async def delete(talk: Talk, **options: Any) -> Answer:
    """A DELETE to a server that talks so; reading there is no success either."""

    async def read() -> None:
        with pytest.raises(ApiError):
            await client.list_pools(PROJECT)

    async with talking(talk) as url, calling(url, **options) as client:
        answer, _ = await asyncio.gather(client.delete_pool(PROJECT, POOL), read())
    return answer


async def sign_in(talk: Talk, timeout_s: float = 20) -> AuthError:
    async with talking(talk) as url:
        with pytest.raises(AuthError) as error:
            await fetch_token(user(url), PROJECT, timeout_s)
    assert "password-is-secret" not in repr(error.value)
    return error.value


# Connections


async def reset(_: Reader, writer: Writer) -> None:
    now = struct.pack("ii", 1, 0)
    writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, now)
    writer.transport.abort()


async def reset_after_the_request(reader: Reader, writer: Writer) -> None:
    await read_request(reader)
    await reset(reader, writer)


async def reset_within_the_answer(reader: Reader, writer: Writer) -> None:
    await read_request(reader)
    writer.write(http(GOOD)[:-5])
    await writer.drain()
    await reset(reader, writer)


@pytest.mark.parametrize("talk", [reset, reset_after_the_request, reset_within_the_answer])
async def test_a_reset_connection_is_a_failure_to_retry_wherever_it_is_cut(talk: Talk) -> None:
    answer = await delete(talk)
    # A reset may come so soon that the connection never stood.
    lost = {Failure.RESET, Failure.CONNECT} if talk is reset else {Failure.RESET}
    assert answer.status is None
    assert answer.failure in lost
    assert classify(answer).kind is VerdictKind.RETRY
    assert (await sign_in(talk)).temporary


async def silence(reader: Reader, writer: Writer) -> None:
    await reader.read()  # until the other side has had enough
    writer.close()


async def slow_headers(reader: Reader, writer: Writer) -> None:
    await read_request(reader)
    with contextlib.suppress(ConnectionError):
        for byte in http(GOOD, b"X-Slow: " + b"x" * 2_000):
            writer.write(bytes([byte]))
            await writer.drain()
            await asyncio.sleep(0.01)
    writer.close()


async def slow_chunks(reader: Reader, writer: Writer) -> None:
    await read_request(reader)
    writer.write(
        b"HTTP/1.1 201 Created\r\nX-Subject-Token: t\r\nTransfer-Encoding: chunked\r\n\r\n"
    )
    with contextlib.suppress(ConnectionError):
        while not writer.is_closing():
            writer.write(b"1\r\n \r\n")
            await writer.drain()
            await asyncio.sleep(0.01)
    writer.close()


async def endless_interim_answers(reader: Reader, writer: Writer) -> None:
    await read_request(reader)
    with contextlib.suppress(ConnectionError):
        while not writer.is_closing():
            writer.write(b"HTTP/1.1 102 Processing\r\n\r\n")
            await writer.drain()
            await asyncio.sleep(0)
    writer.close()


@pytest.mark.parametrize("talk", [silence, slow_headers, slow_chunks, endless_interim_answers])
async def test_an_answer_that_does_not_end_runs_into_the_total_timeout(talk: Talk) -> None:
    answer, error = await asyncio.gather(
        delete(talk, total_timeout_s=SOON_S, connect_timeout_s=100), sign_in(talk, SOON_S)
    )
    assert (answer.status, answer.failure) == (None, Failure.TIMEOUT)
    assert classify(answer).kind is VerdictKind.RETRY
    assert error.temporary
    assert "does not answer" in str(error)


async def test_a_connection_that_was_closed_between_calls_is_not_used_again() -> None:
    seen: list[bytes] = []

    async def talk(reader: Reader, writer: Writer) -> None:
        seen.append(await read_request(reader))
        writer.write(http(GOOD, connection=b"keep-alive"))
        await writer.drain()
        writer.close()
        await writer.wait_closed()

    async with talking(talk) as url, calling(url) as client:
        answers = [await client.delete_pool(PROJECT, POOL) for _ in range(20)]
    # A call may cross with the end of its connection; none is made twice for that.
    assert {answer.status for answer in answers} <= {200, None}
    assert answers[0].status == 200
    assert len(seen) == [answer.status for answer in answers].count(200)
    assert {answer.failure for answer in answers if answer.status is None} <= {Failure.RESET}


async def test_an_answer_that_nobody_asked_for_is_not_taken_for_that_of_the_next_call() -> None:
    connections: list[int] = []
    answered, said = asyncio.Event(), asyncio.Event()
    unasked = http(b"", status=b"400 Bad Request", connection=b"keep-alive")

    async def talk(reader: Reader, writer: Writer) -> None:
        number = len(connections)
        connections.append(0)
        with contextlib.suppress(ConnectionError, asyncio.IncompleteReadError):
            while True:
                await read_request(reader)
                connections[number] += 1
                writer.write(http(GOOD, connection=b"keep-alive"))
                await writer.drain()
                if number == 0:
                    await answered.wait()
                    writer.write(unasked)
                    await writer.drain()
                    said.set()
        writer.close()

    async with talking(talk) as url, calling(url) as client:
        for _ in range(3):
            assert (await client.delete_pool(PROJECT, POOL)).status == 200
            answered.set()
            await said.wait()
            for _ in range(10):  # turns of the loop, in which it arrives
                await asyncio.sleep(0)
    assert connections == [1, 2]


# What is no HTTP, or not all of it

CHUNKED = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n"
PARTS = gzip.compress(GOOD)
NO_ANSWERS = {
    "a status in letters": http(GOOD, status=b"2OO OK"),
    "a status of two digits": http(GOOD, status=b"20 OK"),
    "a status of four digits": http(GOOD, status=b"2000 OK"),
    "a negative status": http(GOOD, status=b"-200 OK"),
    "another version": http(GOOD).replace(b"HTTP/1.1", b"HTTP/9.9"),
    "no status line": GOOD,
    "HTTP/2": b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
    "a TLS alert": b"\x15\x03\x01\x00\x02\x02\x46",
    "two lengths": http(GOOD, b"Content-Length: 2"),
    "a length and chunks": http(GOOD, b"Transfer-Encoding: chunked"),
    "a negative length": b"HTTP/1.1 200 OK\r\nContent-Length: -1\r\n\r\n",
    "a length in letters": b"HTTP/1.1 200 OK\r\nContent-Length: two\r\n\r\n{}",
    "a length beyond all bounds": b"HTTP/1.1 200 OK\r\nContent-Length: "
    + b"9" * 40
    + b"\r\n\r\n{}",
    "a null byte in a header": http(GOOD, b"X-Request-Id: a\0b"),
    "a header without a colon": http(GOOD, b"nonsense"),
    "a header with a space in its name": http(GOOD, b"X Y: z"),
    "headers without end": b"HTTP/1.1 200 OK\r\n" + b"X: y\r\n" * 20_000 + b"\r\n",
    "a chunk whose size is none": CHUNKED + b"zz\r\n{}\r\n",
    "a chunk of negative size": CHUNKED + b"-2\r\n{}\r\n",
    "a chunk larger than all memory": CHUNKED + b"ffffffffffffffffff\r\n{}",
    "a chunked body without its end": CHUNKED + b"2\r\n{}\r\n0\r\n",
    "an interim answer alone": b"HTTP/1.1 100 Continue\r\n\r\n",
    "an interim answer with a body": (
        b"HTTP/1.1 102 Processing\r\nContent-Length: 5\r\n\r\nhello" + http(GOOD)
    ),
    "deflate that is none": http(GOOD, b"Content-Encoding: deflate"),
    "deflate that is cut": http(zlib.compress(GOOD)[:-9], b"Content-Encoding: deflate"),
    "deflate without content": http(zlib.compress(GOOD)[:2], b"Content-Encoding: deflate"),
    "gzip with a wrong checksum": http(PARTS[:-8] + b"01234567", b"Content-Encoding: gzip"),
    "gzip with more behind it": http(PARTS + b"more", b"Content-Encoding: gzip"),
    "gzip without content": http(PARTS[:10], b"Content-Encoding: gzip"),
    "brotli that is none": http(GOOD, b"Content-Encoding: br"),
    "zstandard that is none": http(GOOD, b"Content-Encoding: zstd"),
}


@pytest.mark.parametrize("what", NO_ANSWERS)
async def test_what_is_no_answer_is_a_failure_to_retry(what: str) -> None:
    text = NO_ANSWERS[what]
    answer = await delete(saying(text), total_timeout_s=20)
    assert answer.status is None
    assert answer.failure in {Failure.INVALID, Failure.RESET}
    verdict = classify(answer)
    assert verdict.kind is VerdictKind.RETRY
    assert "\n" not in verdict.reason
    # An identity service that answers so has given no token, whatever its headers say.
    token = text.replace(b"200 OK", b"201 Created\r\nX-Subject-Token: t", 1)
    if what != "gzip without content":  # the headers hold all that is needed
        assert (await sign_in(saying(token))).temporary


# What is an answer, but not the API's


def nested(depth: int) -> bytes:
    return b"[" * depth + b"]" * depth


LIES = {
    "text that is no UTF-8": http(b'{"metadata": {"name": "\xff\xfe"}}'),
    "half a document": http(GOOD[:-3]),
    "a document that the connection's end cuts": b"HTTP/1.1 200 OK\r\n\r\n" + GOOD[:-3],
    "half a compressed document": http(PARTS[:-12], b"Content-Encoding: gzip"),
    "a document compressed twice": http(
        gzip.compress(gzip.compress(GOOD)), b"Content-Encoding: gzip, gzip"
    ),
    "an unknown compression": http(b"\x00\x01\x02", b"Content-Encoding: x-secret"),
    "two documents": http(GOOD + GOOD),
    "ten thousand levels": http(b'{"a": ' + nested(10_000) + b"}"),
    "a number of five thousand digits": http(b'{"a": ' + b"9" * 5_000 + b"}"),
    "a number alone": http(b"NaN"),
    "switching protocols": (
        b"HTTP/1.1 101 Switching Protocols\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n\r\n"
    ),
    "half of it": http(GOOD, status=b"206 Partial Content"),
    "not modified": http(b"", status=b"304 Not Modified"),
    "a status that there is not": http(GOOD, status=b"999 What"),
    "not found, ten thousand levels deep": http(
        b'{"error_code": "ModelArts.50015001", "a": ' + nested(10_000) + b"}",
        status=b"404 Not Found",
    ),
    "not found, in a list": http(
        b'{"error_code": ["ModelArts.50015001"]}', status=b"404 Not Found"
    ),
    "not found, with half a character": http(
        b'{"error_code": "ModelArts.50015001\\ud800"}', status=b"404 Not Found"
    ),
    "not found, cut": http(
        gzip.compress(b'{"error_code": "ModelArts.50015001"}')[:-12],
        b"Content-Encoding: gzip",
        status=b"404 Not Found",
    ),
    "not found, then found": http(
        b'{"error_code": "ModelArts.50015001", "error_code": ""}', status=b"404 Not Found"
    ),
}


@pytest.mark.parametrize("what", LIES)
async def test_what_is_not_the_apis_answer_fails_and_is_never_a_success(what: str) -> None:
    async with talking(saying(LIES[what])) as url, calling(url) as client:
        answer = await client.delete_pool(PROJECT, POOL)
        for read in (client.show_pool, client.list_nodes, client.list_workloads):
            with pytest.raises(ApiError):
                await read(PROJECT, POOL)
        with pytest.raises(ApiError):
            await client.list_pools(PROJECT)
    verdict = classify(answer)
    assert verdict.kind is VerdictKind.FAILED
    assert verdict.reason.startswith(f"HTTP {answer.status}: ")


@pytest.mark.parametrize("depth", [500, 900, 950, 970, 990, 1_000, 2_000])
async def test_a_document_nested_as_deep_as_can_be_read_or_deeper_does_no_harm(depth: int) -> None:
    inner = nested(depth).decode()
    pool = f'{{"metadata": {{"name": "{POOL}", "labels": {inner}}}, "spec": {inner}}}'
    body = f'{{"items": [{pool}], "tags": {inner}}}'.encode()
    async with talking(saying(http(body))) as url, calling(url) as client:
        reads: list[Callable[[], Awaitable[Any]]] = [
            lambda: client.list_pools(PROJECT),
            lambda: client.show_pool(PROJECT, POOL),
            lambda: client.list_nodes(PROJECT, POOL),
            lambda: client.list_workloads(PROJECT, POOL),
            lambda: client.show_pool_tags(PROJECT, POOL),
        ]
        for read in reads:
            with contextlib.suppress(ApiError, UnreadableTagsError):
                await read()
        assert classify(await client.delete_pool(PROJECT, POOL)).kind in {
            VerdictKind.ACCEPTED,
            VerdictKind.FAILED,
        }


@pytest.mark.parametrize("odd", ["NaN", "-Infinity", "1e999", "9" * 4_000, "-1", "true", "{}"])
async def test_numbers_that_are_none_leave_a_list_readable(odd: str) -> None:
    resource = f'{{"count": {odd}, "maxCount": {odd}, "flavor": {odd}}}'
    pool = (
        f'{{"metadata": {{"name": "{POOL}", "annotations": {{'
        f'"os.modelarts.pool/subpools.count": {odd}, "os.modelarts/billing.mode": {odd}}}}}, '
        f'"spec": {{"controlMode": {odd}, "resources": [{resource}]}}, '
        f'"status": {{"phase": {odd}, "resources": {{"available": [{resource}]}}}}}}'
    )
    text = http(f'{{"items": [{pool}]}}'.encode())
    async with talking(saying(text)) as url, calling(url) as client:
        listing = await client.list_pools(PROJECT)
    assert [found.pool_id for found in listing.pools] == [POOL]
    assert listing.pools[0].subpool_count is None


NOT_FOUND = http(
    b'{"error_code": "ModelArts.50015001", "error_msg": "pool not found"}', status=b"404 Not Found"
)
BUSY = http(b"{}", b"Retry-After: 7", status=b"503 Busy")
IN_CHUNKS = CHUNKED + b"2\r\n{}\r\n0\r\n\r\n"
PACKED = http(PARTS, b"Content-Encoding: gzip", b"Set-Cookie: a=b", b"X-Request-Id: r")


@given(
    text=st.sampled_from([http(GOOD), NOT_FOUND, BUSY, IN_CHUNKS, PACKED]),
    places=st.lists(st.tuples(st.integers(0, 250), st.integers(0, 9), st.binary(max_size=9))),
)
def test_whatever_a_server_says_it_is_an_answer(
    text: bytes, places: list[tuple[int, int, bytes]]
) -> None:
    for start, removed, added in places:
        text = text[:start] + added + text[start + removed :]

    async def call() -> Answer:
        async with talking(saying(text)) as url, calling(url, total_timeout_s=SOON_S) as client:
            return await client.delete_pool(PROJECT, POOL)

    answer = asyncio.run(call())
    verdict = classify(answer)
    assert verdict.reason
    assert (answer.status is None) is (answer.failure is not None)
    if verdict.kind is VerdictKind.ALREADY_DELETED:
        assert b"404" in text
        assert b"ModelArts.50015001" in text


async def test_a_list_of_workloads_that_never_ends_is_given_up() -> None:
    async def page(_: web.BaseRequest) -> web.StreamResponse:
        return web.json_response({"total": 10**9, "items": [{"name": "the same again"}]})

    async with recording(page) as server, calling(server.url) as client:
        with pytest.raises(ApiError, match="has not ended after"):
            await client.list_workloads(PROJECT, POOL)
    assert len(server.received) == MOST_PAGES


# Signing in


@pytest.mark.parametrize("status", [301, 303, 307, 308])
async def test_the_password_follows_no_redirect(status: int) -> None:
    async with recording() as elsewhere:

        async def redirect(_: web.BaseRequest) -> web.StreamResponse:
            headers = {"Location": f"{elsewhere.url}/v3/auth/tokens"}
            return web.Response(status=status, headers=headers)

        async with recording(redirect) as identity:
            with pytest.raises(AuthError, match=f"HTTP {status} without a token") as error:
                await fetch_token(user(identity.url), PROJECT)
    assert not error.value.temporary
    assert len(identity.received) == 1
    assert elsewhere.received == []


@pytest.mark.parametrize("token", [b"\xff\xfe", "é".encode(), b"t\x7f", b"a\tb"])
async def test_a_token_that_cannot_stand_in_a_header_is_none(token: bytes) -> None:
    text = http(b"{}", b"X-Subject-Token: " + token, status=b"201 Created")
    assert "HTTP 201 without a token" in str(await sign_in(saying(text)))


async def test_an_identity_service_that_talks_without_end_fills_no_memory() -> None:
    bomb = gzip.compress(bytes(64 << 20), compresslevel=1)
    text = http(bomb, b"X-Subject-Token: t", b"Content-Encoding: gzip", status=b"201 Created")
    tracemalloc.start()
    error = await sign_in(saying(text))
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert error.temporary
    assert "larger than 8388608 bytes" in str(error)
    assert peak < 32 << 20


# The clock


def expired(date: str) -> Callable[[web.BaseRequest], Awaitable[web.StreamResponse]]:
    async def answer(_: web.BaseRequest) -> web.StreamResponse:
        body = {
            "error_code": "APIGW.0301",
            "error_msg": "Incorrect IAM authentication information: "
            "verify aksk signature fail, signature expired",
        }
        return web.json_response(body, status=401, headers={"Date": date})

    return answer


def access_key() -> AccessKey:
    return AccessKey(SecretStr("AKIDSECRET"), SecretStr("sk-is-secret"))


@pytest.mark.parametrize(
    ("minutes", "words"), [(20, "20 min behind the cloud's"), (-90, "90 min ahead of the cloud's")]
)
async def test_a_clock_that_spoils_the_signatures_is_named(minutes: int, words: str) -> None:
    date = format_datetime(datetime.now(UTC) + timedelta(minutes=minutes), usegmt=True)
    async with recording(expired(date)) as server, calling(server.url, access_key()) as client:
        answer = await client.delete_pool(PROJECT, POOL)
        with pytest.raises(AuthError) as error:
            await client.renew_credentials(PROJECT)
        assert len(server.received) == 1
        with pytest.raises(AuthError, match="set the clock"):
            await client.list_pools(PROJECT)
        assert len(server.received) == 2  # again in vain would come closer to locking the key
    assert classify(answer).kind is VerdictKind.RENEW
    assert not error.value.temporary
    assert str(error.value) == (
        f"Signing in failed: this machine's clock is {words}, which refuses signatures that are "
        "more than 15 min off: set the clock."
    )


@pytest.mark.parametrize("date", ["now", "", "soon", "Thu, 99 Xyz 99999 99:99:99 GMT"])
async def test_a_clock_that_is_right_or_cannot_be_compared_is_not_to_blame(date: str) -> None:
    if date == "now":
        date = format_datetime(datetime.now(UTC) + timedelta(minutes=10), usegmt=True)
    async with recording(expired(date)) as server, calling(server.url, access_key()) as client:
        assert (await client.delete_pool(PROJECT, POOL)).status == 401
        await client.renew_credentials(PROJECT)
        with pytest.raises(ApiError, match="signature expired"):
            await client.list_pools(PROJECT)


async def test_a_clock_that_was_set_is_to_blame_no_longer() -> None:
    dates = [datetime.now(UTC) + timedelta(hours=1), datetime.now(UTC)]

    async def answer(request: web.BaseRequest) -> web.StreamResponse:
        return await expired(format_datetime(dates.pop(0), usegmt=True))(request)

    async with recording(answer) as server, calling(server.url, access_key()) as client:
        await client.delete_pool(PROJECT, POOL)
        with pytest.raises(AuthError, match="60 min behind"):
            await client.renew_credentials(PROJECT)
        await client.delete_pool(PROJECT, POOL)
        await client.renew_credentials(PROJECT)


# TLS

CALLER = """
import asyncio, json, sys
from pydantic import SecretStr
from tests.api.servers import POOL, PROJECT, calling
from worker.modelarts import AuthError, Endpoint, IamUser
from worker.modelarts.auth import fetch_token

async def call(url):
    async with calling(url, total_timeout_s=20) as client:
        answer = await client.delete_pool(PROJECT, POOL)
    try:
        user = IamUser(Endpoint.parse(url), "name", SecretStr("password"), "domain")
        await fetch_token(user, PROJECT)
        sign_in = "done"
    except AuthError as error:
        sign_in = str(error)
    return [answer.status, answer.failure, answer.detail, sign_in]

async def main():
    print(json.dumps([await call(url) for url in sys.argv[1:]]))

asyncio.run(main())
"""


async def test_tls_that_cannot_be_trusted_ends_a_call_before_the_credentials_go(
    tmp_path: Path,
) -> None:
    async def answer(_: web.BaseRequest) -> web.StreamResponse:
        return web.json_response({}, status=201, headers={"X-Subject-Token": "t"})

    def replying(text: bytes) -> Talk:
        async def talk(reader: Reader, writer: Writer) -> None:
            await reader.read(1)
            writer.write(text)
            writer.close()

        return talk

    plain = replying(http(b"", status=b"400 Bad Request"))
    too_old = replying(b"\x15\x03\x01\x00\x02\x02\x46")  # alert: protocol version
    authority = CertificateAuthority(tmp_path)
    contexts = {
        "trusted": authority.serve_as("127.0.0.1"),
        "wrong name": authority.serve_as("127.0.0.2"),
        "expired": authority.serve_as("127.0.0.1", timedelta(hours=-1)),
    }
    async with contextlib.AsyncExitStack() as stack:
        servers = {
            name: await stack.enter_async_context(recording(answer, tls=context))
            for name, context in contexts.items()
        }
        others = [await stack.enter_async_context(talking(talk)) for talk in (plain, too_old)]
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-c", CALLER),
            *(server.url for server in servers.values()),
            *(url.replace("http:", "https:") for url in others),
            env={**os.environ, "SSL_CERT_FILE": str(authority.file)},
            stdout=asyncio.subprocess.PIPE,
        )
        output, _ = await process.communicate()
    trusted, *outcomes = json.loads(output.splitlines()[-1])  # log lines go before it
    assert trusted == [201, None, "", "done"]
    assert [request.method for request in servers.pop("trusted").received] == ["DELETE", "POST"]
    for server in servers.values():
        assert server.received == []
    words = ["IP address mismatch", "certificate has expired"]
    words += ["wrong version number", "alert protocol version"]
    for (status, failure, detail, sign_in), word in zip(outcomes, words, strict=True):
        assert (status, failure) == (None, Failure.TLS)
        assert word in detail
        assert sign_in.startswith("Signing in failed: the identity service at https://127.0.0.1:")
        assert word in sign_in
