"""Where a newer version decides, an older intake takes nothing in and plans nothing."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import pytest
from structlog.testing import capture_logs

from scheduler.intake.messages import LEFT_S, Mailroom, Message
from scheduler.intake.request import Way
from tests.intake.api import Api, body
from worker.ledger import RunState, SchemaError, keys
from worker.ledger.schema import SCHEMA
from worker.limiter import Limiter

if TYPE_CHECKING:
    from redis.asyncio import Redis

NEWER = str(SCHEMA + 1)


def opened(redis: Redis) -> Api:
    """An intake to which a client may come by every way."""
    api = Api(redis)
    api.allow(ci={"ways": list(Way)})
    return api


def mailroom(api: Api) -> Mailroom:
    limiter = Limiter(api.redis, endpoint="intake", rate=0, burst=1, own=api.clients.quotas)
    return Mailroom(api.parts().desk, api.requests, lambda: api.clients, limiter)


def message(number: int, **changes: object) -> Message:
    fields = {"request": body() | changes, "client": "ci"}
    return Message(Way.CELERY, f"m{number}", fields, json.dumps(fields))


async def test_a_message_is_left_to_the_newer_version_even_if_this_one_would_refuse_it(
    redis_client: Redis,
) -> None:
    api = opened(redis_client)
    room = mailroom(api)
    await redis_client.set(keys.SCHEMA, NEWER)
    for number, changes in enumerate([{}, {"a_field_of_tomorrow": True}]):
        assert await room.take(message(number, **changes)) == LEFT_S
    assert not await api.requests.waiting()
    assert not await api.requests.rejected()
    assert not await api.ledger.runs()
    await redis_client.set(keys.SCHEMA, str(SCHEMA))
    assert await room.take(message(0)) == 0
    (run,) = await api.ledger.runs()
    assert run.state is RunState.QUEUED


async def test_what_waits_is_left_to_the_newer_versions_planners(redis_client: Redis) -> None:
    api = opened(redis_client)
    assert await mailroom(api).take(message(0)) == 0
    (waiting,) = await api.requests.waiting()
    await redis_client.set(keys.SCHEMA, NEWER)
    with capture_logs() as logs:
        for _ in range(10):
            assert await api.requests.take(lease_s=0, limit=9) == []
    assert [event["event"] for event in logs] == ["requests_left_to_newer_version"]
    await redis_client.set(keys.SCHEMA, str(SCHEMA))
    (taken,) = await api.requests.take(lease_s=0, limit=9)
    # Not counted as a planner's death, for many of which a request is given up.
    assert (taken.run_id, taken.tried) == (waiting.run_id, 1)


async def test_a_request_is_not_half_accepted(redis_client: Redis) -> None:
    api = opened(redis_client)
    await redis_client.set(keys.SCHEMA, NEWER)
    request = message(0).read()
    client = api.clients.by_name("ci")
    assert client is not None
    with pytest.raises(SchemaError, match="upgrade this process"):
        await api.parts().desk.accept(request, client, Way.HTTP, key="k")
    assert not await api.requests.waiting()
