"""The intake as it runs: processes, a Redis with an append-only file, a worker, a sandbox.

The sandbox serves from a thread of the test process, and each test has projects of its own in it.
An intake reads the one queue and the one stream that its Redis has, so the tests that share a Redis
share its intake too.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import json
import os
import signal
import sys
import urllib.error
import urllib.request
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final

import pytest
from celery import Celery

from scheduler.intake.clients import new_token, token_hash
from scheduler.intake.requests import Rejected, Requests
from tests import nursery
from tests.sweep.conftest import Project, Sandbox, eventually, serving
from tests.worker.conftest import Process, RedisServer
from worker.broker import KEY_PREFIX
from worker.ledger import Ledger, Run, keys

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

TASK: Final = "poolsweep.request_deletion"
QUEUE: Final = "requests"
LEASE_S = 1.0
OFTEN = {"rate_limit": 10_000, "rate_burst": 10_000}
EVERY_WAY = ["http", "celery", "stream"]
PROMPT: Final = {
    "POOLSWEEP_RATE_LIMIT": "1000",
    "POOLSWEEP_BATCH_SIZE": "20",
    "POOLSWEEP_VERIFY_INTERVAL_S": "0.2",
    "POOLSWEEP_PRECONDITION_MAX_AGE_S": "1",
    "POOLSWEEP_BACKOFF_BASE_S": "0.1",
    "POOLSWEEP_RESEND_S": "1",
    "POOLSWEEP_LEASE_S": str(LEASE_S),
    "POOLSWEEP_SHUTDOWN_S": "2",
    "POOLSWEEP_LOG_FORMAT": "json",
}
"""Settings under which what takes a minute takes a second."""
_NUMBERS = itertools.count(1)


def asks(project: Project, *pools: str, **changes: Any) -> dict[str, Any]:
    """A request for pools by name, which only plans unless told otherwise."""
    target = {"project_id": project.project, "pools": list(pools)}
    return {"targets": [target], "dry_run": True, **changes}


@dataclass
class Place:
    """Where a test's processes are: a folder, a Redis, a sandbox.

    Attributes:
        folder: for logs and files.
        server: the Redis.
        sandbox: the cloud.
        tokens: the token of each client that was allowed.
    """

    folder: Path
    server: RedisServer
    sandbox: Sandbox
    tokens: dict[str, str] = field(default_factory=dict)

    @property
    def clients_file(self) -> Path:
        return self.folder / "clients.yaml"

    def allow(self, **clients: dict[str, Any]) -> None:
        """Write the clients' file anew. Whoever was a client before keeps the token."""
        entries = {}
        for name, given in clients.items():
            token, _ = new_token()
            digest = token_hash(self.tokens.setdefault(name, token))
            projects = list(self.sandbox.running.config.project_ids)
            brakes = {"max_deletions": 100_000, "max_percent": 100}
            entry = {"tokens": [digest], "projects": projects, "ways": EVERY_WAY, "brakes": brakes}
            entries[name] = entry | OFTEN | given
        self.clients_file.write_text(json.dumps({"clients": entries}))

    def environment(self, **settings: str) -> dict[str, str]:
        """The variables of a process."""
        return {
            **PROMPT,
            "HOME": str(self.folder),
            "POOLSWEEP_STATE_DIR": str(self.folder / "state"),
            "POOLSWEEP_ENDPOINT": self.sandbox.url,
            "POOLSWEEP_TOKEN": self.sandbox.token,
            "POOLSWEEP_REDIS_URL": self.server.url,
            "POOLSWEEP_CLIENTS_FILE": str(self.clients_file),
            "POOLSWEEP_INTAKE_PORT": "0",
            **{f"POOLSWEEP_{name}": value for name, value in settings.items()},
        }

    def process(self, *command: str, **settings: str) -> Process:
        """`poolsweep ...`, with its log."""
        log = self.folder / f"{command[0]}-{next(_NUMBERS)}.log"
        whole = [sys.executable, "-m", "scheduler.cli", *command]
        return Process(whole, log, env=self.environment(**settings))

    def intake(self, *options: str, **settings: str) -> Intake:
        """An intake that has just been started."""
        return Intake(self.process("intake", *options, **settings))

    def run(self, *command: str) -> str:
        """What a command says, once it has ended well."""
        code, out, err = nursery.run(command, {**os.environ, **self.environment()})
        assert code == 0, err
        return out

    # What is in Redis

    def runs(self, project: Project | None = None) -> dict[str, Run]:
        """The runs by id; only those in a project, if one is given."""
        return {
            run.run_id: run
            for run in self.ask(lambda redis: Ledger(redis).runs(limit=10_000))
            if project is None or run.projects == (project.project,)
        }

    def run_in(self, project: Project) -> Run:
        """The one run of a project, once there is one and it has ended."""
        found = eventually(lambda: [run for run in self.runs(project).values() if run.ended])
        assert len(self.runs(project)) == 1
        return found[0]

    def rejected(self) -> list[Rejected]:
        """The messages that were refused, the newest first."""
        found: list[Rejected] = self.ask(lambda redis: Requests(redis).rejected())
        return found

    def refusal(self, message_id: str) -> Rejected:
        """The note that a message was refused, once it is there."""
        found = eventually(lambda: [r for r in self.rejected() if r.message_id == message_id])
        assert len(found) == 1
        return found[0]

    def ask(self, question: Any) -> Any:
        """Ask Redis something by one of the project's own classes."""

        async def asked() -> Any:
            async with self.server.connected() as redis:
                return await question(redis)

        return asyncio.run(asked())

    def xadd(self, **fields: str) -> str:
        """Put an entry on the stream. Returns its id."""
        with self.server.client() as client:
            return str(client.xadd(keys.STREAM, dict(fields)))

    def nothing_left(self) -> bool:
        """Whether no message waits, or is held by anybody."""
        with self.server.client() as client:
            lists = client.keys(f"{KEY_PREFIX}{QUEUE}*")
            return not client.xlen(keys.STREAM) and not lists

    # By Celery

    @property
    def sender(self) -> Celery:
        """A Celery app as another system has one: nothing of poolsweep's is in it."""
        app = Celery(broker=self.server.url.replace("unix://", "redis+socket://"))
        app.conf.broker_transport_options = {"global_keyprefix": "poolsweep:broker:"}
        return app

    def send(self, task: str = TASK, /, *args: Any, **given: Any) -> str:
        """Send a task as another system would; arguments of Celery's own begin with `_`.

        Returns:
            The task's id.
        """
        options = {name[1:]: given.pop(name) for name in list(given) if name[0] == "_"}
        with self.sender as app:
            sent = app.send_task(task, args=args, kwargs=given, queue=QUEUE, **options)
        return str(sent.id)

    def push(self, text: bytes) -> None:
        """Put something on the broker's queue that no Celery has made."""
        with self.server.client() as client:
            client.lpush(KEY_PREFIX + QUEUE, text)


def _has_ended(process: Process) -> bool:
    return process._popen.poll() is not None


class Intake:
    """A process of the intake."""

    def __init__(self, process: Process) -> None:
        self.process = process

    @property
    def url(self) -> str:
        """Where it serves, once it does."""
        return str(eventually(lambda: self._events("intake_ready"))[0]["url"])

    def _events(self, name: str) -> list[dict[str, Any]]:
        assert not _has_ended(self.process) or self.process.events(name), self.process.text
        return self.process.events(name)

    def get(self, path: str) -> tuple[int, Any]:
        """The status and the document of an answer."""
        return self.call(path)

    def call(self, path: str, body: Any = None, **headers: str) -> tuple[int, Any]:
        """The status and the document of an answer; with a body, it is a POST."""
        request = urllib.request.Request(  # noqa: S310 - a loopback address
            self.url + path,
            data=None if body is None else json.dumps(body).encode(),
            headers={
                "Content-Type": "application/json",
                **{name.replace("_", "-"): value for name, value in headers.items()},
            },
        )
        try:
            with urllib.request.urlopen(request, timeout=30) as answer:  # noqa: S310
                return answer.status, json.loads(answer.read())
        except urllib.error.HTTPError as error:
            with error:
                return error.code, json.loads(error.read())

    def is_ready(self) -> bool:
        """Whether it says that it takes requests."""
        return self.get("/readyz")[0] == 200

    def ready(self) -> Intake:
        """Itself, once it takes requests."""
        eventually(self.is_ready)
        return self

    def stop(self) -> int:
        """Its exit status, stopped in order."""
        self.process.send(signal.SIGTERM)
        return self.ended()

    def ended(self) -> int:
        """Its exit status, once it has ended."""
        eventually(lambda: _has_ended(self.process))
        return int(self.process._popen.returncode)

    def kill(self) -> None:
        self.process.kill()

    @contextlib.contextmanager
    def frozen(self) -> Iterator[None]:
        """Have it do nothing for the time of the `with` block."""
        self.process.send(signal.SIGSTOP)
        try:
            yield
        finally:
            self.process.send(signal.SIGCONT)


@pytest.fixture(scope="module")
def sandbox() -> Iterator[Sandbox]:
    """The sandbox of a module's tests."""
    with serving() as running:
        yield running


@pytest.fixture
def project(sandbox: Sandbox) -> Project:
    """A new project without pools."""
    return sandbox.project()


@contextlib.contextmanager
def a_place(folder: Path, sandbox: Sandbox) -> Iterator[Place]:
    """A place with a Redis of its own, where client `ci` may ask by every way."""
    server = RedisServer(folder)
    try:
        place = Place(folder, server, sandbox)
        place.allow(ci={})
        yield place
    finally:
        server.kill()


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory, sandbox: Sandbox) -> Iterator[Place]:
    """The place of a module's tests."""
    with a_place(tmp_path_factory.mktemp("place"), sandbox) as found:
        yield found


@pytest.fixture
def own_place(tmp_path: Path, sandbox: Sandbox) -> Iterator[Place]:
    """A place that a test has to itself, and whose Redis it may kill."""
    with a_place(tmp_path, sandbox) as found:
        yield found
