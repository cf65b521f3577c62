"""The intake as Celery starts it: `celery -A scheduler.intake.app worker`."""

from __future__ import annotations

import logging
import os
import signal
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from celery import signals

from scheduler.intake import process
from scheduler.intake.broker import make_app
from worker import log
from worker import process as redis_member
from worker.embedded_redis import EmbeddedRedisError
from worker.settings import SettingsError, settings
from worker.yaml_source import YamlError

if TYPE_CHECKING:
    from collections.abc import Callable
    from types import FrameType

    from celery import Celery

EXIT_USAGE = 2


def _end(error: Exception) -> NoReturn:
    """An intake that cannot work says why in a sentence, where Celery would print a traceback."""
    sys.stderr.write(f"poolsweep: {error}\n")
    raise SystemExit(EXIT_USAGE)


def _make() -> Celery:
    try:
        return make_app(settings())
    except SettingsError as error:
        _end(error)


app = _make()


@signals.celeryd_init.connect
def _start(**_: Any) -> None:
    """Before Celery looks for its broker: whoever asks by HTTP is told what is missing."""
    config = settings()
    log.configure(config)
    for name in ("celery.worker.strategy", "celery.app.trace"):
        # Two lines for each message, and for each time that one whose client asks too often comes
        # round. What became of it is said once, in words of our own.
        logging.getLogger(name).setLevel(logging.WARNING)
    if log.is_json(config, sys.stderr):
        # Celery prints a banner and a farewell past all logging.
        sys.__stdout__ = Path(os.devnull).open("w")  # type: ignore[misc] # noqa: SIM115
    try:
        redis_member.join_redis()
        process.begin(config)
    except (SettingsError, YamlError, EmbeddedRedisError) as error:
        redis_member.stop()
        _end(error)


@signals.setup_logging.connect
def _leave_logging_alone(**_: Any) -> None:
    """That somebody listens keeps Celery from setting up logs of its own."""


@signals.worker_ready.connect
def _consume(**_: Any) -> None:
    process.current().broker_is_there()
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGQUIT):
        _drain_first(number)


def _drain_first(number: int) -> None:
    """On a signal, nothing new is taken, before Celery begins to wait for what is under way."""
    celerys: Callable[[int, FrameType | None], Any] | int | None = signal.getsignal(number)

    def handle(given: int, frame: FrameType | None) -> None:
        process.drain()
        if callable(celerys):
            celerys(given, frame)

    signal.signal(number, handle)


@signals.worker_shutdown.connect
def _stop(**_: Any) -> None:
    process.stop()
    redis_member.stop()
