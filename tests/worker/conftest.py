"""The executing side as it runs: worker processes, a Redis of their own, and the sandbox.

The sandbox runs in the test's event loop, so that a test sees its journal and steers it; in front
of it stands a gateway that answers in the cloud's place when a test says so. A session has one
Redis, on which the endpoint, a fresh port for each test, keeps the runs of the tests apart.
"""

from __future__ import annotations

import asyncio
import base64
import contextlib
import ctypes
import json
import os
import signal
import subprocess
import sys
import time
import uuid
from collections import Counter
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import redis as sync_redis
from aiohttp import web
from pydantic import SecretStr
from redis.asyncio import Redis

from sandbox.cloud import SandboxPool
from sandbox.config import SandboxConfig
from sandbox.fleet import Behaviour, Category, Member, generate
from sandbox.server import SandboxServer
from tests.conftest import until
from worker import embedded_redis
from worker.broker import KEY_PREFIX, make_app, queue_name, sender
from worker.feed import Feed
from worker.ledger import Job, JobState, Ledger, NewJob, NewRun, Run, Source, keys, new_run_id
from worker.modelarts import Pool, Precondition
from worker.process import WorkerProcess
from worker.redis_connection import connect
from worker.settings import Settings

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterator, Mapping, Sequence

ROOT = Path(__file__).parents[2]
PATIENCE_S = 60.0
_PR_SET_PDEATHSIG = 1
_LIBC = ctypes.CDLL(None)

FAST: Mapping[str, object] = {
    "rate_limit": 500,
    "batch_size": 20,
    "worker_batches": 4,
    "backoff_base_s": 0.1,
    "backoff_cap_s": 0.4,
    "inline_wait_s": 0.2,
    "max_attempts": 4,
    "lease_s": 30,
    "resend_s": 30,
    "shutdown_s": 3,
    "verify_interval_s": 0.2,
    "verify_deadline_s": 60,
}
"""Settings under which what takes minutes at a real cloud takes a second or two.

Leases are for tests of crashes to shorten: on a busy machine a short one runs out by itself.
"""


def _die_with_parent() -> None:
    _LIBC.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


class Process:
    """A process in a session of its own, which ends with the test at the latest."""

    def __init__(
        self,
        command: Sequence[str],
        log: Path,
        *,
        env: Mapping[str, str] | None = None,
        cwd: Path = ROOT,
    ) -> None:
        self._log = log
        with log.open("ab") as output, log.with_suffix(".out").open("ab") as other:
            self._popen = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=other,
                stderr=output,
                env={**os.environ, **(env or {})},
                cwd=cwd,
                start_new_session=True,
                preexec_fn=_die_with_parent,
            )

    @property
    def pid(self) -> int:
        return self._popen.pid

    @property
    def text(self) -> str:
        """What it has written to its standard error so far."""
        return self._log.read_text()

    @property
    def output(self) -> str:
        """What it has written to its standard output so far."""
        return self._log.with_suffix(".out").read_text()

    def events(self, name: str = "") -> list[dict[str, Any]]:
        """Its log, which is JSON to the last line written; only those of a name, if given."""
        lines = [
            json.loads(line) for line in self.text.splitlines(keepends=True) if line[-1:] == "\n"
        ]
        return [line for line in lines if not name or line["event"] == name]

    def send(self, number: signal.Signals) -> None:
        self._popen.send_signal(number)

    def kill(self) -> None:
        """End it and its children as the kernel does when memory runs out."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._popen.pid, signal.SIGKILL)
        self._popen.wait()

    async def ended(self, within_s: float = PATIENCE_S) -> int:
        """Its exit status, once it has ended."""
        await until(self._has_ended, within_s=within_s)
        return int(self._popen.returncode)

    async def _has_ended(self) -> bool:
        return self._popen.poll() is not None


class RedisServer:
    """A redis-server with an append-only file, which a test may stop, kill and start again."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._path = directory / "redis.sock"
        self.url = f"unix://{self._path}"
        self._process: Process | None = None
        self.start()

    def start(self) -> None:
        options = ["--port", "0", "--unixsocket", "redis.sock", "--save", "", "--appendonly", "yes"]
        command = [embedded_redis.find_server_binary(), *options]
        self._process = Process(command, self._directory / "redis.log", cwd=self._directory)
        deadline = time.monotonic() + PATIENCE_S
        while True:
            with contextlib.suppress(sync_redis.ConnectionError), self.client() as client:
                client.ping()
                return
            assert time.monotonic() < deadline, "redis-server did not start"
            time.sleep(0.02)

    def client(self) -> sync_redis.Redis:
        return sync_redis.Redis(unix_socket_path=str(self._path), decode_responses=True)

    @contextlib.asynccontextmanager
    async def connected(self) -> AsyncIterator[Redis]:
        """A connection that outlives a restart."""
        redis = connect(Settings(redis_url=SecretStr(self.url)))
        try:
            yield redis
        finally:
            await redis.aclose()

    def kill(self) -> None:
        if self._process:
            self._process.kill()


@pytest.fixture(scope="session")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RedisServer]:
    """The Redis of the worker tests."""
    started = RedisServer(tmp_path_factory.mktemp("redis"))
    yield started
    started.kill()


@pytest.fixture
async def redis(server: RedisServer) -> AsyncIterator[Redis]:
    client = Redis.from_url(server.url, decode_responses=True)
    yield client
    await client.aclose()


Gateway = Callable[[web.Request], "web.Response | Awaitable[web.Response | None] | None"]


def refused(status: int, code: str, message: str = "no", **headers: str) -> web.Response:
    """An error as the service and the gateway word it; `Retry_After` is the header Retry-After."""
    named = {name.replace("_", "-"): value for name, value in headers.items()}
    body = {"error_code": code, "error_msg": message}
    return web.json_response(body, status=status, headers={"X-Request-Id": "front-1", **named})


def is_list(request: web.Request) -> bool:
    """Whether a call asks for all pools of a project."""
    return request.method == "GET" and "pool" not in request.match_info


@dataclass
class Cloud:
    """The sandbox, and the gateway in front of it.

    Attributes:
        url: where it serves.
        sandbox: its state.
        gateway: asked first about each call: what it returns is the answer, None passes it on.
    """

    url: str
    sandbox: SandboxServer
    gateway: Gateway = field(default=lambda _: None)
    deletes: list[tuple[str, int]] = field(default_factory=list)
    """Each DELETE that arrived: the pool, and when, in ms since the epoch."""
    reads: list[tuple[str, str]] = field(default_factory=list)
    """Each GET that arrived: the project, and the pool or `list`."""

    def project(self, count: int = 0, **behaviours: int) -> Project:
        """A new project with pools that may be deleted, some of them with a behaviour."""
        project_id = uuid.uuid4().hex
        self.sandbox.cloud.projects[project_id] = {}
        project = Project(self, project_id)
        kinds = [kind for name, share in behaviours.items() for kind in [Behaviour(name)] * share]
        project.add(count, kinds)
        return project

    def latency(self, milliseconds: float) -> None:
        """How long every answer takes from now on."""
        self.sandbox.faults = self.sandbox.faults.model_copy(update={"latency_ms": milliseconds})

    def calls_of(self, pool_name: str) -> list[int]:
        """When a pool's DELETE calls arrived, in ms since the epoch."""
        return [at_ms for name, at_ms in self.deletes if name == pool_name]

    @web.middleware
    async def answer(self, request: web.Request, handler: Any) -> web.StreamResponse:
        if request.path.startswith("/_sandbox/"):
            steered: web.StreamResponse = await handler(request)
            return steered
        project, pool = (request.match_info.get(part, "") for part in ("project", "pool"))
        if request.method == "DELETE":
            self.deletes.append((pool, time.time_ns() // 1_000_000))
        else:
            self.reads.append((project, pool or "list"))
        answer = self.gateway(request)
        if isinstance(answer, Awaitable):
            answer = await answer
        if answer is not None:
            return answer
        response: web.StreamResponse = await handler(request)
        return response


@dataclass
class Project:
    """A project of the sandbox."""

    cloud: Cloud
    project_id: str

    @property
    def pools(self) -> dict[str, SandboxPool]:
        return self.cloud.sandbox.cloud.projects[self.project_id]

    def add(self, count: int, kinds: Sequence[Behaviour] = ()) -> None:
        plain = (Category.EXPIRED, Category.TAGGED)
        config = SandboxConfig(pools=2 * count + 50, seed=uuid.uuid4().int % 2**31)
        fleet = [m for m in generate(config, datetime.now(UTC)) if m.category in plain][:count]
        assert len(fleet) == count
        for number, member in enumerate(fleet):
            kind = kinds[number] if number < len(kinds) else Behaviour.NORMAL
            pool = SandboxPool(Member(self.project_id, member.category, kind, member.document))
            self.pools[member.name] = pool

    def jobs(self) -> list[NewJob]:
        """What a plan that chose all its pools would ask for."""
        return [self.job(name) for name in self.pools]

    def job(self, name: str) -> NewJob:
        pool = Pool.parse(self.pools[name].document)
        precondition = Precondition.of(pool)
        return NewJob(
            project_id=self.project_id,
            pool_name=name,
            display_name=pool.display_name,
            created=precondition.created,
            fingerprint=precondition.fingerprint,
            chosen="asked for",
        )

    def there(self) -> set[str]:
        """The pools that still exist."""
        cloud = self.cloud.sandbox.cloud
        return {name for name, pool in self.pools.items() if cloud.is_there(pool)}

    def lists(self) -> int:
        """How many times its pools were listed."""
        return self.cloud.reads.count((self.project_id, "list"))


@contextlib.asynccontextmanager
async def serving(delete_seconds: float = 0.2) -> AsyncIterator[Cloud]:
    """A cloud without pools, on a free port."""
    sandbox = SandboxServer(SandboxConfig(pools=0, delete_seconds=delete_seconds))
    cloud = Cloud("", sandbox)
    app = sandbox.application()
    app.middlewares.insert(0, cloud.answer)
    runner = web.AppRunner(app, access_log=None, shutdown_timeout=0.1)
    await runner.setup()
    try:
        site = web.TCPSite(runner, "127.0.0.1", 0, backlog=1024)
        await site.start()
        cloud.url = "http://{}:{}".format(*runner.addresses[0][:2])
        yield cloud
    finally:
        await runner.cleanup()


@pytest.fixture
async def cloud() -> AsyncIterator[Cloud]:
    async with serving() as running:
        yield running


def settings_for(cloud: Cloud, url: str, **changes: object) -> Settings:
    """Settings of a worker of this test, in this process."""
    values: dict[str, Any] = {**FAST, "endpoint": cloud.url, "redis_url": SecretStr(url), **changes}
    values.setdefault("token", SecretStr(cloud.sandbox.config.token))
    return Settings(**values)


def environment(settings: Settings) -> dict[str, str]:
    """The same settings as variables, for a worker process."""
    given = {name: getattr(settings, name) for name in settings.model_fields_set}
    return {
        f"POOLSWEEP_{name.upper()}": value.get_secret_value()
        if isinstance(value, SecretStr)
        else str(value)
        for name, value in given.items()
        if value is not None
    }


class Runs:
    """Makes runs and looks at them, as the deciding side does."""

    def __init__(self, redis: Redis, settings: Settings) -> None:
        self.redis = redis
        self.settings = settings
        self.ledger = Ledger(redis)
        endpoint = settings.api_endpoint.url
        self.send = sender(make_app(settings, [endpoint]), endpoint)
        self.feed = Feed(self.ledger, self.send, settings)

    async def make(self, jobs: Sequence[NewJob], *, verify: bool = True, feed: bool = True) -> str:
        """Start a run, and send its first batches unless told not to."""
        run_id = new_run_id(datetime.now(UTC))
        endpoint = self.settings.api_endpoint.url
        assert await self.ledger.create(NewRun(run_id, Source.CLI, endpoint, verify=verify))
        await self.ledger.add(run_id, jobs)
        assert await self.ledger.start(run_id, len(jobs))
        if feed:
            await self.feed(run_id)
        return run_id

    async def ended(self, run_id: str, within_s: float = PATIENCE_S) -> Run:
        """The run, once it has ended."""

        async def run() -> Run | None:
            found = await self.ledger.run(run_id)
            return found if found.ended else None

        found = await until(run, within_s=within_s)
        assert found is not None
        return found

    async def unsent(self, run_id: str) -> set[int]:
        """Jobs of which the ledger says that a message carries them, and none does."""
        queue = KEY_PREFIX + queue_name(self.settings.api_endpoint.url)
        carried: set[int] = set()
        for message in await self.redis.lrange(queue, 0, -1):
            _, arguments, _ = json.loads(base64.b64decode(json.loads(message)["body"]))
            if arguments["run_id"] == run_id:
                carried.update(arguments["numbers"])
        return {int(str(n)) for n in await self.redis.zrange(keys.sent(run_id), 0, -1)} - carried

    async def jobs(self, run_id: str) -> list[Job]:
        return [job async for job in self.ledger.all_jobs(run_id)]

    async def check(self, run_id: str, cloud: Cloud, project: Project) -> Counter[JobState]:
        """What holds of every ended run, whatever happened on the way. Returns its outcomes."""
        run, jobs = await self.ledger.run(run_id), await self.jobs(run_id)
        outcomes = Counter(job.state for job in jobs)
        assert run.ended
        assert len(jobs) == run.total == sum(run.counts.values())
        assert {state: count for state, count in run.counts.items() if count} == dict(outcomes)
        listed = [
            job.number
            for state in outcomes
            for job in [j async for j in self.ledger.all_jobs(run_id, outcome=state)]
        ]
        assert sorted(listed) == [job.number for job in jobs]  # each in one outcome, once
        there = project.there()
        for job in jobs:
            gone = job.state in {JobState.DELETED, JobState.ALREADY_DELETED}
            assert not (gone and job.pool_name in there), job
            assert all(at_ms <= job.done_ms for at_ms in cloud.calls_of(job.pool_name)), job
        return outcomes


@contextlib.asynccontextmanager
async def worker_here(settings: Settings) -> AsyncIterator[WorkerProcess]:
    """The parts of a worker in this process, without Celery: for what does not depend on it."""
    parts = WorkerProcess(settings)
    try:
        yield parts
    finally:
        await asyncio.to_thread(parts.stop)


class Workers:
    """Worker processes of a test."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._started: list[Process] = []

    def start(self, env: Mapping[str, str], *options: str, plain: bool = False) -> Process:
        """`poolsweep worker`, or the plain `celery -A worker.app worker` with options."""
        celery = [sys.executable, "-m", "celery", "-A", "worker.app", "worker", *options]
        command = celery if plain else [sys.executable, "-m", "scheduler.cli", "worker"]
        log = self._directory / f"worker-{len(self._started)}.log"
        process = Process(command, log, env={**env, "HOME": str(self._directory)})
        self._started.append(process)
        return process

    async def ready(self, *processes: Process) -> None:
        """Wait until they take batches."""

        async def all_ready() -> bool:
            for process in processes:
                assert not await process._has_ended(), process.text
            return all('ready.",' in process.text for process in processes)

        await until(all_ready, within_s=PATIENCE_S)

    def kill(self) -> None:
        for process in self._started:
            process.kill()


@pytest.fixture
def workers(tmp_path: Path) -> Iterator[Workers]:
    started = Workers(tmp_path)
    yield started
    started.kill()
