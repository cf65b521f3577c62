"""The worker as Celery starts it: `celery -A worker.app worker`."""

from __future__ import annotations

import gc
import os
import signal
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from celery import signals

from worker import log, process
from worker.broker import make_app
from worker.embedded_redis import EmbeddedRedisError
from worker.projects import Directory
from worker.settings import SettingsError, settings
from worker.yaml_source import YamlError

if TYPE_CHECKING:
    from collections.abc import Callable
    from types import FrameType

    from celery import Celery

EXIT_USAGE = 2


def _end(error: Exception) -> NoReturn:
    """A worker that cannot work says why in a sentence, where Celery would print a traceback."""
    sys.stderr.write(f"poolsweep: {error}\n")
    raise SystemExit(EXIT_USAGE)


def _make() -> Celery:
    try:
        config = settings()
        directory = Directory.of(config)
        endpoints = directory.endpoints
        for endpoint in endpoints:
            directory.check(endpoint)
        return make_app(config, endpoints)
    except (SettingsError, YamlError) as error:
        _end(error)


app = _make()


@signals.celeryd_init.connect
def _prepare(**_: Any) -> None:
    config = settings()
    log.configure(config)
    if log.is_json(config, sys.stderr):
        # Celery prints a banner and a farewell past all logging.
        sys.__stdout__ = Path(os.devnull).open("w")  # type: ignore[misc] # noqa: SIM115
    try:
        process.join_redis()
    except EmbeddedRedisError as error:
        _end(error)


@signals.setup_logging.connect
def _leave_logging_alone(**_: Any) -> None:
    """That somebody listens keeps Celery from setting up logs of its own."""


@signals.worker_ready.connect
def _start(**_: Any) -> None:
    process.current().reconcile()
    _collect_seldom()
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGQUIT):
        _drain_first(number)


def _collect_seldom() -> None:
    """Have Python look for garbage in circles less often than it would.

    By default it looks after every 700 new objects, of which one list of pools has thousands: that
    took a third of a worker's time. What is loaded by now lives as long as the process.
    """
    gc.collect()
    gc.freeze()
    gc.set_threshold(50_000, 20, 100)


def _drain_first(number: int) -> None:
    """On a signal, batches give back what they can, before Celery begins to wait for them.

    Celery's own signal `worker_shutting_down` comes too late for a cold shutdown.
    """
    celerys: Callable[[int, FrameType | None], Any] | int | None = signal.getsignal(number)

    def handle(given: int, frame: FrameType | None) -> None:
        process.drain()
        if callable(celerys):
            celerys(given, frame)

    signal.signal(number, handle)


@signals.worker_shutdown.connect
def _stop(**_: Any) -> None:
    process.stop()
