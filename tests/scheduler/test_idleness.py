"""How long a pool has been idle is remembered between looks, and forgotten on any doubt."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from scheduler.idleness import LONGEST_GAP, SKEW, Idleness, Look, look
from tests.modelarts.pool_documents import json_values, pool, pool_id
from worker.ledger import keys
from worker.modelarts.schema import Workload

if TYPE_CHECKING:
    from redis.asyncio import Redis

ENDPOINT = "https://modelarts.example.com"
PROJECT = "0123456789abcdef0123456789abcdef"
NOW = datetime(2026, 1, 2, 3, 4, 5, tzinfo=UTC)
HOUR = timedelta(hours=1)
DAY = timedelta(days=1)
POOL = pool("a")

patient = settings(deadline=None, max_examples=70)


def job(
    created: Any = None, seconds: Any = 0, status: str = "Completed", kind: str = "train"
) -> Workload:
    """A workload; by default one that ended long ago."""
    created = NOW - 30 * DAY if created is None else created
    if isinstance(created, datetime):
        created = round(created.timestamp() * 1000)
    return Workload.model_validate(
        {"type": kind, "status": status, "createTime": created, "runningDuration": seconds}
    )


def idle_since(before: Look | None, *workloads: Workload, now: datetime = NOW) -> datetime:
    return look(POOL, workloads, now, before).since


def last_look(*workloads: Workload, ago: timedelta = DAY, idle: timedelta = 5 * DAY) -> Look:
    """What was seen of the pool so long ago, when it had been idle for so long."""
    first = look(POOL, workloads, NOW - ago, None)
    return Look(first.created, first.at, NOW - ago - idle, first.traces)


# Between two looks


def test_a_pool_seen_for_the_first_time_has_been_idle_for_no_time() -> None:
    assert idle_since(None) == NOW
    assert idle_since(None, job()) == NOW, "whatever ended when"


def test_a_pool_seen_idle_again_has_been_idle_since_before() -> None:
    assert idle_since(last_look()) == NOW - 6 * DAY
    assert idle_since(last_look(job()), job()) == NOW - 6 * DAY


def test_another_incarnation_of_the_pool_starts_anew() -> None:
    successor = pool("a", created="2025-01-01T00:00:00Z")
    assert look(successor, [], NOW, last_look()).since == NOW


@pytest.mark.parametrize(
    ("ago", "known"),
    [
        (timedelta(0), True),
        (7 * DAY + HOUR, True),
        (LONGEST_GAP, True),
        (LONGEST_GAP + timedelta(seconds=1), False),
        (-timedelta(seconds=1), False),
    ],
)
def test_after_too_long_without_a_look_nothing_is_known(ago: timedelta, known: bool) -> None:
    assert (idle_since(last_look(ago=ago)) < NOW - DAY) == known


def test_a_job_that_came_and_went_between_two_looks_was_a_use() -> None:
    before = last_look()
    for came in (NOW - DAY - SKEW, NOW - DAY, NOW - HOUR, NOW + HOUR):
        assert idle_since(before, job(came)) == NOW
    assert idle_since(before, job(NOW - DAY - SKEW - timedelta(seconds=1))) < NOW - DAY


def test_a_job_that_was_queued_before_and_ran_since_was_a_use() -> None:
    before = last_look()
    two_days_ago = NOW - 2 * DAY
    assert idle_since(before, job(two_days_ago, 86_400)) == NOW
    assert idle_since(before, job(two_days_ago, 86_101)) == NOW, "clocks differ"
    assert idle_since(before, job(two_days_ago, 60)) < NOW - DAY


@pytest.mark.parametrize("kind", ["notebook", "infer", "x-infer", "another"])
def test_what_can_be_started_again_was_used_if_anything_about_it_changed(kind: str) -> None:
    seen = job(kind=kind)
    before = last_look(seen)
    assert idle_since(before, seen) < NOW - DAY
    # It keeps its creation time, and nothing else tells when it ran.
    for changed in (
        [job(kind=kind, seconds=30)],
        [job(kind=kind, status="Failed")],
        [seen, job(NOW - 20 * DAY, kind=kind)],
        [],
    ):
        assert idle_since(before, *changed) == NOW


def test_jobs_that_the_cloud_forgets_are_no_use() -> None:
    assert idle_since(last_look(job(), job(NOW - 20 * DAY)), job()) < NOW - DAY


@pytest.mark.parametrize(
    "created",
    [
        NOW - 30 * DAY,
        (NOW - 30 * DAY).timestamp(),
        "2025-12-01T00:00:00Z",
        "2025-12-01T00:00:00",
        "2025-12-01 08:00:00+08:00",
    ],
)
def test_times_are_read_in_any_of_the_usual_forms(created: Any) -> None:
    assert idle_since(last_look(), job(created)) < NOW - DAY


@pytest.mark.parametrize(
    ("created", "seconds"),
    [
        ("yesterday", 0),
        ("", 0),
        (True, 0),
        (["2025"], 0),
        (10**400, 0),
        (float("nan"), 0),
        (float("inf"), 0),
        (NOW - 30 * DAY, None),
        (NOW - 30 * DAY, "60"),
        (NOW - 30 * DAY, True),
        (NOW - 30 * DAY, float("nan")),
        (NOW - 30 * DAY, 10**400),
    ],
    ids=repr,
)
def test_what_tells_no_readable_time_may_have_ended_just_now(created: Any, seconds: Any) -> None:
    assert idle_since(last_look(), job(created, seconds)) == NOW


def test_a_negative_duration_does_not_put_an_end_before_its_beginning() -> None:
    assert idle_since(last_look(), job(NOW - HOUR, -86_400 * 9)) == NOW


@patient
@given(
    json_values(),
    json_values(),
    json_values(),
    st.timedeltas(-DAY, 10 * DAY),
    st.timedeltas(-9 * DAY, 9 * DAY),
)
def test_no_workload_makes_looking_fail_and_nothing_is_idle_for_longer_than_was_seen(
    kind: Any, created: Any, seconds: Any, ago: timedelta, idle: timedelta
) -> None:
    raw = {"type": kind, "status": "Failed", "createTime": created, "runningDuration": seconds}
    before = last_look(ago=ago, idle=idle)
    since = idle_since(before, Workload.model_validate(raw))
    assert since <= NOW
    assert since in {NOW, before.since}


# In Redis


async def seen(redis: Redis, *workloads: Workload, now: datetime = NOW) -> datetime | None:
    return await Idleness(redis, ENDPOINT).seen(PROJECT, POOL, workloads, now)


async def test_idleness_lasts_from_the_first_idle_look_on(redis_client: Redis) -> None:
    for hours in range(4):
        assert await seen(redis_client, now=NOW + hours * HOUR) == NOW


async def test_a_pool_that_is_seen_busy_is_forgotten(redis_client: Redis) -> None:
    await seen(redis_client)
    running = job(status="Running")
    assert await seen(redis_client, job(), running, now=NOW + HOUR) is None
    assert await redis_client.hgetall(keys.idle(ENDPOINT, PROJECT)) == {}
    assert await seen(redis_client, now=NOW + 2 * HOUR) == NOW + 2 * HOUR


async def test_a_use_between_two_looks_starts_anew(redis_client: Redis) -> None:
    await seen(redis_client)
    used = job(NOW + 10 * HOUR, 60)
    assert await seen(redis_client, used, now=NOW + DAY) == NOW + DAY
    assert await seen(redis_client, used, now=NOW + 2 * DAY) == NOW + DAY


async def test_pools_projects_and_endpoints_are_told_apart(redis_client: Redis) -> None:
    await seen(redis_client)
    later = NOW + HOUR
    idleness = Idleness(redis_client, ENDPOINT)
    assert await idleness.seen(PROJECT, pool("b"), [], later) == later
    assert await idleness.seen("elsewhere", POOL, [], later) == later
    other = Idleness(redis_client, "https://other.example.com")
    assert await other.seen(PROJECT, POOL, [], later) == later
    assert await seen(redis_client, now=later) == NOW


async def test_a_look_is_read_back_as_it_was(redis_client: Redis) -> None:
    odd = pool("a", created='2025-01-01T00:00:00.123Z|"]\u2028')
    await Idleness(redis_client, ENDPOINT).seen(PROJECT, odd, [job(kind="infer")], NOW)
    text = await redis_client.hget(keys.idle(ENDPOINT, PROJECT), pool_id("a"))
    assert Look.parse(str(text)) == look(odd, [job(kind="infer")], NOW, None)
