"""Requests with slips in them, through the real HTTP API: taken, or refused where wrong."""

from __future__ import annotations

import asyncio
import json
from contextlib import AsyncExitStack
from typing import TYPE_CHECKING, Any

import pytest
from aiohttp import ClientSession
from hypothesis import given
from hypothesis import strategies as st
from redis.asyncio import Redis

from scheduler.intake.request import Request, read_request
from scheduler.intake.requests import Filed
from tests.fuzz.mutation import as_bytes, broken_bytes, broken_json, is_fit_to_show
from tests.intake.api import PROJECTS, Answer, Api, Caller, body, serving

if TYPE_CHECKING:
    from collections.abc import Iterator

REQUESTS: list[dict[str, Any]] = [
    body("pool-0123456789abcdef0123456789abcdef", reason="end of project", dry_run=True),
    {
        "targets": [
            {"project_id": PROJECTS[0], "pools": [f"pool-{n:032d}" for n in range(3)]},
            {
                "project_id": PROJECTS[1],
                "selector": {
                    "all": [
                        {"expired": {"tag": "expires-at"}},
                        {"any": [{"name": "tmp-*"}, {"name": {"regex": "a+b", "of": "id"}}]},
                        {
                            "not": {
                                "tags": {"key": "env", "one_of": ["prod", "live"], "on": "nodes"}
                            }
                        },
                        {"ttl": {"default": "7d"}},
                        {"utilisation": {"of": "gpu", "below": 5, "over": "7d"}},
                        {"older_than": "12h"},
                    ]
                },
            },
        ],
        "reason": "nightly ü",
        "requester": "ci",
        "verify": False,
    },
]
PIECES = [b'"', b",", b"{", b"}", b"[", b"]", b":", b"\\", b"\\u0000", b"\\ud800", b"null", b"NaN",
          b"1e999", b"-0", b"\xff", b"\xef\xbb\xbf", b"/*", b"true", b"9" * 5_000]  # fmt: skip
broken = st.sampled_from(REQUESTS).flatmap(
    lambda whole: broken_json(whole).map(as_bytes) | broken_bytes(as_bytes(whole), PIECES)
)


class Service:
    """The API as it is served, and a client that may ask."""

    def __init__(self, runner: asyncio.Runner, redis_url: str) -> None:
        self._runner = runner
        self._stack = AsyncExitStack()
        self.api, self._caller = runner.run(self._open(redis_url))

    async def _open(self, redis_url: str) -> tuple[Api, Caller]:
        redis = Redis.from_url(redis_url, decode_responses=True)
        self._stack.push_async_callback(redis.aclose)
        await redis.flushdb()
        api = await self._stack.enter_async_context(serving(redis))
        session = await self._stack.enter_async_context(ClientSession())
        return api, Caller(api, session)

    def asks(self, raw: bytes) -> Answer:
        return self._runner.run(self._caller.post("/v1/runs", raw=raw))

    def taken_in(self) -> list[Filed]:
        """The requests that were accepted, which are forgotten then."""

        async def taken() -> list[Filed]:
            waiting = await self.api.requests.waiting()
            for each in waiting:
                await self.api.requests.done(each.run_id)
            return [Filed.parse(each.run_id, each.record) for each in waiting]

        return self._runner.run(taken())

    def close(self) -> None:
        self._runner.run(self._stack.aclose())


@pytest.fixture(scope="module")
def service(redis_url: str) -> Iterator[Service]:
    with asyncio.Runner() as runner:
        opened = Service(runner, redis_url)
        yield opened
        opened.close()


def test_unbroken_requests_are_taken_in(service: Service) -> None:
    for whole in REQUESTS:
        assert service.asks(as_bytes(whole)).status == 202
    assert len(service.taken_in()) == len(REQUESTS)


@given(broken)
def test_a_broken_request_is_taken_in_as_it_says_or_refused_where_it_is_wrong(
    service: Service, raw: bytes
) -> None:
    answer = service.asks(raw)
    filed = service.taken_in()
    if answer.status == 202:
        (found,) = filed
        assert said(found.request) <= said(read_request(raw))
        assert said(found.request) == pools_of(json.loads(raw))
        return
    assert not filed, "what is refused leaves nothing behind"
    status, kind = answer.refusal
    assert (status, kind) in {(400, "bad-request"), (422, "invalid-request"), (403, "forbidden")}
    assert is_fit_to_show(answer.document["detail"])
    if kind != "bad-request":
        faults = answer.document["errors"]
        assert faults
        for fault in faults:
            assert fault["detail"]
            assert fault["pointer"] == "" or fault["pointer"].startswith("/")


def said(request: Request) -> set[tuple[str, str]]:
    """What is named to be deleted: projects and pools."""
    return {
        (target.project_id, pool) for target in request.targets for pool in target.pools or ["*"]
    }


def pools_of(document: Any) -> set[tuple[str, str]]:
    """The same by the plainest of readings."""
    return {
        (target["project_id"], pool)
        for target in document["targets"]
        for pool in target.get("pools") or ["*"]
    }


@pytest.mark.parametrize("place", range(9))
def test_half_a_character_is_refused_wherever_it_stands(service: Service, place: int) -> None:
    half = "\ud800"
    selector, pointer = [
        ({"name": half}, "/name"),
        ({"name": {"glob": half}}, "/name/glob"),
        ({"name": {"regex": half}}, "/name/regex"),
        ({"tags": {"key": "a", "equals": half}}, "/tags/equals"),
        ({"tags": {"key": "a", "one_of": ["b", half]}}, "/tags/one_of/1"),
        ({"all": [{"flavor": ["x", half]}]}, "/all/0/flavor/1"),
        ({"not": {"phase": half}}, "/not/phase"),
        ({"driver": {"gpu": half}}, "/driver/gpu"),
        ({half: {}}, ""),
    ][place]
    raw = as_bytes({"targets": [{"project_id": PROJECTS[0], "selector": selector}]})
    answer = service.asks(raw)
    assert answer.refusal == (422, "invalid-request")
    (fault,) = answer.document["errors"]
    assert fault["pointer"] == f"/targets/0/selector{pointer}"
    assert fault["detail"] == "a text without half characters is needed"
    assert not service.taken_in()
