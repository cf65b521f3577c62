"""The intake as Celery starts it: `celery -A scheduler.intake.app worker`."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any

from celery import signals

from scheduler.intake import process
from scheduler.intake.broker import make_app
from worker import celery_host, garbage
from worker import process as redis_member
from worker.embedded_redis import EmbeddedRedisError
from worker.settings import SettingsError, settings
from worker.yaml_source import YamlError

if TYPE_CHECKING:
    from celery import Celery


def _make() -> Celery:
    try:
        return make_app(settings())
    except SettingsError as error:
        celery_host.refuse(error)


app = _make()


@signals.celeryd_init.connect
def _start(**_: Any) -> None:
    """Before Celery looks for its broker: whoever asks by HTTP is told what is missing."""
    config = settings()
    celery_host.set_up_logs(config)
    # Its lines hold the arguments of a message, and so the URL of a webhook.
    logging.getLogger("celery.pool").setLevel(logging.INFO)
    for name in ("celery.worker.strategy", "celery.app.trace"):
        # Two lines for each message, and for each time that one whose client asks too often comes
        # round. What became of it is said once, in words of our own.
        logging.getLogger(name).setLevel(logging.WARNING)
    try:
        redis_member.join_redis()
        process.begin(config)
    except (SettingsError, YamlError, EmbeddedRedisError) as error:
        redis_member.stop()
        celery_host.refuse(error)


@signals.setup_logging.connect
def _leave_logging_alone(**_: Any) -> None:
    """That somebody listens keeps Celery from setting up logs of its own."""


@signals.worker_ready.connect
def _consume(**_: Any) -> None:
    process.current().broker_is_there()
    garbage.settle()
    # Nothing new is taken.
    celery_host.drain_first(process.drain)


@signals.worker_shutdown.connect
def _stop(**_: Any) -> None:
    process.stop()
    redis_member.stop()
