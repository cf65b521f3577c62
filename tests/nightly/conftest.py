"""The scheduler as it runs: processes, a Redis of each test's own, the sandbox, a policy file."""

from __future__ import annotations

import asyncio
import contextlib
import json
import sys
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

import pytest

from scheduler import policy as policies
from scheduler.almanac import Almanac, Night, NightState
from scheduler.announcer import Announcer
from scheduler.file_watch import FileWatch
from scheduler.rota import Rota
from scheduler.sweep import Office
from tests.conftest import until
from tests.worker.conftest import Cloud, Process, RedisServer, environment, serving, settings_for
from worker.ledger import Ledger, keys
from worker.projects import Directory
from worker.redis_connection import connect

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterator, Mapping
    from datetime import timedelta
    from pathlib import Path

    from redis.asyncio import Redis

    from tests.worker.conftest import Project
    from worker.ledger import Run
    from worker.settings import Settings

NIGHTLY = "0 2 * * *"
BY = f"{NIGHTLY} UTC"
POOLSWEEP = [sys.executable, "-m", "scheduler.cli"]
_CELERY = [sys.executable, "-m", "celery", "-A", "scheduler.beat"]
BEAT = [*_CELERY, "beat"]
QUIET_BEAT = [*_CELERY, "--quiet", "beat"]


def policy(*projects: str, schedule: str | None = NIGHTLY, **more: object) -> dict[str, object]:
    """A policy that deletes every pool that may be deleted."""
    return {
        "projects": list(projects),
        "match": {"name": "*"},
        "brakes": {"max_percent": 100},
        **({} if schedule is None else {"schedule": schedule}),
        **more,
    }


@dataclass
class Stage:
    """What the schedulers of a test have in common."""

    directory: Path
    cloud: Cloud
    server: RedisServer
    redis: Redis
    settings: Settings
    started: list[Process] = field(default_factory=list)
    projects: dict[str, dict[str, object]] = field(default_factory=dict)

    @property
    def path(self) -> Path:
        return self.directory / "policies.yaml"

    @property
    def ledger(self) -> Ledger:
        return Ledger(self.redis)

    @property
    def almanac(self) -> Almanac:
        return Almanac(self.redis)

    def project(self, name: str = "research", pools: int = 0) -> Project:
        """A new project of the cloud, under a name for policies."""
        made = self.cloud.project(pools)
        self.projects[name] = {"id": made.project_id}
        return made

    def write(self, policies: Mapping[str, object], **more: object) -> None:
        """Put a policy file in place by renaming, as careful editors do."""
        document = {"projects": self.projects, "policies": policies, **more}
        self.write_text(json.dumps(document))

    def write_text(self, text: str) -> None:
        fresh = self.path.with_suffix(".new")
        fresh.write_text(text)
        fresh.rename(self.path)

    def start(
        self,
        command: list[str],
        env: Mapping[str, str] | None = None,
        *,
        name: str = "scheduler",
        cwd: Path | None = None,
    ) -> Process:
        log = self.directory / f"{name}-{len(self.started)}.log"
        given = environment(self.settings) | {"HOME": str(self.directory)} | dict(env or {})
        process = Process(command, log, env=given, cwd=cwd or self.directory)
        self.started.append(process)
        return process

    def scheduler(self, **env: str) -> Process:
        """`poolsweep scheduler FILE`."""
        return self.start([*POOLSWEEP, "scheduler", str(self.path)], env)

    def worker(self) -> Process:
        """`poolsweep worker`."""
        return self.start([*POOLSWEEP, "worker"], name="worker")

    async def leader(self, *among: Process) -> Process:
        """The one that leads, once one does."""

        async def leading() -> Process | None:
            holder = str(await self.redis.get(keys.SCHEDULER))
            pid = holder.partition(":")[2].partition(":")[0]
            return next((each for each in among if str(each.pid) == pid), None)

        found = await until(leading)
        assert found is not None
        return found

    async def schedule(self, *options: str) -> tuple[int, str, str]:
        """`poolsweep schedule FILE`: its exit code, output and errors."""
        command = [*POOLSWEEP, "schedule", str(self.path), *options]
        process = self.start(command, name="schedule")
        code = await process.ended()
        return code, process.output, process.text

    async def listed(self) -> dict[str, Any]:
        """What `poolsweep schedule FILE --json` says."""
        code, output, errors = await self.schedule("--json")
        assert code == 0, errors
        found: dict[str, Any] = json.loads(output)
        return found

    async def last_was(
        self, name: str, at: datetime, state: NightState = NightState.DONE, by: str = BY
    ) -> None:
        """The almanac says that this was a policy's last night."""
        record = Night(name, at, state, by).record()
        await self.redis.hset(keys.NIGHTS, name, record)

    async def past(self, name: str) -> list[Night]:
        """A policy's past nights, oldest first."""
        return (await self.almanac.past(name, 100))[::-1]

    async def past_when(
        self, name: str, count: int, state: NightState = NightState.DONE
    ) -> list[Night]:
        """The same, once there are so many of a state."""

        async def nights() -> list[Night]:
            found = await self.past(name)
            return found if sum(night.state is state for night in found) >= count else []

        return await until(nights, within_s=40)

    async def runs(self) -> list[Run]:
        """The runs, oldest first."""
        return (await self.ledger.runs(limit=1000))[::-1]

    async def logged(self, process: Process, event: str, count: int = 1) -> list[dict[str, Any]]:
        """The lines of a process' log about an event, once there are so many."""

        async def lines() -> list[dict[str, Any]]:
            found = process.events(event)
            return found if len(found) >= count else []

        return await until(lines, within_s=40)

    @contextlib.asynccontextmanager
    async def rota(self) -> AsyncIterator[Rota]:
        """A scheduler's rota in this process, without Celery: for what does not depend on it."""
        redis = connect(self.settings)
        watch = FileWatch(self.path, policies.load)
        ledger = Ledger(redis)
        announcer = Announcer(redis, ledger, watch.current.notifications)
        directory = Directory(self.settings, watch.current.projects)
        made = Rota(Office(directory, redis, ledger), announcer, watch)
        try:
            yield made
        finally:
            await made.close()
            await redis.aclose()


def last_night(ago: timedelta) -> tuple[datetime, str]:
    """A minute so long ago, to the minute, and the schedule by which only it was due that day."""
    at = (datetime.now(UTC) - ago).replace(second=0, microsecond=0)
    return at, f"{at.minute} {at.hour} * * *"


async def steps(rota: Rota, condition: Any) -> Any:
    """Let a rota go on, a step every twentieth of a second, until a condition holds."""

    async def stepped() -> Any:
        await rota.step()
        await asyncio.sleep(0.05)
        return await condition()

    return await until(stepped)


@pytest.fixture
async def cloud() -> AsyncIterator[Cloud]:
    async with serving() as running:
        yield running


@pytest.fixture
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RedisServer]:
    """A Redis of this test."""
    started = RedisServer(tmp_path_factory.mktemp("redis"))
    yield started
    started.kill()


@pytest.fixture
async def stage(tmp_path: Path, cloud: Cloud, server: RedisServer) -> AsyncIterator[Stage]:
    settings = settings_for(cloud, server.url)
    async with server.connected() as redis:
        made = Stage(tmp_path, cloud, server, redis, settings)
        yield made
        for process in made.started:
            process.kill()
