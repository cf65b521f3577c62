"""Just before its DELETE a pool must still be what was chosen; what is read for that is little."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import aiohttp
import pytest
from aiohttp.web import json_response

from tests.conftest import until
from tests.worker.conftest import Runs, is_list, refused, settings_for, worker_here
from worker.ledger import JobState, NewJob, keys

if TYPE_CHECKING:
    from collections.abc import Sequence

    from aiohttp import web
    from redis.asyncio import Redis

    from tests.worker.conftest import Cloud, Project, RedisServer

TAGS = "os.modelarts/tms.tags"
CHANGES: dict[str, tuple[dict[str, Any], str]] = {
    "retagged": ({"annotations": {TAGS: '{"team": "atlas"}'}}, "tags changed"),
    "renewed": (
        {"annotations": {TAGS: '{"expires-at": "2099-01-01"}'}},
        'tags are now {"expires-at": "2099-01-01"}',
    ),
    "protected": (
        {"annotations": {TAGS: '[{"key": "poolsweep/protect", "value": "true"}]'}},
        "poolsweep/protect",
    ),
    "labelled": ({"labels": {"os.modelarts/workspace.id": "7"}}, "labels changed"),
    "annotated": ({"annotations": {"os.modelarts/billing.mode": "1"}}, "annotations changed"),
    "created anew": (
        {"creationTimestamp": "2030-05-06T07:08:09Z"},
        "another incarnation, created 2030-05-06T07:08:09Z",
    ),
}


async def change(cloud: Cloud, project: Project, pool: str, what: dict[str, Any]) -> None:
    url = f"{cloud.url}/_sandbox/pools/{project.project_id}/{pool}"
    async with aiohttp.ClientSession() as session, session.post(url, json=what) as answer:
        assert answer.status == 200


@pytest.mark.parametrize("count", [1, 20], ids=["read by itself", "read in a list"])
@pytest.mark.parametrize("name", CHANGES)
async def test_a_pool_that_changed_since_it_was_chosen_is_skipped(
    cloud: Cloud, redis: Redis, server: RedisServer, name: str, count: int
) -> None:
    what, words = CHANGES[name]
    project = cloud.project(count)
    settings = settings_for(cloud, server.url)
    runs = Runs(redis, settings)
    run_id = await runs.make(project.jobs(), verify=False, feed=False)
    changed = list(project.pools)[count // 2]
    await change(cloud, project, changed, what)
    async with worker_here(settings) as worker:
        await asyncio.to_thread(worker.execute, run_id, range(count))
    assert (await runs.check(run_id, cloud, project))[JobState.SKIPPED] == 1
    (skipped,) = [job for job in await runs.jobs(run_id) if job.state is JobState.SKIPPED]
    assert skipped.pool_name == changed
    assert "changed since it was chosen" in skipped.reason
    assert words in skipped.reason
    assert not skipped.attempts
    assert {pool for pool, _ in cloud.deletes} == set(project.pools) - {changed}


async def test_a_pool_that_changes_while_its_job_waits_its_turn_is_skipped(
    cloud: Cloud, redis: Redis, server: RedisServer
) -> None:
    project = cloud.project(22)
    settings = settings_for(cloud, server.url, rate_limit=15, precondition_max_age_s=1)
    runs = Runs(redis, settings)
    run_id = await runs.make(project.jobs(), verify=False, feed=False)
    async with worker_here(settings) as worker:
        batch = asyncio.create_task(asyncio.to_thread(worker.execute, run_id, range(22)))
        await until(lambda: _has_begun(cloud))
        deleted = {pool for pool, _ in cloud.deletes}
        last = list(project.pools)[-3:]
        assert not deleted & set(last)
        for pool in last:
            await change(cloud, project, pool, CHANGES["renewed"][0])
        await batch
    jobs = {job.pool_name: job for job in await runs.jobs(run_id)}
    assert [jobs[pool].state for pool in last] == [JobState.SKIPPED] * 3
    assert not {pool for pool, _ in cloud.deletes} & set(last)
    assert (await runs.check(run_id, cloud, project))[JobState.ACCEPTED] == 19


async def _has_begun(cloud: Cloud) -> bool:
    return bool(cloud.deletes)


async def test_a_pool_that_is_gone_already_needs_no_call(
    cloud: Cloud, redis: Redis, server: RedisServer
) -> None:
    project = cloud.project(10)
    settings = settings_for(cloud, server.url)
    runs = Runs(redis, settings)
    gone, *_ = project.pools
    run_id = await runs.make(project.jobs(), verify=False, feed=False)
    async with aiohttp.ClientSession() as session:
        await session.delete(f"{cloud.url}/_sandbox/pools/{project.project_id}/{gone}")
    async with worker_here(settings) as worker:
        await asyncio.to_thread(worker.execute, run_id, range(10))
    outcomes = await runs.check(run_id, cloud, project)
    assert outcomes == {JobState.ALREADY_DELETED: 1, JobState.ACCEPTED: 9}
    assert not cloud.calls_of(gone)


async def test_a_pool_that_a_list_hides_is_read_by_itself(
    cloud: Cloud, redis: Redis, server: RedisServer
) -> None:
    project = cloud.project(10)
    settings = settings_for(cloud, server.url)
    runs = Runs(redis, settings)

    def show_none(request: web.Request) -> web.Response | None:
        return aiohttp.web.json_response({"items": []}) if is_list(request) else None

    cloud.gateway = show_none
    run_id = await runs.make(project.jobs(), verify=False, feed=False)
    async with worker_here(settings) as worker:
        await asyncio.to_thread(worker.execute, run_id, range(10))
    assert await runs.check(run_id, cloud, project) == {JobState.ACCEPTED: 10}


async def test_hundreds_of_deletions_take_a_few_lists(
    cloud: Cloud, redis: Redis, server: RedisServer
) -> None:
    project = cloud.project(300)
    settings = settings_for(cloud, server.url, batch_size=50)
    runs = Runs(redis, settings)
    run_id = await runs.make(project.jobs(), verify=False, feed=False)
    async with worker_here(settings) as worker:
        batches = [range(start, start + 50) for start in range(0, 300, 50)]
        await asyncio.gather(
            *(asyncio.to_thread(worker.execute, run_id, batch) for batch in batches)
        )
    assert await runs.check(run_id, cloud, project) == {JobState.ACCEPTED: 300}
    assert len(cloud.deletes) == 300
    assert len(cloud.reads) < 30
    assert 1 <= project.lists() <= 3


async def slowly(
    cloud: Cloud, redis: Redis, server: RedisServer, jobs: Sequence[NewJob], *, max_age_s: int
) -> tuple[Runs, str]:
    """Carry out a run in one batch that takes longer than what it reads is trusted."""
    settings = settings_for(
        cloud, server.url, rate_limit=20, precondition_max_age_s=max_age_s, batch_size=200
    )
    runs = Runs(redis, settings)
    run_id = await runs.make(jobs, verify=False, feed=False)
    async with worker_here(settings) as worker:
        await asyncio.to_thread(worker.execute, run_id, range(len(jobs)))
    return runs, run_id


async def test_a_list_is_read_anew_before_it_is_too_old_and_costs_no_turn(
    cloud: Cloud, redis: Redis, server: RedisServer
) -> None:
    project = cloud.project(80)
    runs, run_id = await slowly(cloud, redis, server, project.jobs(), max_age_s=1)
    assert await runs.check(run_id, cloud, project) == {JobState.ACCEPTED: 80}
    limit = keys.limiter(cloud.url, project.project_id)
    given = int(await redis.hget(limit, "slot") or 0)
    assert project.lists() >= 4
    # One or two, if this machine stands still for longer than a list has left.
    assert given - len(cloud.deletes) - len(cloud.reads) <= project.lists() // 2


async def test_a_list_that_cannot_be_read_anew_is_used_for_as_long_as_it_is_trusted(
    cloud: Cloud, redis: Redis, server: RedisServer
) -> None:
    project = cloud.project(80)
    listed, failed = list[float](), list[float]()

    def fail_soon(request: web.Request) -> web.Response | None:
        if not is_list(request):
            return None
        now = asyncio.get_running_loop().time()
        if not listed or now - listed[0] > 1.9:
            listed.append(now)
            return None
        failed.append(now)
        return refused(503, "ModelArts.50000002", "busy")

    cloud.gateway = fail_soon
    runs, run_id = await slowly(cloud, redis, server, project.jobs(), max_age_s=2)
    assert await runs.check(run_id, cloud, project) == {JobState.ACCEPTED: 80}
    assert len(failed) <= 1
    assert len(listed) >= 2


async def test_on_doubt_nothing_is_deleted(cloud: Cloud, redis: Redis, server: RedisServer) -> None:
    project = cloud.project(10)
    settings = settings_for(cloud, server.url, max_attempts=2)
    runs = Runs(redis, settings)
    cloud.gateway = lambda r: refused(503, "ModelArts.50000002", "no lists today")
    run_id = await runs.make(project.jobs(), verify=False, feed=False)
    async with worker_here(settings) as worker:
        while not (await runs.ledger.run(run_id)).ended:
            await asyncio.to_thread(worker.execute, run_id, range(10))
    assert await runs.check(run_id, cloud, project) == {JobState.FAILED: 10}
    assert not cloud.deletes
    for job in await runs.jobs(run_id):
        assert "could not be read before its deletion" in job.reason
        assert "no lists today" in job.reason
        assert "given up after 2 attempts" in job.reason
        assert [attempt.status for attempt in job.attempts] == [503, 503]


async def test_a_list_that_fails_fails_for_all_that_wait_for_it_and_is_not_read_for_each(
    cloud: Cloud, redis: Redis, server: RedisServer
) -> None:
    project = cloud.project(100)
    settings = settings_for(cloud, server.url, inline_wait_s=0, max_attempts=9)
    runs = Runs(redis, settings)

    async def fail(request: web.Request) -> web.Response | None:
        await asyncio.sleep(0.1)
        return refused(500, "ModelArts.50000001") if is_list(request) else None

    cloud.gateway = fail
    run_id = await runs.make(project.jobs(), verify=False, feed=False)
    async with worker_here(settings) as worker:
        await asyncio.to_thread(worker.execute, run_id, range(100))
        assert (await runs.ledger.run(run_id)).counts[JobState.PENDING] == 100
        assert project.lists() <= 2
        cloud.gateway = lambda _: None
        while not (await runs.ledger.run(run_id)).ended:
            await asyncio.to_thread(worker.execute, run_id, range(100))
    assert await runs.check(run_id, cloud, project) == {JobState.ACCEPTED: 100}


async def test_a_list_that_takes_longer_than_it_is_trusted_keeps_nothing_from_being_deleted(
    cloud: Cloud, redis: Redis, server: RedisServer
) -> None:
    project = cloud.project(10)
    settings = settings_for(cloud, server.url, precondition_max_age_s=1)
    runs = Runs(redis, settings)

    async def slow(request: web.Request) -> None:
        if is_list(request):
            await asyncio.sleep(1.2)

    cloud.gateway = slow
    run_id = await runs.make(project.jobs(), verify=False, feed=False)
    async with worker_here(settings) as worker:
        await asyncio.to_thread(worker.execute, run_id, range(10))
    assert await runs.check(run_id, cloud, project) == {JobState.ACCEPTED: 10}


async def test_a_job_without_precondition_needs_no_read(
    cloud: Cloud, redis: Redis, server: RedisServer
) -> None:
    project = cloud.project(5)
    settings = settings_for(cloud, server.url)
    runs = Runs(redis, settings)
    jobs = [NewJob(project.project_id, name) for name in project.pools]
    run_id = await runs.make(jobs, verify=False, feed=False)
    async with worker_here(settings) as worker:
        await asyncio.to_thread(worker.execute, run_id, range(5))
    assert await runs.check(run_id, cloud, project) == {JobState.ACCEPTED: 5}
    assert not cloud.reads


async def test_nodes_that_the_plan_left_unread_are_looked_at_just_before_the_call(
    cloud: Cloud, redis: Redis, server: RedisServer
) -> None:
    project = cloud.project(6)
    settings = settings_for(cloud, server.url)
    runs = Runs(redis, settings)
    jobs = [replace(job, check_nodes=True) for job in project.jobs()]
    run_id = await runs.make(jobs, verify=False, feed=False)
    prepaid, gone, odd, *plain = project.pools

    def answer(request: web.Request) -> web.Response | None:
        if gone in request.path:
            return refused(404, "ModelArts.50015001", "pool not found")
        if not request.path.endswith("/nodes"):
            return None
        if odd in request.path:
            return refused(404, "ModelArts.50015001", "pool not found")
        mode = "1" if prepaid in request.path else "0"
        annotations = {"os.modelarts/billing.mode": mode}
        return json_response({"items": [{"metadata": {"annotations": annotations}}]})

    cloud.gateway = answer
    async with worker_here(settings) as worker:
        await asyncio.to_thread(worker.execute, run_id, range(6))
    found = {job.pool_name: job for job in await runs.jobs(run_id)}
    assert (found[prepaid].state, found[prepaid].reason) == (
        JobState.SKIPPED,
        "it has prepaid nodes: unsubscribe these first",
    )
    assert found[gone].state is JobState.ALREADY_DELETED
    assert found[odd].state is JobState.FAILED, "only the pool's own 404 counts"
    assert {found[pool].state for pool in plain} == {JobState.ACCEPTED}
    assert {pool for pool, _ in cloud.deletes} == set(plain)


async def test_nodes_that_cannot_be_read_keep_the_pool(
    cloud: Cloud, redis: Redis, server: RedisServer
) -> None:
    project = cloud.project(1)
    settings = settings_for(cloud, server.url)
    runs = Runs(redis, settings)
    (job,) = project.jobs()
    run_id = await runs.make([replace(job, check_nodes=True)], verify=False, feed=False)
    cloud.gateway = lambda request: (
        refused(403, "APIG.0305", "no") if request.path.endswith("/nodes") else None
    )
    async with worker_here(settings) as worker:
        await asyncio.to_thread(worker.execute, run_id, [0])
    (failed,) = await runs.jobs(run_id)
    assert failed.state is JobState.FAILED
    assert "could not be read before its deletion" in failed.reason
    assert not cloud.deletes


async def test_a_pool_that_changes_while_its_nodes_are_read_is_skipped(
    cloud: Cloud, redis: Redis, server: RedisServer
) -> None:
    project = cloud.project(1)
    settings = settings_for(cloud, server.url, precondition_max_age_s=1)
    runs = Runs(redis, settings)
    (job,) = project.jobs()
    run_id = await runs.make([replace(job, check_nodes=True)], verify=False, feed=False)

    async def answer(request: web.Request) -> web.Response | None:
        if request.path.endswith("/nodes"):
            await change(cloud, project, job.pool_name, CHANGES["protected"][0])
            await asyncio.sleep(1.1)  # longer than what was seen of the pool may be trusted
        return None

    cloud.gateway = answer
    async with worker_here(settings) as worker:
        await asyncio.to_thread(worker.execute, run_id, [0])
    (skipped,) = await runs.jobs(run_id)
    assert (skipped.state, "poolsweep/protect" in skipped.reason) == (JobState.SKIPPED, True)
    assert not cloud.deletes


async def test_nodes_are_looked_at_anew_when_the_call_has_to_wait_for_long(
    cloud: Cloud, redis: Redis, server: RedisServer
) -> None:
    project = cloud.project(60)
    jobs = [replace(job, check_nodes=True) for job in project.jobs()]
    renewed_ms: list[int] = []

    async def answer(request: web.Request) -> web.Response | None:
        if request.path.endswith("/nodes"):
            mode = "1" if renewed_ms else "0"
            await asyncio.sleep(0.4)  # so that several wait for their DELETE's turn when it comes
            annotations = {"os.modelarts/billing.mode": mode}
            return json_response({"items": [{"metadata": {"annotations": annotations}}]})
        if request.method == "DELETE" and len(cloud.deletes) == 5:
            renewed_ms.append(cloud.deletes[-1][1])
            return refused(429, "APIG.0308", "slow down", Retry_After="3")
        return None

    cloud.gateway = answer
    runs, run_id = await slowly(cloud, redis, server, jobs, max_age_s=1)
    (then_ms,) = renewed_ms
    assert max(at_ms for _, at_ms in cloud.deletes) < then_ms + 2_000
    skipped = [job for job in await runs.jobs(run_id) if job.state is JobState.SKIPPED]
    assert all("prepaid nodes" in job.reason for job in skipped)
    assert len(skipped) >= 20
