"""`poolsweep worker`: a thin face on the Celery worker."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
import threading
from typing import TYPE_CHECKING, Annotated, Any

import typer
from celery import signals

from scheduler.cli.session import connected
from worker.settings import settings

if TYPE_CHECKING:
    from worker.settings import Settings


def worker(
    exit_with_stdin: Annotated[
        bool, typer.Option(hidden=True, help="End when standard input does.")
    ] = False,
) -> None:
    """Execute runs until stopped: the same as `celery -A worker.app worker`."""
    config = settings()
    if config.redis_url is not None:
        # Celery would try for ever, which helps nobody who mistyped the URL or the password.
        asyncio.run(_check_redis(config))
    early = note_stops()
    if exit_with_stdin:
        threading.Thread(target=end_with_stdin, daemon=True).start()
    from worker.app import app

    if early:
        return

    def stop_if_asked(**_: Any) -> None:
        for number in early[:1]:
            os.kill(os.getpid(), number)

    signals.worker_ready.connect(stop_if_asked, weak=False)
    app.worker_main(
        [
            "--quiet",
            "worker",
            "--loglevel",
            config.log_level,
            "--without-gossip",
            "--without-mingle",
        ]
    )


def note_stops() -> list[int]:
    """The signals to stop that come from now on, until Celery has handlers of its own.

    Interrupted halfway through its start, Celery leaves things behind or hangs.
    """
    noted: list[int] = []
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda given, _: noted.append(given))
    return noted


def end_with_stdin() -> None:
    """Stop this process in order once its standard input ends."""
    while os.read(sys.stdin.fileno(), 4096):
        pass
    os.kill(os.getpid(), signal.SIGTERM)


async def _check_redis(config: Settings) -> None:
    async with connected(config):
        pass
