"""The page as a process serves it: where it listens, and for whom."""

from __future__ import annotations

import asyncio
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING

import structlog
from aiohttp import web

from scheduler.file_watch import FileWatch
from scheduler.intake import clients
from scheduler.intake.addresses import canonical_host, is_loopback
from scheduler.intake.serving import make_runner
from scheduler.review.web.app import Parts, make_app
from worker.cancellation import cancel
from worker.projects import Directory
from worker.settings import SettingsError
from worker.yaml_source import YamlError

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from redis.asyncio import Redis

    from scheduler.intake.clients import Clients
    from scheduler.prices import Prices
    from worker.ledger import Ledger
    from worker.settings import Settings

LOOK_S = 1.0
BACKLOG = 128
SHUTDOWN_S = 2.0
"""Whoever still reads a page when it stops gets so long."""

log = structlog.get_logger(__name__)


class Audience:
    """For whom the page is, from the settings.

    Args:
        config: the settings.
        host: where the page is to listen.

    Attributes:
        watch: the clients' file; None: the page is for this machine alone.

    Raises:
        SettingsError: strangers would reach it, or read on the way what it says.
        YamlError: the clients' file is not as it must be.
    """

    def __init__(self, config: Settings, host: str) -> None:
        self.watch: FileWatch[Clients] | None = None
        if config.clients_file is not None:
            self.watch = FileWatch(config.clients_file.absolute(), clients.load)
        if _is_this_machine(host):
            return
        if self.watch is None:
            raise SettingsError(
                f"--host, POOLSWEEP_REVIEW_HOST: {host!r} is not this machine alone, and nobody "
                "would have to sign in; accepted: 127.0.0.1, ::1 or localhost, or "
                "POOLSWEEP_CLIENTS_FILE besides"
            )
        if not config.insecure_http:
            raise SettingsError(
                f"--host, POOLSWEEP_REVIEW_HOST: {host!r} is not this machine alone, and tokens "
                "would be sent in the clear; accepted: POOLSWEEP_INSECURE_HTTP=true besides, "
                "behind a proxy that encrypts"
            )

    @property
    def clients(self) -> Clients | None:
        """The clients as they are now."""
        return None if self.watch is None else self.watch.current

    async def keep_up(self) -> None:
        """Take up what changes in the clients' file, until cancelled."""
        while self.watch is not None:
            try:
                if await asyncio.to_thread(self.watch.look):
                    log.info("clients_taken_up", clients=[each.name for each in self.watch.current])
            except YamlError as error:
                log.error("clients_rejected", reason=str(error))
            await asyncio.sleep(LOOK_S)


@asynccontextmanager
async def served(
    config: Settings,
    redis: Redis,
    ledger: Ledger,
    audience: Audience,
    *,
    host: str,
    port: int,
    prices: Prices | None = None,
) -> AsyncIterator[str]:
    """Serve the page for the time of the `with` block.

    Args:
        config: the settings.
        redis: a connection that decodes responses.
        ledger: the runs in it.
        audience: for whom.
        host: the address to listen on.
        port: the port; 0: any.
        prices: what nodes cost; None: not known.

    Returns:
        The page's URL.

    Raises:
        SettingsError: it cannot listen there.
        YamlError: the projects' file is not as it must be.
    """
    directory = Directory.of(config)
    watch = audience.watch
    parts = Parts(
        redis=redis,
        ledger=ledger,
        clients=None if watch is None else lambda: watch.current,
        quota=directory.quota,
        endpoints=_endpoints(directory),
        prices=prices,
    )
    runner = make_runner(make_app(parts), shutdown_s=SHUTDOWN_S)
    await runner.setup()
    going = asyncio.create_task(audience.keep_up())
    try:
        try:
            await web.TCPSite(runner, host, port, backlog=BACKLOG).start()
        except OSError as error:
            raise SettingsError(
                f"--host, --port, POOLSWEEP_REVIEW_HOST, POOLSWEEP_REVIEW_PORT: {host}:{port} "
                f"cannot be listened on: {error.strerror}; accepted: an address of this machine "
                "with a port that is free, 0 for any"
            ) from None
        name, number = runner.addresses[0][:2]
        yield f"http://[{name}]:{number}/" if ":" in name else f"http://{name}:{number}/"
    finally:
        await cancel(going)
        await runner.cleanup()


def _is_this_machine(host: str) -> bool:
    try:
        return is_loopback(canonical_host(host))
    except ValueError:
        return False


def _endpoints(directory: Directory) -> list[str]:
    """Those that are configured: none need be, only to look at what is there."""
    try:
        return directory.endpoints
    except SettingsError:
        return []
