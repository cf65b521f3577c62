"""Requests that come as messages, which nobody waits for an answer to.

Whoever may write to Redis names its client; that the client may come by this way is in the clients'
file. What cannot be accepted is noted with the reason, and its content, for `poolsweep requests
--rejected`.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import structlog
from redis.exceptions import RedisError

from scheduler.intake import openapi
from scheduler.intake.desk import LONGEST_KEY, NotAllowedError
from scheduler.intake.request import RequestError, Way, read_request, validate
from scheduler.intake.requests import KeyReusedError, Rejected
from worker.ledger import SchemaError
from worker.modelarts.answers import printable

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from scheduler.intake.clients import Client, Clients
    from scheduler.intake.desk import Desk
    from scheduler.intake.request import Request
    from scheduler.intake.requests import Requests

FIELDS = ("request", "client", "idempotency_key")
_MASK = "***"
_SPACE = r"(?:\s|\\+[nrt])*"
_WEBHOOK = re.compile(
    # Perhaps in a text in a text: what ends it has as many backslashes as what begins it.
    rf"""(webhook\\*["']{_SPACE}:{_SPACE})"""
    r"""(?:(\\*)(["']).*?(?:(?<!\\)\2\3|\Z)|[\[{].*?(?:[\]}]|\Z))""",
    re.DOTALL,
)
_SHOWN = 80
LEFT_S = 10.0
"""Seconds after which a message is looked at again that was left to a newer version."""

log = structlog.get_logger(__name__)


class Permits(Protocol):
    """Who may ask how often; `worker.limiter.Limiter` is one."""

    async def try_permit(self, project_id: str, /) -> float:
        """0 if a client may ask now, which is counted; else the seconds until it may."""


class RefusedError(ValueError):
    """A message is refused; the text says why, in one line."""


@dataclass(frozen=True, slots=True)
class Message:
    """A request as it came.

    Attributes:
        way: how.
        message_id: what it is called there; its idempotency key if it brings none.
        fields: `request`, `client` and perhaps `idempotency_key`, as they came.
        content: all of it, for the record.
        group: the consumer group of the stream that it came by; None: it came otherwise.
    """

    way: Way
    message_id: str
    fields: dict[str, Any]
    content: str
    group: str | None = None

    @property
    def client_name(self) -> str:
        """The client that it names, for the record; empty: none."""
        name = self.fields.get("client")
        return name if isinstance(name, str) else ""

    @property
    def key(self) -> str:
        """Its idempotency key.

        Raises:
            RefusedError: it brings one that is none.
        """
        given = self.fields.get("idempotency_key")
        if given is None:
            return f"{self.way}:{self.message_id}"
        if not isinstance(given, str) or not re.fullmatch(openapi.KEY, given, re.ASCII):
            raise RefusedError(
                f"idempotency_key: accepted: 1 to {LONGEST_KEY} visible ASCII characters"
            )
        return given

    def read(self) -> Request:
        """What it asks for.

        Raises:
            RefusedError: it has not the fields of a message.
            RequestError: it asks for nothing that can be done.
        """
        check_fields(self.fields)
        request = self.fields["request"]
        return read_request(request) if self.way is Way.STREAM else validate(request)

    def rejected(self, reason: str) -> Rejected:
        """The note that it was refused, without its webhook, whose URL may be a secret."""
        content = masked(self.content)
        return Rejected("", self.way, self.message_id, self.client_name, reason, content)


def check_fields(names: Iterable[str]) -> None:
    """See that a message has the fields that it must have, and no others: pure.

    Raises:
        RefusedError: not so.
    """
    names = set(names)
    if unknown := sorted(names - set(FIELDS)):
        shown = printable(unknown[0], _SHOWN)
        raise RefusedError(f"{shown!r} is not known; accepted: {', '.join(FIELDS)}")
    for name in ("request", "client"):
        if name not in names:
            raise RefusedError(f"{name}: it is needed")


def masked(text: str) -> str:
    """A text without the values of `webhook` in its JSON, nor in JSON in its texts: pure.

    Args:
        text: JSON or not; what is none is searched for what looks like it.

    Returns:
        The very text if there is nothing to mask.
    """
    try:
        found = json.loads(text, object_pairs_hook=_no_key_twice)
        without = _without_webhooks(found)
    except (ValueError, RecursionError):
        return _WEBHOOK.sub(rf'\1\2"{_MASK}\2"', text)
    return text if without == found else json.dumps(without, ensure_ascii=False)


def _without_webhooks(value: Any) -> Any:
    if isinstance(value, dict):
        return {
            key: _MASK if key == "webhook" and each is not None else _without_webhooks(each)
            for key, each in value.items()
        }
    if isinstance(value, list):
        return [_without_webhooks(each) for each in value]
    return masked(value) if isinstance(value, str) else value


def _no_key_twice(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        # Written anew, one of them would be lost.
        raise ValueError
    return found


class Mailroom:
    """Takes messages to the desk, and notes those that it refuses.

    Args:
        desk: takes requests in.
        requests: where refused messages are noted.
        clients: the clients as they are now.
        limiter: how often each may ask, by its name.
    """

    def __init__(
        self, desk: Desk, requests: Requests, clients: Callable[[], Clients], limiter: Permits
    ) -> None:
        self._desk = desk
        self._requests = requests
        self._clients = clients
        self._limiter = limiter

    async def take(self, message: Message) -> float:
        """Accept a message, or refuse it for good.

        Args:
            message: the message. Taking it twice makes one run.

        Returns:
            0: it may be acknowledged, and survives whatever dies. Else the seconds after which it
            is to be taken again: its client may ask then, or it is left to a newer version.

        Raises:
            RedisError: it may or may not be accepted; it is to be taken again.
        """
        try:
            # First of all: what this version would refuse, a newer one may accept.
            await self._requests.check_schema()
            request = message.read()
            client, key = self._client(message), message.key
            if wait_s := await self._limiter.try_permit(client.name):
                return wait_s
            await self._desk.accept(request, client, message.way, key=key)
        except (RefusedError, RequestError, NotAllowedError, KeyReusedError) as error:
            await self.refuse(message, str(error))
        except RedisError:
            raise
        except SchemaError as error:
            log.warning("message_left_to_newer_version", way=str(message.way), reason=str(error))
            return LEFT_S
        except Exception:
            # Tried again it would fail again, for ever.
            log.exception("message_crashed", way=str(message.way), message_id=message.message_id)
            await self.refuse(message, "it was not handled; the service's log says why")
        return 0.0

    async def refuse(self, message: Message, reason: str) -> None:
        """Note that a message is refused. A stream's entry leaves its stream in the same step.

        Args:
            message: the message.
            reason: why, in one line.

        Raises:
            RedisError: it may or may not be noted.
        """
        await self._requests.reject(message.rejected(reason), group=message.group)
        log.warning(
            "message_refused",
            way=str(message.way),
            message_id=printable(message.message_id, _SHOWN),
            client=printable(message.client_name, _SHOWN),
            reason=printable(reason, 1_000),
        )

    def _client(self, message: Message) -> Client:
        name = message.fields["client"]
        client = self._clients().by_name(name) if isinstance(name, str) else None
        if client is None:
            shown = printable(repr(name), _SHOWN)
            raise RefusedError(
                f"client: {shown} is not known; accepted: a name in the clients' file"
            )
        return client
