"""A deployment as it is watched: a worker, a scheduler and an intake, each on a port of its own.

They share a Redis and a sandbox, and have carried out one night, and a run that was cancelled.
"""

from __future__ import annotations

import json
import urllib.error
import urllib.request
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Any

import pytest
from prometheus_client.parser import text_string_to_metric_families

from scheduler.almanac import Night, NightState
from scheduler.sweep import night_run_id
from tests.intake.conftest import Place, a_place, asks
from tests.sweep.conftest import PROTECT, eventually, serving
from worker import pause
from worker.ledger import Job, Kept, Ledger, NewJob, NewRun, Run, Source, keys

if TYPE_CHECKING:
    from collections.abc import Iterator

    from prometheus_client import Metric
    from redis.asyncio import Redis

    from tests.sweep.conftest import Project, Sandbox
    from tests.worker.conftest import Process

CANCELLED = "20260101-000000-00cafe0000"
KINDS = {"normal": 12, "gone": 2, "throttled": 1, "flaky": 3, "doomed": 2}


def served(process: Process, host: str = "127.0.0.1") -> str:
    """Where a process says how it is, once it does."""

    def url() -> str:
        assert process._popen.poll() is None, process.text
        events = process.events("metrics_served")
        return f"http://{host}:{events[0]['port']}" if events else ""

    return eventually(url)


def get(process: Process, path: str) -> tuple[int, str]:
    """The status and the text of an answer."""
    try:
        with urllib.request.urlopen(served(process) + path, timeout=30) as answer:  # noqa: S310
            return answer.status, answer.read().decode()
    except urllib.error.HTTPError as error:
        with error:
            return error.code, error.read().decode()


def page(process: Process) -> dict[str, Metric]:
    """What a process tells Prometheus, by the names of the families."""
    status, text = get(process, "/metrics")
    assert status == 200
    return {family.name: family for family in text_string_to_metric_families(text)}


def value(process: Process, name: str, **labels: str) -> float | None:
    """A sample; None if it is not told."""
    found = [
        sample.value
        for family in page(process).values()
        for sample in family.samples
        if sample.name == name and sample.labels == labels
    ]
    assert len(found) <= 1
    return found[0] if found else None


def is_ready(process: Process) -> bool:
    """Whether it says so."""
    return get(process, "/readyz")[0] == 200


@dataclass
class Deployment:
    """The processes, and what they have done.

    Attributes:
        place: where they are.
        project: the project that the night swept.
        run_id: the night's run.
        at: when the night was due.
    """

    place: Place
    worker: Process
    scheduler: Process
    intake: Process
    project: Project
    run_id: str
    at: datetime

    @property
    def processes(self) -> dict[str, Process]:
        return {"worker": self.worker, "scheduler": self.scheduler, "intake": self.intake}

    @property
    def endpoint(self) -> str:
        return self.place.sandbox.url

    def jobs(self, run_id: str) -> list[Job]:
        """A run's jobs as the ledger has them."""

        async def ask(redis: Redis) -> list[Job]:
            return [job async for job in Ledger(redis).all_jobs(run_id)]

        found: list[Job] = self.place.ask(ask)
        return found

    def kept(self, run_id: str) -> list[Kept]:
        """The pools that a run's plan keeps, as the ledger has them."""

        async def ask(redis: Redis) -> list[Kept]:
            return [pool async for pool in Ledger(redis).all_kept(run_id)]

        found: list[Kept] = self.place.ask(ask)
        return found

    def run(self, run_id: str) -> Run:
        """A run as the ledger has it."""
        found: Run = self.place.ask(lambda redis: Ledger(redis).run(run_id))
        return found


@pytest.fixture(scope="package")
def sandbox() -> Iterator[Sandbox]:
    with serving() as running:
        yield running


async def _cancel_a_run(redis: Redis, endpoint: str, project: Project) -> None:
    """A run of which nothing was called when it was cancelled."""
    ledger = Ledger(redis)
    await pause.pause(redis, pause.EVERYTHING, by="ann", reason="a test")
    await ledger.create(NewRun(CANCELLED, Source.CLI, endpoint, projects=(project.project,)))
    await ledger.add(CANCELLED, [NewJob(project.project, name) for name in project.there()])
    await ledger.start(CANCELLED, len(project.there()))
    await ledger.cancel(CANCELLED)
    await pause.resume(redis, pause.EVERYTHING)


@pytest.fixture(scope="package")
def deployment(tmp_path_factory: pytest.TempPathFactory, sandbox: Sandbox) -> Iterator[Deployment]:
    project, other = sandbox.project(), sandbox.project()
    for behaviour, count in KINDS.items():
        project.add(count, behaviour=behaviour)
    project.add(2, tags={PROTECT: "1"})
    other.add(3)
    at = datetime.now(UTC).replace(second=0, microsecond=0) - timedelta(minutes=2)
    schedule = f"{at.minute} {at.hour} * * *"
    policy = {
        "projects": ["research"],
        "match": {"name": "*"},
        "brakes": {"max_percent": 100},
        "schedule": schedule,
    }
    started: list[Process] = []
    with a_place(tmp_path_factory.mktemp("place"), sandbox) as place:
        path = place.folder / "policies.yaml"
        named = {"research": {"id": project.project}}
        path.write_text(json.dumps({"projects": named, "policies": {"night": policy}}))
        last = Night("night", at - timedelta(days=1), NightState.DONE, f"{schedule} UTC")
        with place.server.client() as client:
            client.hset(keys.NIGHTS, "night", last.record())
        # Waits of a tenth of a second are the ledger's, so that jobs come back by the broker too.
        several: dict[str, str] = {"METRICS_PORT": "0", "INLINE_WAIT_S": "0.05", "LEASE_S": "30"}
        try:
            worker = place.process("worker", **several)
            started.append(worker)
            intake = place.process("intake", **several)
            started.append(intake)
            scheduler = place.process("scheduler", str(path), **several)
            started.append(scheduler)
            for process in started:
                eventually(lambda process=process: is_ready(process))  # type: ignore[misc]
            run_id = night_run_id("night", project.project, at)
            found = Deployment(place, worker, scheduler, intake, project, run_id, at)
            eventually(lambda: run_id in place.runs() and found.run(run_id).ended)
            place.ask(lambda redis: _cancel_a_run(redis, sandbox.url, other))
            eventually(lambda: len(worker.events("run_ended")) == 2)
            yield found
        finally:
            for process in started:
                process.kill()


def asked(deployment: Deployment, **changes: Any) -> dict[str, Any]:
    """A request that only plans."""
    return asks(deployment.project, "none-" + "0" * 32, **changes)
