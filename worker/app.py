"""The Celery app: `celery -A worker.app worker`.

Set for reliability: a message is acknowledged only when its batch is done, a worker takes no more
than it works on, nothing but JSON is read, and there is no result backend, since the ledger is
the result. One process works on several batches in threads, which do nothing but wait for the
process's event loop.
"""

from __future__ import annotations

from typing import Any
from urllib.parse import urlsplit

from celery import Celery, signals

from worker import log
from worker.settings import Settings, settings

BROKER_KEY_PREFIX = "poolsweep:broker:"


def queue_name(endpoint: str) -> str:
    """The queue of an endpoint's batches: a worker configured for another never sees them."""
    return f"batches:{urlsplit(endpoint).netloc}"


def make_app(config: Settings) -> Celery:
    """A Celery app for the settings.

    Args:
        config: broker, endpoint, times.

    Returns:
        The app, with the tasks known by name; nothing is connected yet.

    Raises:
        SettingsError: no endpoint is set, or it is not one.
    """
    made = Celery("poolsweep", include=["worker.tasks"])
    made.conf.update(
        broker_url=config.broker_location,
        broker_transport_options={
            "visibility_timeout": round(config.visibility_timeout_s),
            "global_keyprefix": BROKER_KEY_PREFIX,
            "socket_timeout": 30,
            "socket_keepalive": True,
        },
        broker_connection_retry_on_startup=True,
        broker_connection_max_retries=None,
        task_default_queue=queue_name(config.api_endpoint.url),
        task_serializer="json",
        accept_content=["json"],
        task_ignore_result=True,
        result_backend=None,
        task_acks_late=True,
        task_reject_on_worker_lost=True,
        task_track_started=False,
        worker_prefetch_multiplier=1,
        worker_pool="threads",
        worker_concurrency=config.worker_batches,
        worker_soft_shutdown_timeout=config.shutdown_s,
        worker_enable_soft_shutdown_on_idle=False,
        worker_hijack_root_logger=False,
        worker_redirect_stdouts=False,
        worker_send_task_events=False,
    )
    return made


@signals.setup_logging.connect
def _log_through_structlog(**_: Any) -> None:
    log.configure(settings())


app = make_app(settings())
