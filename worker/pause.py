"""The kill switch: while it is on, no worker makes a DELETE call; all projects, or just one.

It is in Redis; each worker process looks twice a second, and whatever is about to be called is
given back to the ledger instead.
"""

from __future__ import annotations

import asyncio
import json
from dataclasses import dataclass
from typing import TYPE_CHECKING, cast

import structlog
from redis.exceptions import RedisError

from worker.ledger import keys

if TYPE_CHECKING:
    from collections.abc import Awaitable, Iterable

    from redis.asyncio import Redis

EVERYTHING = "*"
LOOK_S = 0.5

log = structlog.get_logger(__name__)


@dataclass(frozen=True, slots=True)
class Pause:
    """A pause that is on.

    Attributes:
        scope: the project's id, or `*` for all.
        by: who asked for it.
        reason: why, in their words.
        at_ms: since when, in ms since the epoch.
    """

    scope: str
    by: str
    reason: str
    at_ms: int

    def __str__(self) -> str:
        what = "everything" if self.scope == EVERYTHING else f"project {self.scope}"
        return f"{what} is paused by {self.by}" + (f": {self.reason}" if self.reason else "")


async def pause(redis: Redis, scope: str, *, by: str, reason: str) -> None:
    """Turn it on.

    Args:
        redis: a connection that decodes responses.
        scope: a project's id, or `*` for all.
        by: who asks.
        reason: why, in their words.
    """
    seconds, _ = await redis.time()
    text = json.dumps([by, reason, seconds * 1000], ensure_ascii=False)
    await redis.hset(keys.PAUSED, scope, text)


async def resume(redis: Redis, scope: str) -> bool:
    """Turn it off for a scope; a pause of another scope stays. Returns whether it was on."""
    return bool(await redis.hdel(keys.PAUSED, scope))


async def pauses(redis: Redis) -> dict[str, Pause]:
    """Those that are on, by scope."""
    found = await cast("Awaitable[dict[str, str]]", redis.hgetall(keys.PAUSED))
    return {scope: _read(scope, text) for scope, text in sorted(found.items())}


def _read(scope: str, text: str) -> Pause:
    try:
        by, reason, at_ms = json.loads(text)
        return Pause(scope, str(by), str(reason), int(at_ms))
    except (ValueError, TypeError, OverflowError):
        # Whoever wrote it by hand meant to stop something.
        return Pause(scope, "somebody", "", 0)


class PauseWatch:
    """What one worker process knows of the kill switch.

    Args:
        redis: a connection that decodes responses.
    """

    def __init__(self, redis: Redis) -> None:
        self._redis = redis
        self._on: dict[str, Pause] | None = None

    async def ready(self) -> None:
        """Wait until it is known what is paused.

        Raises:
            RedisError: it cannot be told.
        """
        if self._on is None:
            await self.look()

    def covers(self, project_id: str) -> Pause | None:
        """The pause that a project is under, as last seen; None if it is not."""
        on = self._on or {}
        return on.get(EVERYTHING) or on.get(project_id)

    def covers_all(self, project_ids: Iterable[str]) -> bool:
        """Whether everything is paused, or each of some projects."""
        on, ids = self._on or {}, list(project_ids)
        return EVERYTHING in on or (bool(ids) and all(each in on for each in ids))

    async def look(self) -> None:
        """Ask Redis.

        Raises:
            RedisError: it does not answer; what was seen last holds.
        """
        seen, before = await pauses(self._redis), self._on or {}
        for scope in seen.keys() - before.keys():
            log.warning("paused", scope=scope, by=seen[scope].by, reason=seen[scope].reason)
        for scope in before.keys() - seen.keys():
            log.warning("resumed", scope=scope)
        self._on = seen

    async def run(self) -> None:
        """Go on looking until cancelled."""
        while True:
            try:
                await self.look()
            except RedisError as error:
                log.warning("redis_unreachable", reason=str(error))
            except Exception:
                # A defect, or what no client of ours wrote, must not end the watch.
                log.exception("pause_watch_crashed")
            await asyncio.sleep(LOOK_S)
