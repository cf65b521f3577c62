"""Marks wait out their grace over one and the same pool; vetoes keep pools until they end."""

from __future__ import annotations

import json
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from scheduler.marks import LAPSE, Grace, Mark, Marks, Veto, Vetoes, all_marks, weigh
from scheduler.selection import Decision
from tests.modelarts.pool_documents import pool, pool_id
from worker.ledger import keys
from worker.modelarts import Precondition

if TYPE_CHECKING:
    from redis.asyncio import Redis

    from worker.modelarts import Pool

ENDPOINT = "https://modelarts.example.com"
PROJECT = "0123456789abcdef0123456789abcdef"
NOW = datetime(2026, 1, 2, 3, 4, 5, tzinfo=UTC)
GRACE = timedelta(days=3)
SECOND = timedelta(seconds=1)

patient = settings(deadline=None, max_examples=70)


def wanted(*pools: Pool) -> list[Decision]:
    return [Decision(each, True, "past its time") for each in pools]


def weighed(
    pools: list[Pool],
    marks: list[Mark],
    *,
    now: datetime = NOW,
    grace: timedelta = GRACE,
) -> Grace:
    return weigh(
        wanted(*pools),
        {mark.pool_id: mark for mark in marks},
        project_id=PROJECT,
        policy="stale",
        grace=grace,
        now=now,
    )


def mark(of: Pool, *, at: datetime = NOW - GRACE, grace: timedelta = GRACE) -> Mark:
    """A mark that a pool got at some time."""
    (made,) = weighed([of], [], now=at, grace=grace).fresh
    return made


# Weighing


def test_a_pool_is_marked_first_with_what_it_was_like() -> None:
    found = pool("a")
    assert weighed([found], []) == Grace(
        due=(),
        waiting=(),
        fresh=(
            Mark(
                project_id=PROJECT,
                pool_id=found.pool_id,
                display_name="auto-pool-os",
                policy="stale",
                precondition=Precondition.of(found),
                marked_at=NOW,
                due_at=NOW + GRACE,
                reason="past its time",
            ),
        ),
        lifted=(),
    )


@pytest.mark.parametrize(
    ("age", "due"), [(timedelta(0), False), (GRACE - SECOND, False), (GRACE, True)]
)
def test_a_mark_is_due_when_its_grace_is_over_and_not_before(age: timedelta, due: bool) -> None:
    found = pool("a")
    marked = mark(found, at=NOW - age)
    grace = weighed([found], [marked])
    assert grace.due == (tuple(wanted(found)) if due else ())
    assert grace.waiting == (() if due else (marked,))
    assert (grace.fresh, grace.lifted) == ((), ())


@pytest.mark.parametrize(
    "changes",
    [
        {"created": "2022-09-17T03:10:40Z"},
        {"labels": {"team": "b"}},
        {"annotations": {"os.modelarts/description": "in use again"}},
        {"tags": {"keep": "please"}},
        {"control_mode": 4},
    ],
    ids=str,
)
def test_a_pool_that_has_changed_is_marked_anew(changes: dict[str, Any]) -> None:
    marked = mark(pool("a"), at=NOW - 9 * GRACE)
    grace = weighed([pool("a", **changes)], [marked])
    assert (grace.due, grace.waiting, grace.lifted) == ((), (), ())
    (fresh,) = grace.fresh
    assert (fresh.marked_at, fresh.due_at) == (NOW, NOW + GRACE)
    assert fresh.precondition != marked.precondition


@pytest.mark.parametrize(("late", "fresh"), [(LAPSE, False), (LAPSE + timedelta(seconds=1), True)])
def test_a_mark_that_was_due_long_ago_is_void(late: timedelta, fresh: bool) -> None:
    found = pool("a")
    grace = weighed([found], [mark(found, at=NOW - GRACE - late)])
    assert (len(grace.fresh), len(grace.due)) == (int(fresh), int(not fresh))


def test_a_mark_that_nothing_wants_any_more_is_lifted() -> None:
    marks = [mark(pool(name)) for name in "cab"]
    assert weighed([pool("b")], marks).lifted == (pool_id("a"), pool_id("c"))


def test_a_grace_that_was_prolonged_holds_for_older_marks_too() -> None:
    found = pool("a")
    marked = mark(found)
    assert weighed([found], [marked], grace=2 * GRACE).waiting == (marked,)
    assert weighed([found], [marked], grace=2 * GRACE, now=NOW + GRACE).due


def test_a_grace_that_was_shortened_does_not_take_back_what_was_told() -> None:
    found = pool("a")
    marked = mark(found, at=NOW - SECOND)
    assert weighed([found], [marked], grace=timedelta(0)).waiting == (marked,)


def test_a_mark_of_the_future_is_not_due() -> None:
    # Somebody's clock was set back.
    found = pool("a")
    assert not weighed([found], [mark(found, at=NOW + 9 * GRACE)]).due


def test_a_parent_is_not_due_before_its_subpools() -> None:
    parent = pool("a")
    child = pool("b", parent=parent.pool_id)
    grandchild = pool("c", parent=child.pool_id)
    family = [grandchild, child, parent]  # as a plan has them
    old = [mark(each) for each in family]
    assert [each.pool for each in weighed(family, old).due] == family
    young = mark(grandchild, at=NOW)
    grace = weighed(family, [young, *old[1:]])
    assert grace.due == ()
    assert grace.waiting == (young, *old[1:])
    grace = weighed(family, old[1:])
    assert [each.pool_id for each in grace.fresh] == [grandchild.pool_id]
    assert grace.waiting == tuple(old[1:])
    # Two children, of which one waits.
    sibling = pool("d", parent=parent.pool_id)
    grace = weighed([child, sibling, parent], [mark(child), mark(parent)])
    assert [each.pool for each in grace.due] == [child]
    assert [each.pool_id for each in grace.waiting] == [parent.pool_id]


names = st.sampled_from("abcdef")
ages = st.timedeltas(-GRACE, 3 * GRACE)


@patient
@given(
    st.dictionaries(names, st.none() | ages, max_size=6),
    st.lists(names, unique=True),
    st.timedeltas(timedelta(0), 3 * GRACE),
)
def test_every_deletion_is_due_waits_or_is_marked_and_every_other_mark_is_lifted(
    marked: dict[str, timedelta | None], goes: list[str], grace: timedelta
) -> None:
    """A mark of age None is one of a pool that has changed since."""
    marks = [
        mark(pool(name, control_mode=4), at=NOW - 9 * GRACE)
        if age is None
        else mark(pool(name), at=NOW - age)
        for name, age in marked.items()
    ]
    found = weighed([pool(name) for name in goes], marks, grace=grace)
    due = [each.pool.pool_id for each in found.due]
    others = [each.pool_id for each in (*found.waiting, *found.fresh)]
    assert sorted([*due, *others]) == sorted(map(pool_id, goes))
    assert set(found.lifted) == set(map(pool_id, marked)) - set(map(pool_id, goes))
    for name in goes:
        age = marked.get(name)
        assert (pool_id(name) in due) == (age is not None and age >= max(GRACE, grace))


# Marks in Redis


async def test_marks_are_kept_by_endpoint_project_and_policy(redis_client: Redis) -> None:
    marks = Marks(redis_client, ENDPOINT)
    one, other = mark(pool("a")), replace(mark(pool("b")), policy="other")
    await marks.put([one, other])
    assert await marks.of(PROJECT, "stale") == {one.pool_id: one}
    assert await marks.of(PROJECT, "other") == {other.pool_id: other}
    assert await marks.of("elsewhere", "stale") == {}
    assert await Marks(redis_client, "https://other.example.com").of(PROJECT, "stale") == {}


async def test_a_mark_is_read_back_as_it_was_made(redis_client: Redis) -> None:
    marks = Marks(redis_client, ENDPOINT)
    made = replace(
        mark(pool("a", labels={"os.modelarts/name": 'Größe "7" 训练'}), at=NOW),
        reason="because: «x» \\ \u2028",
        marked_at=NOW.replace(microsecond=123_456),
    )
    await marks.put([made])
    assert (await marks.of(PROJECT, "stale"))[made.pool_id] == made


async def test_a_new_mark_takes_the_place_of_an_older_one(redis_client: Redis) -> None:
    marks = Marks(redis_client, ENDPOINT)
    older, newer = mark(pool("a")), mark(pool("a", tags={"x": "y"}), at=NOW)
    await marks.put([older])
    await marks.put([newer])
    assert await marks.of(PROJECT, "stale") == {newer.pool_id: newer}


async def test_lifted_marks_are_gone_and_the_others_stay(redis_client: Redis) -> None:
    marks = Marks(redis_client, ENDPOINT)
    made = [mark(pool(name)) for name in "abc"]
    await marks.put(made)
    await marks.lift(PROJECT, "stale", [])
    await marks.lift(PROJECT, "stale", [pool_id("a"), pool_id("c"), pool_id("unknown")])
    assert list(await marks.of(PROJECT, "stale")) == [pool_id("b")]


async def test_all_marks_are_listed_those_first_that_are_due_first(redis_client: Redis) -> None:
    late, early = mark(pool("a"), at=NOW), mark(pool("b"))
    elsewhere = replace(mark(pool("c"), at=NOW - SECOND), project_id="p2", policy="x:y|z")
    await Marks(redis_client, ENDPOINT).put([late, early])
    await Marks(redis_client, "https://other.example.com").put([elsewhere])
    assert await all_marks(redis_client) == [early, elsewhere, late]
    await Marks(redis_client, ENDPOINT).lift(PROJECT, "stale", [late.pool_id, early.pool_id])
    assert await all_marks(redis_client) == [elsewhere]


async def test_no_marks_are_no_marks(redis_client: Redis) -> None:
    await Marks(redis_client, ENDPOINT).put([])
    assert await all_marks(redis_client) == []


# Vetoes


def veto(name: str = "a", until: datetime | None = None, **changes: Any) -> Veto:
    return Veto(PROJECT, pool_id(name), until, **{"by": "ada", "reason": "", **changes})


@pytest.mark.parametrize(
    ("until", "holds"),
    [(None, True), (NOW + SECOND, True), (NOW, False), (NOW - SECOND, False)],
)
def test_a_veto_holds_until_its_end(until: datetime | None, holds: bool) -> None:
    assert veto(until=until).holds(NOW) == holds


def test_a_veto_says_who_keeps_the_pool_and_why() -> None:
    assert str(veto()) == "ada keeps it"
    assert str(veto(until=NOW, reason="still training")) == (
        "ada keeps it until 2026-01-02T03:04Z: still training"
    )


async def test_vetoes_that_hold_are_found_by_pool(redis_client: Redis) -> None:
    vetoes = Vetoes(redis_client, ENDPOINT)
    kept = [
        veto("a"),
        veto("b", NOW + timedelta(microseconds=1), by="Grace H.", reason="«läuft» noch"),
    ]
    for each in (*kept, veto("c", NOW)):
        await vetoes.put(each)
    assert await vetoes.of(PROJECT, NOW) == {each.pool_id: each for each in kept}
    assert await vetoes.of("elsewhere", NOW) == {}
    assert await Vetoes(redis_client, "https://other.example.com").of(PROJECT, NOW) == {}


async def test_a_veto_can_be_prolonged_and_taken_back(redis_client: Redis) -> None:
    vetoes = Vetoes(redis_client, ENDPOINT)
    await vetoes.put(veto("a", NOW - SECOND))
    await vetoes.put(veto("a", NOW + SECOND))
    assert await vetoes.of(PROJECT, NOW) == {pool_id("a"): veto("a", NOW + SECOND)}
    assert await vetoes.take_back(PROJECT, pool_id("a"))
    assert not await vetoes.take_back(PROJECT, pool_id("a"))
    assert await vetoes.of(PROJECT, NOW) == {}


async def test_what_is_held_of_a_mark_is_short_and_plain(redis_client: Redis) -> None:
    await Marks(redis_client, ENDPOINT).put([mark(pool("a"), at=NOW)])
    held = await redis_client.hgetall(keys.marks(ENDPOINT, PROJECT, "stale"))
    assert json.loads(held[pool_id("a")]) == {
        "name": "auto-pool-os",
        "created": "2022-09-16T03:10:40Z",
        "fingerprint": Precondition.of(pool("a")).fingerprint,
        "marked": NOW.timestamp(),
        "due": (NOW + GRACE).timestamp(),
        "reason": "past its time",
    }
