"""Celery's consumer, which no message can end.

A batch is a wake-up call and never the record, so a message that cannot be read is dropped: its
jobs, if it had any, are sent again.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import structlog
from celery.worker import consumer

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
            except (*self.connection_errors, *self.channel_errors):
                raise  # Redis has gone or refuses, which is no fault of the message
            except Exception:
                log.exception("message_crashed")
                if not message.acknowledged:
                    message.ack()

        return handle_safely
