"""What Redis remembers of the nights: which were handled, how, and what came of them."""

from __future__ import annotations

import json
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from enum import StrEnum
from typing import TYPE_CHECKING, Any, cast

from worker.ledger import keys

if TYPE_CHECKING:
    from collections.abc import Awaitable, Sequence

    from redis.asyncio import Redis

MOST_PAST = 100
SILENT_S = 15.0
"""A leader that has said nothing for so long is taken for gone."""


class NightState(StrEnum):
    """What became of a night."""

    WATCHED = "watched"
    """Not a night: since then the policy's schedule has been looked at."""
    STARTED = "started"
    DONE = "done"
    MISSED = "missed"


@dataclass(frozen=True, slots=True)
class Night:
    """A night of a policy.

    Attributes:
        policy: the policy.
        at: when it was due; an aware time.
        state: what became of it.
        runs: the ids of its runs, by project.
        note: what else there is to say, in a sentence; empty: nothing.
    """

    policy: str
    at: datetime
    state: NightState
    runs: dict[str, str] = field(default_factory=dict)
    note: str = ""

    def record(self) -> str:
        """The form in which it is held."""
        return json.dumps(
            [self.at.timestamp(), self.state, self.runs, self.note], ensure_ascii=False
        )

    @classmethod
    def parse(cls, policy: str, text: str) -> Night:
        """Read one back."""
        at, state, runs, note = json.loads(text)
        return cls(policy, datetime.fromtimestamp(at, UTC), NightState(state), runs, note)

    def done(self, runs: dict[str, str], note: str = "") -> Night:
        """The same night, carried out."""
        return replace(self, state=NightState.DONE, runs=runs, note=note)


class Almanac:
    """The nights of all policies.

    Args:
        redis: a connection that decodes responses.
    """

    def __init__(self, redis: Redis) -> None:
        self._redis = redis

    async def last(self, policy: str) -> Night | None:
        """The last night that was handled; None: the policy is new here."""
        text = await cast("Awaitable[str | None]", self._redis.hget(keys.NIGHTS, policy))
        return None if text is None else Night.parse(policy, text)

    async def put(self, night: Night) -> None:
        """Remember a night as the policy's last."""
        await self._redis.hset(keys.NIGHTS, night.policy, night.record())

    async def file(self, nights: Sequence[Night]) -> None:
        """Add nights, oldest first, to those that are past."""
        for night in nights:
            key = keys.past_nights(night.policy)
            async with self._redis.pipeline(transaction=True) as pipe:
                pipe.lpush(key, night.record())
                pipe.ltrim(key, 0, MOST_PAST - 1)
                await pipe.execute()

    async def past(self, policy: str, limit: int = 10) -> list[Night]:
        """The latest nights that are past, newest first."""
        key = keys.past_nights(policy)
        texts = await cast("Awaitable[list[str]]", self._redis.lrange(key, 0, limit - 1))
        return [Night.parse(policy, text) for text in texts]

    async def say(self, state: dict[str, Any]) -> None:
        """What the leader says of itself."""
        text = json.dumps(state, ensure_ascii=False)
        await self._redis.set(keys.SCHEDULER_STATE, text, px=round(SILENT_S * 1000))

    async def said(self) -> dict[str, Any] | None:
        """What the leader last said; None: there is no leader."""
        text = await self._redis.get(keys.SCHEDULER_STATE)
        return None if text is None else cast("dict[str, Any]", json.loads(text))
