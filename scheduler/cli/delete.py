"""`poolsweep delete`: pools by their ids, previewed first."""

from __future__ import annotations

import asyncio
import contextlib
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Annotated

import typer

from scheduler.cli.attendance import Attendance
from scheduler.cli.errors import UsageError
from scheduler.cli.progress import follow
from scheduler.cli.session import (
    heed_interrupt,
    open_ledger,
    remark,
    requester,
    say,
    stdout,
)
from scheduler.dispatch import Order, dispatch
from scheduler.review import tables
from scheduler.selection import named, totals
from scheduler.sweep import Office, plan_project
from worker.ledger import JobState, Source
from worker.modelarts import validate_pool_name, validate_project_id
from worker.projects import Directory
from worker.settings import Settings, settings

if TYPE_CHECKING:
    from collections.abc import Sequence

    from scheduler.planner import Plan
    from worker.ledger import Ledger, Run

EXIT_FAILURES = 1


def delete(
    pools: Annotated[list[str], typer.Argument(metavar="POOL", help="Pool ids (metadata.name).")],
    project: Annotated[str, typer.Option(help="The project that the pools are in.")],
    yes: Annotated[bool, typer.Option("--yes", help="Delete; without it, only preview.")] = False,
    reason: Annotated[str, typer.Option(help="Why, for the record.")] = "",
    verify: Annotated[
        bool,
        typer.Option(help="Wait until the pools are seen to be gone, or end when accepted."),
    ] = True,
    wait: Annotated[
        bool,
        typer.Option("--wait/--detach", help="Wait for the run's end, or leave it to others."),
    ] = True,
) -> None:
    """Delete pools by id: a preview, unless --yes is given."""
    try:
        validate_project_id(project)
        ids = list(dict.fromkeys(validate_pool_name(pool) for pool in pools))
    except ValueError as error:
        raise UsageError(str(error)) from None
    failed = asyncio.run(_delete(settings(), project, ids, yes, reason, verify, wait))
    if failed:
        raise typer.Exit(EXIT_FAILURES)


async def _delete(
    config: Settings,
    project: str,
    ids: Sequence[str],
    yes: bool,
    reason: str,
    verify: bool,
    wait: bool,
) -> bool:
    """Returns whether any job failed."""
    async with open_ledger(config) as (redis, ledger):
        office = Office(Directory.of(config), redis, ledger)
        now = datetime.now(UTC)
        plan = await plan_project(office, project, named(ids), now, named=ids)
        _preview(plan, now)
        if not yes:
            say("Preview only: nothing was deleted. Add --yes to delete.")
            return False
        if not plan.deletions and not plan.absent:
            say("Nothing to delete.")
            return False
        order = Order(plan.endpoint, Source.CLI, requester(), reason, verify)
        feed = office.feed(plan.endpoint)
        with contextlib.ExitStack() as stack:
            attendance = Attendance(
                config, redis, endpoint=plan.endpoint, may_start=wait, stack=stack
            )
            await attendance()
            heed_interrupt()
            # An interrupted maker would leave half a run: this much is always brought to its end.
            making = asyncio.create_task(dispatch([plan], order, ledger=ledger, feed=feed))
            try:
                run_id = (await asyncio.shield(making)).run_id
                if not wait:
                    say(run_id)
                    return False
                run = await follow(ledger, run_id, attendance)
            except asyncio.CancelledError:
                run_id = (await making).run_id
                remark(f"Interrupted. {await attendance.prospects(run_id)}", "yellow")
                remark(f"See it with: poolsweep results {run_id}", "yellow")
                raise
            await show_end(ledger, run)
            return bool(run.counts[JobState.FAILED])


def _preview(plan: Plan, now: datetime) -> None:
    if plan.decisions:
        stdout.print(tables.decisions(plan.decisions, now))
    for pool_id in plan.absent:
        say(f"{pool_id}: not in the project; its job will end as already_deleted")
    count, nodes = totals(plan.decisions)
    say(
        f"{count} to delete, {len(plan.refusals)} to keep, {len(plan.absent)} not there; "
        f"frees {tables.nodes(nodes)}"
    )
    if plan.unreadable:
        say(f"{plan.unreadable} pools of the project could not be read; they stay.")


async def show_end(ledger: Ledger, run: Run) -> None:
    """What became of a run, every failure with its reason, and how to see it again.

    Args:
        ledger: where its jobs are.
        run: as it ended.
    """
    stdout.print(tables.outcomes(run))
    if run.note:
        say(run.note)
    failures = [job async for job in ledger.all_jobs(run.run_id, outcome=JobState.FAILED)]
    if failures:
        stdout.print(tables.failures(failures))
    say(f"Look again with: poolsweep results {run.run_id}")
    if failures:
        say(f"Only failures:   poolsweep results {run.run_id} --outcome failed")
