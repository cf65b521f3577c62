"""Accepted requests, in Redis until they are planned; and those that were refused, for review.

Accepting is one atomic script, so that two same requests that race make one run. A planner leases
what it takes; should it die, another takes it when the lease ends.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from importlib.resources import files
from typing import TYPE_CHECKING, Any, cast

import structlog

from scheduler.intake.request import Request, Way, validate
from worker.ledger import SchemaError, keys, schema
from worker.modelarts.answers import printable

if TYPE_CHECKING:
    from collections.abc import Awaitable

    from redis.asyncio import Redis

MEMORY_S = 86_400
"""For how long an idempotency key stands for its run."""
MOST_REJECTED = 10_000
LONGEST_RECORD = 4_096
_KEYS = [keys.REQUESTS, keys.REQUESTS_DUE, keys.REQUESTS_TRIED, keys.REQUESTS_TROUBLE]

log = structlog.get_logger(__name__)


@dataclass(frozen=True, slots=True)
class Filed:
    """A request that was accepted.

    Attributes:
        run_id: the run that it became.
        client: who sent it.
        way: how it came in.
        endpoint: the base URL of the API that its projects are at.
        request: what it asks for.
        accepted_ms: when, in ms since the epoch.
    """

    run_id: str
    client: str
    way: Way
    endpoint: str
    request: Request
    accepted_ms: int

    def record(self) -> str:
        """The JSON that it is held as."""
        fields = [self.client, self.way, self.endpoint, self.accepted_ms]
        return json.dumps([*fields, json.loads(self.request.record())])

    @classmethod
    def parse(cls, run_id: str, text: str) -> Filed:
        """Read one back.

        Raises:
            ValueError: an earlier or later version wrote what this one does not understand.
        """
        client, way, endpoint, accepted_ms, request = json.loads(text)
        return cls(run_id, client, Way(way), endpoint, validate(request), accepted_ms)

    @property
    def digest(self) -> str:
        """What tells its content from another's."""
        text = self.request.model_dump_json(by_alias=True)
        return hashlib.sha256(text.encode()).hexdigest()[:32]


@dataclass(frozen=True, slots=True)
class Waiting:
    """An accepted request that is to be planned.

    Attributes:
        run_id: its run.
        record: the request as it is held; `Filed.parse` reads it.
        tried: how often its planning was begun and came to no end, with this time.
        trouble: why it could not be planned yet; empty: nothing is known of that.
    """

    run_id: str
    record: str
    tried: int
    trouble: str = ""


@dataclass(frozen=True, slots=True)
class Rejected:
    """A message that was refused, and that nobody waits for an answer to.

    Attributes:
        entry_id: of the record, which begins with the ms when it was refused.
        way: how it came.
        message_id: what it is called there: a stream entry's id or a Celery task's.
        client: the client that it names; empty: none.
        reason: why it was refused.
        content: the message, cut to 4,096 characters.
    """

    entry_id: str
    way: str
    message_id: str
    client: str
    reason: str
    content: str


class KeyReusedError(ValueError):
    """An idempotency key came with another content than before."""

    def __init__(self) -> None:
        super().__init__(
            "the idempotency key was used for another request in the last 24 hours; accepted: "
            "the same request again, or a new key"
        )


class Requests:
    """The requests in Redis.

    Args:
        redis: a connection that decodes responses.
    """

    def __init__(self, redis: Redis) -> None:
        self._redis = redis
        self._told_of_newer = False
        source = (files("scheduler.intake") / "requests.lua").read_text()
        self._script = redis.register_script(source)

    async def check_schema(self) -> None:
        """See that this version may take requests in.

        Raises:
            SchemaError: a newer version decides here; requests are its.
        """
        await schema.check(self._redis)

    async def accept(self, filed: Filed, *, key: str | None = None) -> str:
        """Take a request in: it is planned from now on, whatever dies.

        Args:
            filed: the request, under the id of a new run.
            key: the client's idempotency key; None: every request is another.

        Returns:
            The id of the run that the request became: an earlier one if the key was used before.

        Raises:
            KeyReusedError: the key was used for another content.
            SchemaError: a newer version decides here; it is not accepted.
            RedisError: it may or may not be accepted; with a key, repeating it is safe.
        """
        await self.check_schema()
        names = list(_KEYS)
        if key is not None:
            names.append(keys.idempotency(filed.client, hashlib.sha256(key.encode()).hexdigest()))
        args: list[Any] = ["accept", filed.run_id, filed.record(), filed.digest, MEMORY_S * 1000]
        run_id, _, digest = str(await self._script(keys=names, args=args)).partition(" ")
        if digest != filed.digest:
            raise KeyReusedError
        return run_id

    async def take(self, *, lease_s: float, limit: int) -> list[Waiting]:
        """Requests that are due, leased to the caller.

        None where a newer version decides: its planners take them, and understand older ones too.

        Args:
            lease_s: seconds after which another may take them, unless renewed.
            limit: how many at most.
        """
        try:
            await self.check_schema()
        except SchemaError as error:
            if not self._told_of_newer:
                log.error("requests_left_to_newer_version", reason=str(error))
            self._told_of_newer = True
            return []
        flat = await self._call("take", round(lease_s * 1000), limit)
        return [
            Waiting(flat[start], flat[start + 1], int(flat[start + 2]))
            for start in range(0, len(flat), 3)
        ]

    async def renew(self, run_id: str, *, lease_s: float) -> None:
        """Keep a lease for so many seconds from now."""
        await self._call("renew", round(lease_s * 1000), run_id)

    async def retry(self, run_id: str, *, wait_s: float, trouble: str) -> None:
        """Have a request planned again after so many seconds, and say why it was not now.

        Its planner lives, so what was tried before is forgotten.

        Args:
            run_id: its run.
            wait_s: seconds.
            trouble: why; empty: what was said before holds.
        """
        await self._call("retry", round(wait_s * 1000), run_id, printable(trouble, 1_000))

    async def done(self, run_id: str) -> None:
        """A request is planned: its run says all from now on."""
        await self._call("done", run_id)

    async def waits(self, run_id: str) -> bool:
        """Whether a run's request still waits to be planned."""
        found = self._redis.hexists(keys.REQUESTS, run_id)
        return bool(await cast("Awaitable[int]", found))

    async def waiting(self, limit: int = 100) -> list[Waiting]:
        """The requests that wait to be planned, those first that are due first."""
        run_ids = cast("list[str]", await self._redis.zrange(keys.REQUESTS_DUE, 0, limit - 1))
        if not run_ids:
            return []
        async with self._redis.pipeline(transaction=True) as pipe:
            for key in (keys.REQUESTS, keys.REQUESTS_TRIED, keys.REQUESTS_TROUBLE):
                pipe.hmget(key, run_ids)
            columns = await pipe.execute()
        return [
            Waiting(run_id, record, int(tried or 0), trouble or "")
            for run_id, record, tried, trouble in zip(run_ids, *columns, strict=True)
            if record is not None
        ]

    async def reject(self, rejected: Rejected, *, group: str | None = None) -> None:
        """Note a message that was refused.

        Args:
            rejected: the message; its `entry_id` is given by Redis.
            group: the consumer group that it leaves, if it came by the stream: it is taken off
                the stream in the same step.
        """
        fields: dict[Any, Any] = {
            "way": rejected.way,
            "message_id": rejected.message_id,
            "client": printable(rejected.client, 200),
            "reason": printable(rejected.reason, 1_000),
            "content": rejected.content[:LONGEST_RECORD],
        }
        async with self._redis.pipeline(transaction=True) as pipe:
            pipe.xadd(keys.REJECTED, fields, maxlen=MOST_REJECTED, approximate=True)
            if group is not None:
                pipe.xack(keys.STREAM, group, rejected.message_id)
                pipe.xdel(keys.STREAM, rejected.message_id)
            await pipe.execute()

    async def rejected(self, limit: int = 100) -> list[Rejected]:
        """The messages that were refused, the newest first."""
        found = await self._redis.xrevrange(keys.REJECTED, count=limit)
        entries = cast("list[tuple[str, dict[str, str]]]", found)
        names = ("way", "message_id", "client", "reason", "content")
        return [
            Rejected(entry_id, *(fields.get(name, "") for name in names))
            for entry_id, fields in entries
        ]

    async def _call(self, *args: Any) -> Any:
        return await self._script(keys=_KEYS, args=args)
