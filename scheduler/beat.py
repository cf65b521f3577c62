"""The scheduler as Celery beat runs it: `celery -A scheduler.beat beat`.

Celery's own schedulers keep their state in a file, and those that keep it in Redis know one time
zone, no window for making up a missed night and no record of one; so this is a scheduler class
of its own, with the nights and the lead in Redis. Each tick is a step of the rota.
"""

from __future__ import annotations

import asyncio
import contextlib
import signal
from typing import TYPE_CHECKING, Any

import structlog
from celery import Celery, signals
from celery.beat import Scheduler
from redis.exceptions import RedisError

from scheduler import policy
from scheduler.announcer import Announcer
from scheduler.file_watch import FileWatch
from scheduler.rota import STEP_S, Rota
from scheduler.sweep import Office
from worker import celery_host, log, process
from worker.cancellation import cancel
from worker.embedded_redis import EmbeddedRedisError
from worker.ledger import Ledger
from worker.projects import Directory
from worker.redis_connection import connect
from worker.settings import SettingsError, settings
from worker.yaml_source import YamlError

if TYPE_CHECKING:
    from scheduler.policy import PolicyFile
    from worker.settings import Settings

STOP_TIMEOUT_S = 2.0

logger = structlog.get_logger(__name__)


def _read(config: Settings) -> tuple[FileWatch[PolicyFile], Directory]:
    """The policies, and how their projects are reached.

    Raises:
        SettingsError, YamlError: with these no night would run.
    """
    if config.policies_file is None:
        raise SettingsError("POOLSWEEP_POLICIES_FILE: not set; accepted: the path of a policy file")
    watch = FileWatch(config.policies_file.absolute(), policy.load)
    directory = Directory(config, watch.current.projects)
    for endpoint in directory.endpoints:
        directory.check(endpoint)
    return watch, directory


class RotaScheduler(Scheduler):  # type: ignore[misc]
    """Celery beat's scheduler; it sends no tasks, since the rota starts the runs itself."""

    def setup_schedule(self) -> None:
        """Read the policies and connect; called by beat when it starts."""
        self._loop = asyncio.new_event_loop()
        self._stop = asyncio.Event()
        # Celery's handlers would close the scheduler in the middle of a step.
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            if signal.getsignal(number) is not signal.SIG_IGN:
                self._loop.add_signal_handler(number, self._stop.set)
        config = settings()
        try:
            watch, directory = _read(config)
            process.join_redis()
        except (SettingsError, YamlError, EmbeddedRedisError) as error:
            celery_host.refuse(error)
        self._redis = connect(config)
        ledger = Ledger(self._redis, retention_days=config.retention_days)
        announcer = Announcer(self._redis, ledger, watch.current.notifications)
        self._rota = Rota(Office(directory, self._redis, ledger), announcer, watch)

    def tick(self, *_: Any, **__: Any) -> float:
        """One step, and the time until the next, in which sweeps go on. Ends beat if it is told to.

        Returns:
            The seconds that beat is to sleep: none.
        """
        self._loop.run_until_complete(self._turn())
        if self._stop.is_set():
            raise SystemExit
        return 0.0

    async def _turn(self) -> None:
        stop, step = asyncio.create_task(self._stop.wait()), asyncio.create_task(self._step())
        await asyncio.wait({stop, step}, return_when=asyncio.FIRST_COMPLETED)
        await cancel(stop, step)

    async def _step(self) -> None:
        try:
            await self._rota.step()
        except Exception:
            # The next step may well succeed; a scheduler that has gone helps nobody.
            logger.exception("step_crashed")
        await asyncio.sleep(STEP_S)

    def close(self) -> None:
        """Let another scheduler lead; called by beat when it stops, perhaps twice."""
        if self._loop.is_closed():
            return
        with contextlib.suppress(RedisError, TimeoutError):
            self._loop.run_until_complete(self._close())
        process.stop()
        self._loop.close()

    async def _close(self) -> None:
        try:
            async with asyncio.timeout(STOP_TIMEOUT_S):
                await self._rota.close()
        finally:
            await self._redis.aclose()

    @property
    def info(self) -> str:
        """What beat says of it when it starts."""
        return f"    . policies -> {settings().policies_file}"


def _make() -> Celery:
    try:
        config = settings()
        _read(config)  # a mistake is told before anything is started
    except (SettingsError, YamlError) as error:
        celery_host.refuse(error)
    made = Celery("poolsweep-scheduler", set_as_current=False)
    made.conf.update(
        broker_url=config.broker_location,
        beat_scheduler=f"{__name__}:RotaScheduler",
        worker_hijack_root_logger=False,
        worker_redirect_stdouts=False,
    )
    return made


app = _make()


@signals.setup_logging.connect
def _set_up_logging(**_: Any) -> None:
    """That somebody listens keeps Celery from setting up logs of its own."""
    log.configure(settings())
