"""A report: what the runs of some time came to.

Its fields are those of its JSON, which docs/reports.md tells of. Times are texts in ISO 8601, in
UTC, as in every record.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True, slots=True)
class Day:
    """The runs that were made on one day, in UTC, and the outcomes of their jobs."""

    day: str
    runs: int
    outcomes: dict[str, int]


@dataclass(frozen=True, slots=True)
class Freed:
    """What the pools that are gone had.

    Attributes:
        pools: how many were deleted, or of a run that does not verify: accepted.
        nodes: their nodes by flavor.
        node_hours_per_day: 24 for each node.
        money_per_day: what they cost a day, in the currency; None: no prices were given.
        currency: such as EUR; None with `money_per_day`.
        unpriced: flavors that are not in the money, for want of a price.
        unsized: how many of the pools the ledger does not know the nodes of.
    """

    pools: int
    nodes: dict[str, int]
    node_hours_per_day: int
    money_per_day: float | None
    currency: str | None
    unpriced: tuple[str, ...]
    unsized: int


@dataclass(frozen=True, slots=True)
class Example:
    """One job of several with the same trouble."""

    job_id: str
    project_id: str
    pool_name: str
    name: str
    reason: str
    request_id: str | None


@dataclass(frozen=True, slots=True)
class FailureGroup:
    """Failed jobs whose last call was answered alike.

    Attributes:
        error_code: the cloud's code, or the kind of trouble; None: neither.
        status: the HTTP status; None: there was no answer, or no call.
        count: how many jobs.
        what_to_do: in a sentence or two.
        example: the first of them.
    """

    error_code: str | None
    status: int | None
    count: int
    what_to_do: str
    example: Example


@dataclass(frozen=True, slots=True)
class Reason:
    """A reason, without what differs from pool to pool, and how many jobs or pools have it."""

    reason: str
    count: int


@dataclass(frozen=True, slots=True)
class SlowJob:
    """A job that took long.

    Attributes:
        took_ms: from its first call to its end.
        attempts: how many calls.
    """

    job_id: str
    project_id: str
    pool_name: str
    name: str
    outcome: str
    took_ms: int
    attempts: int


@dataclass(frozen=True, slots=True)
class StoppedRun:
    """A run that did not do all that it was made for, and why."""

    run_id: str
    state: str
    policy: str | None
    created_at: str | None
    note: str


@dataclass(frozen=True, slots=True)
class DueMarks:
    """Marked pools at present.

    Attributes:
        due: how many may go at the next sweep.
        waiting: how many are not due yet.
        first: of those that are due the first ones, as `poolsweep marks --json` tells them.
    """

    due: int
    waiting: int
    first: tuple[dict[str, Any], ...]


@dataclass(frozen=True, slots=True)
class Report:
    """What some runs came to.

    Attributes:
        run_id: the only run that it is about; None: all of a time.
        since: the beginning of that time; None with `run_id`.
        made_at: its end, when the report was made.
        runs: how many.
        runs_by_state: the same by state.
        runs_unread: how many more there are, made by a newer version, that this one cannot read.
        jobs: how many, of the runs that were started.
        outcomes: the same by outcome, or state.
        days: every day of the time, in order.
        freed: what the pools that are gone had.
        failures: failed jobs by error, the most frequent first.
        skipped: why jobs were skipped, the most frequent first.
        kept: why plans kept pools, the most frequent first; a pool counts once for each run.
        slowest: the jobs that took longest, those first.
        stopped: runs that were braked or aborted, the newest first: the latest of them.
        stopped_runs: how many there are in all.
        marks: marked pools at present; None with `run_id`.
    """

    run_id: str | None
    since: str | None
    made_at: str
    runs: int
    runs_by_state: dict[str, int]
    runs_unread: int
    jobs: int
    outcomes: dict[str, int]
    days: tuple[Day, ...]
    freed: Freed
    failures: tuple[FailureGroup, ...]
    skipped: tuple[Reason, ...]
    kept: tuple[Reason, ...]
    slowest: tuple[SlowJob, ...]
    stopped: tuple[StoppedRun, ...]
    stopped_runs: int
    marks: DueMarks | None

    def record(self) -> dict[str, Any]:
        """Its fields for JSON."""
        return asdict(self)
