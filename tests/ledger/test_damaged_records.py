"""A job whose record is missing or damaged harms no other: it ends, is told of once, and is shown.

What may have happened to a record is nobody's to know, so no call is made for it.
"""

from __future__ import annotations

import json
from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING, Any, cast

import pytest
from structlog.testing import capture_logs

from tests.ledger.conftest import PROJECT, begun, check, damage, running
from worker.ledger import Attempt, Job, JobState, Kept, Ledger, Move, RunState, keys

if TYPE_CHECKING:
    from collections.abc import Mapping

    from redis.asyncio import Redis

SOUND: dict[str, Any] = {
    "pool": "pool-1",
    "name": "Pool 1 ü",
    "project": PROJECT,
    "created": "2026-01-01T00:00:00Z",
    "fingerprint": "0-1-2-3",
    "chosen": "asked for",
    "state": "pending",
}
CALL = Attempt(at_ms=1_700_000_000_000, duration_ms=12, status=500, code="E", request_id="r1")
ATTEMPTS = [[1_700_000_000_000, 12, 500, "E", "r1"]]
LEASED = SOUND | {"state": "leased", "owner": "me", "attempts": ATTEMPTS}

# What no script can make anything of.
NO_RECORDS: dict[str, str | bytes | None] = {
    "missing": None,
    "empty": "",
    "text": "no record",
    "bytes": b"\xff\x00\xfe{",
    "cut short": json.dumps(SOUND)[:-9],
    "null": "null",
    "a number": "7",
    "a string": '"pending"',
    "a list": "[]",
    "an object of nothing": "{}",
    "nested too deep": "[" * 100_000,
}


def changed(record: Mapping[str, Any], **fields: Any) -> str:
    return json.dumps({**record, **fields})


def without(record: Mapping[str, Any], name: str) -> str:
    return json.dumps({key: record[key] for key in record.keys() - {name}})


# Records with one field that the scripts use and cannot.
NO_STATES = {
    "no state": without(SOUND, "state"),
    "state null": changed(SOUND, state=None),
    "state of none": changed(SOUND, state="elsewhere"),
    "leased without an owner": without(LEASED, "owner"),
    "leased by null": changed(LEASED, owner=None),
    "attempts null": changed(LEASED, attempts=None),
    "attempts a number": changed(LEASED, attempts=5),
    "attempts of numbers": changed(LEASED, attempts=[5]),
    "attempts without a status": changed(LEASED, attempts=[[1, 2]]),
    "a status of text": changed(LEASED, attempts=[[1, 2, "500", "E", "r"]]),
    "due soon": changed(SOUND, due="soon"),
    "due never": changed(SOUND, due=0).replace('"due": 0', '"due": 1e999'),
}
# What only whoever carries the job out can tell.
NO_JOBS = {
    **{
        f"no {name}": without(SOUND, name)
        for name in ("pool", "name", "project", "created", "fingerprint", "chosen")
    },
    "fingerprint null": changed(SOUND, fingerprint=None),
    "fingerprint false": changed(SOUND, fingerprint=False),
    "created a number": changed(SOUND, created=5),
    "pool a list": changed(SOUND, pool=["pool-1"]),
    "check_nodes null": changed(SOUND, check_nodes=None),
    "reason a number": changed(SOUND, reason=5),
    "nodes a list": changed(SOUND, nodes=[1]),
    "nodes of text": changed(SOUND, nodes={"flavor": "2"}),
    "attempts too long": changed(SOUND, attempts=[[1, 2, 500, "E", "r", "more"]]),
    "attempts a map": changed(SOUND, attempts={"0": ATTEMPTS[0]}),
    "blocked yes": changed(SOUND, blocked="yes"),
}


async def pending(ledger: Ledger) -> str:
    """A run with three jobs, one of which was sent."""
    run_id = await running(ledger, 3)
    assert await ledger.take(run_id, window=1, batch_size=1, resend_s=60) == [0]
    return run_id


async def leased(ledger: Ledger) -> str:
    """A run whose three jobs are leased, and each lease is over."""
    run_id = await running(ledger, 3)
    assert len(await ledger.claim(run_id, range(3), owner="me", lease_s=0)) == 3
    return run_id


async def accepted(ledger: Ledger) -> str:
    """A run whose three jobs are accepted."""
    run_id = await leased(ledger)
    await record(ledger, run_id, JobState.LEASED, JobState.ACCEPTED)
    return run_id


async def record(ledger: Ledger, run_id: str, source: JobState, target: JobState) -> set[int]:
    """Move all jobs. Returns those that were."""
    owner = "me" if source is JobState.LEASED else ""
    made = await ledger.record(run_id, [Move(n, source, target, owner, CALL) for n in range(3)])
    return {n for n, done in enumerate(made) if done}


async def delete(ledger: Ledger, run_id: str) -> set[int]:
    return await record(ledger, run_id, JobState.LEASED, JobState.DELETED)


async def confirm(ledger: Ledger, run_id: str) -> set[int]:
    return await record(ledger, run_id, JobState.ACCEPTED, JobState.DELETED)


async def claim(ledger: Ledger, run_id: str) -> set[int]:
    return {job.number for job in await ledger.claim(run_id, range(3), owner="me", lease_s=60)}


async def cancel(ledger: Ledger, run_id: str) -> set[int]:
    assert await ledger.cancel(run_id)
    return {job.number for job in await ledger.jobs(run_id, outcome=JobState.CANCELLED)}


async def renew(ledger: Ledger, run_id: str) -> set[int]:
    return {0, 1, 2} - await ledger.renew(run_id, range(3), owner="me", lease_s=60)


async def reclaim(ledger: Ledger, run_id: str) -> set[int]:
    assert await ledger.reclaim(run_id, max_attempts=9) == 3
    return {job.number for job in await ledger.jobs(run_id, outcome=JobState.PENDING)}


async def give_up(ledger: Ledger, run_id: str) -> set[int]:
    assert await ledger.reclaim(run_id, max_attempts=1) == 3
    failed = await ledger.jobs(run_id, outcome=JobState.FAILED)
    return {job.number for job in failed if not job.is_damaged}


async def verify(ledger: Ledger, run_id: str) -> set[int]:
    return {job.number for job, _ in await ledger.accepted(run_id)}


Made = Callable[[Ledger], Awaitable[str]]
Step = Callable[[Ledger, str], Awaitable[set[int]]]
LOOK = "look at what was accepted"
STEPS: dict[str, tuple[Made, Step]] = {
    "claim": (pending, claim),
    "cancel": (pending, cancel),
    "renew": (leased, renew),
    "record": (leased, delete),
    "reclaim": (leased, reclaim),
    "reclaim for the last time": (leased, give_up),
    "record what was accepted": (accepted, confirm),
    LOOK: (accepted, verify),
}
# A number that JSON can be read to, and not written.
UNWRITABLE = {
    step: changed(record, more=[0]).replace("[0]", "[-1e999]")
    for step, record in {
        "claim": SOUND,
        "cancel": SOUND,
        "record": LEASED,
        "reclaim": LEASED,
        "reclaim for the last time": LEASED,
        "record what was accepted": SOUND | {"state": "accepted"},
    }.items()
}
CASES = [
    *((*STEPS[step], UNWRITABLE[step], f"{step}: unwritable") for step in UNWRITABLE),
    *((*STEPS[step], NO_RECORDS[kind], f"{step}: {kind}") for step in STEPS for kind in NO_RECORDS),
    *(
        (*STEPS[step], NO_STATES[kind], f"{step}: {kind}")
        for step in STEPS
        if step != LOOK
        for kind in NO_STATES
    ),
    *(
        (*STEPS[step], NO_JOBS[kind], f"{step}: {kind}")
        for step in ("claim", LOOK)
        for kind in NO_JOBS
    ),
]


@pytest.mark.parametrize(
    ("made", "step", "instead"), [pytest.param(*case[:3], id=case[3]) for case in CASES]
)
async def test_a_damaged_record_ends_its_own_job_and_harms_no_other(
    ledger: Ledger, redis: Redis, made: Made, step: Step, instead: str | bytes | None
) -> None:
    run_id = await made(ledger)
    await damage(redis, run_id, 1, instead)
    with capture_logs() as logs:
        assert await step(ledger, run_id) == {0, 2}
        assert await ledger.renew(run_id, [1], owner="me", lease_s=60) == {1}
    (told,) = logs
    (ended,) = [job for job in await ledger.jobs(run_id) if job.number == 1]
    assert told == {
        "event": "job_record_damaged",
        "log_level": "error",
        "run_id": run_id,
        "job_id": ended.job_id,
        "reason": ended.reason,
    }
    assert (ended.state, ended.is_damaged) == (JobState.FAILED, True)
    assert ended.reason.startswith("its record in the ledger is ")
    assert ended.reason.isascii()
    assert ended.reason.isprintable()
    await check(ledger, run_id)

    await claim(ledger, run_id)
    await delete(ledger, run_id)
    await confirm(ledger, run_id)
    run = await ledger.run(run_id)
    assert (run.state, run.done) == (RunState.FINISHED, 3)
    await check(ledger, run_id)


@pytest.mark.parametrize("said", [state for state in JobState if state is not JobState.LEASED])
async def test_a_record_that_contradicts_the_index_of_leases_is_damaged(
    ledger: Ledger, redis: Redis, said: JobState
) -> None:
    run_id = await leased(ledger)
    await damage(redis, run_id, 1, changed(SOUND, state=said))
    assert await reclaim(ledger, run_id) == {0, 2}
    assert await ledger.reclaim(run_id, max_attempts=9) == 0
    await check(ledger, run_id)


async def test_a_record_that_contradicts_the_index_of_pending_jobs_is_damaged(
    ledger: Ledger, redis: Redis
) -> None:
    run_id = await pending(ledger)
    await damage(redis, run_id, 1, changed(LEASED))
    assert await cancel(ledger, run_id) == {0, 2}
    await check(ledger, run_id)


EVERYTHING = [
    pytest.param(instead, id=kind)
    for kind, instead in {**NO_RECORDS, **NO_JOBS, "no state": NO_STATES["no state"]}.items()
]


@pytest.mark.parametrize("instead", EVERYTHING)
async def test_a_damaged_record_is_shown_as_such_among_the_others(
    ledger: Ledger, redis: Redis, instead: str | bytes | None
) -> None:
    run_id = await pending(ledger)
    before = await ledger.jobs(run_id)
    await damage(redis, run_id, 1, instead)
    with capture_logs() as logs:
        by_number = await ledger.jobs(run_id)
        in_state = await ledger.jobs(run_id, outcome=JobState.PENDING)
        assert [job async for job in ledger.all_jobs(run_id)] == by_number
    assert not logs, "who only looks changes nothing"
    assert [by_number[0], by_number[2]] == [before[0], before[2]]
    assert (by_number[1].number, by_number[1].state) == (1, JobState.FAILED)
    (listed,) = [job for job in in_state if job.number == 1]
    assert listed.state is JobState.PENDING
    assert by_number[1].is_damaged
    assert by_number[1].reason == listed.reason


async def test_what_is_left_of_a_damaged_record_is_told(ledger: Ledger, redis: Redis) -> None:
    run_id = await pending(ledger)
    left = '{"pool":"pool-1","name":"\t' + "x" * 999
    await damage(redis, run_id, 1, left)
    await damage(redis, run_id, 2, None)
    told = [
        "",
        f"its record in the ledger is damaged: {left[:300].replace(chr(9), '?')}",
        "its record in the ledger is missing",
    ]
    assert [job.reason for job in await ledger.jobs(run_id)] == told
    await claim(ledger, run_id)
    assert [job.reason for job in await ledger.jobs(run_id)] == told


async def test_a_record_that_is_damaged_after_its_jobs_end_changes_no_outcome(
    ledger: Ledger, redis: Redis
) -> None:
    run_id = await accepted(ledger)
    assert await confirm(ledger, run_id) == {0, 1, 2}
    before = await ledger.run(run_id)
    await damage(redis, run_id, 1, None)
    assert await claim(ledger, run_id) == set()
    assert await confirm(ledger, run_id) == set()
    assert await ledger.run(run_id) == before
    listed = await ledger.jobs(run_id, outcome=JobState.DELETED)
    assert [(job.number, job.state, job.is_damaged) for job in listed] == [
        (0, JobState.DELETED, False),
        (1, JobState.DELETED, True),
        (2, JobState.DELETED, False),
    ]


async def test_jobs_that_are_yet_to_be_added_are_not_missing(ledger: Ledger) -> None:
    run_id = await begun(ledger, 2)
    assert [job.number for job in await ledger.jobs(run_id)] == [0, 1]
    assert await ledger.jobs(run_id, offset=2) == []
    started = await running(ledger, 2)
    assert [job.number for job in await ledger.jobs(started)] == [0, 1]
    assert await ledger.jobs(started, offset=2) == []


async def test_a_damaged_record_counts_as_a_failure_for_the_brake(
    ledger: Ledger, redis: Redis
) -> None:
    run_id = await running(ledger, 3, max_failures=0)
    await damage(redis, run_id, 1, None)
    assert await claim(ledger, run_id) == {0, 2}
    assert (await ledger.run(run_id)).braked_ms


@pytest.mark.parametrize(
    "instead", ["", "no record", "7", "[]", '["p", "pool", "", 5]', "[" * 9_999]
)
async def test_a_damaged_record_of_a_kept_pool_is_shown_as_such(
    ledger: Ledger, redis: Redis, instead: str
) -> None:
    run_id = await begun(ledger, 1)
    kept = [Kept(PROJECT, f"kept-{n}", "ü", "protected") for n in range(3)]
    await ledger.keep(run_id, kept)
    await cast("Awaitable[str]", redis.lset(keys.kept(run_id), 1, instead))
    first, second, third = await ledger.kept(run_id)
    assert [first, third] == [kept[0], kept[2]]
    assert second == Kept("", "", "", f"its record in the ledger is damaged: {instead[:300]}")


def test_a_sound_record_is_read() -> None:
    nodes = {"flavor": 2}
    more = {"check_nodes": True, "nodes": nodes, "blocked": 7, "due": 8, "done": 9, "reason": "r"}
    job = Job.parse("run", 3, changed(LEASED, **more))
    assert (job.job_id, job.is_damaged, job.check_nodes) == ("run/3", False, True)
    assert (job.nodes, job.blocked_ms, job.due_ms, job.done_ms) == (nodes, 7, 8, 9)
    assert job.attempts == (CALL,)


@pytest.mark.parametrize(
    "record",
    [
        changed(SOUND, state="deleted"),
        changed(SOUND, state="accepted"),
        changed(SOUND, due=0).replace('"due": 0', '"due": NaN'),
    ],
)
async def test_a_record_that_contradicts_the_index_of_sent_jobs_is_damaged(
    ledger: Ledger, redis: Redis, record: str
) -> None:
    run_id = await pending(ledger)
    await damage(redis, run_id, 0, record)
    await ledger.take(run_id, window=9, batch_size=1, resend_s=0)
    assert 0 not in {
        job.number for job in await ledger.claim(run_id, [0, 1, 2], owner="me", lease_s=60)
    }
    assert [job.number for job in await ledger.jobs(run_id, outcome=JobState.FAILED)] == [0]
