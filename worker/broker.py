"""Celery, set for reliability.

A message is acknowledged only when its batch is done, a worker takes no more than it works on,
nothing but JSON is read, and there is no result backend, since the ledger is the result. One
process works on several batches in threads, which do nothing but wait for its event loop.
"""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

from redis.exceptions import ConnectionError as RedisConnectionError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from celery import Celery

    from worker.feed import Send
    from worker.settings import Settings

EXECUTE_BATCH = "poolsweep.execute_batch"
KEY_PREFIX = "poolsweep:broker:"


def queue_name(endpoint: str) -> str:
    """The queue of an endpoint's batches: a worker configured for another never sees them.

    Args:
        endpoint: the base URL of the API.
    """
    return f"batches:{urlsplit(endpoint).netloc}"


def make_app(settings: Settings, endpoints: Sequence[str]) -> Celery:
    """A Celery app; nothing is connected yet.

    Args:
        settings: broker, times.
        endpoints: the base URLs of the APIs whose batches a worker of this app takes.
    """
    # Celery takes a tenth of a second, for which a command that only shows a plan has no use.
    from celery import Celery

    from worker import transport

    queues = [queue_name(endpoint) for endpoint in endpoints]
    app = Celery("poolsweep", amqp=transport.amqp(), include=["worker.tasks"], set_as_current=False)
    app.conf.update(
        broker_url=settings.broker_location,
        broker_transport_options={
            "visibility_timeout": round(settings.visibility_timeout_s),
            "global_keyprefix": KEY_PREFIX,
            "socket_timeout": 30,
            "socket_keepalive": True,
        },
        broker_connection_retry_on_startup=True,
        broker_connection_max_retries=None,
        # Redis may refuse too, as when it is full; without this that ends the process.
        broker_channel_error_retry=True,
        task_default_queue=queues[0],
        task_queues={name: {"routing_key": name} for name in queues},
        task_serializer="json",
        accept_content=["json"],
        task_ignore_result=True,
        result_backend=None,
        task_acks_late=True,
        task_reject_on_worker_lost=True,
        worker_consumer="worker.consumer:Consumer",
        worker_prefetch_multiplier=1,
        worker_pool="threads",
        worker_concurrency=settings.worker_batches,
        worker_soft_shutdown_timeout=settings.shutdown_s,
        worker_hijack_root_logger=False,
        worker_redirect_stdouts=False,
    )
    return app


def sender(app: Celery, endpoint: str) -> Send:
    """What puts batches for an endpoint on the broker, without holding up the event loop meanwhile.

    It raises a RedisError if the broker cannot be reached, since that is the ledger's Redis.
    """
    from kombu.exceptions import OperationalError  # part of Celery: see make_app

    queue = queue_name(endpoint)

    async def send(run_id: str, numbers: list[int]) -> None:
        message = {"run_id": run_id, "numbers": numbers}
        try:
            await asyncio.to_thread(app.send_task, EXECUTE_BATCH, kwargs=message, queue=queue)
        except OperationalError as error:
            raise RedisConnectionError(str(error)) from error

    return send
