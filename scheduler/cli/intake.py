"""`poolsweep intake`: a thin face on the intake's Celery worker."""

from __future__ import annotations

import os
import threading
from typing import Annotated, Any

import typer
from celery import signals
from celery.exceptions import WorkerShutdown

from scheduler.cli.worker import end_with_stdin, note_stops
from worker.settings import ENV_PREFIX, settings


def intake(
    host: Annotated[
        str | None, typer.Option(help="The address to listen on; POOLSWEEP_INTAKE_HOST.")
    ] = None,
    port: Annotated[
        int | None,
        typer.Option(min=0, max=65_535, help="The port, 0 for any; POOLSWEEP_INTAKE_PORT."),
    ] = None,
    exit_with_stdin: Annotated[
        bool, typer.Option(hidden=True, help="End when standard input does.")
    ] = False,
) -> None:
    """Take requests in from other systems: `celery -A scheduler.intake.app worker`."""
    for name, value in (("INTAKE_HOST", host), ("INTAKE_PORT", port)):
        if value is not None:
            os.environ[ENV_PREFIX + name] = str(value)
    settings.cache_clear()
    early = note_stops()
    if exit_with_stdin:
        threading.Thread(target=end_with_stdin, daemon=True).start()
    from scheduler.intake.app import app

    def stop_if_asked(**_: Any) -> None:
        if early:
            raise WorkerShutdown(0)

    # At the second, handlers of Celery's own are there; the first does not wait for the broker.
    for moment in (signals.celeryd_after_setup, signals.worker_ready):
        moment.connect(stop_if_asked, weak=False)
    app.worker_main(
        [
            "--quiet",
            "worker",
            "--loglevel",
            settings().log_level,
            "--without-gossip",
            "--without-mingle",
        ]
    )
