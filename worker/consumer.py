"""Celery's consumer, which no message can end.

A batch is a wake-up call and never the record, so a message that cannot be read is dropped: its
jobs, if it had any, are sent again.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import structlog
from celery.worker import consumer
from redis.exceptions import RedisError

if TYPE_CHECKING:
    from collections.abc import Callable

log = structlog.get_logger(__name__)


class Consumer(consumer.Consumer):  # type: ignore[misc]
    """Takes messages; one that Celery stumbles over is logged and done with."""

    def create_task_handler(self, *args: Any, **kwargs: Any) -> Callable[[Any], None]:
        """What handles a message that has come."""
        handle = super().create_task_handler(*args, **kwargs)

        def handle_safely(message: Any) -> None:
            try:
                handle(message)
            except RedisError:
                # Redis has gone or refuses, which is no fault of the message. (Kombu counts any
                # KeyError and OSError among its errors of a connection.)
                raise
            except Exception:
                log.exception("message_crashed")
                if not message.acknowledged:
                    message.ack()

        return handle_safely
