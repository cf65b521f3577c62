"""Single faults that need no chance: what must come of each is known to the letter."""

from __future__ import annotations

import asyncio
import contextlib
import json
import shutil
import signal
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from tests.conftest import until
from tests.faults.rig import POOLSWEEP, RedisProcess, free_port
from tests.worker.conftest import (
    Cloud,
    Process,
    Runs,
    Workers,
    environment,
    refused,
    serving,
    settings_for,
    worker_here,
)
from worker.broker import KEY_PREFIX, queue_name
from worker.ledger import JobState, RunState, keys
from worker.redis_connection import connect
from worker.settings import Settings

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from pathlib import Path

    from aiohttp import web
    from redis.asyncio import Redis

GONE = {JobState.DELETED, JobState.ALREADY_DELETED}


@dataclass
class Stage:
    """What a scenario needs: a cloud, a Redis of its own, and workers to be started."""

    directory: Path
    cloud: Cloud
    server: RedisProcess
    redis: Redis
    settings: Settings
    runs: Runs
    workers: Workers

    async def worker(self) -> Process:
        """A worker that takes batches."""
        started = self.workers.start(environment(self.settings))
        await self.workers.ready(started)
        return started

    async def called(self, count: int) -> None:
        """Wait until so many DELETE calls have arrived."""

        async def enough() -> bool:
            return len(self.cloud.deletes) >= count

        await until(enough)

    def command(self, *arguments: str) -> Process:
        """`poolsweep ...`, against the same Redis."""
        log = self.directory / f"{arguments[0]}.log"
        env = {**environment(self.settings), "HOME": str(self.directory)}
        return Process([*POOLSWEEP, *arguments], log, env=env)

    @property
    def queue(self) -> str:
        return KEY_PREFIX + queue_name(self.cloud.url)


@contextlib.asynccontextmanager
async def staged(directory: Path, *options: str, **changes: Any) -> AsyncIterator[Stage]:
    """A stage whose Redis has more options, and whose settings differ from the usual."""
    server, workers = RedisProcess(directory / "redis", *options), Workers(directory)
    async with serving() as cloud:
        try:
            await server.start()
            settings = settings_for(cloud, server.url, **changes)
            redis = connect(settings)
            runs = Runs(redis, settings)
            yield Stage(directory, cloud, server, redis, settings, runs, workers)
            await redis.aclose()
        finally:
            workers.kill()
            server.kill()


async def test_a_run_that_redis_has_forgotten_is_no_success_to_anybody(tmp_path: Path) -> None:
    async with staged(tmp_path, rate_limit=20, lease_s=2, resend_s=1) as stage:
        project = stage.cloud.project(300)
        worker = await stage.worker()
        run_id = await stage.runs.make(project.jobs())
        watcher = stage.command("watch", run_id)

        async def watching() -> bool:
            return "300 jobs" in watcher.text

        await until(watching)
        await stage.called(5)
        stage.server.kill()
        (tmp_path / "redis" / "appendonly.aof").unlink()
        await stage.server.start()
        results = stage.command("results", run_id)
        for command in (watcher, results):
            assert await command.ended() == 2
            assert f"Run '{run_id}' is not in the ledger" in command.text
            assert "lost by Redis" in command.text
            assert "Traceback" not in command.text

        async def let_go() -> bool:
            return bool(worker.events("lease_lost"))

        await until(let_go)
        # It does its work as before, and nothing of the old run comes back.
        other = stage.cloud.project(5)
        second = await stage.runs.make(other.jobs())
        await stage.runs.ended(second)
        assert [run.run_id for run in await stage.runs.ledger.runs()] == [second]
        assert set(await stage.runs.check(second, stage.cloud, other)) <= GONE
        assert project.there()
        said = {event["run_id"] for event in worker.events("job_moved") if "run_id" in event}
        assert said <= {run_id, second}


async def test_a_failover_that_loses_the_last_writes_repeats_work_and_loses_none(
    tmp_path: Path,
) -> None:
    port = free_port()
    listens = ("--port", str(port), "--bind", "127.0.0.1")
    async with staged(tmp_path, *listens, rate_limit=40, lease_s=1, resend_s=1) as stage:
        replica = RedisProcess(tmp_path / "replica", "--replicaof", "127.0.0.1", str(port))
        try:
            await replica.start()
            project, spared = stage.cloud.project(80), stage.cloud.project(5)
            await stage.worker()
            run_id = await stage.runs.make(project.jobs())
            await stage.called(15)
            async with replica.client() as client:

                async def in_step() -> bool:
                    return bool(await client.exists(keys.run(run_id)))

                await until(in_step)
                await client.replicaof("NO", "ONE")
                behind = len(stage.cloud.deletes)
                await stage.called(behind + 20)
                stage.server.kill()
                ahead = len(stage.cloud.deletes)
        finally:
            replica.kill()
        shutil.copy(tmp_path / "replica" / "appendonly.aof", tmp_path / "redis" / "appendonly.aof")
        await stage.server.start()
        run = await stage.runs.ledger.run(run_id)
        assert run.state is RunState.RUNNING
        assert sum(run.counts[state] for state in GONE) < ahead
        await stage.runs.ended(run_id)
        assert set(await stage.runs.check(run_id, stage.cloud, project)) <= GONE
        assert not project.there()
        assert len(spared.there()) == 5
        assert {name for name, _ in stage.cloud.deletes} == set(project.pools)


async def test_messages_that_come_hours_late_change_nothing(tmp_path: Path) -> None:
    async with staged(tmp_path, batch_size=10) as stage:
        project = stage.cloud.project(40)
        run_id = await stage.runs.make(project.jobs())
        late = await stage.redis.lrange(stage.queue, 0, -1)
        assert len(late) == 4
        # By the ledger's clock they were sent hours ago, and count as lost.
        await stage.redis.delete(stage.queue)
        for number in range(40):
            await stage.redis.zincrby(keys.sent(run_id), -3 * 3_600_000, str(number))
        worker = await stage.worker()
        await stage.runs.ended(run_id)
        assert set(await stage.runs.check(run_id, stage.cloud, project)) <= GONE
        before = await everything_of(stage.redis, run_id)
        claimed, called = len(worker.events("batch_claimed")), len(stage.cloud.deletes)
        await stage.redis.lpush(stage.queue, *late, *late)

        async def taken() -> bool:
            return len(worker.events("batch_claimed")) == claimed + 8

        await until(taken)
        assert all(event["claimed"] == 0 for event in worker.events("batch_claimed")[claimed:])
        assert len(stage.cloud.deletes) == called
        assert await everything_of(stage.redis, run_id) == before


async def everything_of(redis: Redis, run_id: str) -> dict[str, bytes]:
    """All that is in Redis of a run, but how long it is kept."""
    raw: dict[str, bytes] = {}
    for key in keys.of_run(run_id):
        kind = str(await redis.type(key))
        if kind == "hash":
            raw[key] = json.dumps(await redis.hgetall(key), sort_keys=True).encode()
        elif kind == "list":
            raw[key] = json.dumps(await redis.lrange(key, 0, -1)).encode()
        else:
            assert kind == "none", f"{key} is a {kind}, and the run has ended"
    return raw


async def test_a_job_whose_message_is_lost_is_found_by_itself(tmp_path: Path) -> None:
    # As often as the settings say; by default that is a minute.
    assert Settings.model_fields["resend_s"].default <= 60
    async with staged(tmp_path, resend_s=1, batch_size=10) as stage:
        project = stage.cloud.project(40)
        run_id = await stage.runs.make(project.jobs())
        assert await stage.redis.delete(stage.queue)
        assert len(await stage.runs.unsent(run_id)) == 40
        await stage.worker()
        await stage.runs.ended(run_id, within_s=20)
        assert await stage.runs.check(run_id, stage.cloud, project) == {JobState.DELETED: 40}


async def test_a_job_that_no_worker_can_carry_out_does_not_harm_the_others(
    tmp_path: Path,
) -> None:
    async with staged(tmp_path, batch_size=20) as stage:
        project = stage.cloud.project(20)
        run_id = await stage.runs.make(project.jobs(), feed=False)
        poison = await damage(stage, run_id, 7, project="no project")
        await stage.worker()
        await stage.runs.ended(run_id)
        jobs = await stage.runs.jobs(run_id)
        assert jobs[7].state is JobState.FAILED
        assert len(jobs[7].attempts) <= stage.settings.max_attempts
        assert {job.state for job in jobs if job.number != 7} <= GONE
        assert project.there() == {poison}


async def test_a_record_that_cannot_be_read_does_not_harm_the_others(tmp_path: Path) -> None:
    async with staged(tmp_path, batch_size=20, lease_s=1, resend_s=1) as stage:
        project = stage.cloud.project(20)
        run_id = await stage.runs.make(project.jobs(), feed=False)
        poison = await damage(stage, run_id, 7, name=None)
        await stage.worker()

        async def others_are_done() -> bool:
            return project.there() == {poison}

        await until(others_are_done, within_s=6)
        run = await stage.runs.ended(run_id)
        assert run.counts[JobState.FAILED] == 1
        assert sum(run.counts[state] for state in GONE) == 19


async def damage(stage: Stage, run_id: str, number: int, **fields: str | None) -> str:
    """Change a job's record behind everybody's back; None: the field is gone. Returns its pool."""
    text = await stage.redis.hget(keys.jobs(run_id), str(number))
    record = {**json.loads(text or ""), **fields}
    kept = {name: value for name, value in record.items() if value is not None}
    await stage.redis.hset(keys.jobs(run_id), str(number), json.dumps(kept))
    return str(record["pool"])


async def test_a_job_that_kills_its_workers_is_given_up_and_harms_no_other(
    tmp_path: Path,
) -> None:
    # Slow, so that the others of its batch have not been called when it strikes.
    changes = {"rate_limit": 10, "rate_burst": 1, "batch_size": 10, "max_attempts": 3}
    async with staged(tmp_path, **changes, lease_s=1, resend_s=1) as stage:
        project = stage.cloud.project(10)
        poison = next(iter(project.pools))
        strikes: list[str] = []
        present = stage.workers.start(environment(stage.settings))

        def strike(request: web.Request) -> web.Response | None:
            if request.method != "DELETE" or request.match_info["pool"] != poison:
                return None
            strikes.append(poison)
            present.kill()
            return refused(500, "ModelArts.50000001")

        stage.cloud.gateway = strike
        run_id = await stage.runs.make(project.jobs())

        async def ended() -> bool:
            nonlocal present
            if await present._has_ended():
                present = stage.workers.start(environment(stage.settings))
            return (await stage.runs.ledger.run(run_id)).ended

        await until(ended, within_s=60)
        jobs = {job.pool_name: job for job in await stage.runs.jobs(run_id)}
        assert len(strikes) == 3
        assert jobs.pop(poison).state is JobState.FAILED
        assert {job.state for job in jobs.values()} <= GONE, [job.reason for job in jobs.values()]


async def test_a_worker_outlives_a_redis_that_is_full(tmp_path: Path) -> None:
    async with staged(tmp_path, batch_size=2, worker_batches=4, lease_s=1, resend_s=1) as stage:
        project = stage.cloud.project(60)
        stage.cloud.latency(100)
        worker = await stage.worker()
        run_id = await stage.runs.make(project.jobs())
        await stage.called(4)
        await stage.redis.config_set("maxmemory", "1")

        async def noticed() -> bool:
            return "Connection to broker lost" in worker.text or await worker._has_ended()

        await until(noticed)
        await stage.redis.config_set("maxmemory", "0")
        assert not await worker._has_ended(), worker.text[-2_000:]
        await stage.runs.ended(run_id)
        assert set(await stage.runs.check(run_id, stage.cloud, project)) <= GONE
        worker.send(signal.SIGTERM)
        assert await worker.ended() == 0


async def test_a_call_whose_record_redis_refuses_is_still_an_attempt(tmp_path: Path) -> None:
    async with staged(tmp_path) as stage:
        project = stage.cloud.project(2)
        first, _ = project.pools
        both_called, healed = asyncio.Event(), asyncio.Event()
        called: list[int] = []

        async def answer(request: web.Request) -> web.Response | None:
            if request.match_info["pool"] == first:
                await both_called.wait()
                await stage.redis.config_set("maxmemory", "1")
                called.append(await errors())
                return refused(503, "ModelArts.50000002")
            both_called.set()
            await healed.wait()  # so that the batch ends only when Redis takes records again
            return None

        async def errors() -> int:
            return int((await stage.redis.info("stats"))["total_error_replies"])

        async def refused_one() -> bool:
            # The first error is that the server does not know the script yet.
            return bool(called) and await errors() >= called[0] + 2

        stage.cloud.gateway = lambda request: answer(request) if is_delete(request) else None
        run_id = await stage.runs.make(project.jobs(), verify=False, feed=False)
        async with worker_here(stage.settings) as worker:
            batch = asyncio.create_task(asyncio.to_thread(worker.execute, run_id, [0, 1]))
            await until(refused_one)
            await stage.redis.config_set("maxmemory", "0")
            healed.set()
            await batch
        job, other = await stage.runs.jobs(run_id)
        assert [name for name, _ in stage.cloud.deletes].count(first) == 1
        assert [attempt.status for attempt in other.attempts] == [200]
        assert len(job.attempts) == 1, f"{job.state}: {job.reason}"


def is_delete(request: web.Request) -> bool:
    return request.method == "DELETE"
