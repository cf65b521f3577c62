"""Which accepted pools are really gone: a 200 only means that the cloud has begun.

Deleting a real cluster takes minutes to over an hour, so no worker waits. From time to time each
project is listed once for all of its accepted jobs; a pool that the list does not show is asked
for by itself, and only the cloud's "pool not found" makes its job `deleted`.
"""

from __future__ import annotations

import asyncio
from collections import defaultdict
from typing import TYPE_CHECKING, Any

import structlog

from worker.ledger import JobState, Move
from worker.ledger.ledger import PAGE
from worker.modelarts import ApiError, AuthError, UnreadablePoolError

if TYPE_CHECKING:
    from collections.abc import Coroutine, Iterable, Sequence

    from worker.ledger import Job, Ledger, Run
    from worker.limiter import Limiter
    from worker.modelarts import Pool
    from worker.modelarts.client import ModelArtsClient
    from worker.modelarts.listing import ListedPool
    from worker.recorder import Recorder

READS_AT_ONCE = 16
"""Fewer than the connections that the client keeps beside those for DELETE calls."""

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
        self._busy: set[str] = set()
        self._reads = asyncio.Semaphore(READS_AT_ONCE)

    async def verify(self, runs: Sequence[Run]) -> None:
        """Look once at every accepted job of the runs, but for projects still being looked at.

        Each project is on its own: one that is slow, throttled or forbidden holds up no other.

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
        await _all(self._look(name, jobs) for name, jobs in accepted.items())

    async def _look(self, project_id: str, jobs: Sequence[tuple[Job, int]]) -> None:
        if project_id in self._busy:
            return
        self._busy.add(project_id)
        try:
            await self._project(project_id, jobs)
        finally:
            self._busy.remove(project_id)

    async def _project(self, project_id: str, jobs: Sequence[tuple[Job, int]]) -> None:
        due_before_ms = await self._ledger.now_ms() - self._deadline_s * 1000
        await self._limiter.permit(project_id, urgent=True)
        present: dict[str, ListedPool] | None = None
        try:
            listing = await self._client.list_unread(project_id)
            present = {listed.name: listed for listed in listing}
        except (ApiError, AuthError) as error:
            await self._slow_down(project_id, error)
            log.warning("pools_not_listed", project_id=project_id, reason=str(error))
        looks = []
        for job, since_ms in jobs:
            is_overdue = since_ms <= due_before_ms
            if present is not None and (listed := present.get(job.pool_name)):
                if is_overdue:
                    reason = overdue(_read(listed), "it cannot be read", self._deadline_s)
                    looks.append(self._end(job, JobState.FAILED, reason))
            elif present is not None or is_overdue:
                # At the deadline a list that failed does not decide either: the pool may be gone.
                looks.append(self._confirm(job, is_overdue=is_overdue))
        await _all(looks)

    async def _confirm(self, job: Job, *, is_overdue: bool) -> None:
        await self._limiter.permit(job.project_id)
        try:
            async with self._reads:
                pool = await self._client.show_pool(job.project_id, job.pool_name)
        except (ApiError, AuthError) as error:
            await self._slow_down(job.project_id, error)
            _log_of(job).warning("pool_not_read", reason=str(error))
            why = overdue(None, str(error), self._deadline_s)
        else:
            if pool is None:
                return await self._end(job, JobState.DELETED, "the pool is gone")
            why = overdue(pool, "", self._deadline_s)
        if is_overdue:
            await self._end(job, JobState.FAILED, why)
        return None

    async def _slow_down(self, project_id: str, error: ApiError | AuthError) -> None:
        if isinstance(error, ApiError) and error.verdict.throttled:
            await self._limiter.throttled(
                project_id,
                error.verdict.retry_after_s,
                sent_ago_s=error.answer.duration_s,
            )

    async def _end(self, job: Job, state: JobState, reason: str) -> None:
        move = Move(job.number, JobState.ACCEPTED, state, reason=reason)
        if await self._recorder.record(job.run_id, move):
            _log_of(job).info("job_moved", state=state, reason=reason)


def _read(listed: ListedPool) -> Pool | None:
    try:
        return listed.read()
    except UnreadablePoolError:
        return None


async def _all(looks: Iterable[Coroutine[Any, Any, None]]) -> None:
    """Await them all, so that none goes on unseen; then raise the first error."""
    for result in await asyncio.gather(*looks, return_exceptions=True):
        if isinstance(result, BaseException):
            raise result


def _log_of(job: Job) -> Any:
    return log.bind(
        run_id=job.run_id,
        job_id=job.job_id,
        project_id=job.project_id,
        pool_name=job.pool_name,
    )
