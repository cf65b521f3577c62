"""Every error of every kind is a problem as RFC 9457 has it, also below the routes."""

from __future__ import annotations

import asyncio
import json
from typing import TYPE_CHECKING, Any

import pytest
import redis.exceptions
from aiohttp import web
from hypothesis import given
from hypothesis import strategies as st
from structlog.testing import capture_logs

from scheduler.intake import problems
from scheduler.intake.desk import NotAllowedError
from scheduler.intake.http import Bounds
from scheduler.intake.problems import KINDS, Kind, Problem, problem_of, retry_after
from scheduler.intake.request import LARGEST, Fault, RequestError
from scheduler.intake.requests import KeyReusedError
from tests.intake.api import Api, body, serving
from worker.ledger import DamagedRunError, RunNotFoundError, SchemaError

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from redis.asyncio import Redis

QUICK = Bounds(body_s=0.3, answer_s=5, idle_s=0.5)

# What an error means: pure


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        (web.HTTPNotFound(), problems.NOT_FOUND),
        (web.HTTPMethodNotAllowed("PUT", ["GET"]), problems.METHOD_NOT_ALLOWED),
        (web.HTTPRequestEntityTooLarge(1, 2), problems.TOO_LARGE),
        (web.HTTPExpectationFailed(), problems.EXPECTATION),
        (web.HTTPBadRequest(), problems.BAD_REQUEST),
        (NotAllowedError([Fault("/webhook", "no")]), problems.FORBIDDEN),
        (RequestError([Fault("/targets", "no")]), problems.INVALID),
        (KeyReusedError(), problems.KEY_REUSED),
        (RunNotFoundError("x"), problems.NOT_FOUND),
        (SchemaError.of_run("x", "9"), problems.UNAVAILABLE),
        (redis.exceptions.ConnectionError("10.0.0.7:6379"), problems.UNAVAILABLE),
        (TimeoutError(), problems.UNAVAILABLE),
    ],
)
def test_an_error_that_is_foreseen_means_a_problem(error: Exception, kind: Kind) -> None:
    problem = problem_of(error)
    assert problem is not None
    assert problem.kind == kind


def test_an_error_that_nobody_foresaw_means_none() -> None:
    assert problem_of(ZeroDivisionError()) is None
    assert problem_of(DamagedRunError("x", KeyError("total"))) is None


def test_what_redis_says_is_not_passed_on() -> None:
    problem = problem_of(redis.exceptions.ConnectionError("connecting to secret-host:6379"))
    assert problem is not None
    assert "secret-host" not in problem.detail
    assert int(problem.headers["Retry-After"]) >= 1


def test_no_two_kinds_have_one_name() -> None:
    assert len({kind.name for kind in KINDS}) == len(KINDS)


@given(st.text(max_size=4_000), st.lists(st.builds(Fault, st.text(), st.text()), max_size=3))
def test_whatever_a_problem_says_its_answer_is_one_json_object(
    detail: str, faults: list[Fault]
) -> None:
    response = Problem(problems.INVALID, detail, faults).response()
    assert isinstance(response.body, bytes)
    document = json.loads(response.body)
    assert document["status"] == response.status == 422
    assert document["type"] == "urn:poolsweep:problem:invalid-request"
    assert "\n" not in document["detail"]
    assert len(document.get("errors", [])) == len(faults)


@given(st.floats(min_value=0, max_value=1e6))
def test_a_client_that_waits_as_it_is_told_has_waited_long_enough(wait_s: float) -> None:
    told = int(retry_after(wait_s)["Retry-After"])
    assert max(1, wait_s) <= told < wait_s + 1 or told == 1


# Below the routes


@pytest.fixture
async def api(redis_client: Redis) -> AsyncIterator[Api]:
    async with serving(redis_client, QUICK) as running:
        yield running


class Answer:
    """An answer as it came over the wire."""

    def __init__(self, raw: bytes) -> None:
        head, _, self.body = raw.partition(b"\r\n\r\n")
        first, *lines = head.decode().split("\r\n")
        self.status = int(first.split()[1]) if raw else 0
        pairs = (line.split(": ", 1) for line in lines)
        self.head = {name.lower(): value for name, value in pairs}

    @property
    def problem(self) -> str:
        """The name of the problem that it is."""
        assert self.head["content-type"] == "application/problem+json"
        assert self.head["x-content-type-options"] == "nosniff"
        assert self.head["cache-control"] == "no-store"
        assert self.head["server"] == "poolsweep"
        document = json.loads(self.body)
        assert document["status"] == self.status
        return str(document["type"].rpartition(":")[2])


async def wire(api: Api, *parts: bytes, until_closed: bool = True) -> Answer:
    """Send bytes as they are; read until the other side has closed, or for one answer."""
    host, port = api.url.removeprefix("http://").split(":")
    reader, writer = await asyncio.open_connection(host, int(port))
    try:
        for part in parts:
            writer.write(part)
            await writer.drain()
        async with asyncio.timeout(20):
            if until_closed:
                return Answer(await reader.read())
            head = await reader.readuntil(b"\r\n\r\n")
            return Answer(head + await reader.read(int(Answer(head).head["content-length"])))
    finally:
        writer.close()


def head(api: Api, *lines: str, method: str = "POST", path: str = "/v1/runs") -> bytes:
    """A request's head, with the token of a client."""
    whole = [
        f"{method} {path} HTTP/1.1",
        "Host: localhost",
        f"Authorization: Bearer {api.tokens['ci']}",
        *lines,
    ]
    return "\r\n".join([*whole, "", ""]).encode()


@pytest.mark.parametrize(
    "sent",
    [
        b"nonsense\r\n\r\n",
        b"GET / HTTP/9.9\r\nHost: x\r\n\r\n",
        b"GET /healthz HTTP/1.1\r\nHost: x\r\nbad header\r\n\r\n",
        b"GET /healthz HTTP/1.1\r\nHost: x\r\nX: " + b"x" * 20_000 + b"\r\n\r\n",
        b"GET /" + b"x" * 20_000 + b" HTTP/1.1\r\nHost: x\r\n\r\n",
        b"POST /v1/runs HTTP/1.1\r\nHost: x\r\nContent-Length: 1\r\nContent-Length: 2\r\n\r\n",
        b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 1\r\nTransfer-Encoding: chunked\r\n\r\n",
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03 \r\n\r\n",
    ],
    ids=["no http", "version", "header", "long header", "long path", "lengths", "framing", "tls"],
)
async def test_what_is_not_http_is_told_so_and_the_connection_closes(api: Api, sent: bytes) -> None:
    answer = await wire(api, sent)
    assert (answer.status, answer.problem) == (400, "bad-request")


async def test_a_token_in_a_broken_head_is_neither_repeated_nor_logged(
    api: Api, caplog: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture[str]
) -> None:
    secret = api.tokens["ci"]
    answer = await wire(
        api, f"GET / HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {secret}\x01\r\n\r\n".encode()
    )
    assert answer.status == 400
    said = answer.body.decode() + caplog.text + "".join(capsys.readouterr())
    assert secret not in said


@pytest.mark.parametrize("hosts", [[], ["Host: a", "Host: b"]])
async def test_a_request_names_one_host(api: Api, hosts: list[str]) -> None:
    lines = ["GET /healthz HTTP/1.1", *hosts, "Connection: close", "", ""]
    answer = await wire(api, "\r\n".join(lines).encode())
    assert (answer.status, answer.problem) == (400, "bad-request")


async def test_no_answer_depends_on_the_host_that_is_named(api: Api) -> None:
    sent = json.dumps(body()).encode()
    length = f"Content-Length: {len(sent)}"
    lines = head(api, "Content-Type: application/json", length, "Connection: close")
    answer = await wire(api, lines.replace(b"localhost", b"evil.example"), sent)
    assert answer.status == 202
    assert answer.head["location"].startswith("/v1/runs/")
    assert b"evil" not in answer.body


async def test_a_path_that_is_not_there_is_a_problem(api: Api) -> None:
    for path in ("/", "/v1", "/v2/runs", "/v1/runs/", "/v1/runs/%2e%2e/secret", "//v1/runs"):
        answer = await wire(api, head(api, "Connection: close", method="GET", path=path))
        assert (answer.status, answer.problem) == (404, "not-found"), path


async def test_a_method_that_is_not_accepted_is_a_problem_that_names_the_others(api: Api) -> None:
    for method in ("GET", "PUT", "DELETE", "OPTIONS", "HEAD", "TRACE", "PROPFIND"):
        answer = await wire(api, head(api, "Connection: close", method=method))
        assert (answer.status, answer.head["allow"]) == (405, "POST"), method
        if method != "HEAD":
            assert answer.problem == "method-not-allowed"


async def test_an_expectation_that_cannot_be_met_is_a_problem_on_every_path(api: Api) -> None:
    lines = (
        "Expect: tea",
        "Content-Type: application/json",
        "Content-Length: 2",
        "Connection: close",
    )
    for path in ("/v1/runs", "/nowhere"):
        answer = await wire(api, head(api, *lines, path=path), b"{}")
        assert (answer.status, answer.problem) == (417, "expectation-failed"), path


async def test_a_body_is_asked_for_only_once_its_head_is_accepted(api: Api) -> None:
    sent = json.dumps(body()).encode()
    lines = ("Expect: 100-continue", f"Content-Length: {len(sent)}", "Connection: close")
    host, port = api.url.removeprefix("http://").split(":")
    reader, writer = await asyncio.open_connection(host, int(port))
    writer.write(head(api, "Content-Type: application/json", *lines))
    assert await reader.readuntil(b"\r\n\r\n") == b"HTTP/1.1 100 Continue\r\n\r\n"
    writer.write(sent)
    assert Answer(await reader.read()).status == 202
    writer.close()
    refused = await wire(api, head(api, "Content-Type: text/plain", *lines), until_closed=False)
    assert (refused.status, refused.problem) == (415, "unsupported-media-type")


async def test_a_body_that_says_it_is_too_large_is_refused_unread(api: Api) -> None:
    lines = ("Content-Type: application/json", f"Content-Length: {LARGEST + 1}")
    answer = await wire(api, head(api, *lines), until_closed=False)
    assert (answer.status, answer.problem) == (413, "too-large")


async def test_a_body_in_chunks_that_grows_too_large_is_refused(api: Api) -> None:
    lines = ("Content-Type: application/json", "Transfer-Encoding: chunked")
    chunk = b"10000\r\n" + b" " * 0x10000 + b"\r\n"
    answer = await wire(api, head(api, *lines), *[chunk] * 17, until_closed=False)
    assert (answer.status, answer.problem) == (413, "too-large")


async def test_a_body_that_does_not_come_is_given_up(api: Api) -> None:
    lines = ("Content-Type: application/json", "Content-Length: 100")
    answer = await wire(api, head(api, *lines), b'{"targets":', until_closed=False)
    assert (answer.status, answer.problem) == (408, "too-slow")


async def test_a_head_that_trickles_in_is_cut_off(api: Api) -> None:
    host, port = api.url.removeprefix("http://").split(":")
    reader, writer = await asyncio.open_connection(host, int(port))
    writer.write(b"GET /healthz HTTP/1.1\r\n")

    async def trickle() -> None:
        while True:
            writer.write(b"X: y\r\n")
            await asyncio.sleep(0.05)

    trickling = asyncio.create_task(trickle())
    try:
        async with asyncio.timeout(10):
            assert await reader.read() == b""
    except ConnectionResetError:
        pass
    finally:
        trickling.cancel()
        writer.close()


async def test_a_chunk_that_is_none_is_a_problem(api: Api) -> None:
    lines = ("Content-Type: application/json", "Transfer-Encoding: chunked")
    answer = await wire(api, head(api, *lines), b"zz\r\n{}\r\n0\r\n\r\n")
    assert (answer.status, answer.problem) == (400, "bad-request")


async def test_a_crash_is_a_problem_that_says_nothing_and_a_log_that_says_all(api: Api) -> None:
    # What another program has broken in Redis: a run whose fields are no run's.
    run_id = "20260101-000000-0123456789"
    fields: dict[Any, Any] = {"state": "no such state", "source": "intake", "total": "0"}
    await api.redis.hset(f"poolsweep:{{{run_id}}}:run", mapping=fields)
    with capture_logs() as logs:
        answer = await wire(
            api, head(api, "Connection: close", method="GET", path=f"/v1/runs/{run_id}")
        )
    assert (answer.status, answer.problem) == (500, "internal-error")
    assert b"endpoint" not in answer.body
    assert [log["event"] for log in logs] == ["request_crashed", "request_refused"]
    assert logs[0]["run_id"] == run_id
    assert logs[0]["exc_info"]
