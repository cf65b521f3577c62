"""The worker as Celery starts it: `celery -A worker.app worker`."""

from __future__ import annotations

from typing import Any

from celery import signals

from worker import log, process
from worker.broker import make_app
from worker.settings import settings

app = make_app(settings())


@signals.celeryd_init.connect
def _prepare(**_: Any) -> None:
    log.configure(settings())
    process.join_redis()


@signals.setup_logging.connect
def _leave_logging_alone(**_: Any) -> None:
    """That somebody listens keeps Celery from setting up logs of its own."""


@signals.worker_ready.connect
def _start(**_: Any) -> None:
    process.current().reconcile()


@signals.worker_shutting_down.connect
def _drain(**_: Any) -> None:
    process.current().drain()


@signals.worker_shutdown.connect
def _stop(**_: Any) -> None:
    process.stop()
