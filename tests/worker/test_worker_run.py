"""Runs from the broker to their end: what is delivered, how often, and what is tried again."""

from __future__ import annotations

import asyncio
import json
import time
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from itertools import pairwise
from typing import TYPE_CHECKING

import pytest
from pydantic import SecretStr

from tests.conftest import until
from tests.worker.conftest import (
    Runs,
    environment,
    refused,
    serving,
    settings_for,
    worker_here,
)
from worker.broker import EXECUTE_BATCH, KEY_PREFIX, make_app, queue_name
from worker.ledger import Job, JobState
from worker.pause import LOOK_S, pause, resume
from worker.settings import Settings

if TYPE_CHECKING:
    from collections.abc import Callable

    from aiohttp import web
    from redis.asyncio import Redis

    from tests.worker.conftest import Cloud, Process, RedisServer, Workers

LONG = {"lease_s": 600, "resend_s": 600}


# With worker processes


async def test_every_pool_comes_to_the_end_that_its_behaviour_asks_for(
    cloud: Cloud,
    redis: Redis,
    server: RedisServer,
    workers: Workers,
) -> None:
    project = cloud.project(80, gone=4, throttled=1, flaky=6, doomed=5, stuck=2)
    cloud.latency(20)
    settings = settings_for(cloud, server.url, verify_deadline_s=1)
    runs = Runs(redis, settings)
    worker = workers.start(environment(settings))
    await workers.ready(worker)
    run_id = await runs.make(project.jobs())
    await runs.ended(run_id)
    outcomes = await runs.check(run_id, cloud, project)
    assert outcomes == {
        JobState.DELETED: 69,
        JobState.ALREADY_DELETED: 4,
        JobState.FAILED: 7,
    }
    for job in await runs.jobs(run_id):
        calls = cloud.calls_of(job.pool_name)
        assert len(job.attempts) == len(calls)
        match project.pools[job.pool_name].member.behaviour:
            case "normal":
                assert [(a.status, a.code) for a in job.attempts] == [(200, "")]
            case "gone":
                assert [a.status for a in job.attempts] in ([], [404])
            case "throttled":
                assert [a.status for a in job.attempts] == [429, 200]
                assert calls[1] - calls[0] >= 1_000  # Retry-After: 1
            case "flaky":
                assert [a.status for a in job.attempts][-1] == 200
                assert len(job.attempts) == 3
            case "doomed":
                assert "HTTP 40" in job.reason
                assert len(job.attempts) == 1
            case _:
                assert job.reason == (
                    "accepted, but not seen to be gone within 1 s: its phase is Deleting "
                    "(no message)"
                )
        for attempt, at_ms in zip(job.attempts, calls, strict=True):
            assert attempt.request_id.startswith("sandbox-")
            assert attempt.duration_ms >= 20
            assert at_ms - 1 <= attempt.at_ms <= time.time_ns() // 1_000_000


async def test_a_batch_delivered_again_or_to_two_workers_changes_nothing(
    cloud: Cloud, redis: Redis, server: RedisServer, workers: Workers
) -> None:
    project = cloud.project(60)
    cloud.latency(50)
    settings = settings_for(cloud, server.url, **LONG)
    runs = Runs(redis, settings)
    both = [workers.start(environment(settings)) for _ in range(2)]
    await workers.ready(*both)
    run_id = await runs.make(project.jobs(), verify=False, feed=False)
    for _ in range(3):
        for start in range(0, 60, 20):
            await runs.send(run_id, list(range(start, start + 20)))
    await runs.ended(run_id)
    claimed = [event for worker in both for event in worker.events("batch_claimed")]
    assert await runs.check(run_id, cloud, project) == {JobState.ACCEPTED: 60}
    assert sorted(pool for pool, _ in cloud.deletes) == sorted(project.pools)
    await runs.send(run_id, list(range(60)))  # and once more, when all is over
    await until(lambda: _claims(both, len(claimed)))
    assert (
        sum(event["claimed"] for worker in both for event in worker.events("batch_claimed")) == 60
    )
    assert len(cloud.deletes) == 60


async def _claims(workers: list[Process], count: int) -> bool:
    return sum(len(worker.events("batch_claimed")) for worker in workers) > count


async def test_messages_that_a_worker_cannot_use_do_nothing_and_stop_nothing(
    cloud: Cloud, redis: Redis, server: RedisServer, workers: Workers
) -> None:
    project = cloud.project(20)
    settings = settings_for(cloud, server.url, **LONG)
    runs = Runs(redis, settings)
    async with serving() as elsewhere:
        others = Runs(redis, settings_for(elsewhere, server.url, **LONG))
        other_run = await others.make(cloud.project(5).jobs(), feed=False)
        await runs.send(other_run, [0, 1, 2, 3, 4])
        await runs.send("20200101-000000-0000000000", [0, 1])
        app = make_app(settings, [settings.api_endpoint.url])
        for arguments in ({}, {"run_id": 5, "numbers": "abc"}, {"run_id": other_run, "what": []}):
            await asyncio.to_thread(app.send_task, EXECUTE_BATCH, kwargs=arguments)
        await asyncio.to_thread(app.send_task, "poolsweep.no_such_task", kwargs={})
        pickled = make_app(settings, [settings.api_endpoint.url])
        pickled.conf.update(task_serializer="pickle", accept_content=["pickle", "json"])
        numbers = {"run_id": other_run, "numbers": [0]}
        await asyncio.to_thread(pickled.send_task, EXECUTE_BATCH, kwargs=numbers)
        queue = KEY_PREFIX + queue_name(cloud.url)
        (whole,) = await redis.lrange(queue, 0, 0)
        for changes in (
            {"body": "bm8ganNvbg=="},
            {"properties": 5},
            {"headers": None},
            {"headers": {"task": EXECUTE_BATCH}},
            {"headers": {"task": EXECUTE_BATCH, "id": "x", "compression": "application/x-bz2"}},
            {"body": 7},
        ):
            await redis.lpush(queue, json.dumps(json.loads(whole) | changes))
        await redis.lpush(queue, "no json", "7", "[]", "{}")
        held = set(await redis.hkeys(KEY_PREFIX + "unacked"))  # by what other tests have killed
        worker = workers.start(environment(settings), plain=True)
        await workers.ready(worker)
        run_id = await runs.make(project.jobs(), verify=False)
        await runs.ended(run_id)
        assert await runs.check(run_id, cloud, project) == {JobState.ACCEPTED: 20}
        assert {job.state for job in await others.jobs(other_run)} == {JobState.PENDING}
        assert not elsewhere.deletes
    assert {pool for pool, _ in cloud.deletes} == set(project.pools)
    (event,) = worker.events("batch_of_other_endpoint")
    assert (event["run_id"], event["endpoint"]) == (other_run, elsewhere.url)
    assert worker.events("batch_of_unknown_run")
    assert "pickle" in worker.text  # refused, and said so
    assert worker.events("message_unreadable")
    assert set(await redis.hkeys(KEY_PREFIX + "unacked")) <= held
    assert not worker.events("job_crashed")


async def test_lost_messages_are_sent_again(
    cloud: Cloud, redis: Redis, server: RedisServer, workers: Workers
) -> None:
    project = cloud.project(60)
    cloud.latency(50)
    settings = settings_for(
        cloud, server.url, worker_batches=1, in_flight=5, batch_size=10, resend_s=1
    )
    runs = Runs(redis, settings)
    run_id = await runs.make(project.jobs(), verify=False)
    queue = KEY_PREFIX + queue_name(cloud.url)
    assert await redis.llen(queue) == 6
    assert await redis.delete(queue)
    worker = workers.start(environment(settings))
    await workers.ready(worker)

    async def lost_midway() -> bool:
        return bool(cloud.deletes) and bool(await redis.delete(queue))

    await until(lost_midway)
    await runs.ended(run_id)
    assert await runs.check(run_id, cloud, project) == {JobState.ACCEPTED: 60}
    assert len(cloud.deletes) == 60


async def test_a_run_whose_cancelling_was_cut_short_is_cancelled_to_its_end(
    cloud: Cloud, redis: Redis, server: RedisServer
) -> None:
    project = cloud.project(10)
    settings = settings_for(cloud, server.url)
    runs = Runs(redis, settings)
    run_id = await runs.make(project.jobs(), feed=False)
    # What is left when the canceller is stopped after its first step.
    await redis.hset(f"poolsweep:{{{run_id}}}:run", "cancelled_ms", await runs.ledger.now_ms())
    async with worker_here(settings) as worker:
        await asyncio.to_thread(worker.reconcile)
        await runs.ended(run_id)
    assert await runs.check(run_id, cloud, project) == {JobState.CANCELLED: 10}
    assert not cloud.deletes


async def test_a_worker_that_stops_while_it_sends_batches_sends_all_that_it_took(
    cloud: Cloud, redis: Redis, server: RedisServer
) -> None:
    settings = settings_for(cloud, server.url, batch_size=1, **LONG)
    runs = Runs(redis, settings)
    queue = KEY_PREFIX + queue_name(cloud.url)
    async with worker_here(settings) as worker:
        await asyncio.to_thread(worker.reconcile)
        run_id = await runs.make(cloud.project(300).jobs(), feed=False)

        async def has_begun() -> bool:
            return bool(await redis.llen(queue))

        await until(has_begun)
    assert not await runs.unsent(run_id)


# What is tried again, in this process


def first_calls(
    count: int, answer: Callable[[], web.Response]
) -> Callable[[web.Request], web.Response | None]:
    """Has the cloud answer the first DELETE calls so."""
    left = count

    def gateway(request: web.Request) -> web.Response | None:
        nonlocal left
        if request.method != "DELETE" or left == 0:
            return None
        left -= 1
        return answer()

    return gateway


async def one_job(runs: Runs, run_id: str) -> Job:
    (job,) = await runs.jobs(run_id)
    return job


async def test_a_job_that_must_wait_long_goes_back_and_is_executed_when_due(
    cloud: Cloud, redis: Redis, server: RedisServer
) -> None:
    project = cloud.project(1)
    settings = settings_for(
        cloud, server.url, inline_wait_s=0, backoff_base_s=600, backoff_cap_s=600
    )
    runs = Runs(redis, settings)
    cloud.gateway = first_calls(1, lambda: refused(503, "ModelArts.50000002", "busy"))
    run_id = await runs.make(project.jobs(), verify=False, feed=False)
    before = await runs.ledger.now_ms()
    async with worker_here(settings) as worker:
        await asyncio.to_thread(worker.execute, run_id, [0])
        job = await one_job(runs, run_id)
        assert job.state is JobState.PENDING
        assert before < job.due_ms <= before + 700_000
        assert job.reason == "HTTP 503: the cloud has a fault (ModelArts.50000002 busy)"
        (attempt,) = job.attempts
        assert (attempt.status, attempt.code) == (503, "ModelArts.50000002")
        assert attempt.request_id == "front-1"
        await asyncio.to_thread(worker.execute, run_id, [0])  # it is not due yet
        assert len(cloud.deletes) == 1


async def test_a_job_is_sent_again_when_it_is_due(
    cloud: Cloud, redis: Redis, server: RedisServer, workers: Workers
) -> None:
    project = cloud.project(3)
    settings = settings_for(cloud, server.url, inline_wait_s=0, **LONG)
    runs = Runs(redis, settings)
    cloud.gateway = first_calls(3, lambda: refused(409, "ModelArts.50015006", "being scaled"))
    worker = workers.start(environment(settings))
    await workers.ready(worker)
    run_id = await runs.make(project.jobs(), verify=False)
    await runs.ended(run_id)
    assert await runs.check(run_id, cloud, project) == {JobState.ACCEPTED: 3}
    statuses = [attempt.status for job in await runs.jobs(run_id) for attempt in job.attempts]
    assert sorted(statuses) == [200] * 3 + [409] * 3


async def test_a_job_is_given_up_after_its_last_attempt_and_says_why(
    cloud: Cloud, redis: Redis, server: RedisServer
) -> None:
    project = cloud.project(1)
    settings = settings_for(cloud, server.url, inline_wait_s=1, max_attempts=3)
    runs = Runs(redis, settings)
    cloud.gateway = first_calls(99, lambda: refused(502, "", "bad gateway"))
    run_id = await runs.make(project.jobs(), verify=False, feed=False)
    async with worker_here(settings) as worker:
        await asyncio.to_thread(worker.execute, run_id, [0])
    job = await one_job(runs, run_id)
    assert job.state is JobState.FAILED
    assert job.reason == (
        "HTTP 502: the cloud has a fault (bad gateway) (given up after 3 attempts)"
    )
    assert [attempt.status for attempt in job.attempts] == [502, 502, 502]
    assert len(cloud.deletes) == 3


async def test_in_an_outage_the_cloud_is_left_alone_and_no_job_is_given_up(
    cloud: Cloud, redis: Redis, server: RedisServer, workers: Workers
) -> None:
    project, other = cloud.project(60), cloud.project(30)
    settings = settings_for(
        cloud, server.url, in_flight=15, max_attempts=4, backoff_base_s=0.1, **LONG
    )
    runs = Runs(redis, settings)
    outage = True
    cloud.gateway = lambda r: (
        refused(503, "APIG.0203", "backend unavailable")
        if outage and r.method == "DELETE" and r.match_info["project"] == project.project_id
        else None
    )
    worker = workers.start(environment(settings))
    run_id = await runs.make(project.jobs(), verify=False)
    other_run = await runs.make(other.jobs(), verify=False)

    def failed() -> int:
        return sum(pool in project.pools for pool, _ in cloud.deletes)

    async def waiting() -> bool:
        counts = (await runs.ledger.run(run_id)).counts
        return bool(worker.events("circuit_opened")) and counts[JobState.PENDING] == 60

    await until(waiting)
    before = failed()
    outage = False
    await runs.ended(run_id)
    assert await runs.check(run_id, cloud, project) == {JobState.ACCEPTED: 60}
    assert await runs.check(other_run, cloud, other) == {JobState.ACCEPTED: 30}
    (opened, *_) = worker.events("circuit_opened")
    # Those that had failed when it opened, those under way by then, and a probe now and then.
    opened_ms = datetime.fromisoformat(opened["timestamp"]).timestamp() * 1000
    failed_ms = sorted(at for pool, at in cloud.deletes if pool in project.pools)[:before]
    probes = [at for at in failed_ms if at > opened_ms + 2_000]
    assert before - len(probes) <= opened["failed"] + 15
    assert all(later - at > 1_000 for at, later in pairwise(probes))
    assert [event["project_id"] for event in worker.events("circuit_closed")] == [
        project.project_id
    ]


async def test_a_project_that_must_wait_long_leaves_the_workers_to_the_others(
    cloud: Cloud, redis: Redis, server: RedisServer, workers: Workers
) -> None:
    project, other = cloud.project(80), cloud.project(80)
    settings = settings_for(
        cloud, server.url, rate_limit=40, worker_batches=1, batch_size=20, inline_wait_s=0.5
    )
    runs = Runs(redis, settings)
    cloud.gateway = lambda r: (
        refused(429, "APIG.0308", "slow down", Retry_After="500")
        if r.match_info.get("project") == project.project_id
        else None
    )
    workers.start(environment(settings))
    both = zip(project.jobs(), other.jobs(), strict=True)
    run_id = await runs.make([job for pair in both for job in pair], verify=False)

    async def others_done() -> bool:
        return (await runs.ledger.run(run_id)).counts[JobState.ACCEPTED] == 80

    await until(others_done)
    jobs = [job for job in await runs.jobs(run_id) if job.project_id == project.project_id]
    assert {job.state for job in jobs} == {JobState.PENDING}
    assert any("no call may be made for 4" in job.reason for job in jobs)
    assert sum(name == project.project_id for name, _ in cloud.reads) == 1
    assert not {pool for pool, _ in cloud.deletes} & set(project.pools)


async def test_what_changes_while_a_call_is_signed_is_seen_before_it_is_made(
    cloud: Cloud, redis: Redis, server: RedisServer
) -> None:
    """Signing waits for a token, a while after the pool was looked at and its turn had come."""
    project, config = cloud.project(12), cloud.sandbox.config
    settings = settings_for(
        cloud,
        server.url,
        token=None,
        iam_endpoint=cloud.url,
        iam_user=config.iam_user,
        iam_password=SecretStr(config.iam_password),
        iam_domain=config.iam_domain,
        rate_limit=40,
    )
    runs = Runs(redis, settings)
    asked, may_answer = asyncio.Event(), asyncio.Event()

    async def hold_back() -> None:
        asked.set()
        await may_answer.wait()

    cloud.gateway = lambda r: hold_back() if r.path == "/v3/auth/tokens" else None
    unchecked = [replace(job, created="", fingerprint="") for job in project.jobs()]
    run_id = await runs.make(unchecked, verify=False, feed=False)
    async with worker_here(settings) as worker:
        batch = asyncio.create_task(asyncio.to_thread(worker.execute, run_id, range(12)))
        await asked.wait()
        await pause(redis, project.project_id, by="a test", reason="")
        # Each had its turn, and the worker has heard of the pause.
        await asyncio.sleep(12 / 40 + 2 * LOOK_S)
        may_answer.set()
        await batch
        assert {job.state for job in await runs.jobs(run_id)} == {JobState.PENDING}
        assert not cloud.deletes
        await resume(redis, project.project_id)


def _in_seconds() -> str:
    return "1"


def _as_a_date() -> str:
    # A date has whole seconds, so that up to one is lost.
    return format_datetime(datetime.now(UTC) + timedelta(seconds=2), usegmt=True)


@pytest.mark.parametrize("retry_after", [_in_seconds, _as_a_date])
async def test_what_the_cloud_asks_to_wait_is_waited_by_all_of_the_project_and_no_other(
    cloud: Cloud, redis: Redis, server: RedisServer, retry_after: Callable[[], str]
) -> None:
    project, other = cloud.project(8), cloud.project(8)
    settings = settings_for(cloud, server.url, inline_wait_s=5, rate_limit=20)
    runs = Runs(redis, settings)
    first = first_calls(
        1, lambda: refused(429, "APIG.0308", "slow down", Retry_After=retry_after())
    )
    cloud.gateway = lambda r: (
        first(r) if r.match_info.get("project") == project.project_id else None
    )
    run_id = await runs.make(project.jobs(), verify=False, feed=False)
    other_run = await runs.make(other.jobs(), verify=False, feed=False)
    async with worker_here(settings) as worker:
        batch = asyncio.create_task(asyncio.to_thread(worker.execute, run_id, range(8)))
        await until(lambda: _has_begun(cloud))
        await asyncio.to_thread(worker.execute, other_run, range(8))
        assert not batch.done()
        await batch
    assert await runs.check(run_id, cloud, project) == {JobState.ACCEPTED: 8}
    refused_job = next(job for job in await runs.jobs(run_id) if len(job.attempts) == 2)
    assert [attempt.status for attempt in refused_job.attempts] == [429, 200]
    refused_ms = refused_job.attempts[0].at_ms
    calls = sorted(at_ms for pool, at_ms in cloud.deletes if pool in project.pools)
    # Only calls whose slot came before the answer may fall into the second; without the wait it
    # would be all of them.
    assert sum(refused_ms < at_ms < refused_ms + 950 for at_ms in calls) <= 3
    assert sum(at_ms >= refused_ms + 950 for at_ms in calls) >= 4


async def _has_begun(cloud: Cloud) -> bool:
    return bool(cloud.deletes)


async def test_without_verification_a_run_ends_when_all_is_accepted(
    cloud: Cloud, redis: Redis, server: RedisServer
) -> None:
    project = cloud.project(5, stuck=5)
    settings = settings_for(cloud, server.url)
    runs = Runs(redis, settings)
    run_id = await runs.make(project.jobs(), verify=False, feed=False)
    async with worker_here(settings) as worker:
        await asyncio.to_thread(worker.execute, run_id, range(5))
    assert await runs.check(run_id, cloud, project) == {JobState.ACCEPTED: 5}
    assert (await runs.ledger.run(run_id)).ended
    assert project.there() == set(project.pools)


# How Celery is set


def test_celery_is_set_so_that_no_batch_is_lost() -> None:
    settings = Settings(
        endpoint="https://modelarts.example.com:8443",
        redis_url=SecretStr("redis://redis.example.com/0"),
        batch_max_s=1_000,
        shutdown_s=100,
        worker_batches=3,
    )
    conf = make_app(settings, [settings.api_endpoint.url]).conf
    assert conf.task_acks_late
    assert conf.task_reject_on_worker_lost
    assert conf.worker_prefetch_multiplier == 1
    assert conf.worker_concurrency == 3
    assert (conf.task_serializer, conf.accept_content) == ("json", ["json"])
    assert conf.result_backend is None
    assert conf.task_ignore_result
    assert conf.broker_transport_options["visibility_timeout"] > 1_000 + 100
    assert conf.task_default_queue == "batches:modelarts.example.com:8443"
    assert conf.worker_soft_shutdown_timeout == 100
