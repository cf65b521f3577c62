"""The scheduler as Celery beat runs it: `celery -A scheduler.beat beat`.

Celery's own schedulers keep their state in a file, and those that keep it in Redis know one time
zone, no window for making up a missed night and no record of one; so this is a scheduler class
of its own, with the nights and the lead in Redis. Each tick is a step of the rota.
"""

from __future__ import annotations

import asyncio
import contextlib
import threading
from typing import TYPE_CHECKING, Any

from celery import Celery, signals
from celery.beat import Scheduler
from redis.exceptions import RedisError

from scheduler import policy as policies
from scheduler.announcer import Announcer
from scheduler.rota import STEP_S, Rota
from scheduler.sweep import Office
from worker import log
from worker.ledger import Ledger
from worker.process import join_redis
from worker.projects import Directory
from worker.redis_connection import connect
from worker.settings import SettingsError, settings

if TYPE_CHECKING:
    from collections.abc import Coroutine
    from pathlib import Path


def policies_path() -> Path:
    """The policy file that the settings name.

    Raises:
        SettingsError: they name none.
    """
    path = settings().policies_file
    if path is None:
        raise SettingsError("POOLSWEEP_POLICIES_FILE: not set; accepted: the path of a policy file")
    return path


class RotaScheduler(Scheduler):  # type: ignore[misc]
    """Celery beat's scheduler; it sends no tasks, since the rota starts the runs itself."""

    def setup_schedule(self) -> None:
        """Read the policies and connect; called by beat when it starts.

        Raises:
            YamlError: the policy file is not as it must be.
        """
        join_redis()
        path = policies_path()
        policy_file = policies.load(path)
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="rota", daemon=True)
        self._thread.start()
        self._rota = self._do(self._make(path, policy_file))

    async def _make(self, path: Path, policy_file: policies.PolicyFile) -> Rota:
        config = settings()
        self._redis = connect(config)
        ledger = Ledger(self._redis, retention_days=config.retention_days)
        directory = Directory(config, policy_file.projects)
        office = Office(directory, self._redis, ledger)
        announcer = Announcer(self._redis, ledger, policy_file.notifications)
        return Rota(office, announcer, path, policy_file)

    def tick(self, *_: Any, **__: Any) -> float:
        """One step. Returns the seconds until the next."""
        self._do(self._rota.step())
        return STEP_S

    def close(self) -> None:
        """Let another scheduler lead; called by beat when it stops."""
        with contextlib.suppress(RedisError):
            self._do(self._close())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(timeout=5)

    async def _close(self) -> None:
        await self._rota.close()
        await self._redis.aclose()

    def _do(self, work: Coroutine[Any, Any, Any]) -> Any:
        return asyncio.run_coroutine_threadsafe(work, self._loop).result()

    @property
    def info(self) -> str:
        """What beat says of it when it starts."""
        return f"    . policies -> {policies_path()}"


app = Celery("poolsweep-scheduler", set_as_current=False)
app.conf.update(
    beat_scheduler=f"{__name__}:RotaScheduler",
    beat_max_loop_interval=STEP_S,
    worker_hijack_root_logger=False,
)


@signals.beat_init.connect
def _prepare(**_: Any) -> None:
    log.configure(settings())


@signals.setup_logging.connect
def _leave_logging_alone(**_: Any) -> None:
    """That somebody listens keeps Celery from setting up logs of its own."""
