"""`poolsweep worker`: a thin face on the Celery worker."""

from __future__ import annotations

import os
import signal
import sys
import threading
from typing import Annotated

import typer

from worker.settings import settings


def worker(
    exit_with_stdin: Annotated[
        bool, typer.Option(hidden=True, help="End when standard input does.")
    ] = False,
) -> None:
    """Execute runs until stopped: the same as `celery -A worker.app worker`."""
    config = settings()
    from worker.app import app

    if exit_with_stdin:
        threading.Thread(target=_end_with_stdin, daemon=True).start()
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


def _end_with_stdin() -> None:
    while os.read(sys.stdin.fileno(), 4096):
        pass
    os.kill(os.getpid(), signal.SIGTERM)
