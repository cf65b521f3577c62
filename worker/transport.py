"""Kombu's Redis transport, made to outlive its Redis.

When Redis goes, Celery clears away the connection, perhaps in two goes, and later those who hold
messages of it are done with them. Kombu's own transport would raise an AttributeError then, which
ends the process. A message that is noted as held comes again by itself. What lies in a queue and is
no message at all would end the process too.
"""

from __future__ import annotations

from queue import Empty
from typing import Any

import structlog
from celery.app.amqp import AMQP
from kombu.connection import Connection
from kombu.transport import redis as kombu_redis
from kombu.transport import virtual
from redis.exceptions import RedisError

log = structlog.get_logger(__name__)


class QoS(kombu_redis.QoS):
    """The messages that this process holds."""

    @property
    def _is_cut_off(self) -> bool:
        return getattr(self.channel.connection, "client", None) is None

    def restore_unacked(self, *args: Any, **kwargs: Any) -> None:
        """Give back all that is held."""
        if self._is_cut_off:
            self._delivered.clear()
        else:
            super().restore_unacked(*args, **kwargs)  # type: ignore[no-untyped-call]

    def ack(self, delivery_tag: str) -> None:
        """A message is done with."""
        if self._is_cut_off:
            virtual.QoS.ack(self, delivery_tag)  # type: ignore[no-untyped-call]
        else:
            super().ack(delivery_tag)  # type: ignore[no-untyped-call]

    def reject(self, delivery_tag: str, requeue: bool = False) -> None:
        """A message is given back, or done with."""
        if self._is_cut_off:
            virtual.QoS.ack(self, delivery_tag)  # type: ignore[no-untyped-call]
        else:
            super().reject(delivery_tag, requeue=requeue)  # type: ignore[no-untyped-call]


class Channel(kombu_redis.Channel):
    """A channel whose messages may be let go of when their connection has gone."""

    QoS = QoS

    def _brpop_read(self, **options: Any) -> Any:
        try:
            return super()._brpop_read(**options)  # type: ignore[no-untyped-call]
        except (Empty, RedisError, ConnectionError):
            raise
        except Exception as error:
            # It has been taken off the queue by now, and comes no more.
            log.error("message_unreadable", reason=repr(error)[:300])
            raise Empty from None


def amqp(channel: type[Channel] = Channel) -> type[AMQP]:
    """What a Celery app uses to speak to its broker: its argument `amqp`.

    Args:
        channel: the class of its channels.
    """

    class Transport(kombu_redis.Transport):
        Channel = channel

    class ToRedis(Connection):
        # Rather than by name, so that what kombu knows of the URL's scheme (TLS, a socket) holds.
        def get_transport_cls(self) -> type:
            return Transport

    class Amqp(AMQP):  # type: ignore[misc]
        Connection = ToRedis

    return Amqp
