"""The worker as Celery starts it: `celery -A worker.app worker`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from celery import signals

from worker import celery_host, garbage, process
from worker.broker import make_app
from worker.embedded_redis import EmbeddedRedisError
from worker.projects import Directory
from worker.settings import SettingsError, settings
from worker.yaml_source import YamlError

if TYPE_CHECKING:
    from celery import Celery


def _make() -> Celery:
    try:
        config = settings()
        directory = Directory.of(config)
        endpoints = directory.endpoints
        for endpoint in endpoints:
            directory.check(endpoint)
        return make_app(config, endpoints)
    except (SettingsError, YamlError) as error:
        celery_host.refuse(error)


app = _make()


@signals.celeryd_init.connect
def _prepare(**_: Any) -> None:
    celery_host.set_up_logs(settings())
    try:
        process.join_redis()
    except EmbeddedRedisError as error:
        celery_host.refuse(error)


@signals.setup_logging.connect
def _leave_logging_alone(**_: Any) -> None:
    """That somebody listens keeps Celery from setting up logs of its own."""


@signals.worker_ready.connect
def _start(**_: Any) -> None:
    process.current().reconcile()
    garbage.settle()
    # Batches give back what they can.
    celery_host.drain_first(process.drain)


@signals.worker_shutdown.connect
def _stop(**_: Any) -> None:
    process.stop()
