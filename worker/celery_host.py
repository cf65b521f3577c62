"""What the processes that Celery runs have in common: how they begin, and how they are stopped."""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from worker import log

if TYPE_CHECKING:
    from collections.abc import Callable
    from types import FrameType

    from worker.settings import Settings

EXIT_USAGE = 2


def refuse(error: Exception) -> NoReturn:
    """End a process that cannot work with a sentence, where Celery would print a traceback."""
    sys.stderr.write(f"poolsweep: {error}\n")
    raise SystemExit(EXIT_USAGE)


def set_up_logs(config: Settings) -> None:
    """Send all logs to stderr, and nothing past them.

    Args:
        config: level and format.
    """
    log.configure(config)
    if log.is_json(config, sys.stderr):
        # Celery prints a banner and a farewell past all logging.
        sys.__stdout__ = Path(os.devnull).open("w")  # type: ignore[misc] # noqa: SIM115


def drain_first(drain: Callable[[], None]) -> None:
    """Have something done on a signal to stop, before Celery begins to wait for what goes on.

    Celery's own signal `worker_shutting_down` comes too late for a cold shutdown.

    Args:
        drain: what; safe in a signal handler.
    """
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGQUIT):
        _before(number, drain)


def _before(number: int, drain: Callable[[], None]) -> None:
    celerys: Callable[[int, FrameType | None], Any] | int | None = signal.getsignal(number)

    def handle(given: int, frame: FrameType | None) -> None:
        drain()
        if callable(celerys):
            celerys(given, frame)

    signal.signal(number, handle)
