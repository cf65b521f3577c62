"""From a plan to a run in the ledger, and its first batches to the broker."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import UTC, datetime
from typing import TYPE_CHECKING

from worker.deletion import ABSENT
from worker.ledger import NewJob, NewRun, Source, new_run_id
from worker.modelarts import Precondition

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from scheduler.planner import Plan
    from worker.feed import Feed
    from worker.ledger import Ledger


@dataclass(frozen=True, slots=True)
class Order:
    """Who wants a run, and how.

    Attributes:
        endpoint: the base URL of the API.
        source: which of the ways in it came by.
        requester: who asked.
        reason: why, in their words.
        verify: whether jobs end only when their pool is seen to be gone.
    """

    endpoint: str
    source: Source
    requester: str = ""
    reason: str = ""
    verify: bool = True


def jobs_of(plans: Sequence[Plan]) -> Iterator[NewJob]:
    """The jobs that carry out plans, each with the precondition that its plan rests on."""
    for plan in plans:
        for decision in plan.deletions:
            pool = decision.pool
            precondition = Precondition.of(pool)
            yield NewJob(
                project_id=plan.project_id,
                pool_name=pool.pool_id,
                display_name=pool.display_name,
                created=precondition.created,
                fingerprint=precondition.fingerprint,
                chosen=decision.reason,
            )
        for pool_id in plan.absent:
            yield NewJob(
                project_id=plan.project_id,
                pool_name=pool_id,
                fingerprint=ABSENT,
                chosen="asked for by name; it was not there",
            )


async def dispatch(plans: Sequence[Plan], order: Order, *, ledger: Ledger, feed: Feed) -> str:
    """Start a run.

    Args:
        plans: what to delete.
        order: who wants it, and how.
        ledger: where the run is recorded.
        feed: sends the first batches.

    Returns:
        The run's id. It is in the ledger whole by then: a run that could not be recorded whole
        is never executed.

    Raises:
        RedisError: the ledger cannot be reached.
    """
    run_id = new_run_id(datetime.now(UTC))
    run = NewRun(
        run_id=run_id,
        source=order.source,
        endpoint=order.endpoint,
        requester=order.requester,
        reason=order.reason,
        verify=order.verify,
    )
    await ledger.create(run)
    total = await ledger.add(run_id, jobs_of(plans))
    await ledger.start(run_id, total)
    await feed(run_id)
    return run_id
