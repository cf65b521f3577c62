"""From a plan to a run in the ledger, and its first batches to the broker.

Whoever asks for a run, each decision that it is made of is a line of the log of the process that
made it, and the run itself is one.
"""

from __future__ import annotations

import asyncio
import contextlib
import secrets
from dataclasses import dataclass
from datetime import UTC, datetime
from itertools import chain, zip_longest
from typing import TYPE_CHECKING

import structlog
from redis.exceptions import RedisError

from worker.deletion import ABSENT
from worker.ledger import (
    Kept,
    NewJob,
    NewRun,
    RunNotFoundError,
    RunState,
    Source,
    new_run_id,
)
from worker.modelarts import Precondition

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

    from scheduler.planner import Plan
    from scheduler.policy import Brakes
    from worker.feed import Feed
    from worker.ledger import Ledger, Run

NOT_THERE = "asked for by name; it was not there"
"""Why an id is in a run that no pool of its project has."""
TOLD_AT_ONCE = 1_000
"""Decisions that are logged before the event loop has its turn."""

log = structlog.get_logger(__name__)


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
        client: the client of the intake that asked; empty: none.
        selector: what its pools were chosen by, as JSON; empty: by name, or by the policy.
        dry_run: whether only the plan is wanted.
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
    client: str = ""
    selector: str = ""
    dry_run: bool = False

    def new_run(self, run_id: str, projects: Iterable[str]) -> NewRun:
        """The run that it asks for, as it is opened in the ledger.

        Args:
            run_id: the run's id.
            projects: the projects that its pools are in.
        """
        brakes = self.brakes
        return NewRun(
            run_id=run_id,
            source=self.source,
            endpoint=self.endpoint,
            requester=self.requester,
            reason=self.reason,
            verify=self.verify,
            policy=self.policy,
            client=self.client,
            selector=self.selector,
            projects=tuple(dict.fromkeys(projects)),
            max_failures=None if brakes is None else brakes.max_failures,
            max_failure_percent=None if brakes is None else brakes.max_failure_percent,
        )


def jobs_of(plans: Sequence[Plan]) -> Iterator[NewJob]:
    """The jobs that carry out plans, each with the precondition that its plan rests on.

    The projects take turns, so that one whose calls are slow or paused holds up no other.
    """
    taking_turns = zip_longest(*map(_jobs_of, plans))
    return (job for job in chain.from_iterable(taking_turns) if job is not None)


def _jobs_of(plan: Plan) -> Iterator[NewJob]:
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
            check_nodes=plan.nodes_later and not pool.is_logical,
            # A logical pool's nodes are its parent's, and go on running without it.
            nodes={} if pool.is_logical else dict(pool.nodes_by_flavor),
        )
    for pool_id in plan.absent:
        yield NewJob(
            project_id=plan.project_id,
            pool_name=pool_id,
            fingerprint=ABSENT,
            chosen=NOT_THERE,
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
        run of its project has not ended. If there was a run with the order's id already, and past
        its making, that one.

    Raises:
        RedisError: the ledger cannot be reached.
        RunNotFoundError: somebody else makes the run by now.
    """
    run_id = order.run_id or new_run_id(datetime.now(UTC))
    # Another name each time: whoever was at this run before, here or elsewhere, is cut off.
    maker = secrets.token_hex(8)
    if not await ledger.create(
        order.new_run(run_id, (plan.project_id for plan in plans)), maker=maker
    ):
        return await ledger.run(run_id)
    try:
        await ledger.keep(run_id, kept_by(plans), maker=maker)
        state, note = RunState.RUNNING, ""
        if order.dry_run:
            state, note = RunState.PLANNED, "a dry run: nothing was deleted"
            if brake:
                note += f"; a brake would hold it: {brake}"
        elif brake := brake or await _other_run(plans, order, run_id, ledger):
            state, note = RunState.BRAKED, brake
        total = 0
        if state is not RunState.BRAKED:
            total = await ledger.add(run_id, jobs_of(plans), maker=maker)
        await _tell(plans, run_id)
        if state is RunState.RUNNING:
            is_made = await ledger.start(run_id, total, maker=maker)
        else:
            is_made = await ledger.abort(run_id, note, state=state, maker=maker)
        if not is_made:
            raise RunNotFoundError(run_id)
        _tell_made(order, run_id, state, note)
    except RunNotFoundError:
        run = await ledger.run(run_id)
        if run.ended:  # somebody cancelled it in the making
            _tell_made(order, run_id, run.state, run.note)
            return run
        raise
    except Exception:
        # Where the order has the run's id, whoever carries it out again takes the run over.
        if order.run_id is None:
            with contextlib.suppress(RedisError):  # else the workers give it up in ten minutes
                reason = "its maker failed; none of it was executed"
                await ledger.abort(run_id, reason, maker=maker)
        raise
    if state is RunState.RUNNING:
        with contextlib.suppress(RedisError):  # the workers ask for batches too
            await feed(run_id, projects=len(plans))
    return await ledger.run(run_id)


async def _tell(plans: Sequence[Plan], run_id: str) -> None:
    """Log what plans say of each pool; before the run begins, so that none of it is missing."""
    for number, (event, project_id, pool_name, reason) in enumerate(_decisions(plans), start=1):
        log.info(event, run_id=run_id, project_id=project_id, pool_name=pool_name, reason=reason)
        if number % TOLD_AT_ONCE == 0:
            await asyncio.sleep(0)


def _decisions(plans: Sequence[Plan]) -> Iterator[tuple[str, str, str, str]]:
    """Each decision: its event, the project, the pool and the reason."""
    for plan in plans:
        for decision in plan.decisions:
            event = "pool_chosen" if decision.delete else "pool_kept"
            yield event, plan.project_id, decision.pool.pool_id, decision.reason
        for pool_id in plan.absent:
            yield "pool_chosen", plan.project_id, pool_id, NOT_THERE


def _tell_made(order: Order, run_id: str, state: RunState, note: str) -> None:
    log.info(
        "run_made",
        run_id=run_id,
        state=str(state),
        source=str(order.source),
        policy=order.policy,
        client=order.client,
        requester=order.requester,
        reason=order.reason,
        note=note,
    )


async def _other_run(
    plans: Sequence[Plan], order: Order, run_id: str, ledger: Ledger
) -> str | None:
    if order.alone and any(plan.deletions for plan in plans):
        for plan in plans:
            holder = await ledger.hold_project(order.endpoint, plan.project_id, run_id)
            if holder is not None:
                return f"run {holder} of the same project has not ended"
    return None
