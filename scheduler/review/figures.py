"""Runs, jobs and kept pools made into a report, one after the other: pure.

What is held does not grow with the number of jobs: of everything that comes in any number, the
first or the largest are kept and the rest is counted.
"""

from __future__ import annotations

import heapq
from collections import Counter, deque
from dataclasses import dataclass, field
from datetime import UTC, date, datetime, timedelta
from itertools import count
from typing import TYPE_CHECKING, Final

from scheduler.prices import HOURS_A_DAY
from scheduler.review.credit import CLAIMING, Credit, called_at, frees
from scheduler.review.records import timestamp
from scheduler.review.remedies import RECORD_DAMAGED, remedy
from scheduler.review.report import (
    Day,
    DueMarks,
    Example,
    FailureGroup,
    Freed,
    Reason,
    Report,
    SlowJob,
    StoppedRun,
)
from worker.ledger import JobState, RunState

if TYPE_CHECKING:
    from collections.abc import Container, Mapping, Sequence

    from scheduler.prices import Prices
    from worker.ledger import Job, Kept, Run

MOST_NAMES: Final = 1_000
"""Different reasons, error codes or flavors that are counted apart; some quote a tag."""
MOST_TOLD: Final = 20
"""Reasons, error codes and marks that a report tells of."""
MOST_STOPPED: Final = 50
"""Runs that were stopped, of which a report tells."""
MOST_SLOW: Final = 10
"""Slow jobs that a report tells of."""
OTHERS: Final = "other reasons"
OTHER_FLAVORS: Final = "other flavors"
OTHER_CODES: Final = "other codes"
_LOOK: Final = "Look at them: poolsweep results RUN --outcome failed"
_ENDED_BADLY = {RunState.BRAKED, RunState.ABORTED}


@dataclass(slots=True)
class Tally:
    """Counts by name. Names that are new when it is full are counted together.

    Attributes:
        rest: what these are called.
        counts: the counts.
    """

    rest: str
    counts: Counter[str] = field(default_factory=Counter)

    def add(self, name: str, by: int = 1) -> None:
        """Count something."""
        full = len(self.counts) >= MOST_NAMES and name not in self.counts
        self.counts[self.rest if full else name] += by

    def most(self) -> tuple[Reason, ...]:
        """The most frequent names, and the sum of the others, last."""
        ranked = sorted(self.counts.items(), key=lambda item: (-item[1], item[0]))
        named = [item for item in ranked if item[0] != self.rest]
        told = [Reason(*item) for item in named[:MOST_TOLD]]
        if others := self.counts.total() - sum(reason.count for reason in told):
            told.append(Reason(self.rest, others))
        return tuple(told)


@dataclass(slots=True)
class _Group:
    count: int
    example: Job


def took_ms(job: Job) -> int | None:
    """From a job's first call to its end, in ms; None: no call, or no end yet."""
    if not job.attempts or not job.done_ms:
        return None
    first = job.attempts[0]
    # Two clocks: the worker's and the ledger's.
    return max(0, job.done_ms - (first.at_ms - first.duration_ms))


def day_of(at_ms: int) -> date:
    """The day, in UTC, of a moment in ms since the epoch."""
    return datetime.fromtimestamp(at_ms / 1000, UTC).date()


class Figures:
    """What runs came to, as far as it was added.

    Args:
        shared: the ids of runs that may have called for the same pool as another; what these freed
            is held pool by pool, and of the others it is only added up.
    """

    def __init__(self, shared: Container[str] = frozenset()) -> None:
        self._shared = shared
        self._credit = Credit()
        self._states: Counter[RunState] = Counter()
        self._unread = 0
        self._runs_by_day: Counter[date] = Counter()
        self._outcomes_by_day: dict[date, Counter[JobState]] = {}
        self._freed = 0
        self._unsized = 0
        self._nodes = Tally(OTHER_FLAVORS)
        self._failures: dict[tuple[int, str], _Group] = {}
        self._skipped = Tally(OTHERS)
        self._kept = Tally(OTHERS)
        self._slowest: list[tuple[int, int, Job]] = []
        self._order = count()
        self._stopped: deque[Run] = deque(maxlen=MOST_STOPPED)
        self._stopped_runs = 0

    def add_run(self, run: Run) -> None:
        """Count a run. The oldest comes first."""
        self._states[run.state] += 1
        self._runs_by_day[day_of(run.created_ms)] += 1
        if run.state in _ENDED_BADLY or run.braked_ms:
            self._stopped.append(run)
            self._stopped_runs += 1

    def add_unread(self) -> None:
        """Count a run that this version cannot read."""
        self._unread += 1

    def add_job(self, run: Run, job: Job, nodes: Mapping[str, int] | None) -> None:
        """Count a job of a run that was started.

        Args:
            run: its run.
            job: the job.
            nodes: the nodes by flavor that its pool had; None: not known.
        """
        day = self._outcomes_by_day.setdefault(day_of(run.created_ms), Counter())
        day[job.state] += 1
        if job.state in CLAIMING:
            counts = frees(run, job.state)
            if run.run_id in self._shared:
                self._credit.add(run, job, nodes, counts=counts)
            elif counts and called_at(job) is not None:
                self._add_freed(nodes)
        elif job.state is JobState.FAILED:
            self._add_failure(job)
        elif job.state is JobState.SKIPPED:
            self._skipped.add(_kind(job.reason))
        if (took := took_ms(job)) is not None:
            heapq.heappush(self._slowest, (took, next(self._order), job))
            if len(self._slowest) > MOST_SLOW:
                heapq.heappop(self._slowest)

    def add_claim(self, run: Run, job: Job) -> None:
        """Take into account that a run which this is not about may have freed a pool.

        Args:
            run: that run.
            job: a job of it in one of the states `CLAIMING`.
        """
        self._credit.add(run, job, job.nodes, counts=False)

    def _add_freed(self, nodes: Mapping[str, int] | None) -> None:
        self._freed += 1
        self._unsized += nodes is None
        for flavor, many in (nodes or {}).items():
            self._nodes.add(flavor, many)

    def add_kept(self, pool: Kept) -> None:
        """Count a pool that a plan kept."""
        self._kept.add(_kind(pool.reason))

    def _add_failure(self, job: Job) -> None:
        last = job.attempts[-1] if job.attempts else None
        key = (last.status, last.code) if last else (0, RECORD_DAMAGED if job.is_damaged else "")
        if key not in self._failures and len(self._failures) >= MOST_NAMES:
            key = (0, OTHER_CODES)
        group = self._failures.setdefault(key, _Group(0, job))
        group.count += 1

    def report(
        self,
        made_ms: int,
        *,
        since_ms: int | None = None,
        run_id: str | None = None,
        prices: Prices | None = None,
        marks: DueMarks | None = None,
    ) -> Report:
        """The report; nothing is added after it.

        Args:
            made_ms: now, in ms since the epoch.
            since_ms: the beginning of its time, in the same; None: it is about one run.
            run_id: the only run that it is about; None: all of the time.
            prices: what nodes cost; None: not known.
            marks: marked pools at present; None: it does not tell of them.
        """
        for nodes in self._credit.freed():
            self._add_freed(nodes)
        outcomes: Counter[JobState] = Counter()
        for counts in self._outcomes_by_day.values():
            outcomes += counts
        return Report(
            run_id=run_id,
            since=None if since_ms is None else timestamp(since_ms),
            made_at=timestamp(made_ms) or "",
            runs=self._states.total(),
            runs_by_state=_in_order(self._states, tuple(RunState)),
            runs_unread=self._unread,
            jobs=outcomes.total(),
            outcomes=_in_order(outcomes, tuple(JobState)),
            days=self._days(since_ms, made_ms),
            freed=self._freed_by(prices),
            failures=self._failure_groups(),
            skipped=self._skipped.most(),
            kept=self._kept.most(),
            slowest=tuple(_slow(took, job) for took, _, job in sorted(self._slowest)[::-1]),
            stopped=tuple(map(_stopped, reversed(self._stopped))),
            stopped_runs=self._stopped_runs,
            marks=marks,
        )

    def _days(self, since_ms: int | None, made_ms: int) -> tuple[Day, ...]:
        days = set(self._runs_by_day)
        if since_ms is not None:
            first, last = day_of(since_ms), day_of(made_ms)
            days |= {first + timedelta(days=n) for n in range((last - first).days + 1)}
        return tuple(
            Day(
                day.isoformat(),
                self._runs_by_day[day],
                _in_order(self._outcomes_by_day.get(day, Counter()), tuple(JobState)),
            )
            for day in sorted(days)
        )

    def _freed_by(self, prices: Prices | None) -> Freed:
        nodes = dict(sorted(self._nodes.counts.items()))
        money, unpriced = (0.0, []) if prices is None else prices.per_day(nodes)
        return Freed(
            pools=self._freed,
            nodes=nodes,
            node_hours_per_day=HOURS_A_DAY * sum(nodes.values()),
            money_per_day=None if prices is None else round(money, 2),
            currency=None if prices is None else prices.currency,
            unpriced=tuple(unpriced),
            unsized=self._unsized,
        )

    def _failure_groups(self) -> tuple[FailureGroup, ...]:
        ranked = sorted(self._failures.items(), key=lambda item: (-item[1].count, item[0]))
        return tuple(
            FailureGroup(
                error_code=code or None,
                status=status or None,
                count=group.count,
                what_to_do=_LOOK if code == OTHER_CODES else remedy(status, code),
                example=_example(group.example),
            )
            for (status, code), group in ranked
        )


def _kind(reason: str) -> str:
    """A reason without what differs from pool to pool."""
    return reason.split(": ")[0]


def _in_order(
    counts: Mapping[JobState, int] | Mapping[RunState, int],
    names: Sequence[JobState] | Sequence[RunState],
) -> dict[str, int]:
    by_name = {str(name): count for name, count in counts.items()}
    return {str(name): by_name[name] for name in names if by_name.get(name)}


def _example(job: Job) -> Example:
    request_id = job.attempts[-1].request_id if job.attempts else ""
    return Example(
        job_id=job.job_id,
        project_id=job.project_id,
        pool_name=job.pool_name,
        name=job.display_name,
        reason=job.reason,
        request_id=request_id or None,
    )


def _slow(took: int, job: Job) -> SlowJob:
    return SlowJob(
        job_id=job.job_id,
        project_id=job.project_id,
        pool_name=job.pool_name,
        name=job.display_name,
        outcome=job.state,
        took_ms=took,
        attempts=len(job.attempts),
    )


def _stopped(run: Run) -> StoppedRun:
    return StoppedRun(
        run_id=run.run_id,
        state=run.state,
        policy=run.policy or None,
        created_at=timestamp(run.created_ms),
        note=run.note,
    )
