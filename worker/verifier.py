"""Which accepted pools are really gone: a 200 only means that the cloud has begun.

Deleting a real cluster takes minutes to over an hour, so no worker waits. From time to time each
project is listed once for all of its accepted jobs; a pool that the list does not show is asked
for by itself, and only the cloud's "pool not found" makes its job `deleted`.
"""

from __future__ import annotations

import asyncio
from collections import defaultdict
from typing import TYPE_CHECKING

import structlog

from worker.ledger import JobState, Move
from worker.ledger.ledger import PAGE
from worker.modelarts import ApiError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from worker.ledger import Job, Ledger, Run
    from worker.limiter import Limiter
    from worker.modelarts import ModelArtsClient, Pool
    from worker.recorder import Recorder

log = structlog.get_logger(__name__)


def overdue(pool: Pool | None, doubt: str, deadline_s: float) -> str:
    """Why a pool that is not seen to be gone by its deadline counts as failed: pure.

    Args:
        pool: the pool as last read; None: it could not be read.
        doubt: then: why not.
        deadline_s: the seconds allowed since the cloud accepted the deletion.
    """
    start = f"accepted, but not seen to be gone within {_duration(deadline_s)}: "
    if pool is None:
        return start + doubt
    return start + f"its phase is {pool.phase or 'unknown'} ({pool.message or 'no message'})"


def _duration(seconds: float) -> str:
    return f"{seconds:g} s" if seconds < 120 else f"{seconds / 60:.0f} min"


class Verifier:
    """Moves accepted jobs to their end.

    Args:
        client: the API.
        limiter: reads count as calls too.
        ledger: where the jobs are.
        recorder: where moves go.
        deadline_s: seconds since the acceptance after which a pool still there is a failure.
    """

    def __init__(
        self,
        *,
        client: ModelArtsClient,
        limiter: Limiter,
        ledger: Ledger,
        recorder: Recorder,
        deadline_s: float,
    ) -> None:
        self._client = client
        self._limiter = limiter
        self._ledger = ledger
        self._recorder = recorder
        self._deadline_s = deadline_s

    async def verify(self, runs: Sequence[Run]) -> None:
        """Look once at every accepted job of the runs.

        Args:
            runs: runs that verify.

        Raises:
            RedisError: the ledger cannot be reached; the next look starts anew.
        """
        accepted: defaultdict[str, list[tuple[Job, int]]] = defaultdict(list)
        for run in runs:
            offset = 0
            while page := await self._ledger.accepted(run.run_id, offset=offset):
                for job, since_ms in page:
                    accepted[job.project_id].append((job, since_ms))
                offset += PAGE
        await asyncio.gather(*(self._project(name, jobs) for name, jobs in accepted.items()))

    async def _project(self, project_id: str, jobs: Sequence[tuple[Job, int]]) -> None:
        due_before_ms = await self._ledger.now_ms() - self._deadline_s * 1000
        doubt, present = "", {}
        try:
            await self._limiter.permit(project_id, urgent=True)
            listing = await self._client.list_pools(project_id)
            present = {pool.pool_id: pool for pool in listing.pools}
        except ApiError as error:
            await self._slow_down(project_id, error)
            doubt = str(error)
            log.warning("pools_not_listed", project_id=project_id, reason=doubt)
        looks = []
        for job, since_ms in jobs:
            pool = present.get(job.pool_name)
            if since_ms <= due_before_ms and (pool or doubt):
                looks.append(self._end(job, JobState.FAILED, self._overdue(pool, doubt)))
            elif not pool and not doubt:
                looks.append(self._confirm(job, overdue=since_ms <= due_before_ms))
        await asyncio.gather(*looks)

    async def _confirm(self, job: Job, *, overdue: bool) -> None:
        doubt = ""
        pool = None
        await self._limiter.permit(job.project_id)
        try:
            pool = await self._client.show_pool(job.project_id, job.pool_name)
            if pool is None:
                return await self._end(job, JobState.DELETED, "the pool is gone")
        except ApiError as error:
            await self._slow_down(job.project_id, error)
            doubt = str(error)
            log.warning("pool_not_read", job_id=job.job_id, reason=doubt)
        if overdue:
            await self._end(job, JobState.FAILED, self._overdue(pool, doubt))
        return None

    def _overdue(self, pool: Pool | None, doubt: str) -> str:
        return overdue(pool, doubt, self._deadline_s)

    async def _slow_down(self, project_id: str, error: ApiError) -> None:
        if error.verdict.throttled:
            await self._limiter.throttled(project_id, error.verdict.retry_after_s)

    async def _end(self, job: Job, state: JobState, reason: str) -> None:
        move = Move(job.number, JobState.ACCEPTED, state, reason=reason)
        if await self._recorder.record(job.run_id, move):
            log.info(
                "job_moved",
                run_id=job.run_id,
                job_id=job.job_id,
                project_id=job.project_id,
                pool_name=job.pool_name,
                state=state,
                reason=reason,
            )
