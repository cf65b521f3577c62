"""What one intake process owns: an event loop that lives as long as it, and all that runs there.

HTTP, the stream's reader, the planning and the webhooks share it; Celery's threads hand it their
messages and wait.
"""

from __future__ import annotations

import asyncio
import contextlib
import ssl
import threading
from typing import TYPE_CHECKING, TypeVar

import structlog
from aiohttp import web
from redis.exceptions import RedisError

from scheduler.file_watch import FileWatch
from scheduler.intake import clients
from scheduler.intake.addresses import is_loopback
from scheduler.intake.desk import Desk
from scheduler.intake.http import Parts, make_app
from scheduler.intake.messages import Mailroom
from scheduler.intake.planning import Planning
from scheduler.intake.requests import Requests
from scheduler.intake.serving import make_runner
from scheduler.intake.stream import StreamReader
from scheduler.intake.webhooks import ROOM, GuardedResolver, Webhooks
from scheduler.outbox import Outbox, RunWatch
from scheduler.sweep import Office
from worker.cancellation import cancel
from worker.ledger import Ledger
from worker.limiter import Limiter, Quota
from worker.projects import Directory
from worker.redis_connection import connect
from worker.settings import SettingsError
from worker.yaml_source import YamlError

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Coroutine
    from pathlib import Path

    from scheduler.intake.clients import Clients
    from scheduler.intake.messages import Message
    from worker.settings import Settings

T = TypeVar("T")

STEP_S = 1.0
"""Time between two looks at the clients' file, and at the webhooks."""
PING_S = 2.0
STOP_S = 5.0
CLOSE_S = 1.0
"""Time that connections get to be closed once their last requests have had theirs."""
LONGEST_WAIT_S = 1.0
"""A message whose client must wait longer goes behind the others."""

log = structlog.get_logger(__name__)


class StoppedError(RuntimeError):
    """The process is stopping: nothing new is taken."""


class IntakeProcess:
    """The parts of an intake process, put together on a loop in a thread of its own.

    Args:
        config: the settings.

    Raises:
        SettingsError, YamlError: with these nothing could be taken in.
    """

    def __init__(self, config: Settings) -> None:
        self._config = config
        self._tls = _tls(config)
        directory = Directory.of(config)
        self._watch = _watch(config, directory)
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="loop", daemon=True)
        self._going: list[asyncio.Task[None]] = []
        self._has_broker = self._draining = self._ended = False
        self._redis = connect(config)
        ledger = Ledger(self._redis, retention_days=config.retention_days)
        requests = Requests(self._redis)
        desk = Desk(requests, ledger, directory)
        self._quotas: dict[str, Quota] = dict(self._clients().quotas)
        limiter = Limiter(self._redis, endpoint="intake", rate=1, burst=1, own=self._quotas)
        self._mailroom = Mailroom(desk, requests, self._clients, limiter)
        self._ledger = ledger
        self._webhooks = Webhooks(self._clients)
        self._outbox = Outbox(self._redis, room=ROOM, resolver=GuardedResolver(self._clients))
        self._run_watch = RunWatch(self._redis, self._outbox, room=ROOM)
        office = Office(directory, self._redis, ledger)
        self._planning = Planning(office, requests, self._clients, self._run_watch)
        self._stream = StreamReader(self._redis, self._mailroom, lease_s=config.lease_s)
        parts = Parts(desk, ledger, self._clients, limiter, self._missing)
        self._runner = make_runner(make_app(parts), shutdown_s=config.shutdown_s)
        self._thread.start()

    def _clients(self) -> Clients:
        return self._watch.current

    def start(self) -> None:
        """Serve HTTP, and begin with all else.

        Raises:
            SettingsError: it cannot listen where it is told to.
        """
        self._run(self._start())

    async def _start(self) -> None:
        host, port = self._config.intake_host, self._config.intake_port
        await self._runner.setup()
        site = web.TCPSite(self._runner, host, port, ssl_context=self._tls, backlog=1024)
        try:
            await site.start()
        except OSError as error:
            await self._runner.cleanup()
            raise SettingsError(
                f"POOLSWEEP_INTAKE_HOST, POOLSWEEP_INTAKE_PORT: {host}:{port} cannot be listened "
                f"on: {error.strerror}; accepted: an address of this machine with a port that is "
                "free, 0 for any"
            ) from None
        log.info("intake_ready", url=self._url())
        parts = (self._stream.run, self._planning.run, self._look_at_clients, self._tell_ends)
        self._going = [asyncio.create_task(self._keep_going(part)) for part in parts]

    def _url(self) -> str:
        scheme = "http" if self._tls is None else "https"
        host, port = self._runner.addresses[0][:2]
        return f"{scheme}://[{host}]:{port}" if ":" in host else f"{scheme}://{host}:{port}"

    async def _keep_going(self, part: Callable[[], Awaitable[None]]) -> None:
        while not self._draining:
            try:
                await part()
            except Exception:
                # The others go on; and this one may well, the next time.
                log.exception("part_crashed", part=part.__qualname__)
                await asyncio.sleep(STEP_S)

    async def _look_at_clients(self) -> None:
        try:
            if await asyncio.to_thread(self._watch.look):
                self._quotas.clear()
                self._quotas.update(self._clients().quotas)
                log.info("clients_taken_up", clients=[each.name for each in self._clients()])
        except YamlError as error:
            log.error("clients_rejected", reason=str(error))
        await asyncio.sleep(STEP_S)

    async def _tell_ends(self) -> None:
        try:
            await self._run_watch.check(self._ledger, self._webhooks)
            await self._outbox.deliver(self._webhooks)
        except RedisError as error:
            log.warning("redis_unreachable", reason=str(error))
        await asyncio.sleep(STEP_S)

    async def _missing(self) -> list[str]:
        """What it lacks to take requests."""
        missing = []
        if self._draining:
            missing.append("the process is stopping")
        if not self._has_broker:
            missing.append("the broker was not reached yet")
        try:
            async with asyncio.timeout(PING_S):
                await self._redis.ping()
        except (RedisError, TimeoutError):
            missing.append("Redis does not answer")
        return missing

    # For Celery's threads

    def broker_is_there(self) -> None:
        """Celery has its broker."""
        self._has_broker = True

    def take(self, message: Message) -> float:
        """Accept a message or refuse it, on the loop; see `Mailroom.take`.

        Returns:
            0, or the seconds until its client may ask again, if these are many.

        Raises:
            StoppedError: not any more.
        """
        if self._draining:
            raise StoppedError("the intake is stopping")
        return self._run(self._take(message))

    async def _take(self, message: Message) -> float:
        wait_s = await self._mailroom.take(message)
        if wait_s:
            await asyncio.sleep(min(wait_s, LONGEST_WAIT_S))
            wait_s = await self._mailroom.take(message)
        return wait_s

    def refuse(self, message: Message, reason: str) -> None:
        """Note that a message is refused, on the loop; see `Mailroom.refuse`."""
        self._run(self._mailroom.refuse(message, reason))

    def _run(self, work: Coroutine[None, None, T], timeout_s: float | None = None) -> T:
        if self._ended:
            work.close()
            raise StoppedError("the intake has stopped")
        return asyncio.run_coroutine_threadsafe(work, self._loop).result(timeout_s)

    # Its end

    def drain(self) -> None:
        """Take nothing new by message, begin no plan, and say so. Safe in a signal handler."""
        self._loop.call_soon_threadsafe(self._drain)

    def _drain(self) -> None:
        if not self._draining:
            self._draining = True
            log.info("draining")
            self._stream.stop()
            self._planning.stop()

    def stop(self) -> None:
        """End what is under way, leave Redis in good order, and end the loop."""
        with contextlib.suppress(RedisError, TimeoutError):
            self._run(self._close(), timeout_s=self._config.shutdown_s + 3 * STOP_S)
        self._ended = True
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(timeout=STOP_S)
        if not self._thread.is_alive():
            self._loop.close()

    async def _close(self) -> None:
        self._drain()
        ending = [asyncio.create_task(self._runner.cleanup())]
        # The last two only wait for the next look.
        await cancel(*self._going[2:])
        ending += self._going[:2]
        await asyncio.wait(ending, timeout=self._config.shutdown_s + CLOSE_S)
        others = asyncio.all_tasks() - {asyncio.current_task()}
        async with asyncio.timeout(STOP_S):
            await cancel(*others)
            await self._redis.aclose()


def _watch(config: Settings, directory: Directory) -> FileWatch[Clients]:
    """The clients' file, each of whose clients can be served.

    Raises:
        SettingsError, YamlError: it is not set, or not so.
    """

    def load(path: Path) -> Clients:
        found = clients.load(path)
        wrong = []
        for client in found:
            for project_id in client.projects:
                try:
                    directory.endpoint(project_id)
                    if directory.credentials(project_id) is None:
                        _ = config.credentials
                except SettingsError as error:
                    wrong.append(f"{path}: clients.{client.name}: project {project_id}: {error}")
        if wrong:
            raise YamlError(wrong)
        return found

    if config.clients_file is None:
        raise SettingsError(
            "POOLSWEEP_CLIENTS_FILE: not set; accepted: the path of a file of clients"
        )
    return FileWatch(config.clients_file.absolute(), load)


def _tls(config: Settings) -> ssl.SSLContext | None:
    """How connections are encrypted; None: they are not.

    Raises:
        SettingsError: they must be, or the files that are named cannot be used.
    """
    cert, key = config.intake_tls_cert, config.intake_tls_key
    if cert is None and key is None:
        if not is_loopback(config.intake_host) and not config.insecure_http:
            raise SettingsError(
                f"POOLSWEEP_INTAKE_HOST: {config.intake_host!r} is not this machine alone, and "
                "tokens would be sent in the clear; accepted: POOLSWEEP_INTAKE_TLS_CERT and "
                "POOLSWEEP_INTAKE_TLS_KEY besides, or POOLSWEEP_INSECURE_HTTP=true behind a proxy "
                "that encrypts"
            )
        return None
    if cert is None or key is None:
        raise SettingsError(
            "POOLSWEEP_INTAKE_TLS_CERT, POOLSWEEP_INTAKE_TLS_KEY: only one of them is set; "
            "accepted: both"
        )
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    try:
        # Without the function, a key that is encrypted would be asked for on the terminal.
        context.load_cert_chain(cert, key, password=lambda: "")
    except OSError as error:
        raise SettingsError(
            f"POOLSWEEP_INTAKE_TLS_CERT, POOLSWEEP_INTAKE_TLS_KEY: {cert} and {key} cannot be "
            f"used: {error.strerror or error}; accepted: a certificate chain and its key, PEM, not "
            "encrypted"
        ) from None
    return context


_process: IntakeProcess | None = None


def begin(config: Settings) -> None:
    """Start this process's parts.

    Raises:
        SettingsError, YamlError: as with `IntakeProcess` and `IntakeProcess.start`.
    """
    global _process
    _process = IntakeProcess(config)
    _process.start()


def current() -> IntakeProcess:
    """This process's parts.

    Raises:
        StoppedError: there are none yet, or none any more.
    """
    if _process is None:
        raise StoppedError("the intake does not run")
    return _process


def drain() -> None:
    """Have this process take nothing new. Safe in a signal handler."""
    if _process is not None:
        _process.drain()


def stop() -> None:
    """End this process's parts."""
    global _process
    ended, _process = _process, None
    if ended is not None:
        ended.stop()
