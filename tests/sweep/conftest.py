"""Policies as their user meets them: the command, real workers, a Redis, and sandboxes.

The sandbox serves from a thread of the test process, and each test has projects of its own in it.
One worker executes what the tests of a module start.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import itertools
import json
import threading
import time
import uuid
from collections import defaultdict
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Any, TypeVar

import pytest

from sandbox.config import SandboxConfig
from sandbox.server import RunningSandbox, running_sandbox
from scheduler.marks import all_marks
from scheduler.review.records import run_record
from tests.cli.conftest import Cloud, Command, Ended, User
from worker import embedded_redis, pause
from worker.reconciler import live_workers

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from scheduler.marks import Mark
    from worker.ledger import Run

T = TypeVar("T")
FAILURES, REFUSED, HELD, UNREACHABLE = 1, 2, 3, 4
FLAVOR = "modelarts.vm.cpu.4ud"
PROTECT = "poolsweep/protect"
PAST, FUTURE = "2024-01-31", "2199-12-31"
WITHIN_S = 2.0
"""A pause acts on all workers in this time."""

QUICK = {
    "RATE_LIMIT": "100",
    "BATCH_SIZE": "5",
    "WORKER_BATCHES": "2",
    "VERIFY_INTERVAL_S": "0.2",
    "PRECONDITION_MAX_AGE_S": "1",
    "BACKOFF_BASE_S": "0.1",
}
"""Settings under which what takes minutes at a real cloud takes a second or two."""

Document = dict[str, Any]


def document(**given: Any) -> Document:
    """A pool as the API shows it: pay per use, running, with the tags that are given.

    Args:
        given: `tags`, `created`, `flavor`, `nodes`, `billing`, `parent`, `subpools`, `shared`.
    """
    title = given.get("title") or f"pool-{next(_NUMBERS)}"
    name = f"{title}-{uuid.uuid4().hex}"
    parent = given.get("parent", "")
    nodes = {"flavor": given.get("flavor", FLAVOR), "count": given.get("nodes", 2)}
    labels = {"os.modelarts/name": title, "os.modelarts/workspace.id": "0"}
    if given.get("shared"):
        labels["os.modelarts.pool/biz"] = "public"
    annotations = {
        "os.modelarts/billing.mode": given.get("billing", "0"),
        "os.modelarts/tms.tags": tags_text(given.get("tags", {})),
    }
    if "subpools" in given:
        annotations["os.modelarts.pool/subpools.count"] = str(given["subpools"])
    return {
        "apiVersion": "v2",
        "kind": "Pool",
        "metadata": {
            "name": name,
            "creationTimestamp": given.get("created", "2024-01-01T00:00:00Z"),
            "labels": labels,
            "annotations": annotations,
        },
        "spec": {
            "type": "Logical" if parent else "Dedicate",
            "controlMode": 0,
            "resources": [nodes],
        },
        "status": {"phase": "Running", "parent": parent},
    }


_NUMBERS = itertools.count(1)
_STARTS = itertools.count(0, 50)


def tags_text(tags: dict[str, str]) -> str:
    """Tags as the annotation holds them."""
    return json.dumps([{"key": key, "value": value} for key, value in tags.items()])


def eventually(condition: Callable[[], T], *, within_s: float = 30) -> T:
    """Ask now and then until the answer is truthy; fail if it takes too long.

    The sandbox shares this process's time, so it is asked less often than it might be.
    """
    deadline = time.monotonic() + within_s
    while not (answer := condition()):
        assert time.monotonic() < deadline, "it never came to that"
        time.sleep(0.1)
    return answer


@dataclass(frozen=True)
class Project(Cloud):
    """A project of a sandbox, with pools that only a test puts there."""

    running: RunningSandbox

    def add(
        self, count: int = 1, *, behaviour: str = "normal", category: str = "untagged", **given: Any
    ) -> list[str]:
        """Put pools there; see `document`. Returns their ids."""
        given.setdefault("tags", {"expires-at": PAST})
        documents = [document(**given) for _ in range(count)]
        path = f"/_sandbox/pools/{self.project}?behaviour={behaviour}&category={category}"
        for each in documents:
            self._call("PUT", path, each)
        return [each["metadata"]["name"] for each in documents]

    def retag(self, pool: str, **tags: str) -> None:
        """Give a pool other tags."""
        self.change(pool, annotations={"os.modelarts/tms.tags": tags_text(tags)})

    def protect(self, pool: str) -> None:
        """Give a pool the tag that protects."""
        tags = {"expires-at": PAST, PROTECT: "true"}
        self.change(pool, annotations={"os.modelarts/tms.tags": tags_text(tags)})

    def calls(self, method: str) -> list[tuple[float, str]]:
        """The calls of a method in this project: when, in `time.monotonic` seconds, and to what."""
        start = f"/v2/{self.project}/pools"
        return [
            (at, path.removeprefix(start))
            for at, called, path, *_ in self._call("GET", "/_sandbox/calls")
            if called == method and path.startswith(start)
        ]

    def deletes(self) -> list[str]:
        """The ids of the pools that DELETE calls were made for."""
        return [path.strip("/") for _, path in self.calls("DELETE")]

    def written(self) -> set[str]:
        """The methods of the calls that would change something."""
        return {method for method in ("DELETE", "POST", "PUT", "PATCH") if self.calls(method)}

    def there(self) -> set[str]:
        """The pools that still exist."""
        return {
            name
            for name, pool in self.pools().items()
            if pool["there"] and pool["project_id"] == self.project
        }


class Sandbox:
    """A sandbox that serves from a thread, and gives out its projects one by one."""

    def __init__(self, running: RunningSandbox) -> None:
        self.running = running
        self.url = running.url
        self.token = running.config.token
        # No two sandboxes of a test session give out the same.
        self._ids = itertools.islice(running.config.project_ids, next(_STARTS), None)

    def project(self) -> Project:
        """A project without pools."""
        return Project(self.url, next(self._ids), {}, self.token, self.running)

    def latency(self, milliseconds: float) -> None:
        """How long every answer takes from now on."""
        self.project_call("POST", "/_sandbox/faults", {"latency_ms": milliseconds})

    def project_call(self, method: str, path: str, body: Any) -> None:
        """Steer the sandbox as a whole."""
        Cloud(self.url, "", {}, self.token)._call(method, path, body)


@contextlib.contextmanager
def serving(**config: Any) -> Iterator[Sandbox]:
    """A sandbox without pools in a thread of this process."""
    loop, ended = asyncio.new_event_loop(), asyncio.Event()
    ready: list[RunningSandbox] = []
    begun = threading.Event()

    async def serve() -> None:
        given = {"pools": 0, "projects": 700, "delete_seconds": 0.1, **config}
        async with running_sandbox(SandboxConfig(**given)) as running:
            ready.append(running)
            begun.set()
            await ended.wait()

    thread = threading.Thread(target=loop.run_until_complete, args=[serve()])
    thread.start()
    try:
        assert begun.wait(20), "the sandbox did not start"
        yield Sandbox(ready[0])
    finally:
        loop.call_soon_threadsafe(ended.set)
        thread.join()
        loop.close()


@dataclass(frozen=True)
class Operator(User):
    """Somebody who has policies."""

    policies: Path = field(kw_only=True)

    def writes(self, projects: dict[str, Any], **policies: Any) -> str:
        """Write a policy file: JSON is YAML. Returns its path.

        Args:
            projects: as they stand in the file; or a project's id alone.
            policies: each policy, whose `match` and `projects` may be left out.
        """
        named = {
            name: {"id": given.project} if isinstance(given, Project) else given
            for name, given in projects.items()
        }
        whole = {"projects": list(named), "match": {"expired": {"tag": "expires-at"}}}
        content = {
            "projects": named,
            "policies": {name.replace("_", "-"): whole | each for name, each in policies.items()},
        }
        self.policies.write_text(json.dumps(content, indent=1))
        return str(self.policies)

    def ended(self, run_id: str) -> Run:
        """A run, once it has ended."""
        found = eventually(lambda: run if (run := self.runs()[run_id]).ended else None)
        assert found is not None
        return found

    def runs_in(self, project: Project) -> list[dict[str, Any]]:
        """The runs of a project, the newest first, as `poolsweep runs --json` tells them."""
        return [
            json.loads(json.dumps(run_record(run)))
            for run in self.runs().values()
            if run.projects == (project.project,)
        ]

    def outcomes(self, run_id: str) -> dict[str, set[str]]:
        """The pools of a run by outcome."""
        found: defaultdict[str, set[str]] = defaultdict(set)
        for name, job in self.jobs(run_id).items():
            found[job.state].add(name)
        return dict(found)

    def marks(self, project: Project) -> dict[str, Mark]:
        """The marks in a project, by pool."""
        found = self.ask(all_marks)
        return {mark.pool_id: mark for mark in found if mark.project_id == project.project}

    def pauses(self, project: Project) -> None:
        """Pause a project, and wait until every worker has looked since."""
        self.ask(lambda redis: pause.pause(redis, project.project, by="ann", reason=""))
        passes(datetime.now(UTC) + timedelta(seconds=WITHIN_S))

    def saved_plan(self, path: str, *options: str) -> dict[str, Any]:
        """What `poolsweep plan --json` tells."""
        ended = self.run("plan", path, "--json", *options)
        assert ended.code == 0, ended.err
        found: dict[str, Any] = json.loads(ended.out)
        return found

    def together(self, *commands: tuple[str, ...], **settings: str) -> list[Ended]:
        """Run commands that do not touch each other, two at a time."""
        with ThreadPoolExecutor(2) as pool:
            return list(pool.map(lambda each: self.run(*each, **settings), commands))


@pytest.fixture(scope="package")
def broker(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The URL of a Redis that only these tests use."""
    with embedded_redis.join(tmp_path_factory.mktemp("redis")) as server:
        yield server.url


@pytest.fixture(scope="package")
def sandbox() -> Iterator[Sandbox]:
    """The sandbox of these tests."""
    with serving() as running:
        yield running


@pytest.fixture
def project(sandbox: Sandbox) -> Project:
    """A new project without pools."""
    return sandbox.project()


@pytest.fixture
def other(sandbox: Sandbox) -> Project:
    """Another one."""
    return sandbox.project()


def settings_for(sandbox: Sandbox, broker: str) -> dict[str, str]:
    """The settings of a user of a sandbox."""
    return {**QUICK, "ENDPOINT": sandbox.url, "TOKEN": sandbox.token, "REDIS_URL": broker}


@pytest.fixture
def ann(tmp_path: Path, sandbox: Sandbox, broker: str) -> Operator:
    """Somebody with policies, whose reads nothing limits."""
    settings = settings_for(sandbox, broker) | {"RATE_LIMIT": "0"}
    return Operator(tmp_path, settings, policies=tmp_path / "policies.yaml")


@contextlib.contextmanager
def working(user: User, *endpoints: str, **settings: str) -> Iterator[Command]:
    """A worker, once it serves endpoints."""
    before = {each: _alive(user, each) for each in endpoints}
    log = user.state_dir / f"worker-{next(_NUMBERS)}.log"
    with log.open("w") as output:
        command = Command(("worker",), user.environment(**settings), stdout=output, stderr=output)
        try:
            for each in endpoints:
                eventually(functools.partial(_ready, command, log, user, each, before[each]))
            yield command
        finally:
            command.terminate()
            try:
                command.wait(30)
            finally:
                command.kill()


def _ready(command: Command, log: Path, user: User, endpoint: str, before: int) -> bool:
    assert command.poll() is None, log.read_text()
    return _alive(user, endpoint) > before


def _alive(user: User, endpoint: str) -> int:
    return user.ask(lambda redis: live_workers(redis, endpoint))


@pytest.fixture(scope="package")
def worker(
    tmp_path_factory: pytest.TempPathFactory, sandbox: Sandbox, broker: str
) -> Iterator[Command]:
    """The worker of these tests."""
    user = User(tmp_path_factory.mktemp("worker"), settings_for(sandbox, broker))
    with working(user, sandbox.url) as command:
        yield command


def passes(moment: datetime) -> None:
    """Wait until it is a moment, at most a few seconds away."""
    assert moment - datetime.now(UTC) < timedelta(seconds=20)
    eventually(lambda: datetime.now(UTC) > moment)


def monotonic() -> float:
    """The clock that the sandbox's journal goes by."""
    return time.monotonic()
