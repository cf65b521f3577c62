"""The client against real servers: what goes over the wire, and what comes of what comes back."""

from __future__ import annotations

import asyncio
import gzip
import json
import socket
import tracemalloc
from typing import TYPE_CHECKING

import pytest
from aiohttp import web
from pydantic import SecretStr

from sandbox.config import SandboxConfig
from sandbox.server import running_sandbox
from tests.api.servers import (
    POOL,
    PROJECT,
    calling,
    deletable,
    read_request,
    recording,
    self_signed,
    talking,
)
from tests.conftest import until
from worker.modelarts import AccessKey, ApiError, Body, Failure, Token, VerdictKind, classify
from worker.modelarts.client import SMALL_BODY
from worker.modelarts_client import SPARE_CONNECTIONS, make_client
from worker.projects import Directory
from worker.settings import Settings, SettingsError

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable
    from pathlib import Path

    from redis.asyncio import Redis

    from worker.modelarts import Answer

NOT_FOUND = {"error_code": "ModelArts.50015001", "error_msg": "pool not found"}


def answering(response: Callable[[], web.Response]) -> Callable[..., Awaitable[web.StreamResponse]]:
    async def handler(_: web.BaseRequest) -> web.StreamResponse:
        return response()

    return handler


def saying(text: bytes) -> Callable[..., Awaitable[None]]:
    async def talk(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await read_request(reader)
        writer.write(text)
        await writer.drain()
        writer.close()

    return talk


# What is sent

WRONG_NAMES = ["", ".", "..", "../" + "a" * 36, "a" * 35, "a" * 64, "A" * 36, "a" * 35 + "-"]
WRONG_NAMES += ["a" * 36 + "\n", "a" * 35 + "?", "a" * 20 + "/" + "b" * 20, "%2e%2e%2f" + "a" * 30]
WRONG_NAMES += ["a" * 36 + "#x", "а" * 36, "1" + "a" * 36, "a" * 36 + "\x00", " " + "a" * 36]
WRONG_PROJECTS = ["", ".", "..", "a/b", "a b", "p?x=1", "p#", "p%2f", "p\n", "é", "p" * 65, "-p"]


@pytest.mark.parametrize(
    ("project", "pool"),
    [(PROJECT, name) for name in WRONG_NAMES] + [(project, POOL) for project in WRONG_PROJECTS],
)
async def test_a_name_that_must_not_stand_in_a_path_never_reaches_the_wire(
    project: str, pool: str
) -> None:
    async with (
        running_sandbox(SandboxConfig(pools=1)) as sandbox,
        calling(sandbox.url) as client,
    ):
        for call in (
            client.delete_pool,
            client.show_pool,
            client.show_pool_tags,
            client.list_nodes,
            client.list_workloads,
        ):
            with pytest.raises(ValueError, match="accepted:"):
                await call(project, pool)
        if project != PROJECT:
            with pytest.raises(ValueError, match="accepted:"):
                await client.list_pools(project)
        assert not sandbox.server.calls


async def test_a_delete_is_one_request_without_a_body_to_the_documented_path() -> None:
    async with recording() as server, calling(server.url) as client:
        answer = await client.delete_pool(PROJECT, POOL)
    (request,) = server.received
    assert (request.method, request.path) == ("DELETE", f"/v2/{PROJECT}/pools/{POOL}")
    assert request.body == b""
    assert request.headers["Content-Type"] == "application/json"
    assert (answer.status, answer.body) == (200, Body.OBJECT)


async def test_headers_that_are_not_configured_are_not_sent() -> None:
    async with recording() as server, calling(server.url) as client:
        await client.delete_pool(PROJECT, POOL)
    headers = server.received[0].headers
    assert "request-type" not in headers
    assert "X-ModelArts-User-ID" not in headers
    assert headers["User-Agent"] == "poolsweep"


async def test_configured_headers_are_sent_with_every_kind_of_call() -> None:
    async with (
        recording() as server,
        calling(
            server.url, request_type="console", user_id="tenant-7", user_agent="sweeper/1"
        ) as client,
    ):
        await client.delete_pool(PROJECT, POOL)
        await client.show_pool(PROJECT, POOL)
    assert len(server.received) == 2
    for request in server.received:
        assert request.headers["request-type"] == "console"
        assert request.headers["X-ModelArts-User-ID"] == "tenant-7"
        assert request.headers["User-Agent"] == "sweeper/1"


async def test_the_settings_make_a_client_that_sends_what_they_say(redis_client: Redis) -> None:
    async with recording() as server:
        settings = Settings(
            endpoint=server.url,
            token=SecretStr("settings-token"),
            request_type="console",
            user_id="tenant-7",
            total_timeout_s=7,
        )
        async with make_client(Directory.of(settings), redis_client, server.url) as client:
            await client.delete_pool(PROJECT, POOL)
    headers = server.received[0].headers
    assert headers["X-Auth-Token"] == "settings-token"
    assert (headers["request-type"], headers["X-ModelArts-User-ID"]) == ("console", "tenant-7")
    assert headers["User-Agent"].startswith("poolsweep/")


async def test_a_client_is_not_made_without_an_endpoint_or_credentials(
    redis_client: Redis, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("ENDPOINT", "TOKEN", "AK", "SK", "IAM_ENDPOINT"):
        monkeypatch.delenv(f"POOLSWEEP_{name}", raising=False)
    with pytest.raises(SettingsError, match="POOLSWEEP_ENDPOINT: not set"):
        _ = Directory.of(Settings(token=SecretStr("x"))).endpoints
    directory = Directory.of(Settings(endpoint="https://modelarts.example.com"))
    with pytest.raises(SettingsError, match="no credentials"):
        make_client(directory, redis_client, "https://modelarts.example.com")


# Connections


async def test_calls_one_after_another_share_one_connection() -> None:
    async with recording() as server, calling(server.url) as client:
        for _ in range(20):
            await client.delete_pool(PROJECT, POOL)
    assert len(server.received) == 20
    assert len(server.connections) == 1


async def test_no_more_connections_are_opened_than_configured() -> None:
    async with recording() as server, calling(server.url, max_connections=4) as client:
        await asyncio.gather(*(client.delete_pool(PROJECT, POOL) for _ in range(60)))
    assert len(server.received) == 60
    assert len(server.connections) == 4


async def test_the_pool_of_connections_has_room_for_every_job_that_a_worker_holds(
    redis_client: Redis,
) -> None:
    wanted, all_there = 12 + SPARE_CONNECTIONS, asyncio.Event()

    async def wait_for_all(_: web.BaseRequest) -> web.StreamResponse:
        if len(server.received) == wanted:
            all_there.set()
        await all_there.wait()
        return web.json_response({})

    async with recording(wait_for_all) as server:
        settings = Settings(
            endpoint=server.url, token=SecretStr("x"), worker_batches=3, batch_size=4
        )
        async with make_client(Directory.of(settings), redis_client, server.url) as client:
            calls = (client.delete_pool(PROJECT, POOL) for _ in range(wanted))
            answers = await asyncio.gather(*calls)
    assert {answer.status for answer in answers} == {200}
    assert len(server.connections) == wanted


async def test_a_cancelled_call_gives_its_connection_back() -> None:
    arrived, may_answer = asyncio.Event(), asyncio.Event()

    async def wait(_: web.BaseRequest) -> web.StreamResponse:
        arrived.set()
        await may_answer.wait()
        return web.json_response({})

    async with (
        recording(wait) as server,
        calling(server.url, max_connections=1, total_timeout_s=20) as client,
    ):
        for _ in range(3):
            arrived.clear()
            task = asyncio.create_task(client.delete_pool(PROJECT, POOL))
            await arrived.wait()
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
        may_answer.set()
        answer = await client.delete_pool(PROJECT, POOL)
    assert answer.status == 200


async def test_the_other_side_sees_its_connections_end_when_the_client_is_closed() -> None:
    ended = asyncio.Event()

    async def talk(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await read_request(reader)
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\n{}")
        assert await reader.read() == b""
        ended.set()
        writer.close()

    async with talking(talk) as url:
        async with calling(url) as client:
            assert (await client.delete_pool(PROJECT, POOL)).status == 200
            assert not ended.is_set()
        async with asyncio.timeout(10):
            await ended.wait()


async def test_a_delete_whose_pooled_connection_is_lost_is_not_sent_again_by_itself() -> None:
    seen: list[bytes] = []

    async def talk(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        seen.append(await read_request(reader))
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\n{}")
        seen.append(await read_request(reader))
        writer.close()

    async with talking(talk) as url, calling(url) as client:
        first = await client.delete_pool(PROJECT, POOL)
        second = await client.delete_pool(PROJECT, POOL)
        assert len(seen) == 2
    assert first.status == 200
    assert (second.status, second.failure) == (None, Failure.RESET)
    assert classify(second).kind is VerdictKind.RETRY


# Redirects


@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
async def test_no_redirect_is_followed_with_the_credentials(status: int) -> None:
    async with recording() as elsewhere:

        def redirect() -> web.Response:
            target = f"{elsewhere.url}/v2/{PROJECT}/pools/{POOL}"
            return web.Response(status=status, headers={"Location": target})

        async with recording(answering(redirect)) as server, calling(server.url) as client:
            answer = await client.delete_pool(PROJECT, POOL)
            with pytest.raises(ApiError, match="does not redirect"):
                await client.list_pools(PROJECT)
    assert len(server.received) == 2
    assert elsewhere.received == []
    assert answer.status == status
    assert classify(answer).kind is VerdictKind.FAILED


# What comes back


async def test_the_clouds_request_id_is_kept() -> None:
    async with recording() as server, calling(server.url) as client:
        assert (await client.delete_pool(PROJECT, POOL)).request_id == "request-7"


async def test_a_request_id_in_the_body_is_kept_if_no_header_has_it() -> None:
    body = {"error_code": "APIG.0308", "error_msg": "slow down", "request_id": "from-the-body"}

    def response() -> web.Response:
        return web.json_response(body, status=429, headers={"Retry-After": "17"})

    async with recording(answering(response)) as server, calling(server.url) as client:
        answer = await client.delete_pool(PROJECT, POOL)
    assert (answer.request_id, answer.retry_after_s) == ("from-the-body", 17)
    assert (answer.error_code, answer.error_msg) == ("APIG.0308", "slow down")
    assert classify(answer).throttled


async def test_a_request_id_cannot_forge_a_line_in_the_log() -> None:
    talk = saying(b"HTTP/1.1 200 OK\r\nX-Request-Id: a\x1b[31mb\r\nContent-Length: 2\r\n\r\n{}")
    async with talking(talk) as url, calling(url) as client:
        answer = await client.delete_pool(PROJECT, POOL)
    assert "\x1b" not in answer.request_id


def call_types() -> list[web.Response]:
    not_found = json.dumps(NOT_FOUND)
    return [
        web.Response(status=404, text="<html>404</html>", content_type="application/json"),
        web.Response(status=404, text="nothing here", content_type="application/json"),
        web.Response(status=404, text=f"[{not_found}]", content_type="application/json"),
        web.Response(status=404, text=f"<!-- {not_found} -->", content_type="application/json"),
        web.Response(status=404, body=b"\xff\xfe" + not_found.encode("utf-16-le")[:-1]),
        web.Response(status=404, text=not_found[:-1], content_type="application/json"),
        web.Response(status=404),
        web.Response(status=200, text="<html>sign in</html>", content_type="application/json"),
        web.Response(status=200, text="OK", content_type="application/json"),
    ]


@pytest.mark.parametrize("number", range(len(call_types())))
async def test_a_body_that_is_not_what_its_type_says_is_never_a_success(number: int) -> None:
    async with (
        recording(answering(lambda: call_types()[number])) as server,
        calling(server.url) as client,
    ):
        answer = await client.delete_pool(PROJECT, POOL)
        with pytest.raises(ApiError):
            await client.show_pool(PROJECT, POOL)
        with pytest.raises(ApiError):
            await client.list_pools(PROJECT)
    assert classify(answer).kind is VerdictKind.FAILED


async def test_pool_not_found_counts_whatever_type_the_body_claims_to_be() -> None:
    def response() -> web.Response:
        return web.Response(status=404, text=json.dumps(NOT_FOUND), content_type="text/html")

    async with recording(answering(response)) as server, calling(server.url) as client:
        answer = await client.delete_pool(PROJECT, POOL)
        assert await client.show_pool(PROJECT, POOL) is None
    assert classify(answer).kind is VerdictKind.ALREADY_DELETED


async def test_an_oversized_body_is_read_no_further_than_the_limit() -> None:
    sent = 0

    async def stream(request: web.BaseRequest) -> web.StreamResponse:
        nonlocal sent
        response = web.StreamResponse()
        await response.prepare(request)
        for _ in range(400):
            await response.write(b" " * (1 << 18))
            sent += 1 << 18
        return response

    async with recording(stream) as server, calling(server.url) as client:
        answer = await client.delete_pool(PROJECT, POOL)
    assert (answer.status, answer.failure) == (None, Failure.OVERSIZED)
    assert sent < 400 << 18  # the connection was closed before the end
    assert classify(answer).kind is VerdictKind.RETRY


async def test_a_gzip_bomb_neither_fills_the_memory_nor_passes() -> None:
    bomb = gzip.compress(bytes(200 << 20), compresslevel=1)

    def response() -> web.Response:
        return web.Response(body=bomb, headers={"Content-Encoding": "gzip"})

    async with recording(answering(response)) as server, calling(server.url) as client:
        await client.delete_pool(PROJECT, "warm-" + POOL)
        tracemalloc.start()
        answer = await client.delete_pool(PROJECT, POOL)
        _, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
    assert len(bomb) < 4 << 20
    assert answer.failure is Failure.OVERSIZED
    assert peak < 16 * SMALL_BODY


async def test_a_compressed_answer_is_understood() -> None:
    body = gzip.compress(json.dumps(NOT_FOUND).encode())

    def response() -> web.Response:
        return web.Response(status=404, body=body, headers={"Content-Encoding": "gzip"})

    async with recording(answering(response)) as server, calling(server.url) as client:
        answer = await client.delete_pool(PROJECT, POOL)
    assert classify(answer).kind is VerdictKind.ALREADY_DELETED


NO_ANSWERS = {
    "a body cut midway": (
        b'HTTP/1.1 200 OK\r\nContent-Length: 90\r\n\r\n{"metadata": {}}',
        Failure.RESET,
    ),
    "a chunked body cut midway": (
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n2\r\n{}\r\n",
        Failure.RESET,
    ),
    "headers cut midway": (b"HTTP/1.1 200 OK\r\nContent-Le", Failure.RESET),
    "nothing at all": (b"", Failure.RESET),
    "a body that is not compressed as it says": (
        b"HTTP/1.1 200 OK\r\nContent-Encoding: gzip\r\nContent-Length: 2\r\n\r\n{}",
        Failure.RESET,
    ),
    "no HTTP": (b"SSH-2.0-OpenSSH_9.6\r\n", Failure.INVALID),
    "endless headers": (b"HTTP/1.1 200 OK\r\nX: " + b"x" * 100_000 + b"\r\n\r\n", Failure.INVALID),
}


@pytest.mark.parametrize("what", NO_ANSWERS)
async def test_what_is_no_whole_answer_is_a_failure_to_retry(what: str) -> None:
    text, failure = NO_ANSWERS[what]
    async with talking(saying(text)) as url, calling(url) as client:
        answer = await client.delete_pool(PROJECT, POOL)
    assert (answer.status, answer.failure) == (None, failure)
    assert answer.detail
    assert classify(answer).kind is VerdictKind.RETRY


async def test_a_reset_connection_is_a_failure_to_retry() -> None:
    async def reset(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await read_request(reader)
        writer.transport.abort()

    async with talking(reset) as url, calling(url) as client:
        answer = await client.delete_pool(PROJECT, POOL)
    assert (answer.status, answer.failure) == (None, Failure.RESET)
    assert classify(answer).kind is VerdictKind.RETRY


async def test_a_closed_port_is_a_failure_to_connect() -> None:
    with socket.socket() as reserved:
        reserved.bind(("127.0.0.1", 0))
        async with calling(f"http://127.0.0.1:{reserved.getsockname()[1]}") as client:
            answer = await client.delete_pool(PROJECT, POOL)
    assert (answer.status, answer.failure) == (None, Failure.CONNECT)
    assert classify(answer).kind is VerdictKind.RETRY


async def test_a_host_that_takes_no_connection_runs_into_the_connect_timeout() -> None:
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        server.listen(0)
        address = server.getsockname()
        waiting = [socket.socket() for _ in range(4)]
        try:
            for filler in waiting:  # the queue of the kernel is full after the first or second
                filler.setblocking(False)
                filler.connect_ex(address)
            url = f"http://127.0.0.1:{address[1]}"
            async with calling(url, connect_timeout_s=0.2, total_timeout_s=100) as client:
                answer = await client.delete_pool(PROJECT, POOL)
        finally:
            for filler in waiting:
                filler.close()
    assert (answer.status, answer.failure) == (None, Failure.TIMEOUT)
    assert "Connection timeout" in answer.detail
    assert classify(answer).kind is VerdictKind.RETRY


async def test_a_server_that_never_answers_runs_into_the_total_timeout() -> None:
    async def hang(_: web.BaseRequest) -> web.StreamResponse:
        await asyncio.Event().wait()
        raise AssertionError

    async with (
        recording(hang) as server,
        calling(server.url, connect_timeout_s=100, total_timeout_s=0.2) as client,
    ):
        answer = await client.delete_pool(PROJECT, POOL)
        assert len(server.received) == 1
    assert (answer.status, answer.failure) == (None, Failure.TIMEOUT)
    assert classify(answer).kind is VerdictKind.RETRY


async def test_an_answer_that_trickles_runs_into_the_total_timeout() -> None:
    async def trickle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await read_request(reader)
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 1000000\r\n\r\n")
        while not writer.is_closing():
            writer.write(b" ")
            await writer.drain()
            await asyncio.sleep(0.01)

    async with talking(trickle) as url, calling(url, total_timeout_s=0.3) as client:
        answer = await client.delete_pool(PROJECT, POOL)
    assert (answer.status, answer.failure) == (None, Failure.TIMEOUT)


async def test_a_certificate_that_nobody_vouches_for_ends_the_call_before_the_credentials_go(
    tmp_path: Path,
) -> None:
    async with recording(tls=self_signed(tmp_path)) as server, calling(server.url) as client:
        answer = await client.delete_pool(PROJECT, POOL)
        assert server.received == []
    assert (answer.status, answer.failure) == (None, Failure.TLS)
    assert classify(answer).kind is VerdictKind.FAILED


async def test_no_failure_or_error_tells_the_credentials() -> None:
    secrets = ["the-token-is-secret", "AKIDSECRET", "sk-is-secret", "sts-is-secret"]
    token, ak, sk, security_token = map(SecretStr, secrets)
    async with talking(saying(b"SSH-2.0\r\n")) as url:
        for credentials in (Token(token), AccessKey(ak, sk, security_token)):
            async with calling(url, credentials) as client:
                answer = await client.delete_pool(PROJECT, POOL)
                with pytest.raises(ApiError) as error:
                    await client.list_pools(PROJECT)
            text = f"{answer!r} {error.value!s} {error.value!r} {client!r} {vars(client)!r}"
            assert not [secret for secret in secrets if secret in text]


# Reads


async def test_reads_give_what_the_sandbox_holds() -> None:
    async with (
        running_sandbox(SandboxConfig(pools=40, seed=3)) as sandbox,
        calling(sandbox.url) as client,
    ):
        listing = await client.list_pools(PROJECT)
        there = sandbox.cloud.projects[PROJECT]
        assert [pool.pool_id for pool in listing.pools] == list(there)
        assert listing.unreadable == []
        name = deletable(sandbox)[0]
        shown = await client.show_pool(PROJECT, name)
        assert shown is not None
        assert shown.document.to_json() == there[name].document
        assert await client.show_pool_tags(PROJECT, name) == shown.tags
        assert len(await client.list_nodes(PROJECT, name)) == sum(shown.nodes_by_flavor.values())
        assert await client.list_workloads(PROJECT, name) == []
        assert await client.show_pool(PROJECT, "absent-" + POOL) is None


async def test_a_pool_that_is_not_the_one_asked_for_is_not_taken_for_it() -> None:
    async with recording() as server, calling(server.url) as client:
        with pytest.raises(ApiError, match="not that pool"):
            await client.show_pool(PROJECT, "another-" + POOL)


@pytest.mark.parametrize("document", [{}, {"items": None}, {"items": {}}, {"pools": []}])
async def test_a_list_without_items_is_no_empty_project(document: dict[str, object]) -> None:
    async with (
        recording(answering(lambda: web.json_response(document))) as server,
        calling(server.url) as client,
    ):
        with pytest.raises(ApiError, match="no list of items"):
            await client.list_pools(PROJECT)


async def test_a_list_entry_without_a_name_is_set_aside() -> None:
    items = [{"metadata": {"name": POOL}}, {"metadata": {}}, 7, None]

    async with (
        recording(answering(lambda: web.json_response({"items": items}))) as server,
        calling(server.url) as client,
    ):
        listing = await client.list_pools(PROJECT)
    assert [pool.pool_id for pool in listing.pools] == [POOL]
    assert [each.document() for each in listing.unreadable] == items[1:]


async def test_workloads_are_read_page_by_page() -> None:
    everything = [{"name": f"job-{number}"} for number in range(1_200)]

    async def page(request: web.BaseRequest) -> web.StreamResponse:
        offset, limit = int(request.query["offset"]), int(request.query["limit"])
        return web.json_response({"items": everything[offset : offset + limit]})

    async with recording(page) as server, calling(server.url) as client:
        found = await client.list_workloads(PROJECT, POOL)
    assert [workload.name for workload in found] == [item["name"] for item in everything]
    assert [request.path.partition("?")[2] for request in server.received] == [
        "limit=500&offset=0",
        "limit=500&offset=500",
        "limit=500&offset=1000",
    ]


async def test_pages_may_be_smaller_than_asked_for_if_the_api_says_how_many_there_are() -> None:
    everything = [{"name": f"job-{number}"} for number in range(25)]

    async def page(request: web.BaseRequest) -> web.StreamResponse:
        offset = int(request.query["offset"])
        return web.json_response({"total": 25, "items": everything[offset : offset + 10]})

    async with recording(page) as server, calling(server.url) as client:
        found = await client.list_workloads(PROJECT, POOL)
    assert [workload.name for workload in found] == [item["name"] for item in everything]
    assert len(server.received) == 3


@pytest.mark.parametrize("odd", [None, "job", 7, []], ids=repr)
async def test_a_list_of_workloads_or_nodes_that_cannot_be_read_whole_is_not_read(
    odd: object,
) -> None:
    def response() -> web.Response:
        return web.json_response({"items": [{"name": "a"}, odd]})

    async with recording(answering(response)) as server, calling(server.url) as client:
        for read in (client.list_workloads, client.list_nodes):
            with pytest.raises(ApiError, match="not an object"):
                await read(PROJECT, POOL)
    assert len(server.received) == 2


async def test_a_read_that_is_refused_renews_and_asks_once_more_only() -> None:
    def response() -> web.Response:
        return web.json_response({"error_code": "APIG.0301", "error_msg": "no"}, status=401)

    async with recording(answering(response)) as server, calling(server.url) as client:
        with pytest.raises(ApiError, match="refused") as error:
            await client.list_pools(PROJECT)
    assert len(server.received) == 2
    assert error.value.verdict.kind is VerdictKind.FAILED


async def test_each_call_is_observed_once_and_what_was_not_sent_is_not() -> None:
    seen: list[Answer] = []
    responses = iter(
        [
            web.json_response({"error_code": "APIG.0301", "error_msg": "no"}, status=401),
            web.json_response({"items": []}),
            web.json_response(NOT_FOUND, status=404),
        ]
    )

    def refuse() -> None:
        raise RuntimeError("not now")

    async with (
        recording(answering(lambda: next(responses))) as server,
        calling(server.url, observe=seen.append) as client,
    ):
        await client.list_pools(PROJECT)
        answer = await client.delete_pool(PROJECT, POOL)
        with pytest.raises(ValueError, match="pool"):
            await client.delete_pool(PROJECT, "../elsewhere")
        with pytest.raises(RuntimeError):
            await client.delete_pool(PROJECT, POOL, before=refuse)
    assert [(each.method, each.status) for each in seen] == [
        ("GET", 401),
        ("GET", 200),
        ("DELETE", 404),
    ]
    assert seen[-1] is answer
    assert len(server.received) == len(seen)

    async with (
        talking(saying(b"no HTTP\r\n\r\n")) as url,
        calling(url, observe=seen.append) as client,
    ):
        answer = await client.delete_pool(PROJECT, POOL)
    assert seen[3:] == [answer]
    assert answer.failure is Failure.INVALID


async def test_a_deleted_pool_goes_through_deleting_to_not_found() -> None:
    async with (
        running_sandbox(SandboxConfig(pools=30, delete_seconds=0.3)) as sandbox,
        calling(sandbox.url) as client,
    ):
        name = deletable(sandbox)[0]
        assert (await client.delete_pool(PROJECT, name)).status == 200
        shown = await client.show_pool(PROJECT, name)
        assert shown is None or shown.phase == "Deleting"

        async def gone() -> bool:
            return await client.show_pool(PROJECT, name) is None

        await until(gone)
        answer = await client.delete_pool(PROJECT, name)
    assert classify(answer).kind is VerdictKind.ALREADY_DELETED
