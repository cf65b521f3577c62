"""Requests by a Redis stream: `XADD poolsweep:requests * client NAME request JSON`.

Any number of processes read it as one consumer group. An entry is acknowledged, and leaves the
stream, when its run is in the ledger or its refusal is noted; what a dead consumer left is claimed
by another.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import secrets
import socket
from importlib.resources import files
from typing import TYPE_CHECKING, Any

import structlog
from redis.backoff import EqualJitterBackoff
from redis.exceptions import RedisError, ResponseError

from scheduler.intake.messages import Message
from scheduler.intake.request import Way
from worker.cancellation import cancel
from worker.ledger import keys

if TYPE_CHECKING:
    from redis.asyncio import Redis

    from scheduler.intake.messages import Mailroom

GROUP = "poolsweep"
AT_ONCE = 50
"""Entries that one process works on at once."""
BLOCK_MS = 1_000
MOST_DELIVERIES = 5
"""An entry that was delivered so often and came to no end kills whoever reads it."""
STOP_S = 5.0
BACKOFF = EqualJitterBackoff(cap=10, base=0.5)

log = structlog.get_logger(__name__)


class StreamReader:
    """Takes the stream's entries to the mailroom.

    Args:
        redis: a connection that decodes responses.
        mailroom: takes them.
        lease_s: seconds after which an entry of a consumer that is not heard of is claimed.
    """

    def __init__(self, redis: Redis, mailroom: Mailroom, *, lease_s: float) -> None:
        self._redis = redis
        self._mailroom = mailroom
        self._lease_ms = round(lease_s * 1000)
        self._name = f"{socket.gethostname()}-{os.getpid()}-{secrets.token_hex(4)}"
        self._tasks: dict[str, asyncio.Task[None]] = {}
        self._freed = asyncio.Event()
        self._stopping = asyncio.Event()
        self._leave = redis.register_script((files("scheduler.intake") / "stream.lua").read_text())

    def stop(self) -> None:
        """Take nothing new."""
        self._stopping.set()
        self._freed.set()

    async def run(self) -> None:
        """Go on until stopped, or cancelled. What has begun is ended, unless that takes long."""
        # The one waits for entries, for which the other must not wait.
        parts = [self._read_entries, self._look_after_them]
        going = [asyncio.create_task(self._repeat(part)) for part in parts]
        try:
            await asyncio.wait(going)
            if self._tasks:
                await asyncio.wait(self._tasks.values(), timeout=STOP_S)
        finally:
            await cancel(*going, *self._tasks.values())
            with contextlib.suppress(RedisError):
                await self._take_off(self._name)

    async def _repeat(self, part: Any) -> None:
        failures = 0
        while not self._stopping.is_set():
            try:
                await part()
                failures = 0
            except ResponseError as error:
                if "NOGROUP" not in str(error):
                    failures += 1
                    log.warning("stream_unreadable", reason=str(error))
                # Made from its beginning: what was acknowledged is not in it any more.
                await self._make_group()
            except RedisError as error:
                failures += 1
                log.warning("redis_unreachable", reason=str(error))
            if failures:
                await self._pause(BACKOFF.compute(failures))

    async def _make_group(self) -> None:
        try:
            await self._redis.xgroup_create(keys.STREAM, GROUP, id="0", mkstream=True)
        except ResponseError as error:
            if "BUSYGROUP" not in str(error):
                log.warning("stream_unreadable", reason=str(error))
                await self._pause(BACKOFF.compute(1))
        except RedisError as error:
            log.warning("redis_unreachable", reason=str(error))

    async def _pause(self, seconds: float) -> None:
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self._stopping.wait(), seconds)

    # New entries

    async def _read_entries(self) -> None:
        room = await self._room()
        if self._stopping.is_set():
            return
        # Never cut off: an entry on its way here would be this consumer's, and unknown to it.
        answer: Any = await self._redis.xreadgroup(
            GROUP, self._name, {keys.STREAM: ">"}, count=room, block=BLOCK_MS
        )
        for _, entries in answer.items() if isinstance(answer, dict) else answer:
            for entry_id, fields in entries:
                self._begin(entry_id, fields)

    async def _room(self) -> int:
        while len(self._tasks) >= AT_ONCE and not self._stopping.is_set():
            self._freed.clear()
            await self._freed.wait()
        return AT_ONCE - len(self._tasks)

    def _begin(self, entry_id: str, fields: dict[str, str]) -> None:
        task = asyncio.create_task(self._attend(entry_id, fields))
        self._tasks[entry_id] = task
        task.add_done_callback(lambda _: self._end(entry_id))

    def _end(self, entry_id: str) -> None:
        del self._tasks[entry_id]
        self._freed.set()

    async def _attend(self, entry_id: str, fields: dict[str, str]) -> None:
        message = _message(entry_id, fields)
        failures = 0
        while True:
            try:
                wait_s = await self._mailroom.take(message)
                if not wait_s:
                    await self._acknowledge(entry_id)
                    return
            except RedisError as error:
                # It counts as delivered once, however long Redis is away.
                failures += 1
                wait_s = BACKOFF.compute(failures)
                log.warning("redis_unreachable", reason=str(error))
            await asyncio.sleep(wait_s)

    async def _acknowledge(self, entry_id: str) -> None:
        async with self._redis.pipeline(transaction=True) as pipe:
            pipe.xack(keys.STREAM, GROUP, entry_id)
            pipe.xdel(keys.STREAM, entry_id)
            await pipe.execute()

    # Entries that somebody has, and consumers

    async def _look_after_them(self) -> None:
        if self._tasks:
            # Without counting as another delivery.
            await self._redis.xclaim(
                keys.STREAM, GROUP, self._name, 0, list(self._tasks), justid=True
            )
        await self._claim_what_is_left()
        await self._take_off_the_gone()
        await self._pause(self._lease_ms / 3000)

    async def _claim_what_is_left(self) -> None:
        room = AT_ONCE - len(self._tasks)
        if room <= 0:
            return
        pending: Any = await self._redis.xpending_range(
            keys.STREAM, GROUP, "-", "+", room, idle=self._lease_ms
        )
        for each in pending:
            entry_id = each["message_id"]
            # A single one at a time, so that each is judged by its own count.
            if entry_id not in self._tasks and not self._stopping.is_set():
                await self._claim(entry_id, each["times_delivered"])

    async def _claim(self, entry_id: str, deliveries: int) -> None:
        claimed: Any = await self._redis.xclaim(
            keys.STREAM, GROUP, self._name, self._lease_ms, [entry_id]
        )
        fields = next((found for name, found in claimed if name == entry_id), None)
        if fields is None:
            if not await self._redis.xrange(keys.STREAM, entry_id, entry_id):
                reason = "it was taken off the stream before it was read"
                await self._mailroom.refuse(_message(entry_id, {}), reason)
            return  # else another was quicker
        log.warning("stream_entry_claimed", message_id=entry_id, deliveries=deliveries)
        if deliveries >= MOST_DELIVERIES:
            reason = f"it was delivered {deliveries} times and never came to an end"
            await self._mailroom.refuse(_message(entry_id, fields), reason)
        else:
            self._begin(entry_id, fields)

    async def _take_off_the_gone(self) -> None:
        consumers: Any = await self._redis.xinfo_consumers(keys.STREAM, GROUP)
        for each in consumers:
            gone = each["idle"] > 2 * max(self._lease_ms, BLOCK_MS)
            if gone and not each["pending"] and each["name"] != self._name:
                await self._take_off(each["name"])

    async def _take_off(self, consumer: str) -> None:
        await self._leave(keys=[keys.STREAM], args=[GROUP, consumer])


def _message(entry_id: str, fields: dict[str, str]) -> Message:
    content = json.dumps(fields, ensure_ascii=False)
    return Message(Way.STREAM, entry_id, dict(fields), content, GROUP)
