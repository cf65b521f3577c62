"""The HTTP API: who may ask for what, and that nothing that was acknowledged is lost."""

from __future__ import annotations

import asyncio
import contextlib
import gzip
import json
import re
import socket
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

import pytest
from aiohttp import ClientResponse, ClientSession
from redis.asyncio import Redis
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff
from structlog.testing import capture_logs

from scheduler.intake.desk import order_of
from scheduler.intake.http import Bounds
from scheduler.intake.openapi import RUN_ID
from scheduler.intake.request import LARGEST
from scheduler.intake.requests import Filed
from tests.conftest import until
from tests.intake.api import POOL, PROJECTS, Answer, Api, Caller, body, serving
from tests.worker.conftest import RedisServer
from worker.ledger import JobState, Move, NewJob, RunState, new_run_id

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterator
    from pathlib import Path

BOUNDS = Bounds(answer_s=5, heartbeat_s=0.2, streams=4, streams_of_a_client=3)


@pytest.fixture
async def api(redis_client: Redis) -> AsyncIterator[Api]:
    async with serving(redis_client, BOUNDS) as running:
        yield running


@pytest.fixture
async def caller(api: Api) -> AsyncIterator[Caller]:
    async with ClientSession() as session:
        yield Caller(api, session)


@pytest.fixture
async def other(api: Api) -> AsyncIterator[Caller]:
    async with ClientSession() as session:
        yield Caller(api, session, "other")


async def end(api: Api, run_id: str, states: list[JobState]) -> None:
    """Have the jobs of a running run end so, one after the other, as a worker does."""
    numbers = list(range(len(states)))
    claimed = await api.ledger.claim(run_id, numbers, owner="test", lease_s=60)
    assert len(claimed) == len(states)
    for number, state in enumerate(states):
        move = Move(number, JobState.LEASED, state, owner="test", reason=f"was {state}")
        assert await api.ledger.record(run_id, [move]) == [True]


# Asking


async def test_a_request_is_acknowledged_once_its_run_is_in_the_ledger(
    api: Api, caller: Caller
) -> None:
    answer = await caller.post("/v1/runs", body(reason="no use", requester="jo"))
    assert answer.status == 202
    document = answer.document
    run_id = document["run_id"]
    assert re.fullmatch(RUN_ID, run_id)
    assert document == {"run_id": run_id, "url": f"/v1/runs/{run_id}", "state": "queued"}
    assert answer.headers["Location"] == document["url"]
    run = await api.ledger.run(run_id)
    assert (run.state, run.client, run.requester) == (RunState.QUEUED, "ci", "jo")
    (waiting,) = await api.requests.waiting()
    assert waiting.run_id == run_id


async def test_same_requests_that_race_make_one_run(api: Api, caller: Caller) -> None:
    answers = await asyncio.gather(*(caller.request(body(), "one") for _ in range(50)))
    assert {answer.status for answer in answers} == {202}
    bodies = {answer.body for answer in answers}
    assert len(bodies) == 1
    assert len(await api.requests.waiting()) == 1
    assert len(await api.ledger.runs()) == 1


async def test_racing_requests_that_differ_under_one_key_make_one_run(
    api: Api, caller: Caller
) -> None:
    asked = [body(reason=f"reason {number}") for number in range(20)]
    answers = await asyncio.gather(*(caller.request(each, "one") for each in asked))
    assert sorted(answer.status for answer in answers) == [202] + [422] * 19
    refused = [answer for answer in answers if answer.status == 422]
    assert {answer.refusal for answer in refused} == {(422, "key-reused")}
    assert len(await api.requests.waiting()) == 1


async def test_a_repeated_request_has_the_same_answer_when_its_run_has_gone_on(
    api: Api, caller: Caller
) -> None:
    first = await caller.request(body(), "one")
    await api.start(first.document["run_id"], pools=2)
    again = await caller.request(body(), "one")
    assert (again.status, again.body) == (202, first.body)
    assert again.headers["Location"] == first.headers["Location"]


async def test_a_key_is_its_clients_own(api: Api, caller: Caller, other: Caller) -> None:
    assert await caller.asks(key="one") != await other.asks(key="one")
    assert await caller.asks() != await caller.asks(), "without a key every request is another"


@pytest.mark.parametrize("key", ["", "a b", "ä", "x" * 256, "a\tb"])
async def test_a_key_that_is_none_is_refused(api: Api, caller: Caller, key: str) -> None:
    answer = await caller.request(body(), key)
    assert answer.refusal == (400, "bad-request")
    assert not await api.requests.waiting()


@pytest.mark.parametrize("key", ["x" * 255, "!~{}\"'<>", "*"])
async def test_any_visible_ascii_is_a_key(caller: Caller, key: str) -> None:
    assert await caller.asks(key=key) == await caller.asks(key=key)


@pytest.mark.parametrize(
    "raw",
    [b"", b"nonsense", b"[1,", b'{"a": NaN}', b"\xff\xfe{}", "{}".encode("utf-16"), b"[" * 100_000],
    ids=["empty", "text", "cut", "nan", "bytes", "utf-16", "deep"],
)
async def test_what_is_not_json_is_refused(api: Api, caller: Caller, raw: bytes) -> None:
    answer = await caller.post("/v1/runs", raw=raw)
    assert answer.refusal == (400, "bad-request")
    assert not await api.requests.waiting()


async def test_what_is_not_a_request_is_refused_with_all_that_is_wrong(
    api: Api, caller: Caller
) -> None:
    wrong = {"targets": [{"project_id": "../x", "pools": []}], "dry_run": 1, "extra": None}
    answer = await caller.post("/v1/runs", wrong)
    assert answer.refusal == (422, "invalid-request")
    document = answer.document
    pointers = {error["pointer"] for error in document["errors"]}
    assert pointers == {"/targets/0/project_id", "/targets/0/pools", "/dry_run", "/extra"}
    assert not await api.requests.waiting()


async def test_a_key_that_is_there_twice_in_an_object_is_refused(caller: Caller) -> None:
    answer = await caller.post("/v1/runs", raw=b'{"dry_run": true, "dry_run": false}')
    assert answer.refusal == (422, "invalid-request")


async def test_only_json_is_taken_and_nothing_packed(api: Api, caller: Caller) -> None:
    raw = json.dumps(body()).encode()
    for given in ("text/plain", "application/json; charset=latin-1", "application/jsonp", ""):
        answer = await caller.post("/v1/runs", raw=raw, Content_Type=given)
        assert answer.refusal == (415, "unsupported-media-type"), given
    for given in ("gzip", "identity", "br"):
        answer = await caller.post("/v1/runs", raw=gzip.compress(raw), Content_Encoding=given)
        assert answer.refusal == (415, "unsupported-media-type"), given
    assert not await api.requests.waiting()
    answer = await caller.post("/v1/runs", raw=raw, Content_Type="Application/JSON; charset=UTF-8")
    assert answer.status == 202


async def test_the_largest_body_is_taken_and_a_larger_one_is_not(caller: Caller) -> None:
    raw = json.dumps(body()).encode()
    answer = await caller.post("/v1/runs", raw=raw.ljust(LARGEST))
    assert answer.status == 202
    answer = await caller.post("/v1/runs", raw=raw.ljust(LARGEST + 1))
    assert answer.refusal == (413, "too-large")


# Who may


@pytest.mark.parametrize(
    "given",
    [
        [],
        ["Bearer"],
        ["Basic {token}"],
        ["{token}"],
        ["Bearer {token}x"],
        ["Bearer {token} x"],
        ["Bearer pst_" + "A" * 43],
        ["Bearer {token}", "Bearer {token}"],
    ],
)
async def test_without_a_clients_token_nothing_is_answered(
    api: Api, caller: Caller, given: list[str]
) -> None:
    run_id = await caller.asks()
    head = [("Authorization", each.format(token=api.tokens["ci"])) for each in given]
    for method, path in (
        ("POST", "/v1/runs"),
        ("GET", f"/v1/runs/{run_id}"),
        ("GET", f"/v1/runs/{run_id}/jobs"),
        ("GET", f"/v1/runs/{run_id}/events"),
        ("POST", f"/v1/runs/{run_id}/cancel"),
    ):
        answer = await caller.call(method, path, headers=head)
        assert answer.refusal == (401, "unauthenticated")
        assert answer.headers["WWW-Authenticate"].startswith("Bearer ")
    assert len(await api.requests.waiting()) == 1


async def test_the_scheme_may_be_in_any_case(caller: Caller, api: Api) -> None:
    answer = await caller.get("/v1/runs/x", Authorization=f"bEARER {api.tokens['ci']}")
    assert answer.status == 404


async def test_a_client_asks_only_for_what_it_may(api: Api, caller: Caller) -> None:
    api.allow(ci={"projects": PROJECTS[:1]})
    answer = await caller.post("/v1/runs", body(project=PROJECTS[1]))
    assert answer.refusal == (403, "forbidden")
    document = answer.document
    assert [error["pointer"] for error in document["errors"]] == ["/targets/0/project_id"]
    answer = await caller.post("/v1/runs", body(webhook="https://hooks.example.com/x"))
    assert answer.refusal == (403, "forbidden")
    assert not await api.requests.waiting()


async def test_a_client_that_comes_by_other_ways_gets_nothing_by_this(
    api: Api, caller: Caller
) -> None:
    run_id = await caller.asks()
    api.allow(ci={"ways": ["celery"]})
    assert (await caller.get(f"/v1/runs/{run_id}")).refusal == (403, "forbidden")
    assert (await caller.request(body())).refusal == (403, "forbidden")


async def test_another_clients_run_is_not_told_from_one_that_is_not_there(
    api: Api, caller: Caller, other: Caller
) -> None:
    run_id, absent = await caller.asks(), "20200101-000000-0123456789"
    for path in ("", "/jobs", "/events"):
        theirs = await other.get(f"/v1/runs/{run_id}{path}")
        nobodys = await other.get(f"/v1/runs/{absent}{path}")
        assert theirs.refusal == (404, "not-found")
        assert theirs.body == nobodys.body
    answer = await other.post(f"/v1/runs/{run_id}/cancel")
    assert answer.refusal == (404, "not-found")
    assert (await api.ledger.run(run_id)).state is RunState.QUEUED


@pytest.mark.parametrize(
    "run_id",
    [
        "x",
        "%2e%2e",
        "20260101-000000-0123456789%0a",
        "20260101-000000-0123456789%00",
        "%7B20260101-000000-0123456789%7D:run",
        "२०२६०१०१-000000-0123456789",
        "20260101-000000-0123456789%2Fjobs",
    ],
)
async def test_what_is_no_runs_id_is_not_there(caller: Caller, run_id: str) -> None:
    assert (await caller.get(f"/v1/runs/{run_id}")).refusal == (404, "not-found")


async def test_a_client_that_asks_too_often_is_told_when_to_come_again(
    api: Api, caller: Caller, other: Caller
) -> None:
    api.allow(ci={"rate_limit": 0.01, "rate_burst": 3}, other={})
    for _ in range(2):
        run_id = await caller.asks()
    assert (await caller.post(f"/v1/runs/{run_id}/cancel")).status == 202
    for answer in (
        await caller.request(body()),
        await caller.post(f"/v1/runs/{run_id}/cancel"),
    ):
        assert answer.refusal == (429, "too-many-requests")
        assert 1 <= int(answer.headers["Retry-After"]) <= 100
    assert (await caller.get(f"/v1/runs/{run_id}")).status == 200, "looking is free"
    await other.asks()
    assert len(await api.requests.waiting()) == 3


async def test_what_is_unknown_or_there_twice_in_a_query_is_refused(caller: Caller) -> None:
    run_id = await caller.asks()
    for path in (
        f"/v1/runs/{run_id}?x=1",
        f"/v1/runs/{run_id}?access_token=secret",
        f"/v1/runs/{run_id}/events?x",
        f"/v1/runs/{run_id}/jobs?limit=1&limit=1",
        f"/v1/runs/{run_id}/jobs?Limit=1",
        "/healthz?x=1",
        "/v1/openapi.json?x=1",
    ):
        assert (await caller.get(path)).refusal == (400, "bad-request"), path
    for path in ("/v1/runs?x=1", f"/v1/runs/{run_id}/cancel?x=1"):
        assert (await caller.post(path, body())).refusal == (400, "bad-request"), path


# Seeing


async def test_a_run_is_shown_with_where_more_of_it_is(api: Api, caller: Caller) -> None:
    run_id = await caller.asks(reason="no use")
    run = (await caller.get(f"/v1/runs/{run_id}")).document
    assert (run["state"], run["client"], run["reason"]) == ("queued", "ci", "no use")
    assert run["projects"] == [PROJECTS[0]]
    for name in ("jobs", "self"):
        assert (await caller.get(run["links"][name])).status == 200
    assert (await caller.post(run["links"]["cancel"])).status == 202
    run = (await caller.get(f"/v1/runs/{run_id}")).document
    assert (run["state"], run["links"]["cancel"]) == ("aborted", None)


async def pages(caller: Caller, path: str) -> list[list[dict[str, Any]]]:
    """Every page from one on."""
    found = []
    while path:
        answer = await caller.get(path)
        assert answer.status == 200
        document = answer.document
        found.append(document["jobs"])
        path = document.get("next", "")
    return found


async def test_jobs_are_listed_page_by_page(api: Api, caller: Caller) -> None:
    run_id = await caller.asks()
    url = f"/v1/runs/{run_id}/jobs"
    assert await pages(caller, url) == [[]], "none before it is planned"
    await api.start(run_id, pools=5)
    assert [len(page) for page in await pages(caller, url)] == [5]
    found = await pages(caller, f"{url}?limit=2")
    assert [len(page) for page in found] == [2, 2, 1]
    assert [job["pool_name"][-1] for page in found for job in page] == list("01234")
    assert [len(page) for page in await pages(caller, f"{url}?limit=5")] == [5], "no empty page"
    assert await pages(caller, f"{url}?cursor=77") == [[]]


async def test_jobs_are_shown_only_once_all_of_them_are_written_down(
    api: Api, caller: Caller
) -> None:
    run_id = await caller.asks()
    (waiting,) = await api.requests.waiting()
    order = order_of(Filed.parse(run_id, waiting.record))
    await api.ledger.create(order.new_run(run_id, PROJECTS[:1]), maker="test")
    await api.ledger.add(run_id, [NewJob(PROJECTS[0], POOL)], maker="test")
    url = f"/v1/runs/{run_id}/jobs"
    assert (await caller.get(f"/v1/runs/{run_id}")).document["state"] == "creating"
    assert await pages(caller, url) == [[]], "another maker may write others"
    assert await api.ledger.start(run_id, 1, maker="test")
    assert [len(page) for page in await pages(caller, url)] == [1]


async def test_jobs_that_end_between_two_pages_are_in_the_next(api: Api, caller: Caller) -> None:
    run_id = await caller.asks()
    await api.start(run_id, pools=4)
    url = f"/v1/runs/{run_id}/jobs?outcome=failed&limit=2"
    await end(api, run_id, [JobState.FAILED, JobState.ALREADY_DELETED, JobState.FAILED])
    assert [len(page) for page in await pages(caller, url)] == [2]
    first = (await caller.get(url.replace("limit=2", "limit=1"))).document
    (last,) = await api.ledger.claim(run_id, [3], owner="test", lease_s=60)
    move = Move(last.number, JobState.LEASED, JobState.FAILED, owner="test")
    assert await api.ledger.record(run_id, [move]) == [True]
    rest = await pages(caller, first["next"])
    numbers = [job["pool_name"][-1] for page in [first["jobs"], *rest] for job in page]
    assert numbers == ["0", "2", "3"]


@pytest.mark.parametrize(
    "query",
    [
        "limit=0",
        "limit=1001",
        "limit=-1",
        "limit=ten",
        "limit=1e2",
        "limit=",
        "limit=१",
        "outcome=gone",
        "outcome=",
        "outcome=DELETED",
        "cursor=-1",
        "cursor=",
        "cursor=999999999",
        "cursor=0x1",
    ],
)
async def test_a_parameter_that_is_not_accepted_is_refused(caller: Caller, query: str) -> None:
    run_id = await caller.asks()
    answer = await caller.get(f"/v1/runs/{run_id}/jobs?{query}")
    assert answer.refusal == (400, "bad-request")
    assert "accepted" in answer.document["detail"]


# Cancelling


async def test_a_run_is_cancelled_once_and_again(api: Api, caller: Caller) -> None:
    run_id = await caller.asks()
    await api.start(run_id, pools=3)
    claimed = await api.ledger.claim(run_id, [0], owner="test", lease_s=60)
    assert claimed, "one is under way, so that the run has not ended"
    for _ in range(2):
        answer = await caller.post(f"/v1/runs/{run_id}/cancel")
        assert answer.status == 202
        run = answer.document
        assert (run["state"], run["counts"]) == ("running", {"leased": 1, "cancelled": 2})
    move = Move(0, JobState.LEASED, JobState.ALREADY_DELETED, owner="test")
    assert await api.ledger.record(run_id, [move]) == [True]
    answer = await caller.post(f"/v1/runs/{run_id}/cancel")
    assert answer.refusal == (409, "run-ended")


# Watching


class Stream:
    """A stream of events as a client reads it."""

    def __init__(self, answer: ClientResponse) -> None:
        self.answer = answer
        self.heartbeats = 0

    async def event(self) -> dict[str, str] | None:
        """The next event; None: the stream has ended."""
        async with asyncio.timeout(20):
            fields: dict[str, str] = {}
            while line := await self.answer.content.readline():
                text = line.decode().rstrip("\n")
                if text.startswith(":"):
                    self.heartbeats += 1
                elif text:
                    name, _, value = text.partition(": ")
                    fields[name] = value
                elif "event" in fields:
                    return fields
        return None


@contextlib.asynccontextmanager
async def watching(caller: Caller, run_id: str, known: str = "") -> AsyncIterator[Stream]:
    head = caller.head | ({"Last-Event-ID": known} if known else {})
    url = f"{caller.api.url}/v1/runs/{run_id}/events"
    async with caller.session.get(url, headers=head) as answer:
        assert answer.status == 200, await answer.text()
        assert answer.headers["Content-Type"].startswith("text/event-stream")
        assert answer.headers["Cache-Control"] == "no-store"
        yield Stream(answer)


async def test_a_run_is_watched_to_its_end(api: Api, caller: Caller) -> None:
    run_id = await caller.asks()
    async with watching(caller, run_id) as stream:
        event = await stream.event()
        assert event is not None
        assert event["retry"] == "2000"
        assert event["event"] == "progress"
        run = json.loads(event["data"])
        assert run == (await caller.get(f"/v1/runs/{run_id}")).document
        await api.start(run_id, pools=2)
        event = await stream.event()
        assert event is not None
        assert json.loads(event["data"])["state"] == "running"
        await end(api, run_id, [JobState.ALREADY_DELETED, JobState.FAILED])
        names = []
        while event := await stream.event():
            names.append(event["event"])
            last = json.loads(event["data"])
        assert names[-1] == "end"
        assert names.count("end") == 1
        assert (last["state"], last["done"]) == ("finished", 2)


async def test_a_stream_that_is_taken_up_tells_nothing_twice(api: Api, caller: Caller) -> None:
    run_id = await caller.asks()
    async with watching(caller, run_id) as stream:
        event = await stream.event()
        assert event is not None
    async with watching(caller, run_id, known=event["id"]) as stream:
        await caller.post(f"/v1/runs/{run_id}/cancel")
        event = await stream.event()
        assert event is not None
        assert event["event"] == "end"
        assert await stream.event() is None
    answer = await caller.get(f"/v1/runs/{run_id}/events", **{"Last-Event-ID": event["id"]})
    assert answer.status == 204, "which tells an EventSource to ask no more"


async def test_a_stream_says_that_it_lives(caller: Caller) -> None:
    run_id = await caller.asks()
    async with watching(caller, run_id) as stream:
        await stream.event()
        waiting = asyncio.create_task(stream.event())

        async def said() -> bool:
            return stream.heartbeats >= 2

        await until(said)
        await caller.post(f"/v1/runs/{run_id}/cancel")
        event = await waiting
        assert event is not None
        assert event["event"] == "end"


async def test_many_watchers_of_a_run_share_one_look(redis_client: Redis) -> None:
    bounds = Bounds(streams_of_a_client=50)
    async with contextlib.AsyncExitStack() as stack:
        wide = await stack.enter_async_context(serving(redis_client, bounds))
        caller = Caller(wide, await stack.enter_async_context(ClientSession()))
        run_id = await caller.asks()
        streams = [await stack.enter_async_context(watching(caller, run_id)) for _ in range(30)]
        for stream in streams:
            assert await stream.event()
        before = await _hgetalls(redis_client)

        async def looked() -> bool:
            return await _hgetalls(redis_client) >= before + 2

        await until(looked)
        assert await _hgetalls(redis_client) < before + 10, "and not each for itself"
        await caller.post(f"/v1/runs/{run_id}/cancel")
        events = [await stream.event() for stream in streams]
        assert [event["event"] if event else None for event in events] == ["end"] * 30


async def _hgetalls(redis: Redis) -> int:
    stats = await redis.info("commandstats")
    return int(stats.get("cmdstat_hgetall", {}).get("calls", 0))


async def test_only_so_many_streams_are_open_at_once(
    api: Api, caller: Caller, other: Caller
) -> None:
    mine, theirs = await caller.asks(), await other.asks()
    async with contextlib.AsyncExitStack() as stack:
        for _ in range(3):
            await stack.enter_async_context(watching(caller, mine))
        answer = await caller.get(f"/v1/runs/{mine}/events")
        assert answer.refusal == (429, "too-many-streams")
        assert int(answer.headers["Retry-After"]) >= 1
        await stack.enter_async_context(watching(other, theirs))
        answer = await other.get(f"/v1/runs/{theirs}/events")
        assert answer.refusal == (503, "unavailable")

    async def free() -> bool:
        async with caller.session.get(
            f"{api.url}/v1/runs/{mine}/events", headers=caller.head
        ) as answer:
            return answer.status == 200

    assert await until(free), "whoever leaves makes room"


async def test_a_token_that_is_revoked_ends_its_streams(api: Api, caller: Caller) -> None:
    run_id = await caller.asks()
    async with watching(caller, run_id) as stream:
        assert await stream.event()
        api.allow(ci={"rate_limit": 7})
        waiting = asyncio.create_task(stream.event())
        before = stream.heartbeats

        async def goes_on() -> bool:
            return stream.heartbeats > before + 1

        await until(goes_on)
        api.allow(other={})
        assert await waiting is None
    assert (await caller.get(f"/v1/runs/{run_id}")).status == 401


async def test_streams_end_in_good_order_when_the_process_does(redis_client: Redis) -> None:
    async with ClientSession() as session, contextlib.AsyncExitStack() as stack:
        async with serving(redis_client, BOUNDS) as api:
            caller = Caller(api, session)
            run_id = await caller.asks()
            stream = await stack.enter_async_context(watching(caller, run_id))
            assert await stream.event()
        # The last chunk has come, or reading would fail.
        assert await stream.event() is None


async def test_a_stream_ends_when_its_run_is_forgotten(api: Api, caller: Caller) -> None:
    run_id = await caller.asks()
    async with watching(caller, run_id) as stream:
        assert await stream.event()
        await api.redis.delete(f"poolsweep:{{{run_id}}}:run")
        assert await stream.event() is None


@contextlib.asynccontextmanager
async def deaf(api: Api, *paths: str) -> AsyncIterator[socket.socket]:
    """A client that asks for something and does not read the answers."""
    host, port = api.url.removeprefix("http://").split(":")
    with socket.socket() as connection:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        connection.setblocking(False)
        loop = asyncio.get_running_loop()
        await loop.sock_connect(connection, (host, int(port)))
        token = f"Authorization: Bearer {api.tokens['ci']}"
        for path in paths:
            sent = f"GET {path} HTTP/1.1\r\nHost: x\r\n{token}\r\n\r\n"
            await loop.sock_sendall(connection, sent.encode())
        yield connection


async def large_run(caller: Caller) -> str:
    """A run whose record takes most of a megabyte, so that a few fill every buffer on the way."""
    selector = {"any": [{"name": "x" * 1000} for _ in range(300)]}
    targets = [{"project_id": project, "selector": selector} for project in PROJECTS[:3]]
    answer = await caller.post("/v1/runs", {"targets": targets})
    assert answer.status == 202
    return str(answer.document["run_id"])


async def test_a_watcher_that_does_not_read_is_dropped(redis_client: Redis) -> None:
    bounds = Bounds(answer_s=0.5, streams_of_a_client=1)
    async with serving(redis_client, bounds) as api, ClientSession() as session:
        caller = Caller(api, session)
        run_id = await large_run(caller)
        await api.start(run_id, pools=1_000)
        url = f"/v1/runs/{run_id}/events"

        async def status() -> int:
            async with session.get(api.url + url, headers=caller.head) as answer:
                return answer.status

        async with deaf(api, url) as connection:
            begun = await asyncio.get_running_loop().sock_recv(connection, 15)
            assert begun == b"HTTP/1.1 200 OK"
            numbers = iter(range(1_000))

            async def is_dropped() -> bool:
                # Each change is another event.
                await api.ledger.claim(run_id, [next(numbers)], owner="test", lease_s=60)
                return await status() == 200

            assert await status() == 429
            await until(is_dropped)


async def test_a_client_that_does_not_take_its_answers_is_dropped(redis_client: Redis) -> None:
    async with serving(redis_client, Bounds(answer_s=0.5)) as api, ClientSession() as session:
        run_id = await large_run(Caller(api, session))
        async with deaf(api, *[f"/v1/runs/{run_id}"] * 30) as connection:

            async def is_dropped() -> bool:
                try:
                    connection.send(b" ")
                except ConnectionError:
                    return True
                except BlockingIOError:
                    pass
                return False

            assert await until(is_dropped)


# When Redis does not answer


@pytest.fixture
def mortal(tmp_path: Path) -> Iterator[RedisServer]:
    """A Redis of the test's own, with an append-only file."""
    server = RedisServer(tmp_path)
    yield server
    server.kill()


async def test_what_was_acknowledged_outlives_redis_and_what_was_not_may_be_repeated(
    mortal: RedisServer,
) -> None:
    redis = Redis.from_url(mortal.url, decode_responses=True, retry=Retry(NoBackoff(), 0))
    async with serving(redis, BOUNDS) as api, ClientSession() as session:
        caller = Caller(api, session)
        kept = await caller.asks(key="one")
        async with watching(caller, kept) as stream:
            assert await stream.event()
            mortal.kill()
            for answer in (
                await caller.request(body(), "two"),
                await caller.get(f"/v1/runs/{kept}"),
                await caller.post(f"/v1/runs/{kept}/cancel"),
            ):
                assert answer.refusal == (503, "unavailable")
                assert int(answer.headers["Retry-After"]) >= 1
            mortal.start()
            assert (await caller.get(f"/v1/runs/{kept}")).document["state"] == "queued"
            assert await caller.asks(key="one") == kept
            assert await caller.asks(key="two") != kept
            assert len(await api.ledger.runs()) == 2
            await caller.post(f"/v1/runs/{kept}/cancel")
            event = await stream.event()
            assert event is not None
            assert event["event"] == "end", "the stream went on"
    await redis.aclose()


# The process


async def test_the_process_says_that_it_lives_and_what_it_lacks(api: Api, caller: Caller) -> None:
    async def asked(path: str) -> Answer:
        return await caller.call("GET", path, headers={})

    for path in ("/healthz", "/readyz"):
        answer = await asked(path)
        assert (answer.status, answer.document) == (200, {"status": "ok"})
        assert answer.headers["Cache-Control"] == "no-store"
    api.missing.extend(["Redis does not answer", "the process is stopping"])
    answer = await asked("/readyz")
    assert answer.refusal == (503, "not-ready")
    assert answer.document["detail"] == "Redis does not answer; the process is stopping"
    assert answer.headers["Retry-After"]
    assert (await asked("/healthz")).status == 200


async def test_every_answer_is_safe_to_show(caller: Caller) -> None:
    run_id = await caller.asks()
    for path in ("/healthz", "/v1/openapi.json", f"/v1/runs/{run_id}", "/nowhere"):
        answer = await caller.get(path)
        assert answer.headers["X-Content-Type-Options"] == "nosniff"
        assert answer.headers["Cache-Control"] == "no-store"
        assert answer.headers["Server"] == "poolsweep"
        assert not [name for name in answer.headers if name.startswith("Access-Control")]


async def test_what_happened_is_logged_and_never_a_token(api: Api, caller: Caller) -> None:
    secret = api.tokens["ci"]
    with capture_logs() as logs:
        run_id = await caller.asks(reason=f"line\\nbreak {POOL}")
        await caller.get(f"/v1/runs/{run_id}")
        await caller.get(f"/v1/runs/{run_id}?token={secret}")
        await caller.get(f"/{secret}\u2028")
        await caller.get("/v1/runs/x", Authorization=f"Bearer {secret[:-1]}")
        await caller.post("/v1/runs", {"evil\u2028\x1b[31m": 1})
    assert secret[:-1] not in json.dumps(logs, default=str)
    assert not re.search(r"[\x00-\x1f\u2028]", json.dumps(logs, default=str, ensure_ascii=False))
    told = [
        (log["event"], log["client"], log["status"], log["run_id"])
        for log in logs
        if log["event"] in {"http_request", "request_refused"}
    ]
    assert told == [
        ("http_request", "ci", 202, run_id),
        ("http_request", "ci", 200, run_id),
        ("request_refused", "ci", 400, ""),
        ("request_refused", "", 404, ""),
        ("request_refused", "", 401, ""),
        ("request_refused", "ci", 422, ""),
    ]


def test_a_runs_id_has_the_form_that_is_accepted() -> None:
    assert re.fullmatch(RUN_ID, new_run_id(datetime.now(UTC)))
