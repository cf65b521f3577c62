"""Marks and vetoes in Redis: what is to go when its grace is over, and what somebody keeps.

A mark holds the precondition of the pool as it was marked; a pool that has changed since is
marked anew. Nothing here deletes: a mark that is due is what a later sweep may act on.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, cast

from worker.ledger import keys
from worker.modelarts import Precondition

if TYPE_CHECKING:
    from collections.abc import Awaitable, Collection, Iterable, Mapping

    from redis.asyncio import Redis

    from scheduler.selection import Decision


LAPSE = timedelta(days=30)
"""A mark that was due so long ago, and that nobody acted on, is void: its pool is marked anew."""


@dataclass(frozen=True, slots=True)
class Mark:
    """A pool that goes when its grace is over.

    Attributes:
        project_id, pool_id, display_name: the pool.
        policy: the policy that marked it.
        precondition: the pool as it was then.
        marked_at, due_at: aware times.
        reason: why it was chosen.
    """

    project_id: str
    pool_id: str
    display_name: str
    policy: str
    precondition: Precondition
    marked_at: datetime
    due_at: datetime
    reason: str

    def record(self) -> str:
        """The form in which it is held."""
        return json.dumps(
            {
                "name": self.display_name,
                "created": self.precondition.created,
                "fingerprint": self.precondition.fingerprint,
                "marked": self.marked_at.timestamp(),
                "due": self.due_at.timestamp(),
                "reason": self.reason,
            },
            ensure_ascii=False,
            separators=(",", ":"),
        )

    @classmethod
    def parse(cls, project_id: str, policy: str, pool_id: str, text: str) -> Mark:
        """Read one back."""
        record = json.loads(text)
        return cls(
            project_id=project_id,
            pool_id=pool_id,
            display_name=record["name"],
            policy=policy,
            precondition=Precondition(record["created"], record["fingerprint"]),
            marked_at=datetime.fromtimestamp(record["marked"], UTC),
            due_at=datetime.fromtimestamp(record["due"], UTC),
            reason=record["reason"],
        )


@dataclass(frozen=True, slots=True)
class Grace:
    """What a grace does to a plan's deletions: pure.

    Attributes:
        due: may go now.
        waiting: marked, and not due yet.
        fresh: to be marked now.
        lifted: ids of marked pools that nothing wants to delete any more.
    """

    due: tuple[Decision, ...]
    waiting: tuple[Mark, ...]
    fresh: tuple[Mark, ...]
    lifted: tuple[str, ...]


def weigh(
    decisions: Iterable[Decision],
    marks: Mapping[str, Mark],
    *,
    project_id: str,
    policy: str,
    grace: timedelta,
    now: datetime,
) -> Grace:
    """Sort a plan's deletions by what their marks say: pure.

    Args:
        decisions: the plan's deletions, in order.
        marks: the policy's marks in this project, by pool id.
        project_id, policy: whose marks they are.
        grace: how long from mark to deletion.
        now: an aware time.
    """
    due, waiting, fresh = [], [], []
    wanted = set()
    held = set()  # pools whose sub-pools are not due: these come first in a plan
    for decision in decisions:
        pool = decision.pool
        wanted.add(pool.pool_id)
        mark = marks.get(pool.pool_id)
        precondition = Precondition.of(pool)
        if mark is None or mark.precondition != precondition or now - mark.due_at > LAPSE:
            fresh.append(
                Mark(
                    project_id=project_id,
                    pool_id=pool.pool_id,
                    display_name=pool.display_name,
                    policy=policy,
                    precondition=precondition,
                    marked_at=now,
                    due_at=now + grace,
                    reason=decision.reason,
                )
            )
        # The grace of the policy as it is now counts too: it may have been prolonged.
        elif max(mark.due_at, mark.marked_at + grace) > now or pool.pool_id in held:
            waiting.append(mark)
        else:
            due.append(decision)
            continue
        held.add(pool.parent)
    lifted = tuple(sorted(marks.keys() - wanted))
    return Grace(tuple(due), tuple(waiting), tuple(fresh), lifted)


class Marks:
    """The marks at one endpoint.

    Args:
        redis: a connection that decodes responses.
        endpoint: the base URL of the API.
    """

    def __init__(self, redis: Redis, endpoint: str) -> None:
        self._redis = redis
        self._endpoint = endpoint

    async def of(self, project_id: str, policy: str) -> dict[str, Mark]:
        """A policy's marks in a project, by pool id."""
        key = keys.marks(self._endpoint, project_id, policy)
        found = await cast("Awaitable[dict[str, str]]", self._redis.hgetall(key))
        return {
            pool_id: Mark.parse(project_id, policy, pool_id, text)
            for pool_id, text in found.items()
        }

    async def put(self, marks: Collection[Mark]) -> None:
        """Make marks, in place of older ones of the same pools."""
        async with self._redis.pipeline(transaction=False) as pipe:
            for mark in marks:
                key = keys.marks(self._endpoint, mark.project_id, mark.policy)
                pipe.hset(key, mark.pool_id, mark.record())
                index = json.dumps([self._endpoint, mark.project_id, mark.policy])
                pipe.sadd(keys.MARKED, index)
            await pipe.execute()

    async def lift(self, project_id: str, policy: str, pool_ids: Collection[str]) -> None:
        """Take marks away."""
        if pool_ids:
            key = keys.marks(self._endpoint, project_id, policy)
            await self._redis.hdel(key, *pool_ids)


async def all_marks(redis: Redis) -> list[Mark]:
    """Every mark at every endpoint, those first that are due first."""
    found: list[Mark] = []
    for index in await cast("Awaitable[set[str]]", redis.smembers(keys.MARKED)):
        endpoint, project_id, policy = json.loads(index)
        found += (await Marks(redis, endpoint).of(project_id, policy)).values()
    return sorted(found, key=lambda mark: (mark.due_at, mark.project_id, mark.pool_id))


@dataclass(frozen=True, slots=True)
class Veto:
    """Somebody keeps a pool, whatever any policy says.

    Attributes:
        project_id, pool_id: the pool.
        until: an aware time; None: until it is taken back.
        by: who.
        reason: why, in their words.
    """

    project_id: str
    pool_id: str
    until: datetime | None
    by: str
    reason: str = ""

    def record(self) -> str:
        """The form in which it is held."""
        until = None if self.until is None else self.until.timestamp()
        return json.dumps([until, self.by, self.reason], ensure_ascii=False)

    @classmethod
    def parse(cls, project_id: str, pool_id: str, text: str) -> Veto:
        """Read one back."""
        until, by, reason = json.loads(text)
        moment = None if until is None else datetime.fromtimestamp(until, UTC)
        return cls(project_id, pool_id, moment, by, reason)

    def holds(self, now: datetime) -> bool:
        """Whether it still counts."""
        return self.until is None or now < self.until

    def __str__(self) -> str:
        until = f" until {self.until:%Y-%m-%dT%H:%MZ}" if self.until else ""
        return f"{self.by} keeps it{until}" + (f": {self.reason}" if self.reason else "")


class Vetoes:
    """The vetoes at one endpoint.

    Args:
        redis: a connection that decodes responses.
        endpoint: the base URL of the API.
    """

    def __init__(self, redis: Redis, endpoint: str) -> None:
        self._redis = redis
        self._endpoint = endpoint

    async def put(self, veto: Veto) -> None:
        """Keep a pool, in place of an older veto of the same pool."""
        key = keys.vetoes(self._endpoint, veto.project_id)
        await self._redis.hset(key, veto.pool_id, veto.record())

    async def take_back(self, project_id: str, pool_id: str) -> bool:
        """Keep it no longer. Returns whether there was a veto."""
        return bool(await self._redis.hdel(keys.vetoes(self._endpoint, project_id), pool_id))

    async def of(self, project_id: str, now: datetime) -> dict[str, Veto]:
        """Those that hold in a project at a moment, by pool id."""
        key = keys.vetoes(self._endpoint, project_id)
        found = await cast("Awaitable[dict[str, str]]", self._redis.hgetall(key))
        vetoes = (Veto.parse(project_id, pool_id, text) for pool_id, text in found.items())
        return {veto.pool_id: veto for veto in vetoes if veto.holds(now)}
