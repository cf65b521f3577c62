"""From a plan to a run in the ledger, and its first batches to the broker."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import TYPE_CHECKING

from redis.exceptions import RedisError

from worker.deletion import ABSENT
from worker.ledger import Kept, NewJob, NewRun, RunState, Source, new_run_id
from worker.modelarts import Precondition

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from scheduler.planner import Plan
    from scheduler.policy import Brakes
    from worker.feed import Feed
    from worker.ledger import Ledger, Run


@dataclass(frozen=True, slots=True)
class Order:
    """Who wants a run, and how.

    Attributes:
        endpoint: the base URL of the API.
        source: which of the ways in it came by.
        requester: who asked.
        reason: why, in their words.
        verify: whether jobs end only when their pool is seen to be gone.
        policy: the policy that it carries out; empty: none.
        brakes: what stops it midway; None: nothing.
        alone: whether it must be the only run of its projects.
        run_id: its id, so that asking twice makes one run; None: a new one.
    """

    endpoint: str
    source: Source
    requester: str = ""
    reason: str = ""
    verify: bool = True
    policy: str = ""
    brakes: Brakes | None = None
    alone: bool = False
    run_id: str | None = None


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


def kept_by(plans: Sequence[Plan]) -> Iterator[Kept]:
    """The pools that plans keep, each with the reason."""
    for plan in plans:
        for decision in plan.refusals:
            pool = decision.pool
            yield Kept(plan.project_id, pool.pool_id, pool.display_name, decision.reason)


async def dispatch(
    plans: Sequence[Plan], order: Order, *, ledger: Ledger, feed: Feed, brake: str | None = None
) -> Run:
    """Start a run, or record that a brake holds it.

    Args:
        plans: what to delete, and what is kept.
        order: who wants it, and how.
        ledger: where the run is recorded.
        feed: sends the first batches.
        brake: what holds it, in one phrase; None: nothing.

    Returns:
        The run, whole in the ledger by then: one that could not be recorded whole is never
        executed. Its state is `BRAKED` if the brake held it, or if it was to be alone and another
        run of its project has not ended. If there was a run with the order's id already, that one.

    Raises:
        RedisError: the ledger cannot be reached.
    """
    run_id = await _open(plans, order, ledger)
    run = await ledger.run(run_id)
    if run.state is not RunState.CREATING:
        return run
    try:
        await ledger.keep(run_id, kept_by(plans))
        brake = brake or await _other_run(plans, order, run_id, ledger)
        if brake:
            await ledger.abort(run_id, brake, state=RunState.BRAKED)
            return await ledger.run(run_id)
        total = await ledger.add(run_id, jobs_of(plans))
        await ledger.start(run_id, total)
    except Exception:
        with contextlib.suppress(RedisError):  # else the workers give it up in ten minutes
            await ledger.abort(run_id, "its maker failed; none of it was executed")
        raise
    with contextlib.suppress(RedisError):  # the workers ask for batches too
        await feed(run_id)
    return await ledger.run(run_id)


async def _open(plans: Sequence[Plan], order: Order, ledger: Ledger) -> str:
    """The id of a run that was opened just now, or of one that is past its making."""
    brakes = order.brakes
    run_id = order.run_id or new_run_id(datetime.now(UTC))
    tries = 1
    while True:
        candidate = run_id if tries == 1 else f"{run_id}-{tries}"
        run = NewRun(
            run_id=candidate,
            source=order.source,
            endpoint=order.endpoint,
            requester=order.requester,
            reason=order.reason,
            verify=order.verify,
            policy=order.policy,
            projects=tuple(dict.fromkeys(plan.project_id for plan in plans)),
            max_failures=None if brakes is None else brakes.max_failures,
            max_failure_percent=None if brakes is None else brakes.max_failure_percent,
        )
        if await ledger.create(run):
            return candidate
        # Whoever was making it was cut off, and what was planned then may not hold any more.
        await ledger.abort(candidate, "its maker was cut off; none of it was executed")
        if (await ledger.run(candidate)).state is not RunState.ABORTED:
            return candidate
        tries += 1


async def _other_run(
    plans: Sequence[Plan], order: Order, run_id: str, ledger: Ledger
) -> str | None:
    if order.alone and any(plan.deletions for plan in plans):
        for plan in plans:
            holder = await ledger.hold_project(order.endpoint, plan.project_id, run_id)
            if holder is not None:
                return f"run {holder} of the same project has not ended"
    return None
