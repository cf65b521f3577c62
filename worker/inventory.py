"""What is known of the pools right now: few calls, always fresh.

One list call answers for all of a project's jobs and is trusted for a bounded time; a batch with
only a few jobs in a project reads those pools one by one.
"""

from __future__ import annotations

import asyncio
import contextlib
import math
import random
from dataclasses import dataclass
from typing import TYPE_CHECKING

from worker.modelarts import UnreadablePoolError

if TYPE_CHECKING:
    from worker.limiter import Limiter
    from worker.modelarts import Pool
    from worker.modelarts.client import ModelArtsClient
    from worker.modelarts.listing import ListedPool

FEW = 3
"""Up to this many pools of a project are read one by one, rather than all by a list."""

RENEWED_FROM, RENEWED_UNTIL = 0.6, 0.85
"""A list is read anew at a random share of its time, so that workers do not read in step, and early
enough for no job's turn to come when there is none."""


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


class _Listing:
    """The pools of a project at a moment; each is read only when somebody looks at it."""

    def __init__(self, listed: list[ListedPool], at: float, renew_at: float) -> None:
        self.at = at
        self.renew_at = renew_at
        self._unread = {each.name: each for each in listed if each.name}
        self._pools: dict[str, Pool] = {}

    def find(self, pool_name: str) -> Pool | None:
        """One pool; None: it is not listed, or cannot be read."""
        if listed := self._unread.pop(pool_name, None):
            with contextlib.suppress(UnreadablePoolError):
                self._pools[pool_name] = listed.read()
        return self._pools.get(pool_name)


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
        self._reading: dict[str, asyncio.Task[None]] = {}

    def is_fresh(self, sight: Sight) -> bool:
        """Whether a sight may still be decided on."""
        return self._age_s(sight.at) <= self._max_age_s

    def known(self, project_id: str, pool_name: str) -> Sight | None:
        """A sight that is fresh and needs no call; None: there is none."""
        listing = self._list_of(project_id)
        pool = listing.find(pool_name) if listing else None
        return Sight(pool, listing.at) if listing and pool else None

    def is_list_due(self, project_id: str) -> bool:
        """Whether a project's list is to be read anew, and nobody does so yet."""
        listing = self._listings.get(project_id)
        return (
            listing is not None
            and self._age_s(listing.renew_at) > 0
            and project_id not in self._reading
        )

    async def look(
        self, project_id: str, pool_name: str, *, alone: bool, has_turn: bool = False
    ) -> Sight:
        """A fresh sight of one pool.

        Args:
            project_id: its project.
            pool_name: its id.
            alone: whether few other pools of the project will be asked for, so that reading
                just this one is cheaper than listing all.
            has_turn: whether a call may be made at once.

        Raises:
            ApiError: the cloud does not answer the question.
            LongWaitError: it wants to be left alone for a while.
        """
        if not alone and (self._list_of(project_id) is None or self.is_list_due(project_id)):
            await self._shared_list(project_id, has_turn=has_turn)
            has_turn = False
        if sight := self.known(project_id, pool_name):
            return sight
        # A pool that a list does not show may be hidden rather than gone: only its own 404 counts.
        # A list that takes longer than it is trusted is of no use.
        if not has_turn:
            await self._limiter.permit(project_id, urgent=True, patient=False)
        at = asyncio.get_running_loop().time()
        return Sight(await self._client.show_pool(project_id, pool_name), at)

    def _age_s(self, at: float) -> float:
        return asyncio.get_running_loop().time() - at

    def _list_of(self, project_id: str) -> _Listing | None:
        """The list that may still be decided on."""
        listing = self._listings.get(project_id)
        return listing if listing and self._age_s(listing.at) <= self._max_age_s else None

    async def _shared_list(self, project_id: str, *, has_turn: bool) -> None:
        """One call for all that want a list at the same time, whether it succeeds or fails."""
        reading = self._reading.get(project_id)
        if reading is None:
            reading = asyncio.create_task(self._list(project_id, has_turn=has_turn))
            self._reading[project_id] = reading
            reading.add_done_callback(lambda _: self._reading.pop(project_id))
        # A job that is cancelled must not take the others' list with it.
        await asyncio.shield(reading)

    async def _list(self, project_id: str, *, has_turn: bool) -> None:
        if not has_turn:
            await self._limiter.permit(project_id, urgent=True, patient=False)
        at = asyncio.get_running_loop().time()
        if old := self._listings.get(project_id):
            old.renew_at = math.inf  # if this fails, that is good for as long as it is trusted
        listed = await self._client.list_unread(project_id)
        share = random.uniform(RENEWED_FROM, RENEWED_UNTIL)  # noqa: S311
        self._listings[project_id] = _Listing(listed, at, at + share * self._max_age_s)
