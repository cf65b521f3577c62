"""Since when a pool has been without workloads: remembered in Redis between looks.

A pool that is seen busy is forgotten; one that is seen idle for the first time has been idle
since then. It begins anew when something shows that the pool was in use between two looks, and
when nobody has looked for so long that nobody can tell.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Any, Self, cast

from worker.ledger import keys
from worker.modelarts.activity import is_busy

if TYPE_CHECKING:
    from collections.abc import Awaitable, Sequence

    from redis.asyncio import Redis

    from worker.modelarts import Pool
    from worker.modelarts.schema import Workload

LONGEST_GAP = timedelta(days=8)
"""A look that is longer ago tells nothing: the cloud forgets ended workloads. Weekly looks do."""
SKEW = timedelta(minutes=5)
"""The cloud's clock may differ from ours by so much."""
_MS_FROM = 100_000_000_000
"""Larger times are in ms since the epoch, smaller ones in s."""


@dataclass(frozen=True, slots=True)
class Look:
    """What was seen of a pool that had no workload.

    Attributes:
        created: its creationTimestamp: which incarnation it was.
        at: when; an aware time.
        since: since when it had been idle then.
        traces: a digest of the workloads that can be started again.
    """

    created: str
    at: datetime
    since: datetime
    traces: str

    def record(self) -> str:
        """The form in which it is held."""
        at, since = self.at.timestamp(), self.since.timestamp()
        return json.dumps([self.created, at, since, self.traces], separators=(",", ":"))

    @classmethod
    def parse(cls, text: str) -> Self:
        """Read one back."""
        created, at, since, traces = json.loads(text)
        return cls(
            created, datetime.fromtimestamp(at, UTC), datetime.fromtimestamp(since, UTC), traces
        )


def look(pool: Pool, workloads: Sequence[Workload], now: datetime, before: Look | None) -> Look:
    """What is seen of a pool that has no workload at present: pure.

    Args:
        pool: the pool.
        workloads: all that the workloads call told, none of them busy.
        now: an aware time.
        before: what was seen last; None: nothing.
    """
    traces = _traces(workloads)
    since = now
    if (
        before is not None
        and before.created == pool.created  # another incarnation of the pool starts anew
        and timedelta(0) <= now - before.at <= LONGEST_GAP
        and before.traces == traces
        and not any(_may_have_run_after(before.at - SKEW, workload) for workload in workloads)
    ):
        since = min(before.since, now)
    return Look(pool.created, now, since, traces)


def _traces(workloads: Sequence[Workload]) -> str:
    """A digest of notebooks and services: when started again they keep their creation time, so
    that only some change shows that they ran in between.
    """
    texts = sorted(
        json.dumps([each.type, each.status, each.name, each.job_name, *_times(each)], default=str)
        for each in workloads
        if each.type != "train"
    )
    return hashlib.sha256("\n".join(texts).encode()).hexdigest()[:16]


def _times(workload: Workload) -> tuple[Any, Any]:
    return workload.create_time, workload.running_duration


def _may_have_run_after(moment: datetime, workload: Workload) -> bool:
    """Whether an ended workload ran later; how long it was queued before it ran is not told."""
    begun, seconds = _times(workload)
    if isinstance(seconds, bool) or not isinstance(seconds, int | float):
        return True
    try:
        return _moment(begun) + max(timedelta(0), timedelta(seconds=seconds)) >= moment
    except (ValueError, TypeError, OverflowError, OSError):
        return True


def _moment(value: Any) -> datetime:
    if isinstance(value, str):
        moment = datetime.fromisoformat(value)
        return moment if moment.tzinfo else moment.replace(tzinfo=UTC)
    if isinstance(value, bool):
        raise TypeError
    return datetime.fromtimestamp(value / 1000 if value >= _MS_FROM else value, UTC)


class Idleness:
    """What is remembered at one endpoint.

    Args:
        redis: a connection that decodes responses.
        endpoint: the base URL of the API.
    """

    def __init__(self, redis: Redis, endpoint: str) -> None:
        self._redis = redis
        self._endpoint = endpoint

    async def seen(
        self, project_id: str, pool: Pool, workloads: Sequence[Workload], now: datetime
    ) -> datetime | None:
        """Remember what was seen of a pool just now.

        Args:
            project_id: its project.
            pool: the pool.
            workloads: all that the workloads call told.
            now: an aware time.

        Returns:
            Since when the pool has been idle; None: it is not.
        """
        key = keys.idle(self._endpoint, project_id)
        if any(is_busy(workload) for workload in workloads):
            await self._redis.hdel(key, pool.pool_id)
            return None
        text = await cast("Awaitable[str | None]", self._redis.hget(key, pool.pool_id))
        seen = look(pool, workloads, now, None if text is None else Look.parse(text))
        await self._redis.hset(key, pool.pool_id, seen.record())
        return seen.since
