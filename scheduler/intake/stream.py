"""Requests by a Redis stream: `XADD poolsweep:requests * client NAME request JSON`.

Any number of processes read it as one consumer group. An entry is acknowledged, and leaves the
stream, when its run is in the ledger or its refusal is noted; what a dead consumer left is claimed
by another.

A client that asks too often holds up nobody but itself: its entries leave their places, and stand
in a line of its own. They are counted as delivered only while they are worked on, so that waiting
never makes an entry one that kills whoever reads it.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import secrets
import socket
from collections import deque
from dataclasses import dataclass
from importlib.resources import files
from typing import TYPE_CHECKING, Any, TypeVar

import structlog
from redis.backoff import EqualJitterBackoff
from redis.exceptions import RedisError, ResponseError

from scheduler.intake.messages import Message
from scheduler.intake.request import Way
from worker.cancellation import cancel
from worker.ledger import keys

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Iterable

    from redis.asyncio import Redis

    from scheduler.intake.messages import Mailroom

T = TypeVar("T")

GROUP = "poolsweep"
AT_ONCE = 50
"""Places: entries that one process works on at once."""
LONGEST_LINE = 10_000
"""Entries of one client that one process has wait. Of them it holds no more than the ids."""
LONGEST_NAP_S = 10.0
"""A client may be allowed more by then."""
BLOCK_MS = 1_000
MOST_DELIVERIES = 5
"""An entry that was delivered so often and came to no end kills whoever reads it."""
MOST_IDS = 1_000
"""Of one command: longer ones would hold up whoever else asks Redis something."""
STOP_S = 5.0
BACKOFF = EqualJitterBackoff(cap=10, base=0.5)

log = structlog.get_logger(__name__)


@dataclass(frozen=True, slots=True)
class _Entry:
    """An entry that this process holds.

    Attributes:
        entry_id: its id.
        client: the client that it names.
        deliveries: how often it was delivered before, and came to no end.
    """

    entry_id: str
    client: str
    deliveries: int


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
        self._held: dict[str, _Entry] = {}
        self._places: set[asyncio.Task[None]] = set()
        self._lines: dict[str, deque[_Entry]] = {}
        self._served: set[asyncio.Task[None]] = set()
        self._looked_to = "-"
        self._freed = asyncio.Event()
        self._stopping = asyncio.Event()
        self._leave = redis.register_script((files("scheduler.intake") / "stream.lua").read_text())

    def stop(self) -> None:
        """Take nothing new."""
        self._stopping.set()
        self._freed.set()

    async def run(self) -> None:
        """Go on until stopped, or cancelled. What has begun is ended, unless that takes long.

        What is held then is given back, for others to take at once.
        """
        # The first waits for entries and the second for places, for which the third must not wait.
        parts = [self._read_entries, self._claim_what_is_left, self._look_after_them]
        going = [asyncio.create_task(self._repeat(part)) for part in parts]
        try:
            await asyncio.wait(going)
            if self._places:
                await asyncio.wait(self._places, timeout=STOP_S)
        finally:
            held = list(self._held.values())
            await cancel(*going, *self._places, *self._served)
            with contextlib.suppress(RedisError):
                await self._claim_again(held, uncounted=True, idle=self._lease_ms)
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
                self._begin(entry_id, fields, 0)

    async def _room(self) -> int:
        while len(self._places) >= AT_ONCE and not self._stopping.is_set():
            self._freed.clear()
            await self._freed.wait()
        return AT_ONCE - len(self._places)

    def _begin(self, entry_id: str, fields: dict[str, str], deliveries: int) -> None:
        if entry_id in self._held:
            return  # It comes again if the group was made again.
        entry = _Entry(entry_id, fields.get("client", ""), deliveries)
        self._held[entry_id] = entry
        task = asyncio.create_task(self._attend(entry, fields))
        self._places.add(task)
        task.add_done_callback(self._leave_place)

    def _leave_place(self, task: asyncio.Task[None]) -> None:
        self._places.discard(task)
        self._freed.set()

    async def _attend(self, entry: _Entry, fields: dict[str, str]) -> None:
        must_wait = False
        try:
            must_wait = await self._insist(lambda: self._try(entry, fields))
        finally:
            if not must_wait:
                self._held.pop(entry.entry_id, None)
        if must_wait:
            self._line_up(entry)

    async def _insist(self, step: Callable[[], Awaitable[T]]) -> T:
        """Redis may be away for long: that is no reason to have an entry delivered again."""
        failures = 0
        while True:
            try:
                return await step()
            except RedisError as error:
                failures += 1
                log.warning("redis_unreachable", reason=str(error))
            await asyncio.sleep(BACKOFF.compute(failures))

    async def _try(self, entry: _Entry, fields: dict[str, str]) -> bool:
        """Whether an entry must wait; else it is over."""
        if entry.client in self._lines:
            # Behind those of its client that wait already.
            await self._claim_again([entry], uncounted=True)
            return True
        return bool(await self._take(entry, fields))

    async def _take(self, entry: _Entry, fields: dict[str, str]) -> float:
        wait_s = await self._mailroom.take(_message(entry.entry_id, fields))
        if wait_s:
            await self._claim_again([entry], uncounted=True)
        else:
            await self._acknowledge(entry.entry_id)
        return wait_s

    async def _acknowledge(self, entry_id: str) -> None:
        async with self._redis.pipeline(transaction=True) as pipe:
            pipe.xack(keys.STREAM, GROUP, entry_id)
            pipe.xdel(keys.STREAM, entry_id)
            await pipe.execute()

    # Lines of clients that ask too often

    def _line_up(self, entry: _Entry) -> None:
        line = self._lines.get(entry.client)
        if line is None:
            line = self._lines[entry.client] = deque()
            task = asyncio.create_task(self._serve(entry.client))
            self._served.add(task)
            task.add_done_callback(self._served.discard)
        if len(line) < LONGEST_LINE:
            line.append(entry)
        else:
            # Let go, it is claimed as what the dead left is: when it was not heard of for a while.
            self._held.pop(entry.entry_id, None)

    async def _serve(self, client: str) -> None:
        """Take a line's entries, one after the other, until there are none."""
        line = self._lines[client]
        try:
            while line:
                wait_s = await self._insist(lambda: self._take_again(line[0]))
                if wait_s:
                    await asyncio.sleep(min(wait_s, LONGEST_NAP_S))
                else:
                    self._held.pop(line.popleft().entry_id, None)
        finally:
            del self._lines[client]
            for entry in line:
                self._held.pop(entry.entry_id, None)

    async def _take_again(self, entry: _Entry) -> float:
        fields = await self._read(entry.entry_id)
        if fields is None:
            await self._see_why_it_has_gone(entry.entry_id)
            return 0.0
        await self._claim_again([entry])
        return await self._take(entry, fields)

    async def _read(self, entry_id: str) -> dict[str, str] | None:
        found: Any = await self._redis.xrange(keys.STREAM, entry_id, entry_id)
        return dict(found[0][1]) if found else None

    # Entries that somebody has, and consumers

    async def _look_after_them(self) -> None:
        # Without counting as another delivery.
        await self._renew(list(self._held))
        await self._take_off_the_gone()
        await self._pause(self._lease_ms / 3000)

    async def _renew(self, entry_ids: list[str], **changes: Any) -> None:
        for start in range(0, len(entry_ids), MOST_IDS):
            some: Any = entry_ids[start : start + MOST_IDS]
            await self._redis.xclaim(
                keys.STREAM, GROUP, self._name, 0, some, justid=True, **changes
            )

    async def _claim_again(
        self, entries: Iterable[_Entry], *, uncounted: bool = False, idle: int = 0
    ) -> None:
        """Have this delivery of entries counted, or not."""
        alike: dict[int, list[str]] = {}
        for entry in entries:
            alike.setdefault(entry.deliveries, []).append(entry.entry_id)
        for deliveries, entry_ids in alike.items():
            count = deliveries if uncounted else deliveries + 1
            await self._renew(entry_ids, retrycount=count, idle=idle)

    async def _claim_what_is_left(self) -> None:
        room = await self._room()
        if self._stopping.is_set():
            return
        pending: Any = await self._redis.xpending_range(
            keys.STREAM, GROUP, self._looked_to, "+", room, idle=self._lease_ms
        )
        for each in pending:
            entry_id = each["message_id"]
            # A single one at a time, so that each is judged by its own count.
            if entry_id not in self._held and not self._stopping.is_set():
                await self._claim(entry_id, each["times_delivered"])
        if len(pending) == room:
            # On from there, so that many which are let go again keep no others from being seen.
            self._looked_to = f"({pending[-1]['message_id']}"
        else:
            self._looked_to = "-"
            await self._pause(self._lease_ms / 3000)

    async def _claim(self, entry_id: str, deliveries: int) -> None:
        fields = await self._read(entry_id)
        if fields is None:
            await self._see_why_it_has_gone(entry_id)
            return
        one: Any = [entry_id]
        if not await self._redis.xclaim(
            keys.STREAM,
            GROUP,
            self._name,
            self._lease_ms,
            one,
            retrycount=deliveries + 1,
            justid=True,
        ):
            return  # Another was quicker.
        log.warning("stream_entry_claimed", message_id=entry_id, deliveries=deliveries)
        if deliveries >= MOST_DELIVERIES:
            reason = f"it was delivered {deliveries} times and never came to an end"
            await self._mailroom.refuse(_message(entry_id, fields), reason)
        else:
            self._begin(entry_id, fields, deliveries)

    async def _see_why_it_has_gone(self, entry_id: str) -> None:
        # Who ends an entry takes it off the stream and the group at once.
        if await self._redis.xpending_range(keys.STREAM, GROUP, entry_id, entry_id, 1):
            reason = "it was taken off the stream before it was read"
            await self._mailroom.refuse(_message(entry_id, {}), reason)

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
