"""What is known of the pools right now: few calls, always fresh.

One list call answers for all of a project's jobs and is trusted for a bounded time; a batch with
only a few jobs in a project reads those pools one by one.
"""

from __future__ import annotations

import asyncio
from collections import defaultdict
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from worker.limiter import Limiter
    from worker.modelarts import ModelArtsClient, Pool

FEW = 3
"""Up to this many pools of a project are read one by one, rather than all by a list."""


@dataclass(frozen=True, slots=True)
class Sight:
    """A pool as it was read.

    Attributes:
        pool: the pool; None: the cloud says that there is none.
        at: when it was read, in seconds of the event loop's clock; taken before the call, so
            that the sight is never younger than it says.
    """

    pool: Pool | None
    at: float


@dataclass(slots=True)
class _Listing:
    pools: dict[str, Pool]
    at: float


class Inventory:
    """Reads pools for the preconditions of one worker process.

    Args:
        client: the API.
        limiter: reads count as calls too.
        max_age_s: for how many seconds a list is trusted.
    """

    def __init__(self, client: ModelArtsClient, limiter: Limiter, *, max_age_s: float) -> None:
        self._client = client
        self._limiter = limiter
        self._max_age_s = max_age_s
        self._listings: dict[str, _Listing] = {}
        self._reading: defaultdict[str, asyncio.Lock] = defaultdict(asyncio.Lock)

    def is_fresh(self, sight: Sight) -> bool:
        """Whether a sight may still be decided on."""
        return asyncio.get_running_loop().time() - sight.at <= self._max_age_s

    async def look(self, project_id: str, pool_name: str, *, alone: bool) -> Sight:
        """A fresh sight of one pool.

        Args:
            project_id: its project.
            pool_name: its id.
            alone: whether few other pools of the project will be asked for, so that reading
                just this one is cheaper than listing all.

        Raises:
            ApiError: the cloud does not answer the question.
        """
        listing = self._fresh_listing(project_id)
        if listing is None and not alone:
            listing = await self._list(project_id)
        if listing is not None and (pool := listing.pools.get(pool_name)) is not None:
            return Sight(pool, listing.at)
        # A pool that a list does not show may be hidden rather than gone: only its own 404 counts.
        await self._limiter.permit(project_id, urgent=True)
        at = asyncio.get_running_loop().time()
        return Sight(await self._client.show_pool(project_id, pool_name), at)

    def _fresh_listing(self, project_id: str) -> _Listing | None:
        listing = self._listings.get(project_id)
        if listing and asyncio.get_running_loop().time() - listing.at <= self._max_age_s:
            return listing
        return None

    async def _list(self, project_id: str) -> _Listing:
        async with self._reading[project_id]:
            if listing := self._fresh_listing(project_id):
                return listing
            await self._limiter.permit(project_id, urgent=True)
            at = asyncio.get_running_loop().time()
            found = await self._client.list_pools(project_id)
            listing = _Listing({pool.pool_id: pool for pool in found.pools}, at)
            self._listings[project_id] = listing
            return listing
