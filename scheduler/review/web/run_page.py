"""What is read for the page of a run: never all of its jobs, however many it has."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from scheduler.review.remedies import RECORD_DAMAGED
from worker.ledger import JobState, RunState, keys

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from redis.asyncio import Redis

    from worker.ledger import Job, Kept, Ledger, Run

JOBS: Final = 50
"""Jobs on a page."""
SCAN: Final = 5_000
"""Jobs that a search looks at before it asks whether to go on."""
FAILURES: Final = 1_000
"""Failed jobs, the first to fail, that are grouped."""
KEPT: Final = 100
_CHUNK: Final = 1_000


@dataclass(frozen=True, slots=True)
class JobsPage:
    """A page of jobs.

    Attributes:
        jobs: those that fit.
        first: how many jobs lie before those that were looked at.
        looked_at: how many were looked at.
        next: the cursor from which on to look for more; None: there are no more.
        total: how many there are to look at.
    """

    jobs: Sequence[Job]
    first: int
    looked_at: int
    next: int | None
    total: int


@dataclass(frozen=True, slots=True)
class Failures:
    """Failed jobs that failed for one cause.

    Attributes:
        code: the error code of the last call, or what stands for it.
        count: how many.
        example: one of them.
    """

    code: str
    count: int
    example: Job


async def jobs_page(
    ledger: Ledger, run: Run, *, outcome: JobState | None, query: str, cursor: int
) -> JobsPage:
    """A page of a run's jobs.

    Args:
        ledger: where they are.
        run: the run.
        outcome: only jobs in this state.
        query: only jobs whose pool's id or name has this in it, in either case; empty: any.
        cursor: how many jobs lie before.
    """
    total = run.total if outcome is None else run.counts[outcome]
    # While they are being written down they may yet be written anew.
    if run.state in {RunState.QUEUED, RunState.CREATING}:
        total = 0
    if cursor >= total:
        return JobsPage((), cursor, 0, None, total)
    if not query:
        jobs = await ledger.jobs(run.run_id, outcome=outcome, offset=cursor, limit=JOBS)
        after = cursor + JOBS
        return JobsPage(jobs, cursor, len(jobs), after if after < total else None, total)
    found: list[Job] = []
    position, end, wanted = cursor, min(total, cursor + SCAN), query.casefold()
    while position < end and len(found) < JOBS:
        size = min(_CHUNK, end - position)
        chunk = await ledger.jobs(run.run_id, outcome=outcome, offset=position, limit=size)
        for seen, job in enumerate(chunk, 1):
            if wanted in job.pool_name.casefold() or wanted in job.display_name.casefold():
                found.append(job)
                if len(found) == JOBS:
                    size = seen
                    break
        position += size
    after_scan = position if position < total else None
    return JobsPage(found, cursor, position - cursor, after_scan, total)


async def failures(ledger: Ledger, run: Run) -> tuple[list[Failures], int]:
    """The failed jobs of a run by cause, the most frequent first.

    Returns:
        The groups, and how many jobs were looked at: `FAILURES` at most.
    """
    if not run.counts[JobState.FAILED]:
        return [], 0
    jobs = await ledger.jobs(run.run_id, outcome=JobState.FAILED, limit=FAILURES)
    return grouped(jobs), len(jobs)


def grouped(jobs: Iterable[Job]) -> list[Failures]:
    """Failed jobs by cause, the most frequent first: pure."""
    counts: Counter[str] = Counter()
    examples: dict[str, Job] = {}
    for job in jobs:
        code = cause_of(job)
        counts[code] += 1
        examples.setdefault(code, job)
    return [Failures(code, count, examples[code]) for code, count in counts.most_common()]


def cause_of(job: Job) -> str:
    """What stands for the cause of a job's failure: pure."""
    if job.is_damaged:
        return RECORD_DAMAGED
    if not job.attempts:
        return "no call was made"
    last = job.attempts[-1]
    if last.code:
        return last.code
    # A deletion that was accepted and did not end in time fails too.
    return f"HTTP {last.status}" if last.status else "no answer"


async def kept_page(
    redis: Redis, ledger: Ledger, run_id: str, cursor: int
) -> tuple[list[Kept], int]:
    """A page of the pools that a run's plan kept, and how many there are."""
    total = await redis.llen(keys.kept(run_id))
    return await ledger.kept(run_id, offset=cursor, limit=KEPT), total
