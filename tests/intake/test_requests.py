"""Accepted requests wait in Redis until they are planned, and same ones make one run."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from redis.asyncio import Redis

from scheduler.intake.messages import masked
from scheduler.intake.request import Way, validate
from scheduler.intake.requests import Filed, KeyReusedError, Rejected, Requests
from tests.conftest import until
from worker.ledger import keys

PROJECT = "0123456789abcdef0123456789abcdef"
POOL = "pool-0123456789abcdef0123456789abcdef"
ENDPOINT = "https://modelarts.example.com"


def filed(number: int = 0, *, client: str = "ci", **changes: Any) -> Filed:
    request = validate({"targets": [{"project_id": PROJECT, "pools": [POOL]}], **changes})
    return Filed(f"run-{number}", client, Way.HTTP, ENDPOINT, request, 1_700_000_000_000)


@pytest.fixture(params=["redis_url", "cluster_url"])
async def redis(request: pytest.FixtureRequest) -> Any:
    client = Redis.from_url(request.getfixturevalue(request.param), decode_responses=True)
    await client.flushdb()
    yield client
    await client.aclose()


@pytest.fixture
def requests(redis: Redis) -> Requests:
    return Requests(redis)


async def test_what_is_accepted_waits_until_it_is_planned(requests: Requests) -> None:
    asked = filed(reason="no use")
    assert await requests.accept(asked) == "run-0"
    (waiting,) = await requests.take(lease_s=60, limit=10)
    assert (Filed.parse(waiting.run_id, waiting.record), waiting.tried) == (asked, 1)
    await requests.done("run-0")
    assert await requests.waiting() == []
    assert await requests.take(lease_s=60, limit=10) == []


async def test_a_leased_request_is_nobody_elses_until_the_lease_ends(requests: Requests) -> None:
    await requests.accept(filed())
    assert len(await requests.take(lease_s=60, limit=10)) == 1
    assert await requests.take(lease_s=60, limit=10) == []
    await requests.renew("run-0", lease_s=0.01)

    async def again() -> int:
        return sum(waiting.tried for waiting in await requests.take(lease_s=60, limit=10))

    assert await until(again) == 2, "it was begun twice"


async def test_what_cannot_be_planned_yet_says_why_and_is_not_counted_as_lost(
    requests: Requests,
) -> None:
    await requests.accept(filed())
    await requests.take(lease_s=60, limit=10)
    await requests.retry("run-0", wait_s=60, trouble="the cloud\ndoes not answer")
    (waiting,) = await requests.waiting()
    assert (waiting.tried, waiting.trouble) == (0, "the cloud does not answer")
    assert await requests.take(lease_s=60, limit=10) == []
    await requests.done("run-0")
    await requests.retry("run-0", wait_s=0, trouble="too late")
    assert await requests.waiting() == []


async def test_the_same_request_with_the_same_key_is_one_run(requests: Requests) -> None:
    racing = [requests.accept(filed(number), key="k") for number in range(50)]
    assert len(set(await asyncio.gather(*racing))) == 1
    assert len(await requests.waiting()) == 1


async def test_keys_are_a_clients_own(requests: Requests) -> None:
    assert await requests.accept(filed(0), key="k") == "run-0"
    assert await requests.accept(filed(1, client="other"), key="k") == "run-1"
    assert await requests.accept(filed(2)) == "run-2"
    assert await requests.accept(filed(3)) == "run-3"


async def test_a_key_that_was_used_for_something_else_is_refused(
    requests: Requests, redis: Redis
) -> None:
    await requests.accept(filed(0), key="k")
    with pytest.raises(KeyReusedError, match="idempotency key"):
        await requests.accept(filed(1, dry_run=True), key="k")
    assert len(await requests.waiting()) == 1
    # What is said in other words is the same.
    assert await requests.accept(filed(2, dry_run=False, reason=""), key="k") == "run-0"


async def test_a_key_is_remembered_for_a_day_even_when_its_run_is_planned(
    requests: Requests, redis: Redis
) -> None:
    await requests.accept(filed(0), key="k")
    await requests.done("run-0")
    assert await requests.accept(filed(1), key="k") == "run-0"
    (name,) = [key async for key in redis.scan_iter(keys.idempotency("ci", "*"))]
    assert 86_390_000 < await redis.pttl(name) <= 86_400_000
    assert "k" not in name.rpartition(":")[2], "a client's words are no part of a key's name"


async def test_what_is_refused_is_kept_for_review_bounded_and_printable(
    requests: Requests, redis: Redis
) -> None:
    await requests.reject(Rejected("", "celery", "task-1", "ci\x1b[31m", "bad\nthing", "x" * 9_000))
    await requests.reject(Rejected("", "celery", "task-2", "", "worse", "{}"))
    newest, oldest = await requests.rejected()
    assert (newest.message_id, newest.reason) == ("task-2", "worse")
    assert (oldest.client, oldest.reason, len(oldest.content)) == ("ci [31m", "bad thing", 4_096)


async def test_a_stream_entry_moves_to_the_dead_letters_in_one_step(
    requests: Requests, redis: Redis
) -> None:
    await redis.xgroup_create(keys.STREAM, "g", mkstream=True)
    entry_id = str(await redis.xadd(keys.STREAM, {"request": "?"}))
    await redis.xreadgroup("g", "me", {keys.STREAM: ">"})
    await requests.reject(Rejected("", "stream", entry_id, "", "no JSON", "?"), group="g")
    assert await redis.xlen(keys.STREAM) == 0
    assert (await redis.xpending(keys.STREAM, "g"))["pending"] == 0
    assert [each.message_id for each in await requests.rejected()] == [entry_id]


SECRET = "https://example.com/s3cr3t"
PLAIN = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(),
    lambda parts: st.lists(parts) | st.dictionaries(st.text(), parts),
    max_leaves=5,
)
HOOKS = st.tuples(
    PLAIN,
    # Also such as no URL is, and no webhook.
    st.sampled_from(
        [SECRET, f'"{SECRET}', f"\\\\{SECRET}", f'a"{SECRET}\\', [SECRET], {"url": SECRET}]
    ),
).map(lambda pair: {"before": pair[0], "webhook": pair[1], "after": "kept"})


def nested(parts: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    """In an object, in a list, or as JSON in a text."""
    return parts.map(lambda part: {"request": part}) | parts.map(json.dumps) | st.tuples(parts)


@given(st.recursive(HOOKS, nested, max_leaves=3), st.booleans())
def test_a_webhook_is_masked_wherever_it_is_and_however_the_text_is_cut(
    content: Any, broken: bool
) -> None:
    text = json.dumps(content)
    found = masked(text[:-1] if broken else text)
    assert "s3cr3t" not in found
    assert "***" in found
    assert "kept" in found


@given(PLAIN)
def test_what_names_no_webhook_is_kept_as_it_is(content: Any) -> None:
    text = json.dumps(content, indent=3)
    assert masked(text) == text
    assert masked(text[:-1]) == text[:-1]
    assert masked('{"a": 1, "a": 2}') == '{"a": 1, "a": 2}'
