"""What Redis remembers of the nights."""

from __future__ import annotations

from dataclasses import replace
from datetime import UTC, datetime, timedelta

import pytest
from hypothesis import given
from hypothesis import strategies as st
from redis.asyncio import Redis

from scheduler.almanac import MOST_PAST, SILENT_S, Almanac, Night, NightState, NotLeadingError
from worker.ledger import keys

START = datetime(2026, 3, 1, 2, tzinfo=UTC)
BY = "0 2 * * * Europe/Berlin"

moments = st.integers(0, 7_000_000_000).map(lambda s: datetime.fromtimestamp(s, UTC))
texts = st.text(max_size=30)
nights = st.builds(
    Night,
    policy=texts,
    at=moments,
    state=st.sampled_from(NightState),
    schedule=texts,
    runs=st.dictionaries(texts, texts, max_size=3),
    note=texts,
)


def night(day: int = 0, state: NightState = NightState.DONE) -> Night:
    return Night("expired", START + timedelta(days=day), state, BY)


@pytest.fixture
async def almanac(redis_client: Redis) -> Almanac:
    """That of a leader."""
    await redis_client.set(keys.SCHEDULER, "leader")
    return Almanac(redis_client, "leader")


@given(night=nights)
def test_a_night_reads_back_as_it_was(night: Night) -> None:
    record = night.record()
    assert Night.parse(night.policy, record) == night
    assert record.isascii()  # half a character, too, passes any connection


async def test_a_new_policy_has_no_last_night(almanac: Almanac) -> None:
    assert await almanac.last("expired") is None
    assert await almanac.past("expired") == []
    assert await almanac.policies() == set()


async def test_the_last_night_is_the_one_that_was_put_last(almanac: Almanac) -> None:
    await almanac.put(night(0))
    await almanac.put(night(1, NightState.STARTED))
    assert await almanac.last("expired") == night(1, NightState.STARTED)
    assert await almanac.last("idle") is None
    assert await almanac.policies() == {"expired"}


async def test_past_nights_are_told_newest_first(almanac: Almanac) -> None:
    await almanac.put(night(1), [night(0), night(1)])
    await almanac.put(night(2), [night(2)])
    assert await almanac.past("expired") == [night(2), night(1), night(0)]
    assert await almanac.past("expired", 2) == [night(2), night(1)]
    assert await almanac.past("idle") == []


async def test_only_the_latest_hundred_past_nights_are_kept(
    almanac: Almanac, redis_client: Redis
) -> None:
    many = [night(day) for day in range(MOST_PAST + 5)]
    await almanac.put(many[-1], many)
    await almanac.put(night(200), [night(200)])
    assert await redis_client.llen(keys.past_nights("expired")) == MOST_PAST
    kept = await almanac.past("expired", 1000)
    assert kept == [night(200), *many[::-1][: MOST_PAST - 1]]


async def test_what_is_written_twice_since_its_answer_was_lost_is_there_once(
    almanac: Almanac,
) -> None:
    for _ in range(2):
        await almanac.put(night(1), [night(0), night(1)])
    assert await almanac.past("expired") == [night(1), night(0)]


async def test_whoever_does_not_lead_any_more_writes_nothing(
    almanac: Almanac, redis_client: Redis
) -> None:
    await almanac.put(night(1), [night(1)])
    late = Almanac(redis_client, "a leader that was paused")
    with pytest.raises(NotLeadingError):
        await late.put(night(0), [night(0)])
    with pytest.raises(NotLeadingError):
        await late.forget("expired")
    await redis_client.delete(keys.SCHEDULER)
    with pytest.raises(NotLeadingError):
        await almanac.put(night(2), [night(2)])
    assert await almanac.last("expired") == night(1)
    assert await almanac.past("expired") == [night(1)]


async def test_a_forgotten_policy_keeps_its_past(almanac: Almanac) -> None:
    await almanac.put(night(1), [night(1)])
    await almanac.forget("expired")
    await almanac.forget("expired")
    assert await almanac.last("expired") is None
    assert await almanac.past("expired") == [night(1)]


async def test_all_that_is_written_together_lies_in_one_slot_of_a_cluster(
    cluster_url: str,
) -> None:
    async with Redis.from_url(cluster_url, decode_responses=True) as redis:
        await redis.set(keys.SCHEDULER, "leader")
        await Almanac(redis, "leader").put(night(1), [night(0), night(1)])
        assert len(await Almanac(redis).past("expired")) == 2


async def test_a_note_in_any_script_comes_back(almanac: Almanac) -> None:
    noted = replace(night(), note="research: 网关超时 \ud800 ☠", runs={"p": "r"})
    await almanac.put(noted, [noted])
    assert await almanac.past("expired") == [noted]


async def test_a_leader_that_says_nothing_is_soon_taken_for_gone(
    almanac: Almanac, redis_client: Redis
) -> None:
    assert await almanac.said() is None
    await almanac.say({"leader": "me", "rejected": ""})
    assert await almanac.said() == {"leader": "me", "rejected": ""}
    assert 0 < await redis_client.pttl(keys.SCHEDULER_STATE) <= SILENT_S * 1000
    await almanac.fall_silent()
    assert await almanac.said() is None
