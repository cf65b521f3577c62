"""What Redis remembers of the nights: which were handled, how, and what came of them."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from datetime import UTC, datetime
from enum import StrEnum
from importlib.resources import files
from typing import TYPE_CHECKING, Any, cast

from worker.ledger import keys

if TYPE_CHECKING:
    from collections.abc import Awaitable, Sequence

    from redis.asyncio import Redis

MOST_PAST = 100
SILENT_S = 15.0
"""A leader that has said nothing for so long is taken for gone."""


class NotLeadingError(RuntimeError):
    """Another process leads by now, and nothing was written."""


class NightState(StrEnum):
    """What became of a night."""

    WATCHED = "watched"
    """Not a night: since then the policy's schedule has been looked at."""
    STARTED = "started"
    DONE = "done"
    FAILED = "failed"
    """It ended, and a project of it could not be swept; the note says why."""
    MISSED = "missed"


@dataclass(frozen=True, slots=True)
class Night:
    """A night of a policy.

    Attributes:
        policy: the policy.
        at: when it was due; an aware time.
        state: what became of it.
        schedule: the schedule and the time zone that it was due by.
        runs: the ids of its runs, by project.
        note: what else there is to say, in a sentence; empty: nothing.
    """

    policy: str
    at: datetime
    state: NightState
    schedule: str
    runs: dict[str, str] = field(default_factory=dict)
    note: str = ""

    def record(self) -> str:
        """The form in which it is held; all ASCII, so that any text passes."""
        return json.dumps([self.at.timestamp(), self.state, self.schedule, self.runs, self.note])

    @classmethod
    def parse(cls, policy: str, text: str) -> Night:
        """Read one back."""
        at, state, schedule, runs, note = json.loads(text)
        moment = datetime.fromtimestamp(at, UTC)
        return cls(policy, moment, NightState(state), schedule, runs, note)


class Almanac:
    """The nights of all policies.

    Args:
        redis: a connection that decodes responses.
        writer: the leader's name, for one that writes; what is written by another is refused, so
            that a process which was paused and led once cannot turn back time.
    """

    def __init__(self, redis: Redis, writer: str = "") -> None:
        self._redis = redis
        self._writer = writer
        self._script = redis.register_script((files("scheduler") / "almanac.lua").read_text())

    async def policies(self) -> set[str]:
        """The policies of which a last night is remembered."""
        return set(await cast("Awaitable[list[str]]", self._redis.hkeys(keys.NIGHTS)))

    async def last(self, policy: str) -> Night | None:
        """The last night that was handled; None: the policy is new here."""
        text = await cast("Awaitable[str | None]", self._redis.hget(keys.NIGHTS, policy))
        return None if text is None else Night.parse(policy, text)

    async def put(self, last: Night, past: Sequence[Night] = ()) -> None:
        """Remember a night as its policy's last, and others as past, at once.

        Args:
            last: the night that was handled last.
            past: the nights that are over now, oldest first.

        Raises:
            NotLeadingError: nothing was written.
        """
        await self._write(last.policy, last.record(), [night.record() for night in past])

    async def forget(self, policy: str) -> None:
        """Forget a policy's last night; the past ones stay.

        Raises:
            NotLeadingError: nothing was written.
        """
        await self._write(policy, "", [])

    async def past(self, policy: str, limit: int = 10) -> list[Night]:
        """The latest nights that are past, newest first."""
        key = keys.past_nights(policy)
        texts = await cast("Awaitable[list[str]]", self._redis.lrange(key, 0, limit - 1))
        return [Night.parse(policy, text) for text in texts]

    async def say(self, state: dict[str, Any]) -> None:
        """What the leader says of itself."""
        await self._redis.set(keys.SCHEDULER_STATE, json.dumps(state), px=round(SILENT_S * 1000))

    async def said(self) -> dict[str, Any] | None:
        """What the leader last said; None: there is no leader."""
        text = await self._redis.get(keys.SCHEDULER_STATE)
        return None if text is None else cast("dict[str, Any]", json.loads(text))

    async def fall_silent(self) -> None:
        """The leader goes, and nobody leads."""
        await self._redis.delete(keys.SCHEDULER_STATE)

    async def _write(self, policy: str, last: str, past: list[str]) -> None:
        written = await self._script(
            keys=[keys.SCHEDULER, keys.NIGHTS, keys.past_nights(policy)],
            args=[self._writer, policy, MOST_PAST, last, *past],
        )
        if not written:
            raise NotLeadingError
