"""`poolsweep delete`: pools by their ids, previewed first."""

from __future__ import annotations

import asyncio
import contextlib
import getpass
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Annotated

import typer

from scheduler import children
from scheduler.cli.errors import UsageError
from scheduler.cli.progress import follow
from scheduler.cli.session import open_ledger, stderr, stdout
from scheduler.dispatch import Order, dispatch
from scheduler.planner import Plan, plan_named
from scheduler.review import tables
from scheduler.selection import named, totals
from worker.broker import make_app, sender
from worker.feed import Feed
from worker.ledger import JobState, Ledger, Source
from worker.modelarts import validate_pool_name, validate_project_id
from worker.modelarts_client import make_client
from worker.reconciler import live_workers
from worker.settings import Settings, settings

if TYPE_CHECKING:
    from collections.abc import Sequence

    from redis.asyncio import Redis

EXIT_FAILURES = 1


def delete(
    pools: Annotated[list[str], typer.Argument(help="Pool ids (metadata.name).")],
    project: Annotated[str, typer.Option(help="The project that the pools are in.")],
    yes: Annotated[bool, typer.Option("--yes", help="Delete; without it, only preview.")] = False,
    reason: Annotated[str, typer.Option(help="Why, for the record.")] = "",
    verify: Annotated[
        bool,
        typer.Option(help="Wait until the pools are seen to be gone, or end when accepted."),
    ] = True,
    detach: Annotated[
        bool, typer.Option("--detach", help="Print the run's id and do not wait for its end.")
    ] = False,
) -> None:
    """Delete pools by id: a preview, unless --yes is given."""
    try:
        validate_project_id(project)
        ids = list(dict.fromkeys(validate_pool_name(pool) for pool in pools))
    except ValueError as error:
        raise UsageError(str(error)) from None
    failed = asyncio.run(_delete(settings(), project, ids, yes, reason, verify, detach))
    if failed:
        raise typer.Exit(EXIT_FAILURES)


async def _delete(
    config: Settings,
    project: str,
    ids: Sequence[str],
    yes: bool,
    reason: str,
    verify: bool,
    detach: bool,
) -> bool:
    """Returns whether any job failed."""
    endpoint = config.api_endpoint.url
    async with open_ledger(config) as (redis, ledger):
        async with make_client(config, redis) as client:
            now = datetime.now(UTC)
            plan = await plan_named(client, project, ids, named(ids), now)
        _preview(plan, now)
        if not yes:
            stdout.print("Preview only: nothing was deleted. Add --yes to delete.")
            return False
        if not plan.deletions and not plan.absent:
            stdout.print("Nothing to delete.")
            return False
        order = Order(endpoint, Source.CLI, getpass.getuser(), reason, verify)
        with contextlib.ExitStack() as stack:
            await _have_worker(config, redis, endpoint, stack, detach)
            feed = Feed(ledger, sender(make_app(config)), config)
            run_id = await dispatch([plan], order, ledger=ledger, feed=feed)
            if detach:
                stdout.print(run_id)
                return False
            return await _wait(ledger, run_id)


def _preview(plan: Plan, now: datetime) -> None:
    stdout.print(tables.decisions(plan.decisions, now))
    for pool_id in plan.absent:
        stdout.print(f"{pool_id}: not in the project; its job will end as already_deleted")
    count, nodes = totals(plan.decisions)
    stdout.print(
        f"{count} to delete, {len(plan.refusals)} to keep, {len(plan.absent)} not there; "
        f"frees {tables.nodes(nodes)}"
    )
    if plan.unreadable:
        stdout.print(f"{plan.unreadable} pools of the project could not be read; they stay.")


async def _have_worker(
    config: Settings,
    redis: Redis,
    endpoint: str,
    stack: contextlib.ExitStack,
    detach: bool,
) -> None:
    """See to it that somebody executes the run, or say that nobody does."""
    if await live_workers(redis, endpoint):
        return
    if config.redis_url is None and not detach:
        stderr.print("No worker is running: started one for the time of this run", style="dim")
        stack.enter_context(children.worker({}, config.state_dir / "worker.log"))
    else:
        stderr.print(
            "No worker is running for this endpoint: the run waits until one is started "
            "with `poolsweep worker`",
            style="yellow",
        )


async def _wait(ledger: Ledger, run_id: str) -> bool:
    try:
        run = await follow(ledger, run_id)
    except asyncio.CancelledError:
        stderr.print(f"Interrupted; the run goes on. See `poolsweep results {run_id}`.")
        raise
    stdout.print(tables.outcomes(run))
    failures = await ledger.jobs(run_id, outcome=JobState.FAILED)
    if failures:
        stdout.print(tables.failures(failures))
    stdout.print(f"Look again with: poolsweep results {run_id}")
    return bool(run.counts[JobState.FAILED])
