"""Listings of projects that several plans share for a short while."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from worker.limiter import Limiter
    from worker.modelarts.client import ModelArtsClient, PoolListing


class Listings:
    """Lists projects, each once for all who ask at about the same time.

    Args:
        client: the API.
        limiter: each listing counts as a call.
        max_age_s: for how many seconds a listing is shared; what is deleted is compared once more
            with what was planned anyway.
    """

    def __init__(self, client: ModelArtsClient, limiter: Limiter, *, max_age_s: float) -> None:
        self._client = client
        self._limiter = limiter
        self._max_age_s = max_age_s
        self._tasks: dict[str, asyncio.Task[PoolListing]] = {}

    async def of(self, project_id: str) -> PoolListing:
        """The pools of a project.

        Raises:
            ApiError, AuthError: they cannot be listed; whoever waits for the same listing is told
                so too, and the next to ask lists anew.
        """
        if not self._max_age_s:
            return await self._list(project_id)
        task = self._tasks.get(project_id)
        if task is None:
            task = self._tasks[project_id] = asyncio.create_task(self._list(project_id))
            loop = asyncio.get_running_loop()
            # From when it is asked for: it is never younger than it says.
            loop.call_later(self._max_age_s, self._forget, project_id, task)
            task.add_done_callback(lambda ended: self._forget_failed(project_id, ended))
        return await asyncio.shield(task)

    async def _list(self, project_id: str) -> PoolListing:
        await self._limiter.permit(project_id)
        return await self._client.list_pools(project_id)

    def _forget(self, project_id: str, task: asyncio.Task[PoolListing]) -> None:
        if self._tasks.get(project_id) is task:
            del self._tasks[project_id]

    def _forget_failed(self, project_id: str, task: asyncio.Task[PoolListing]) -> None:
        if task.cancelled() or task.exception() is not None:
            self._forget(project_id, task)
