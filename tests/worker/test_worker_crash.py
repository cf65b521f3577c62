"""Whatever ends a worker, or the Redis under it, no job is lost and none is done twice."""

from __future__ import annotations

import asyncio
import signal
from typing import TYPE_CHECKING, Any

import pytest
from pydantic import SecretStr

from tests.conftest import until
from tests.worker.conftest import RedisServer, Runs, environment, serving, settings_for
from worker.broker import KEY_PREFIX, make_app, sender
from worker.ledger import JobState
from worker.settings import Settings

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Iterator
    from pathlib import Path

    from redis.asyncio import Redis

    from tests.worker.conftest import Cloud, Workers

LONG = {"lease_s": 600, "resend_s": 600}
"""So long that a run which ends within a test has not waited for it."""


def deletes(cloud: Cloud, count: int) -> Callable[[], Awaitable[bool]]:
    async def enough() -> bool:
        return len(cloud.deletes) >= count

    return enough


async def test_a_killed_worker_loses_no_job(
    cloud: Cloud, redis: Redis, server: RedisServer, workers: Workers
) -> None:
    project = cloud.project(300, flaky=10)
    cloud.latency(300)
    settings = settings_for(
        cloud, server.url, in_flight=60, batch_size=50, max_attempts=8, lease_s=1, resend_s=1
    )
    runs, env = Runs(redis, settings), environment(settings)
    first = workers.start(env)
    await workers.ready(first)
    run_id = await runs.make(project.jobs())
    await until(deletes(cloud, 100))
    first.kill()
    assert (await runs.ledger.run(run_id)).counts[JobState.LEASED] >= 100
    cloud.latency(2)
    workers.start(env)
    await runs.ended(run_id)
    outcomes = await runs.check(run_id, cloud, project)
    assert set(outcomes) <= {JobState.DELETED, JobState.ALREADY_DELETED}
    assert not project.there()
    jobs = await runs.jobs(run_id)
    lost = [job for job in jobs if any(a.code == "lease_expired" for a in job.attempts)]
    assert len(lost) >= 100


async def test_a_stopped_worker_gives_its_jobs_back_at_once(
    redis: Redis, server: RedisServer, workers: Workers
) -> None:
    """With each pool of Celery's, and cold too: side by side, since they mostly wait."""
    prefork = ("--pool", "prefork", "-c", "2")

    async def stop(number: signal.Signals, options: tuple[str, ...] = ()) -> None:
        async with serving() as cloud:
            await stopped_by(number, options, cloud, redis, server, workers)

    async with asyncio.TaskGroup() as ways:
        ways.create_task(stop(signal.SIGTERM))
        ways.create_task(stop(signal.SIGQUIT))
        ways.create_task(stop(signal.SIGTERM, prefork))


async def stopped_by(
    number: signal.Signals,
    options: tuple[str, ...],
    cloud: Cloud,
    redis: Redis,
    server: RedisServer,
    workers: Workers,
) -> None:
    project = cloud.project(100)
    cloud.latency(300)
    settings = settings_for(cloud, server.url, in_flight=10, shutdown_s=1, **LONG)
    runs, env = Runs(redis, settings), environment(settings)
    first = workers.start(env, *options, plain=bool(options))
    await workers.ready(first)
    run_id = await runs.make(project.jobs(), verify=False)
    await until(deletes(cloud, 15))
    first.send(number)
    status = await first.ended()
    assert status == 0 or number is signal.SIGQUIT
    counts = (await runs.ledger.run(run_id)).counts
    assert counts[JobState.LEASED] == 0
    assert counts[JobState.PENDING] > 50
    # Every call that was under way was answered, and its answer recorded.
    assert counts[JobState.ACCEPTED] == len(cloud.deletes)
    assert not await runs.unsent(run_id)
    cloud.latency(2)
    second = workers.start(env, *options, plain=bool(options))
    await runs.ended(run_id)
    assert await runs.check(run_id, cloud, project) == {JobState.ACCEPTED: 100}
    assert len(cloud.deletes) == 100
    assert all(len(job.attempts) == 1 for job in await runs.jobs(run_id))
    second.send(signal.SIGTERM)
    assert await second.ended() == 0


async def test_a_stopped_worker_does_not_wait_for_calls_that_hang(
    cloud: Cloud, redis: Redis, server: RedisServer, workers: Workers
) -> None:
    project = cloud.project(40)
    settings = settings_for(cloud, server.url, shutdown_s=0.5, **LONG)
    runs, env = Runs(redis, settings), environment(settings)
    first = workers.start(env)
    await workers.ready(first)
    hanging = asyncio.Event()
    cloud.gateway = lambda r: _hang(hanging) if r.method == "DELETE" else None
    run_id = await runs.make(project.jobs(), verify=False)
    await until(deletes(cloud, 40))
    first.send(signal.SIGTERM)
    assert await first.ended() == 0
    assert (await runs.ledger.run(run_id)).counts[JobState.PENDING] == 40
    for job in await runs.jobs(run_id):
        assert [attempt.code for attempt in job.attempts] == ["cut_short"]
    hanging.set()
    cloud.gateway = lambda _: None
    workers.start(env)
    await runs.ended(run_id)
    outcomes = await runs.check(run_id, cloud, project)
    assert set(outcomes) <= {JobState.ACCEPTED, JobState.ALREADY_DELETED}


async def _hang(end: asyncio.Event) -> None:
    await end.wait()


async def test_a_worker_that_was_frozen_beyond_its_lease_touches_its_jobs_no_more(
    cloud: Cloud, redis: Redis, server: RedisServer, workers: Workers
) -> None:
    project = cloud.project(120)
    cloud.latency(200)
    settings = settings_for(cloud, server.url, in_flight=10, lease_s=1, resend_s=1)
    runs, env = Runs(redis, settings), environment(settings)
    first = workers.start(env)
    await workers.ready(first)
    run_id = await runs.make(project.jobs(), verify=False)
    await until(deletes(cloud, 20))
    first.send(signal.SIGSTOP)
    assert (await runs.ledger.run(run_id)).counts[JobState.LEASED] > 0
    cloud.latency(2)
    workers.start(env)
    await runs.ended(run_id)
    made = len(cloud.deletes)
    first.send(signal.SIGCONT)

    async def let_go() -> bool:
        return bool(first.events("lease_lost"))

    await until(let_go)
    first.send(signal.SIGTERM)
    assert await first.ended() == 0
    assert len(cloud.deletes) == made
    outcomes = await runs.check(run_id, cloud, project)
    assert set(outcomes) <= {JobState.ACCEPTED, JobState.ALREADY_DELETED}


@pytest.fixture
def own_server(tmp_path: Path) -> Iterator[RedisServer]:
    started = RedisServer(tmp_path)
    yield started
    started.kill()


async def test_a_run_outlives_its_redis(
    cloud: Cloud, own_server: RedisServer, workers: Workers
) -> None:
    project = cloud.project(120)
    cloud.latency(100)
    settings = settings_for(
        cloud, own_server.url, in_flight=20, rate_limit=60, lease_s=2, resend_s=1
    )
    worker = workers.start(environment(settings))
    await workers.ready(worker)
    async with own_server.connected() as redis:
        runs = Runs(redis, settings)
        run_id = await runs.make(project.jobs())
        await until(deletes(cloud, 30))
        own_server.kill()
        await asyncio.sleep(0.5)  # an outage, of which the worker takes notice
        own_server.start()
        await runs.ended(run_id)
        assert len(cloud.deletes) >= 120
        outcomes = await runs.check(run_id, cloud, project)
    assert set(outcomes) <= {JobState.DELETED, JobState.ALREADY_DELETED}
    assert not project.there()


def test_messages_that_are_held_when_redis_goes_are_let_be_and_come_again(
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    """As a worker does whose Redis dies while it holds batches and waits for more."""
    server = RedisServer(tmp_path_factory.mktemp("gone"))
    endpoint = "https://modelarts.example.com"
    app = make_app(Settings(redis_url=SecretStr(server.url)), [endpoint])
    send = sender(app, endpoint)
    for number in range(2):
        asyncio.run(send("run", [number]))
    held: list[Any] = []
    connection = app.connection_for_read()
    app.amqp.TaskConsumer(connection.default_channel, on_message=held.append).consume()
    while len(held) < 2:
        connection.drain_events(timeout=20)
    app.amqp.TaskConsumer(connection.channel(), on_message=held.append).consume()
    with pytest.raises(TimeoutError):
        connection.drain_events(timeout=0.1)
    server.kill()
    # Celery's way of clearing away a connection that is lost.
    connection.collect(socket_timeout=1)
    connection.close()
    held[0].ack()
    held[1].reject(requeue=True)
    server.start()
    with server.client() as client:
        assert client.hlen(KEY_PREFIX + "unacked") == 2, "they come again after their time"
    server.kill()
