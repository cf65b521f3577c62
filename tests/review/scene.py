"""A fortnight of runs, as an installation in use has them: for the browser's tests and pictures."""

from __future__ import annotations

import random
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING

from scheduler.almanac import Almanac, Night, NightState
from scheduler.marks import Mark, Marks
from tests.intake.api import ENDPOINT, PROJECTS
from tests.review.site import new_jobs, pool_name
from worker.ledger import Attempt, JobState, Kept, Move, keys
from worker.limiter import Limiter
from worker.modelarts import Precondition

if TYPE_CHECKING:
    from tests.review.site import Site

_DAY_MS = 86_400_000
CALLS = 300
_NODES = {"modelarts.bm.gpu.8a100": 1, "modelarts.vm.cpu.4ud": 2}


async def a_fortnight(site: Site) -> str:
    """Fill the ledger. Returns the id of a run that goes on, with ends of every kind."""
    chance = random.Random(7)
    now_ms = await site.ledger.now_ms()
    nights = {}
    for back in range(13, 0, -1):
        failed, skipped = chance.choice([0, 0, 2, 9]), chance.randrange(6)
        deleted = chance.randrange(20, 90)
        states = [JobState.DELETED] * deleted + [JobState.FAILED] * failed
        states += [JobState.SKIPPED] * skipped + [JobState.ALREADY_DELETED] * chance.randrange(5)
        jobs = new_jobs(len(states), nodes=_NODES)
        run_id = await site.run(jobs, policy="idle-pools", reason="nightly sweep")
        await site.end(run_id, states)
        made_ms = now_ms - back * _DAY_MS
        # The ledger goes by the clock of Redis, which does not go back.
        for name in ("created_ms", "planned_ms", "started_ms", "finished_ms"):
            await site.redis.hset(keys.run(run_id), name, str(made_ms))
        await site.redis.zadd(keys.INDEX, {run_id: made_ms})
        nights[made_ms] = run_id
    await _surroundings(site, nights)
    kept = [
        Kept(PROJECTS[0], pool_name(7_000), "prod-serving", "protected: tag env=prod"),
        Kept(PROJECTS[0], pool_name(7_001), "llm-train", "in use: 3 workloads are running"),
        Kept(PROJECTS[0], pool_name(7_002), "new-lab", "younger than 7 d"),
    ]
    run_id = await site.run(
        new_jobs(120, nodes=_NODES),
        kept=kept,
        policy="idle-pools",
        reason="nightly sweep",
        max_failures=50,
        max_failure_percent=20,
    )
    await site.end(run_id, [JobState.DELETED] * 40)
    refused = "HTTP 403: forbidden: check the permissions"
    await site.end(
        run_id, [JobState.FAILED] * 3, first=40, status=403, code="ModelArts.0104", reason=refused
    )
    await _two_calls(site, run_id, 43)
    await site.end(run_id, [JobState.SKIPPED] * 4, first=44, reason="its tags have changed")
    await site.end(run_id, [JobState.ACCEPTED] * 12, first=48, reason="the cloud accepted it")
    return run_id


async def _two_calls(site: Site, run_id: str, number: int) -> None:
    """A job that was tried twice."""
    await site.ledger.claim(run_id, [number], owner="test", lease_s=60)
    now_ms = await site.ledger.now_ms()
    first = Attempt(now_ms - 4_000, 30_001, 0, "timeout", "")
    last = Attempt(now_ms, 412, 500, "ModelArts.0010", "7f0c5c0f2b9e4d6a")
    again = Move(number, JobState.LEASED, JobState.PENDING, "test", first, "no answer in time", 1)
    assert await site.ledger.record(run_id, [again]) == [True]
    while not await site.ledger.claim(run_id, [number], owner="test", lease_s=60):
        pass  # until it is due, a millisecond later
    reason = "HTTP 500: the cloud has a fault (ModelArts.0010 internal error)"
    end = Move(number, JobState.LEASED, JobState.FAILED, "test", last, reason)
    assert await site.ledger.record(run_id, [end]) == [True]


async def _surroundings(site: Site, nights: dict[int, str]) -> None:
    now = datetime.now(UTC)
    await site.redis.set(keys.SCHEDULER, "leader")
    almanac = Almanac(site.redis, "leader")
    past = [
        Night(
            "idle-pools",
            datetime.fromtimestamp(at_ms / 1000, UTC),
            NightState.DONE,
            "0 2 * * *",
            {PROJECTS[0]: run_id},
        )
        for at_ms, run_id in nights.items()
    ]
    await almanac.put(past[-1], past)
    coming = (now + timedelta(days=1)).replace(hour=2, minute=0, second=0)
    await almanac.say({"next": {"idle-pools": f"{coming:%Y-%m-%dT%H:%M:%SZ}"}, "rejected": ""})
    marks = [
        Mark(
            project_id=PROJECTS[0],
            pool_id=pool_name(8_000 + number),
            display_name=f"notebook-{number}",
            policy="idle-pools",
            precondition=Precondition("2026-03-01T03:10:40Z", "f"),
            marked_at=now - timedelta(days=6),
            due_at=now + timedelta(days=number, minutes=-5),
            reason=f"no workload for {40 - number} d",
        )
        for number in range(4)
    ]
    await Marks(site.redis, ENDPOINT).put(marks)
    limiter = Limiter(site.redis, endpoint=ENDPOINT, rate=4_000, burst=1)
    for _ in range(CALLS):
        await limiter.permit(PROJECTS[0])
    await limiter.throttled(PROJECTS[0], None, sent_ago_s=0)
    await site.redis.zadd(keys.workers(ENDPOINT), {"w1": await site.ledger.now_ms()})
