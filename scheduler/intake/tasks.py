"""The Celery task by which other systems ask for deletions, and what is no such task.

Nothing that comes by the queue is dropped without a trace, and nothing comes again and again:
whatever Celery itself would refuse, or stumble over, is noted as refused.
"""

from __future__ import annotations

import json
from concurrent.futures import CancelledError
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

import structlog
from celery.exceptions import Reject
from celery.worker import consumer, request
from redis.exceptions import RedisError

from scheduler.intake import process
from scheduler.intake.app import app
from scheduler.intake.broker import SWEPT, TASK, UNREADABLE
from scheduler.intake.messages import Message, RefusedError, check_fields
from scheduler.intake.request import Way
from worker.modelarts.answers import printable

if TYPE_CHECKING:
    from collections.abc import Callable

LONGEST_ID = 200
MOST_SWEPT = 5
"""A message with which so many processes have died is one that kills them."""
_SHOWN = 200

log = structlog.get_logger(__name__)


class Request(request.Request):  # type: ignore[misc]
    """Celery's request, with one that has expired noted as refused."""

    def _announce_revoked(
        self, reason: str, terminated: bool, signum: int | None, expired: bool
    ) -> None:
        if expired:
            message = _message(str(self.id), list(self.args or ()), dict(self.kwargs or {}))
            if not _refuse(message, "it expired before it was taken"):
                # Back to the queue, until it can be noted; nothing is left to acknowledge then.
                self.reject(requeue=True)
        super()._announce_revoked(reason, terminated, signum, expired)


@app.task(name=TASK, bind=True, Request=Request)
def request_deletion(self: Any, *args: Any, **kwargs: Any) -> None:
    """Take a request in: `request` (an object), `client`, and perhaps `idempotency_key`."""
    message = _message(str(self.request.id), list(args), kwargs)
    try:
        if args:
            process.current().refuse(message, "only keyword arguments are accepted")
        elif process.current().take(message):
            # Its client asks too often. Behind the others, it does not hold them up.
            raise Reject("its client asks too often", requeue=True)
    except (RedisError, CancelledError, process.StoppedError) as error:
        raise Reject(error, requeue=True) from error


class Consumer(consumer.Consumer):  # type: ignore[misc]
    """Celery's consumer, with refused messages noted."""

    def create_task_handler(self, *args: Any, **kwargs: Any) -> Callable[[Any], None]:
        """What handles a message that has come."""
        handle = super().create_task_handler(*args, **kwargs)

        def look_first(message: Any) -> None:
            try:
                _look_at(message)
                handle(message)
            except RefusedError as error:
                self._refuse(message, str(error))
            except Exception as error:
                # Of what a message may say of itself, Celery foresees some. What it does not would
                # end the process, with the message given back for the next one.
                log.exception("message_crashed", way=str(Way.CELERY))
                self._refuse(message, f"Celery does not take it: {error}")

        return look_first

    def on_invalid_task(self, _body: Any, message: Any, exc: Exception) -> None:
        """Celery does not take a message that is otherwise one: its eta cannot be read, say."""
        self._refuse(message, str(exc))

    def on_decode_error(self, message: Any, exc: Exception | None = None) -> None:
        """Celery cannot read a message."""
        self._refuse(message, f"it cannot be read: {exc}")

    def _refuse(self, message: Any, reason: str) -> None:
        message_id = message.headers.get("id")
        if not isinstance(message_id, str):
            message_id = message.delivery_tag
        body = message.body
        text = body.decode(errors="replace") if isinstance(body, bytes) else str(body)
        noted = _refuse(Message(Way.CELERY, message_id, _fields(message), text), reason)
        # What could not be noted goes back to the queue, until it can.
        if not message.acknowledged:
            message.reject_log_error(log, self.connection_errors, requeue=not noted)


def _refuse(message: Message, reason: str) -> bool:
    try:
        process.current().refuse(message, reason)
    except (RedisError, CancelledError, process.StoppedError) as error:
        log.warning("redis_unreachable", reason=str(error))
        return False
    return True


def _message(task_id: str, args: list[Any], kwargs: dict[str, Any]) -> Message:
    content = {"args": args, "kwargs": kwargs} if args else kwargs
    return Message(Way.CELERY, task_id, kwargs, json.dumps(content, default=str))


def _look_at(message: Any) -> None:
    """See that a message is one that Celery takes without stumbling.

    Raises:
        RefusedError: it is not.
    """
    headers = message.headers
    if message.content_type == UNREADABLE and "why" in headers:
        raise RefusedError(f"no message that can be read: {headers['why']}")
    try:
        payload = message.payload
    except Exception as error:
        # Decoders raise what they like.
        raise RefusedError(f"its body cannot be read: {printable(str(error), _SHOWN)}") from None
    # Protocol 1 has in the body what protocol 2 has in the headers.
    said = headers if "task" in headers else payload
    if not isinstance(said, dict) or "task" not in said:
        raise RefusedError("it is no task")
    if said["task"] != TASK:
        shown = printable(repr(said["task"]), _SHOWN)
        raise RefusedError(f"task {shown} is not accepted here; accepted: {TASK}")
    swept = message.delivery_info.get(SWEPT, 0)
    # Processes may die for other reasons, and it waits long.
    if swept >= MOST_SWEPT and not _is_yet_to_come(said.get("eta")):
        raise RefusedError(f"{swept} times, who took it died, and it never came to an end")
    task_id = said.get("id")
    if not isinstance(task_id, str) or not 1 <= len(task_id) <= LONGEST_ID:
        raise RefusedError(f"its id is not accepted: a text of 1 to {LONGEST_ID} characters")
    args, kwargs = _arguments(payload)
    if not isinstance(args, list) or not isinstance(kwargs, dict):
        raise RefusedError("its arguments are not accepted: a list and an object")
    if not _is_plain(payload):
        raise RefusedError("it asks for more than this task: callbacks and chains are not accepted")
    check_fields(kwargs)


def _is_yet_to_come(eta: Any) -> bool:
    try:
        time = datetime.fromisoformat(eta)
    except (TypeError, ValueError):
        return False
    return (time if time.tzinfo else time.replace(tzinfo=UTC)) > datetime.now(UTC)


def _arguments(payload: Any) -> tuple[Any, Any]:
    if isinstance(payload, dict):
        return payload.get("args", []), payload.get("kwargs", {})
    if isinstance(payload, list) and len(payload) == 3:
        return payload[0], payload[1]
    return None, None


def _is_plain(payload: Any) -> bool:
    """Whether a message asks for nothing but its task, as far as its body says."""
    options = payload[2] if isinstance(payload, list) else payload
    if options is None:
        return True
    names = ("callbacks", "errbacks", "chain", "chord")
    return isinstance(options, dict) and not any(options.get(name) for name in names)


def _fields(message: Any) -> dict[str, Any]:
    """The keyword arguments of a refused message, as far as there are any."""
    try:
        _, kwargs = _arguments(message.payload)
    except Exception:
        return {}
    return kwargs if isinstance(kwargs, dict) else {}
