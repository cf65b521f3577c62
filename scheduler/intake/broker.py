"""Celery for the intake, set so that no message is lost.

Kombu's Redis transport takes a message off its queue first and notes it as unacknowledged then: a
process that dies in between, or whose Redis does, loses it. A worker's batch is sent again; a
request that is not written down yet is not. So this transport waits without taking, takes and
notes in one step, and keeps its notes alive: what a dead process held comes again after a while,
what a living one holds never does, however long it waits for its time. How often a message came
again by the death of its process goes with it, so that one which kills comes to an end.
"""

from __future__ import annotations

import json
import re
import uuid
from functools import cached_property
from importlib.resources import files
from queue import Empty
from time import monotonic
from typing import TYPE_CHECKING, Any

import redis as redis_py
from celery import Celery
from kombu.transport import virtual

from scheduler.intake.request import LARGEST
from worker import transport
from worker.broker import KEY_PREFIX

if TYPE_CHECKING:
    from worker.settings import Settings

TASK = "poolsweep.request_deletion"
QUEUE = "requests"
AT_ONCE = 8
"""Messages that one process works on at once."""
MOST_LATER = 10_000
"""Messages with a time to come that one process holds."""
LARGEST_MESSAGE = 2 * LARGEST
"""Bytes of a message, whose envelope and base64 add to the request."""
UNREADABLE = "application/octet-stream"
"""The content type under which what is no message is handed on, to be refused like any other."""
SWEPT = "swept"
"""Where a message's `delivery_info` has how often its process died with it."""
_SWEPT_AT_ONCE = 100
_SHOWN = 4_096
_BODY = re.compile(r'("body"\s*:\s*")[^"]*')


def make_app(settings: Settings) -> Celery:
    """The intake's Celery app; nothing is connected yet.

    Args:
        settings: broker, times.
    """
    app = Celery(
        "poolsweep-intake",
        amqp=transport.amqp(_Channel),
        include=["scheduler.intake.tasks"],
        set_as_current=False,
    )
    app.conf.update(
        broker_url=settings.broker_location,
        broker_transport_options={
            # Apart from the workers' own: theirs come again later.
            "unacked_key": f"{QUEUE}:unacked",
            "unacked_index_key": f"{QUEUE}:unacked_index",
            "visibility_timeout": settings.lease_s,
            "unacked_restore_interval": settings.lease_s / 3,
            "global_keyprefix": KEY_PREFIX,
            "socket_timeout": 30,
            "socket_keepalive": True,
        },
        broker_connection_retry_on_startup=True,
        broker_connection_max_retries=None,
        # A server that is full, or read-only for the moment, is no reason to end.
        broker_channel_error_retry=True,
        task_default_queue=QUEUE,
        task_queues={QUEUE: {"routing_key": QUEUE}},
        task_serializer="json",
        accept_content=["json"],
        task_ignore_result=True,
        result_backend=None,
        task_acks_late=True,
        worker_consumer="scheduler.intake.tasks:Consumer",
        worker_prefetch_multiplier=1,
        worker_eta_task_limit=MOST_LATER,
        worker_pool="threads",
        worker_concurrency=AT_ONCE,
        worker_soft_shutdown_timeout=settings.shutdown_s,
        worker_hijack_root_logger=False,
        worker_redirect_stdouts=False,
    )
    return app


class _QoS(transport.QoS):
    """The messages that this process holds."""

    def append(self, message: Any, delivery_tag: str) -> None:
        # Past kombu's own, which would note in Redis what the taking has noted already.
        virtual.QoS.append(self, message, delivery_tag)  # type: ignore[no-untyped-call]

    def restore_visible(self, *_: Any, **__: Any) -> None:
        """Called by Celery every now and then: keep what is held, bring back what nobody holds."""
        held = [tag for tag in self._delivered if tag not in self._dirty]
        self.channel.queue_script("renew", *held)
        self.channel.queue_script("sweep", round(self.visibility_timeout * 1000), _SWEPT_AT_ONCE)

    def restore_by_tag(self, tag: str, *_: Any, **__: Any) -> None:
        """Give a message back, behind those that wait."""
        self.channel.queue_script("restore", tag)


class _Channel(transport.Channel):
    QoS = _QoS
    _in_poll: Any
    _brpop_sent_at: Any

    @cached_property
    def _unprefixed(self) -> redis_py.Redis:
        return redis_py.Redis(connection_pool=self.pool)

    @cached_property
    def _script(self) -> Any:
        source = (files("scheduler.intake") / "broker.lua").read_text()
        return self._unprefixed.register_script(source)

    def queue_script(self, operation: str, *args: str | int) -> Any:
        lists = [QUEUE + (f"{self.sep}{step}" if step else "") for step in self.priority_steps]
        names = [self.unacked_key, self.unacked_index_key, *lists]
        keys = [self.global_keyprefix + name for name in names]
        return self._script(keys=keys, args=[operation, *args], client=self._unprefixed)

    def _brpop_start(self, timeout: float | None = None) -> None:
        """Begin to wait for a message, which stays where it is: to its own place it is moved.

        Only in the first of the lists; in the others, the taking looks when this wait is over.
        """
        if not self.active_queues:
            return
        wait_s = self.brpop_timeout if timeout is None else timeout
        key = self.global_keyprefix + QUEUE
        self._in_poll = self.client.connection
        self._brpop_sent_at = monotonic()
        self.client.connection.send_command("BLMOVE", key, key, "RIGHT", "RIGHT", wait_s)

    def _brpop_read(self, **options: Any) -> bool:
        try:
            try:
                self.client.parse_response(self.client.connection, "BLMOVE", **options)
            except self.connection_errors:
                self.client.connection.disconnect()
                raise
        finally:
            self._in_poll = None
        took = False
        while not self._closing and self.active_queues and self.qos.can_consume():
            tag = str(uuid.uuid4())
            found = self.queue_script("take", tag)
            if found is None:
                break
            took = True
            message, swept = found
            self.connection._deliver(_envelope(message, tag, swept, self), QUEUE)
        if not took:
            raise Empty
        return True


def _envelope(message: bytes, tag: str, swept: int, channel: Any) -> dict[str, Any]:
    """A message as kombu has it, under a tag of its own; or one that holds what is none."""
    try:
        if len(message) > LARGEST_MESSAGE:
            raise ValueError(f"it is longer than {LARGEST_MESSAGE} bytes")
        found = json.loads(message)
        headers, properties = found["headers"], found["properties"]
        if headers.get("compression"):
            # A small one may unpack to one that is too large for this process.
            raise ValueError("it is compressed")
        found["properties"] = {
            **properties,
            "delivery_tag": tag,
            # What it is restored by; the sender's may be anything.
            "delivery_info": {"exchange": "", "routing_key": QUEUE, SWEPT: swept},
        }
        channel.Message(found, channel=channel)
    except Exception as error:
        # Whatever it is that kombu cannot read, it would raise it again in the event loop.
        return _refused(message, tag, error)
    envelope: dict[str, Any] = found
    return envelope


def _refused(message: bytes, tag: str, error: Exception) -> dict[str, Any]:
    why = str(error) if type(error) is ValueError else "it is not a message of Celery's"
    # A body is in base64: nobody reads that for the reason, and it may hide a secret.
    shown = _BODY.sub(r"\1***", message[:_SHOWN].decode(errors="replace"))
    return {
        "body": shown,
        "headers": {"why": why},
        "content-type": UNREADABLE,
        "content-encoding": "utf-8",
        "properties": {
            "delivery_tag": tag,
            "delivery_info": {"exchange": "", "routing_key": QUEUE},
        },
    }
