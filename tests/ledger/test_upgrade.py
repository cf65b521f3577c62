"""Versions in one Redis, with a real worker: what lies there at an upgrade comes to its end.

`data/run_schema_1.json` is a run as the version before there were schemas left it when it was
stopped: with the message that carried it and was not acknowledged, and the pools that it was for.
"""

from __future__ import annotations

import asyncio
import json
import re
import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from celery import Celery
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

from tests.fuzz.messages import with_other_arguments
from tests.sweep.conftest import Project, Sandbox, eventually, serving
from tests.worker.conftest import Process, RedisServer
from worker.broker import EXECUTE_BATCH, KEY_PREFIX, queue_name
from worker.ledger import Job, JobState, Ledger, NewJob, NewRun, Run, Source, keys, new_run_id
from worker.ledger.schema import SCHEMA
from worker.modelarts import Pool, Precondition

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Iterator

    import redis as redis_py

YESTERDAY: dict[str, Any] = json.loads(
    (Path(__file__).parent / "data" / "run_schema_1.json").read_text()
)
OUTCOMES = {
    0: JobState.DELETED,
    1: JobState.ALREADY_DELETED,
    2: JobState.DELETED,  # was accepted
    3: JobState.FAILED,
    4: JobState.DELETED,  # was to be tried again
    5: JobState.DELETED,  # its lease had run out
    6: JobState.DELETED,  # only the message carried it
    7: JobState.DELETED,  # was not sent yet
    8: JobState.DELETED,
}
"""How each job of yesterday's run ends."""


class Place:
    """A Redis, a cloud and a worker of today."""

    def __init__(self, server: RedisServer, sandbox: Sandbox, worker: Process) -> None:
        self.server = server
        self.sandbox = sandbox
        self.worker = worker
        self.queue = queue_name(sandbox.url)

    def ask(self, question: Callable[[Ledger], Awaitable[Any]]) -> Any:
        """Ask the ledger something."""

        async def asked() -> Any:
            async with self.server.connected() as redis:
                return await question(Ledger(redis))

        return asyncio.run(asked())

    def ended(self, run_id: str) -> Run:
        """A run, once it has ended."""

        def look() -> Run | None:
            assert self.worker._popen.poll() is None, self.worker.text
            run: Run = self.ask(lambda ledger: ledger.run(run_id))
            return run if run.ended else None

        run = eventually(look)
        assert run is not None
        return run

    def jobs(self, run_id: str) -> list[Job]:
        found: list[Job] = self.ask(lambda ledger: ledger.jobs(run_id))
        return found

    def make(self, project: Project, names: list[str]) -> str:
        """A run that has started and that no message carries yet."""
        documents = project.documents()
        run_id = new_run_id(datetime.now(UTC))

        async def made(ledger: Ledger) -> None:
            await ledger.create(NewRun(run_id, Source.CLI, self.sandbox.url))
            await ledger.add(run_id, [job(project.project, documents[name]) for name in names])
            assert await ledger.start(run_id, len(names))

        self.ask(made)
        return run_id

    def send(self, **arguments: Any) -> None:
        """Send the workers a message."""
        broker = self.server.url.replace("unix://", "redis+socket://")
        with Celery(broker=broker) as app:
            app.conf.broker_transport_options = {"global_keyprefix": KEY_PREFIX}
            app.send_task(EXECUTE_BATCH, kwargs=arguments, queue=self.queue)

    def nothing_left(self) -> bool:
        """Whether every message is dealt with."""
        with self.server.client() as client:
            names = [self.queue, "unacked"]
            return not any(client.exists(KEY_PREFIX + name) for name in names)


def job(project_id: str, document: dict[str, Any]) -> NewJob:
    pool = Pool.parse(document)
    precondition = Precondition.of(pool)
    return NewJob(
        project_id, pool.pool_id, "", precondition.created, precondition.fingerprint, "asked for"
    )


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Place]:
    folder = tmp_path_factory.mktemp("upgrade")
    server = RedisServer(folder)
    try:
        with serving() as sandbox:
            environment = {
                "HOME": str(folder),
                "POOLSWEEP_ENDPOINT": sandbox.url,
                "POOLSWEEP_TOKEN": sandbox.token,
                "POOLSWEEP_REDIS_URL": server.url,
                "POOLSWEEP_RATE_LIMIT": "200",
                "POOLSWEEP_VERIFY_INTERVAL_S": "0.2",
                "POOLSWEEP_RESEND_S": "1",
                "POOLSWEEP_LOG_FORMAT": "json",
            }
            command = [sys.executable, "-m", "scheduler.cli", "worker"]
            worker = Process(command, folder / "worker.log", env=environment)
            try:
                yield Place(server, sandbox, worker)
            finally:
                worker.kill()
    finally:
        server.kill()


def load(client: redis_py.Redis, place: Place, project: Project) -> str:
    """Put yesterday's run there as if it had been written just now. Returns its id."""
    seconds, micros = client.time()
    since_ms = seconds * 1000 + micros // 1000 - YESTERDAY["written_ms"]
    text = json.dumps({key: YESTERDAY[key] for key in ("keys", "message")})
    text = re.sub(r"\b1[0-9]{12}\b", lambda found: str(int(found[0]) + since_ms), text)
    text = text.replace(YESTERDAY["project_id"], project.project)
    text = text.replace(YESTERDAY["endpoint"], place.sandbox.url)
    text = text.replace(queue_name(YESTERDAY["endpoint"]), place.queue)
    written = json.loads(text)
    for key, held in written["keys"].items():
        match held["type"], held["value"]:
            case "hash", value:
                client.hset(key, mapping=value)
            case "zset", value:
                client.zadd(key, value)
            case "list", value:
                client.rpush(key, *value)
            case "set", value:
                client.sadd(key, *value)
    client.lpush(KEY_PREFIX + place.queue, written["message"])
    return str(YESTERDAY["run_id"])


def put(project: Project, document: dict[str, Any]) -> None:
    path = f"/_sandbox/pools/{project.project}?behaviour=normal&category=untagged"
    project._call("PUT", path, document)


def test_a_worker_of_today_finishes_a_run_of_yesterday(place: Place) -> None:
    project = place.sandbox.project()
    for number, document in enumerate(YESTERDAY["pools"]):
        if number > 2:  # the others had gone by then
            put(project, document)
    with place.server.client() as client:
        run_id = load(client, place, project)
        assert client.hget(keys.run(run_id), "schema") is None
    before = {found.number: found for found in place.jobs(run_id)}
    run = place.ended(run_id)
    assert run.counts == {state: [*OUTCOMES.values()].count(state) for state in JobState}
    jobs = {found.number: found for found in place.jobs(run_id)}
    assert {number: found.state for number, found in jobs.items()} == OUTCOMES
    for number, found in jobs.items():
        # What was known of it is kept, and only what was not done is done.
        assert found.attempts[: len(before[number].attempts)] == before[number].attempts
    failed = YESTERDAY["pools"][3]["metadata"]["name"]
    assert project.there() == {failed}
    called = project.deletes()
    assert sorted(called) == sorted(jobs[number].pool_name for number in (4, 5, 6, 7, 8))
    assert (run.policy, run.reason) == ("expired", "nightly sweep of «expired»")


def test_a_run_of_tomorrow_is_left_alone_and_others_go_on(place: Place) -> None:
    project = place.sandbox.project()
    tomorrows, todays = (
        place.make(project, project.add(2, tags={})) for _ in ("tomorrow", "today")
    )
    with place.server.client() as client:
        client.hset(keys.run(tomorrows), mapping={"schema": SCHEMA + 1, "state": "new"})
        of_run = keys.of_run(tomorrows)
        before = [client.dump(key) for key in of_run]
        for _ in range(3):
            place.send(run_id=tomorrows, numbers=[0, 1])
        assert place.ended(todays).counts[JobState.DELETED] == 2
        eventually(place.nothing_left)
        assert [client.dump(key) for key in of_run] == before
        assert client.sismember(keys.active(place.sandbox.url), tomorrows)
    assert set(project.deletes()) == {found.pool_name for found in place.jobs(todays)}
    said = {event["event"] for event in place.worker.events() if event.get("run_id") == tomorrows}
    reasons = {e["reason"] for e in place.worker.events() if e.get("run_id") == tomorrows}
    assert {"batch_of_unknown_run", "run_left_alone"} <= said
    assert all("upgrade this process" in reason for reason in reasons)


def test_a_message_of_tomorrow_costs_only_time(place: Place) -> None:
    project = place.sandbox.project()
    run_id = place.make(project, project.add(3))
    # As if it carried them all, so that the worker does not look for more by itself at once.
    place.ask(lambda ledger: ledger.take(run_id, window=9, batch_size=9, resend_s=1))
    place.send(run_id=run_id, numbers=[0, 1, 2], priority="high")
    assert place.ended(run_id).counts[JobState.DELETED] == 3
    eventually(place.nothing_left)


# A worker that has fallen tells nothing more, so there is no use in looking for less to fell it.
@settings(max_examples=2, phases=[Phase.generate])
@given(st.data())
def test_whatever_arguments_a_message_has_no_worker_ends_of_it(
    place: Place, data: st.DataObject
) -> None:
    arguments = {"run_id": str(YESTERDAY["run_id"]), "numbers": [0, 1]}
    junk = with_other_arguments(EXECUTE_BATCH, place.queue, arguments)
    messages = data.draw(st.lists(junk, min_size=30, max_size=30))
    project = place.sandbox.project()
    with place.server.client() as client:
        client.lpush(KEY_PREFIX + place.queue, *messages)
        run_id = place.make(project, project.add(1))
        assert place.ended(run_id).counts[JobState.DELETED] == 1
        eventually(lambda: not client.exists(KEY_PREFIX + place.queue))
