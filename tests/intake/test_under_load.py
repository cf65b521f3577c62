"""Many clients at once, while everything dies: what was acknowledged happens, once."""

from __future__ import annotations

import asyncio
import contextlib
import json
import socket
from collections import Counter
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import aiohttp
import pytest
from kombu.exceptions import OperationalError
from redis.exceptions import RedisError

from scheduler.intake.requests import Requests
from tests.conftest import until
from tests.intake.conftest import QUEUE, TASK, a_place
from tests.sweep.conftest import serving
from worker.ledger import JobState, Ledger, RunState, keys

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Iterator
    from pathlib import Path

    from celery import Celery
    from redis.asyncio import Redis

    from tests.intake.conftest import Intake, Place
    from tests.sweep.conftest import Project, Sandbox
    from tests.worker.conftest import Process

CLIENTS = 200
EACH = 2
"""Requests of a client, one in each wave."""
BY_MESSAGE = 20
"""Requests that come by each of the ways that answer nothing."""
PROJECTS = 8
BYSTANDERS = 5
"""Pools of each project that nobody asks for, more or less."""
PAUSE_S = 0.3
"""Until a client that got no answer, or not a good one, asks again."""
PATIENCE_S = 150.0
LEASE = {"LEASE_S": "3", "RESEND_S": "3"}
"""Time for a busy machine to renew what it holds."""


@pytest.fixture
def own_sandbox() -> Iterator[Sandbox]:
    with serving() as running:
        yield running


@pytest.fixture
def load_place(tmp_path: Path, own_sandbox: Sandbox) -> Iterator[Place]:
    with a_place(tmp_path, own_sandbox) as found:
        yield found


@dataclass
class Asked:
    """One request: who asks for what, under which key, in which of the two waves."""

    client: str
    project: Project
    pool: str
    key: str
    late: bool

    @property
    def body(self) -> dict[str, Any]:
        return {"targets": [{"project_id": self.project.project, "pools": [self.pool]}]}


@dataclass
class Crowd:
    """The clients: each sends until it is answered that its request is accepted.

    Attributes:
        place: where they are.
        url: where the intake serves, dead or alive.
        later: set when the second wave may come.
        runs: the run that each acknowledged key stands for; by message, nobody says which.
        answers: how often each other status came, and each kind of failure.
        surprises: what should not have been answered.
    """

    place: Place
    url: str
    later: asyncio.Event = field(default_factory=asyncio.Event)
    runs: dict[str, str] = field(default_factory=dict)
    answers: Counter[str] = field(default_factory=Counter)
    surprises: list[str] = field(default_factory=list)

    async def ask(self, session: aiohttp.ClientSession, requests: list[Asked]) -> None:
        """One client by HTTP, with its requests."""
        for each in requests:
            await self._turn(each)
            self.runs[each.key] = await self._accepted(session, each)
            if await self._accepted(session, each) != self.runs[each.key]:
                self.surprises.append(f"{each.key} was answered with two runs")

    async def _turn(self, asked: Asked) -> None:
        if asked.late:
            await self.later.wait()

    async def _accepted(self, session: aiohttp.ClientSession, asked: Asked) -> str:
        headers = {
            "Authorization": f"Bearer {self.place.tokens[asked.client]}",
            "Idempotency-Key": asked.key,
        }
        url = f"{self.url}/v1/runs"
        while True:
            try:
                async with session.post(url, json=asked.body, headers=headers) as answer:
                    if answer.status == 202:
                        return str((await answer.json())["run_id"])
                    self.answers[str(answer.status)] += 1
                    if answer.status not in (429, 503):
                        self.surprises.append(f"{answer.status}: {await answer.text()}")
            except (aiohttp.ClientError, TimeoutError) as error:
                self.answers[type(error).__name__] += 1
            await asyncio.sleep(PAUSE_S)

    async def add(self, redis: Redis, asked: Asked) -> None:
        """One request by the stream."""
        fields: dict[Any, Any] = {
            "request": json.dumps(asked.body),
            "client": asked.client,
            "idempotency_key": asked.key,
        }
        await self._sent(asked, lambda: redis.xadd(keys.STREAM, fields))

    async def send(self, app: Celery, asked: Asked) -> None:
        """One request by Celery."""
        given = {"request": asked.body, "client": asked.client, "idempotency_key": asked.key}
        await self._sent(
            asked, lambda: asyncio.to_thread(app.send_task, TASK, kwargs=given, queue=QUEUE)
        )

    async def _sent(self, asked: Asked, send: Callable[[], Awaitable[Any]]) -> None:
        await self._turn(asked)
        while True:
            try:
                await send()
            except (RedisError, OperationalError) as error:
                self.answers[type(error).__name__] += 1
                await asyncio.sleep(PAUSE_S)
            else:
                self.runs[asked.key] = ""
                return

    async def acknowledged(self, count: int) -> None:
        """Wait until so many requests are."""

        async def enough() -> bool:
            return len(self.runs) >= count

        await until(enough, within_s=PATIENCE_S)


class Chaos:
    """Kills what runs, and starts it again."""

    def __init__(self, place: Place, port: int) -> None:
        self._place = place
        self._port = str(port)
        self.intake: Intake = self._intake()
        self.worker: Process = self._worker()

    def _intake(self) -> Intake:
        return self._place.intake("--port", self._port, **LEASE)

    def _worker(self) -> Process:
        return self._place.process("worker", **LEASE)

    async def kill(
        self, *, intake: bool = False, worker: bool = False, redis: bool = False
    ) -> None:
        """All at the same time; then they are started again, and it waits for Redis alone."""
        if intake:
            self.intake.kill()
        if worker:
            self.worker.kill()
        if redis:
            self._place.server.kill()
            await asyncio.to_thread(start_redis, self._place)
        if intake:
            self.intake = self._intake()
        if worker:
            self.worker = self._worker()

    def end(self) -> None:
        self.intake.kill()
        self.worker.kill()


def start_redis(place: Place) -> None:
    place.server.start()
    keep_everything(place)


def keep_everything(place: Place) -> None:
    """Have Redis answer once a write is on the disk: else it may still be in its own memory."""
    with place.server.client() as client:
        client.config_set("appendfsync", "always")


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@pytest.mark.timeout(400)
async def test_what_was_acknowledged_happens_once_whatever_is_killed(load_place: Place) -> None:
    keep_everything(load_place)
    projects = [load_place.sandbox.project() for _ in range(PROJECTS)]
    by_http, by_stream, by_celery, nobodys = await asyncio.to_thread(_prepare, projects)
    everything = [each for group in by_http for each in group] + by_stream + by_celery
    load_place.sandbox.latency(20)
    load_place.allow(
        **{each.client: {"projects": [each.project.project]} for each in everything},
    )
    port = free_port()
    crowd = Crowd(load_place, f"http://127.0.0.1:{port}")
    chaos = Chaos(load_place, port)
    try:
        await asyncio.to_thread(chaos.intake.ready)
        async with _senders(crowd, by_http, by_stream, by_celery) as sending:
            await crowd.acknowledged(40)
            await chaos.kill(intake=True)
            await crowd.acknowledged(120)
            await chaos.kill(redis=True)
            await more_deletes(projects, 0)
            await chaos.kill(worker=True)
            await more_deletes(projects, await deletes(projects))
            crowd.later.set()
            await crowd.acknowledged(300)
            await chaos.kill(intake=True, worker=True, redis=True)
            # So late that all of this was midway.
            assert len(crowd.runs) < len(everything)
            await asyncio.wait_for(sending, PATIENCE_S)
        assert not crowd.surprises
        assert crowd.answers  # some were told nothing, or to come again
        assert len(crowd.runs) == len(everything)
        await _check(load_place, crowd, everything)
        for project in projects:
            asked_for = {each.pool for each in everything if each.project is project}
            assert set(await asyncio.to_thread(project.deletes)) == asked_for
            assert await asyncio.to_thread(project.there) == nobodys[project.project]
    finally:
        chaos.end()


def _prepare(
    projects: list[Project],
) -> tuple[list[list[Asked]], list[Asked], list[Asked], dict[str, set[str]]]:
    """What everybody will ask for, by each way; and each project's pools that nobody will."""
    count = (CLIENTS * EACH + 2 * BY_MESSAGE) // len(projects)
    pools = {each.project: each.add(count + BYSTANDERS) for each in projects}

    def group(kind: str, number: int, each: int) -> list[Asked]:
        client, project = f"{kind}-{number}", projects[number % len(projects)]
        mine = pools[project.project]
        return [
            Asked(client, project, mine.pop(), f"{client}/{n}", late=(number * each + n) % 2 == 1)
            for n in range(each)
        ]

    by_http = [group("http", number, EACH) for number in range(CLIENTS)]
    by_stream = [one for number in range(BY_MESSAGE) for one in group("stream", number, 1)]
    by_celery = [one for number in range(BY_MESSAGE) for one in group("celery", number, 1)]
    assert all(pools.values())
    return by_http, by_stream, by_celery, {each: set(left) for each, left in pools.items()}


@contextlib.asynccontextmanager
async def _senders(
    crowd: Crowd, by_http: list[list[Asked]], by_stream: list[Asked], by_celery: list[Asked]
) -> Any:
    """Everybody sends at once."""
    connector = aiohttp.TCPConnector(limit=0)
    timeout = aiohttp.ClientTimeout(total=30)
    async with (
        aiohttp.ClientSession(connector=connector, timeout=timeout) as session,
        crowd.place.server.connected() as redis,
    ):
        with crowd.place.sender as app:
            work = [crowd.ask(session, group) for group in by_http]
            work += [crowd.add(redis, each) for each in by_stream]
            work += [crowd.send(app, each) for each in by_celery]
            sending = asyncio.gather(*work)
            try:
                yield sending
            finally:
                sending.cancel()
                with contextlib.suppress(asyncio.CancelledError):
                    await sending


async def deletes(projects: list[Project]) -> int:
    """The number of DELETE calls so far."""
    return sum([len(await asyncio.to_thread(project.deletes)) for project in projects])


async def more_deletes(projects: list[Project], than: int) -> None:
    """Wait until a worker has called for deletions."""

    async def more() -> bool:
        return await deletes(projects) > than

    await until(more, within_s=PATIENCE_S)


async def _check(place: Place, crowd: Crowd, everything: list[Asked]) -> None:
    """Every request became one run, which ended and deleted the pool that was asked for."""
    async with place.server.connected() as redis:
        ledger, requests = Ledger(redis), Requests(redis)

        async def all_planned() -> bool:
            return await asyncio.to_thread(place.nothing_left) and not await requests.waiting()

        await until(all_planned, within_s=PATIENCE_S)
        assert not await requests.rejected()
        runs = [run.run_id for run in await ledger.runs(limit=10_000)]
        assert len(runs) == len(everything)
        made = {run_id: await _ended(ledger, run_id) for run_id in runs}
        assert sorted(pools for pools in made.values()) == sorted(
            [each.pool] for each in everything
        )
        for each in everything:
            if run_id := crowd.runs[each.key]:
                assert made[run_id] == [each.pool]


async def _ended(ledger: Ledger, run_id: str) -> list[str]:
    """The pools of a run, once it has ended and they are gone."""

    async def ended() -> bool:
        return (await ledger.run(run_id)).ended

    await until(ended, within_s=PATIENCE_S)
    assert (await ledger.run(run_id)).state is RunState.FINISHED
    jobs = [job async for job in ledger.all_jobs(run_id)]
    assert {job.state for job in jobs} <= {JobState.DELETED, JobState.ALREADY_DELETED}
    return [job.pool_name for job in jobs]
