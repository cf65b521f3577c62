"""The real thing, made to be broken: Redis, the project's processes, and a simulated cloud.

Everything runs as in production, each in a process of its own; between the workers and the cloud
stands a proxy. Whatever is done to them is noted with its time, so that what is found afterwards
can be explained, or cannot.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import socket
import sys
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final

import aiohttp
from redis.asyncio import Redis
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff
from redis.exceptions import RedisError

from scheduler import children
from scheduler.intake.clients import new_token, token_hash
from tests.conftest import until
from tests.faults.proxy import Proxy
from tests.sweep.conftest import FUTURE, PAST, PROTECT, document
from tests.worker.conftest import Process
from worker import embedded_redis
from worker.broker import KEY_PREFIX, queue_name

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Iterator, Sequence
    from pathlib import Path

LEASE_S: Final = 1.5
CALL_TIMEOUT_S: Final = 1.5
LATENCY_MS: Final = 50
"""Of every answer of the API, so that messages wait for a while."""
LIST_AGE_S: Final = 1.0
STOP_S: Final = 40.0
"""A process that was told to stop has ended by then, even if Redis is away meanwhile."""
SETTINGS: Final = {
    "RATE_LIMIT": "200",
    "IN_FLIGHT": "2",
    "BATCH_SIZE": "5",
    "WORKER_BATCHES": "2",
    "BATCH_MAX_S": "4",
    "SHUTDOWN_S": "1",
    "VISIBILITY_TIMEOUT_S": "10",
    "LEASE_S": str(LEASE_S),
    "RESEND_S": str(LEASE_S),
    "CONNECT_TIMEOUT_S": "1",
    "TOTAL_TIMEOUT_S": str(CALL_TIMEOUT_S),
    "BACKOFF_BASE_S": "0.1",
    "BACKOFF_CAP_S": "0.5",
    "INLINE_WAIT_S": "0.2",
    "PRECONDITION_MAX_AGE_S": str(LIST_AGE_S),
    "VERIFY_INTERVAL_S": "0.3",
    "MAX_ATTEMPTS": "100",
    "LOG_FORMAT": "json",
}
"""Settings under which what takes minutes takes seconds, and no job is out of attempts."""
NO_BRAKES: Final = {
    "max_deletions": 10_000,
    "max_percent": 100,
    "max_failures": 10_000,
    "max_failure_percent": 100,
}
PASSING: Final = {"normal": 80, "flaky": 8, "throttled": 2, "gone": 5}
POOLSWEEP: Final = [sys.executable, "-m", "scheduler.cli"]
READY: Final = ("celery@", "intake_ready", "scheduler_leads", "scheduler_stands_by")
"""The events by which processes say that they work."""
EXIT_UNREACHABLE: Final = 4
Document = dict[str, Any]


@dataclass(slots=True)
class Disruption:
    """Something that was done to the rig.

    Attributes:
        kind: what.
        target: to whom.
        begun, ended: in seconds of `time.monotonic`.
    """

    kind: str
    target: str
    begun: float
    ended: float


class RedisProcess:
    """A redis-server that has on disk whatever it said that it has done."""

    def __init__(self, directory: Path, *options: str) -> None:
        directory.mkdir(exist_ok=True)
        self._directory = directory
        self._options = options
        self._path = directory / "redis.sock"
        self.process: Process | None = None

    @property
    def url(self) -> str:
        return f"unix://{self._path}"

    async def start(self) -> None:
        """Start it, and wait until it has read its file."""
        options = ["--port", "0", "--unixsocket", str(self._path), "--save", ""]
        options += ["--appendonly", "yes", "--appendfsync", "always"]
        command = [embedded_redis.find_server_binary(), *options, *self._options]
        self.process = Process(command, self._directory / "redis.log", cwd=self._directory)
        await until(self._answers, within_s=60)

    async def _answers(self) -> bool:
        async with self.client() as client:
            with contextlib.suppress(RedisError, OSError):
                return bool(await client.ping())
        return False

    def client(self, timeout_s: float = 2) -> Redis:
        """A connection that tries nothing twice."""
        return Redis(
            unix_socket_path=str(self._path),
            decode_responses=True,
            socket_timeout=timeout_s,
            retry=Retry(NoBackoff(), 0),
        )

    def send(self, number: signal.Signals) -> None:
        assert self.process
        self.process.send(number)

    def kill(self) -> None:
        if self.process:
            self.process.kill()
            self.process = None


class Program:
    """A process of the project, which is started again when it has ended.

    Attributes:
        name: what it is.
        busy: whether something is being done to it.
        processes: all that were started, the last one being the present one.
    """

    def __init__(
        self, name: str, command: Sequence[str], env: dict[str, str], directory: Path
    ) -> None:
        self.name = name
        self.busy = False
        self.processes: list[Process] = []
        self._command = command
        self._env = env
        self._directory = directory

    def start(self) -> Process:
        log = self._directory / f"{self.name}-{len(self.processes)}.log"
        process = Process([*POOLSWEEP, *self._command], log, env=self._env)
        self.processes.append(process)
        return process

    @property
    def present(self) -> Process:
        return self.processes[-1]

    @property
    def is_up(self) -> bool:
        return not self.busy and self.status is None

    @property
    def status(self) -> int | None:
        """Its exit status; None: it runs."""
        return self.present._popen.poll()

    @contextlib.contextmanager
    def handled(self) -> Iterator[None]:
        """Nobody else does anything to it meanwhile."""
        self.busy = True
        try:
            yield
        finally:
            self.busy = False

    async def stop(self) -> str:
        """Have it end in order. Returns what was wrong with that; empty: nothing."""
        self.present.send(signal.SIGTERM)
        try:
            status = await self.present.ended(STOP_S)
        except TimeoutError:
            self.present.kill()
            return f"{self.name} did not end within {STOP_S:g} s of SIGTERM"
        if status in {0, EXIT_UNREACHABLE, -signal.SIGTERM}:
            return ""
        return f"{self.name} ended with status {status} on SIGTERM"

    def kill(self) -> None:
        for process in self.processes:
            process.kill()


@dataclass
class Rig:
    """Everything that an episode needs.

    Attributes:
        directory: for logs and files.
        redis: the Redis.
        proxy: the network between the workers and the API.
        sandbox_url: the sandbox without that network, to look at and to steer.
        projects: the projects of the sandbox.
        programs: the processes by name.
        disruptions: what was done to them all.
        complaints: what a process did that none should do.
        wanted: the pools that are to be deleted, and whether their DELETE is refused for good.
        spared: the pools that must not be touched.
        protected: those of them that even whoever asks for them by name does not get, by project.
        redis_busy: whether something is being done to Redis.
    """

    directory: Path
    redis: RedisProcess
    proxy: Proxy
    sandbox_url: str
    projects: list[str]
    http: aiohttp.ClientSession
    programs: dict[str, Program] = field(default_factory=dict)
    disruptions: list[Disruption] = field(default_factory=list)
    complaints: list[str] = field(default_factory=list)
    wanted: dict[str, bool] = field(default_factory=dict)
    spared: set[str] = field(default_factory=set)
    protected: dict[str, list[str]] = field(default_factory=dict)
    redis_busy: bool = False

    # Its parts

    def environment(self, **settings: str) -> dict[str, str]:
        given = {
            **SETTINGS,
            "STATE_DIR": str(self.directory / "state"),
            "ENDPOINT": self.proxy.url,
            "TOKEN": "sandbox-token",
            "REDIS_URL": self.redis.url,
            **settings,
        }
        return {f"POOLSWEEP_{name}": value for name, value in given.items()} | {
            "HOME": str(self.directory)
        }

    def add(self, name: str, *command: str, **settings: str) -> Program:
        """A process of the project, started."""
        program = Program(name, command, self.environment(**settings), self.directory)
        self.programs[name] = program
        program.start()
        return program

    def named(self, *names: str) -> list[Program]:
        """The processes whose name begins so and to which something may be done."""
        return [p for p in self.programs.values() if p.name.startswith(names) and p.is_up]

    @property
    def queue(self) -> str:
        """The list in Redis that holds the workers' messages."""
        return KEY_PREFIX + queue_name(self.proxy.url)

    @contextlib.contextmanager
    def disrupting(self, kind: str, target: str) -> Iterator[None]:
        """Note that something is done for the time of the `with` block."""
        disruption = Disruption(kind, target, time.monotonic(), float("inf"))
        self.disruptions.append(disruption)
        try:
            yield
        finally:
            disruption.ended = time.monotonic()

    def kill(self) -> None:
        """End every process of the project."""
        for program in self.programs.values():
            program.kill()

    async def up(self) -> None:
        """Wait until every process does its work."""

        async def ready() -> bool:
            return all(
                any(f'"event": "{event}' in process.text for event in READY)
                for process in (program.present for program in self.programs.values())
            )

        await until(ready, within_s=60)

    async def supervise(self) -> None:
        """Start again what has ended, as a supervisor of services does."""
        while True:
            await asyncio.sleep(0.1)
            for program in self.programs.values():
                if program.busy or program.status is None:
                    continue
                # A command says by this status that it found no Redis when it began.
                if program.status != EXIT_UNREACHABLE:
                    self.complaints.append(
                        f"{program.name} ended by itself with status {program.status}:\n"
                        + program.present.text[-2_000:]
                    )
                program.start()

    # The cloud

    async def ask(self, method: str, path: str, body: Any = None, **query: str) -> Any:
        """Ask or steer the sandbox."""
        url = f"{self.sandbox_url}/_sandbox{path}"
        async with self.http.request(method, url, json=body, params=query) as answer:
            assert answer.status < 300, await answer.text()
            return await answer.json()

    async def calls(self, since: float = float("-inf")) -> list[list[Any]]:
        """The sandbox's journal: when, method, path, pool, status."""
        found: list[list[Any]] = await self.ask("GET", "/calls", since=str(since))
        return found

    async def put(
        self, project: str, count: int, *, behaviour: str = "normal", **given: Any
    ) -> list[str]:
        """Put pools into a project. Returns their names."""
        documents = [document(**given) for _ in range(count)]
        for each in documents:
            await self.ask("PUT", f"/pools/{project}", each, behaviour=behaviour)
        return [each["metadata"]["name"] for each in documents]

    async def bystanders(self) -> None:
        """Pools that nothing may touch, in every project."""
        for project in self.projects:
            protected = {"expires-at": PAST, PROTECT: "true"}
            self.protected[project] = await self.put(project, 3, tags=protected)
            self.spared.update(self.protected[project])
            self.spared.update(await self.put(project, 3, tags={"expires-at": FUTURE}))

    async def wave(self, project: str, kinds: Sequence[str]) -> list[str]:
        """Pools that are to be deleted, one of each kind of behaviour named."""
        names = []
        for kind in kinds:
            names += await self.put(project, 1, behaviour=kind, tags={"expires-at": PAST})
            self.wanted[names[-1]] = kind == "doomed"
        return names


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@contextlib.asynccontextmanager
async def rigged(directory: Path, *, projects: int = 2, workers: int = 2) -> AsyncIterator[Rig]:
    """A rig whose workers run."""
    sandbox = children.sandbox(
        [
            *("--pools", "0", "--projects", str(projects)),
            *("--delete-seconds", "0.3", "--latency-ms", str(LATENCY_MS)),
        ],
        directory / "sandbox.log",
    )
    redis = RedisProcess(directory / "redis")
    async with contextlib.AsyncExitStack() as stack:
        ready = stack.enter_context(sandbox)
        stack.callback(redis.kill)
        await redis.start()
        http = await stack.enter_async_context(aiohttp.ClientSession())
        port = int(ready["url"].rpartition(":")[2])
        proxy = await stack.enter_async_context(Proxy().serving(port))
        rig = Rig(directory, redis, proxy, ready["url"], ready["project_ids"], http)
        stack.callback(rig.kill)
        await rig.bystanders()
        for number in range(workers):
            rig.add(f"worker{number}", "worker")
        yield rig


@dataclass
class Front:
    """What asks for deletions in an episode.

    Attributes:
        behaviours: of the pools that it asks for, each with its share.
        ask: has some pools of a project deleted; returns once that is sure to happen.
        acknowledged: the run of each request that was acknowledged, with the pools asked for.
    """

    behaviours: dict[str, int]
    ask: Callable[[str, list[str]], Any]
    acknowledged: dict[str, list[str]] = field(default_factory=dict)


def intake(rig: Rig) -> Front:
    """Requests by HTTP, each repeated with its key until it is acknowledged."""
    token, _ = new_token()
    client = {
        "tokens": [token_hash(token)],
        "projects": rig.projects,
        "ways": ["http"],
        "brakes": NO_BRAKES,
        "rate_limit": 10_000,
        "rate_burst": 10_000,
    }
    path = rig.directory / "clients.yaml"
    path.write_text(json.dumps({"clients": {"ci": client}}))
    port = free_port()
    rig.add("intake", "intake", CLIENTS_FILE=str(path), INTAKE_PORT=str(port))
    front = Front({**PASSING, "doomed": 5}, lambda *_: None)

    async def ask(project: str, pools: list[str]) -> None:
        headers = {"Authorization": f"Bearer {token}", "Idempotency-Key": os.urandom(8).hex()}
        # What is protected is asked for too, and must be kept all the same.
        named = [*pools, *rig.protected[project]]
        body = {"targets": [{"project_id": project, "pools": named}]}
        await asyncio.sleep(1.5 * LIST_AGE_S)  # else a list may be older than the pools
        while True:
            with contextlib.suppress(aiohttp.ClientError, TimeoutError):
                async with rig.http.post(
                    f"http://127.0.0.1:{port}/v1/runs",
                    json=body,
                    headers=headers,
                    timeout=aiohttp.ClientTimeout(total=5),
                ) as answer:
                    if answer.status == 202:
                        front.acknowledged[(await answer.json())["run_id"]] = pools
                        return
                    assert answer.status >= 500, await answer.text()
            await asyncio.sleep(0.2)

    front.ask = ask
    return front


def schedulers(rig: Rig) -> Front:
    """Two schedulers and a policy whose nights come every second."""
    policy = {
        "projects": [f"p{number}" for number in range(len(rig.projects))],
        "match": {"expired": {"tag": "expires-at"}},
        "brakes": NO_BRAKES,
        "schedule": "* * * * * *",
    }
    projects = {f"p{number}": {"id": project} for number, project in enumerate(rig.projects)}
    path = rig.directory / "policies.yaml"
    path.write_text(json.dumps({"projects": projects, "policies": {"expired": policy}}))
    for number in range(2):
        rig.add(f"scheduler{number}", "scheduler", str(path))

    async def ask(project: str, pools: list[str]) -> None:
        """They are there, and a night comes soon."""

    # What is refused for good would be tried anew every night.
    return Front(PASSING, ask)
