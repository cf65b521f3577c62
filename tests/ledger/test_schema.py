"""Versions that meet in one Redis: a newer one's runs are left alone, older ones' go on."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

import pytest
from structlog.testing import capture_logs

from tests.ledger import conftest
from tests.ledger.conftest import ENDPOINT, PROJECT, jobs, new
from worker.ledger import (
    Attempt,
    DamagedRunError,
    JobState,
    Kept,
    Ledger,
    Move,
    RunNotFoundError,
    RunState,
    SchemaError,
    keys,
    new_run_id,
)
from worker.ledger.schema import SCHEMA

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from redis.asyncio import Redis

CALL = Attempt(at_ms=1_700_000_000_000, duration_ms=12, status=500, code="", request_id="r1")
NEWER = str(SCHEMA + 1)


async def begun(ledger: Ledger) -> str:
    """A run in the making, with two jobs."""
    return await conftest.begun(ledger, 2, maker="m")


async def running(ledger: Ledger) -> str:
    """A run with one job leased, one sent."""
    run_id = await conftest.running(ledger, 2, maker="m")
    assert await ledger.take(run_id, window=9, batch_size=9, resend_s=0) == [0, 1]
    assert await ledger.claim(run_id, [0], owner="me", lease_s=0)
    return run_id


async def everything(redis: Redis) -> dict[str, tuple[Any, ...]]:
    """All that a Redis holds, and for how long."""
    return {
        key: (await redis.dump(key), await redis.pttl(key))
        async for key in redis.scan_iter(count=1_000)
    }


FIRST: dict[str, Callable[[Ledger, str], Awaitable[Any]]] = {
    "create": lambda ledger, run_id: ledger.create(new(run_id), maker="another"),
    "queue": lambda ledger, run_id: ledger.queue(new(run_id)),
    "add": lambda ledger, run_id: ledger.add(run_id, jobs(1), first=2, maker="m"),
    "keep": lambda ledger, run_id: ledger.keep(run_id, [Kept(PROJECT, "p", "", "r")], maker="m"),
    "start": lambda ledger, run_id: ledger.start(run_id, 2, maker="m"),
    "abort": lambda ledger, run_id: ledger.abort(run_id, "left behind"),
    "cancel": lambda ledger, run_id: ledger.cancel(run_id),
}
LATER: dict[str, Callable[[Ledger, str], Awaitable[Any]]] = {
    "take": lambda ledger, run_id: ledger.take(run_id, window=9, batch_size=9, resend_s=60),
    "claim": lambda ledger, run_id: ledger.claim(run_id, [1], owner="me", lease_s=60),
    "renew": lambda ledger, run_id: ledger.renew(run_id, [0], owner="me", lease_s=60),
    "record": lambda ledger, run_id: ledger.record(
        run_id, [Move(0, JobState.LEASED, JobState.PENDING, "me", CALL)]
    ),
    "reclaim": lambda ledger, run_id: ledger.reclaim(run_id, max_attempts=9),
    "cancel": lambda ledger, run_id: ledger.cancel(run_id),
}
STEPS = [
    *(pytest.param(begun, step, id=f"{name} of one in the making") for name, step in FIRST.items()),
    *(pytest.param(running, step, id=f"{name} of one that runs") for name, step in LATER.items()),
]


@pytest.mark.parametrize(("made", "step"), STEPS)
async def test_no_step_touches_a_newer_versions_run(
    ledger: Ledger,
    redis: Redis,
    made: Callable[[Ledger], Awaitable[str]],
    step: Callable[[Ledger, str], Awaitable[Any]],
) -> None:
    run_id = await made(ledger)
    if step is FIRST["queue"]:  # a run that there is stays as it is anyway
        await redis.hdel(keys.run(run_id), "state")
    await redis.hset(keys.run(run_id), "schema", NEWER)
    before = await everything(redis)
    with pytest.raises(SchemaError) as refusal:
        await step(ledger, run_id)
    assert str(refusal.value) == (
        f"Run {run_id!r} was written by a newer poolsweep (schema {NEWER}, this one knows up to "
        f"{SCHEMA}): upgrade this process."
    )
    after = await everything(redis)
    # The indexes may name it, which changes nothing.
    assert {k: v for k, v in after.items() if run_id in k} == {
        k: v for k, v in before.items() if run_id in k
    }
    # The same step is made of the same run once it is one that this version knows.
    await redis.hset(keys.run(run_id), "schema", str(SCHEMA))
    await step(ledger, run_id)
    assert await everything(redis) != after


@pytest.mark.parametrize("found", [NEWER, "10", "1.5", "two", ""])
async def test_a_schema_that_is_not_known_is_a_newer_one(
    ledger: Ledger, redis: Redis, found: str
) -> None:
    run_id = await running(ledger)
    await redis.hset(keys.run(run_id), "schema", found)
    for look in (
        ledger.run(run_id),
        ledger.runs(),
        ledger.claim(run_id, [1], owner="me", lease_s=60),
    ):
        with pytest.raises(SchemaError, match=rf"\(schema {found},"):
            await look


async def test_a_list_of_runs_leaves_newer_versions_out_for_whoever_wants_to_hear_of_them(
    ledger: Ledger, redis: Redis
) -> None:
    newer, known = [await running(ledger) for _ in range(2)]
    await redis.hset(keys.run(newer), mapping={"schema": NEWER, "state": "a new one"})
    told: list[SchemaError] = []
    assert [run.run_id for run in await ledger.runs(unread=told.append)] == [known]
    (error,) = told
    assert newer in str(error)
    with pytest.raises(SchemaError):
        await ledger.runs()


async def test_to_whoever_asks_for_it_a_newer_versions_run_is_not_there(
    ledger: Ledger, redis: Redis
) -> None:
    run_id = await running(ledger)
    await redis.hset(keys.run(run_id), "schema", NEWER)
    with pytest.raises(RunNotFoundError, match="upgrade this process"):
        await ledger.run(run_id)


async def test_a_newer_versions_run_stays_on_the_list_and_the_others_go_on(
    ledger: Ledger, redis: Redis
) -> None:
    newer, known, over = [await running(ledger) for _ in range(3)]
    await redis.hset(keys.run(newer), mapping={"schema": NEWER, "state": "a new one"})
    await redis.hset(keys.run(over), "state", "finished")
    with capture_logs() as logs:
        for _ in range(2):
            assert [run.run_id for run in await ledger.active(ENDPOINT)] == [known]
    assert await redis.smembers(keys.active(ENDPOINT)) == {newer, known}
    (told,) = logs
    assert (told["event"], told["run_id"]) == ("run_left_alone", newer)
    assert "upgrade this process" in told["reason"]


@pytest.mark.parametrize(("field", "value"), [("total", "many"), ("state", "?"), ("source", None)])
async def test_a_damaged_run_is_left_alone_and_the_others_go_on(
    ledger: Ledger, redis: Redis, field: str, value: str | None
) -> None:
    damaged, sound = [await running(ledger) for _ in range(2)]
    if value is None:
        await redis.hdel(keys.run(damaged), field)
    else:
        await redis.hset(keys.run(damaged), field, value)
    with capture_logs() as logs:
        for _ in range(2):
            assert [run.run_id for run in await ledger.active(ENDPOINT)] == [sound]
    (told,) = logs
    assert (told["event"], told["run_id"]) == ("run_left_alone", damaged)
    assert "is damaged" in told["reason"]
    with pytest.raises(DamagedRunError, match="damaged"):
        await ledger.run(damaged)


async def test_a_run_says_which_schema_it_was_made_with(ledger: Ledger, redis: Redis) -> None:
    queued = new()
    assert await ledger.queue(queued)
    for run_id in (queued.run_id, await begun(ledger)):
        assert await redis.hget(keys.run(run_id), "schema") == str(SCHEMA)


async def test_a_run_from_before_there_were_schemas_is_known(ledger: Ledger, redis: Redis) -> None:
    run_id = await running(ledger)
    await redis.hdel(keys.run(run_id), "schema")
    assert await ledger.reclaim(run_id, max_attempts=9) == 1
    assert await ledger.claim(run_id, [0, 1], owner="me", lease_s=60)
    failed = [Move(n, JobState.LEASED, JobState.FAILED, "me", CALL) for n in (0, 1)]
    assert await ledger.record(run_id, failed) == [True, True]
    assert (await ledger.run(run_id)).state is RunState.FINISHED
    assert [run.run_id for run in await ledger.runs()] == [run_id]


async def test_a_run_that_is_begun_anew_has_the_schema_of_who_makes_it(
    ledger: Ledger, redis: Redis
) -> None:
    run_id = await begun(ledger)
    await redis.hdel(keys.run(run_id), "schema")
    assert await ledger.create(new(run_id), maker="another")
    assert await redis.hget(keys.run(run_id), "schema") == str(SCHEMA)


async def test_the_first_run_notes_the_schema_of_the_whole(ledger: Ledger, redis: Redis) -> None:
    assert await redis.get(keys.SCHEMA) is None
    await ledger.runs()
    assert await redis.get(keys.SCHEMA) is None, "who only looks notes nothing"
    await begun(ledger)
    assert await redis.get(keys.SCHEMA) == str(SCHEMA)


async def test_the_note_grows_with_a_newer_version(ledger: Ledger, redis: Redis) -> None:
    await redis.set(keys.SCHEMA, str(SCHEMA - 1))
    await begun(ledger)
    assert await redis.get(keys.SCHEMA) == str(SCHEMA)


@pytest.mark.parametrize("noted", [NEWER, "10", "two"])
@pytest.mark.parametrize("step", ["create", "queue"])
async def test_where_a_newer_version_decides_no_run_is_opened(
    ledger: Ledger, redis: Redis, step: str, noted: str
) -> None:
    older = await running(ledger)
    await redis.set(keys.SCHEMA, noted)
    before = await everything(redis)
    with pytest.raises(SchemaError) as refusal:
        await FIRST[step](ledger, new_run_id(datetime.now(UTC)))
    assert str(refusal.value) == (
        f"The ledger was written by a newer poolsweep (schema {noted}, this one knows up to "
        f"{SCHEMA}): upgrade this process."
    )
    assert await everything(redis) == before
    # What was begun before the other came goes on.
    assert await ledger.claim(older, [1], owner="me", lease_s=60)


@pytest.mark.parametrize("state", ["running", "finished"])
async def test_a_project_that_a_newer_versions_run_has_is_not_taken_from_it(
    ledger: Ledger, redis: Redis, state: str
) -> None:
    holder, wants = await running(ledger), await begun(ledger)
    assert await ledger.hold_project(ENDPOINT, PROJECT, holder) is None
    await redis.hset(keys.run(holder), mapping={"schema": NEWER, "state": state})
    assert await ledger.hold_project(ENDPOINT, PROJECT, wants) == holder
    assert await redis.get(keys.project(ENDPOINT, PROJECT)) == holder
