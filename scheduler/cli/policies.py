"""`poolsweep policy`, `plan` and `sweep`: policies checked, previewed and carried out."""

from __future__ import annotations

import asyncio
import contextlib
import json
import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from scheduler import plan_file, policy, prices
from scheduler.announcer import Announcer
from scheduler.cli.attendance import Attendance
from scheduler.cli.delete import EXIT_FAILURES, show_end
from scheduler.cli.errors import UsageError
from scheduler.cli.progress import follow
from scheduler.cli.session import open_ledger, remark, requester, say, stdout
from scheduler.review import tables
from scheduler.sweep import Office, carry_out, plan_policy
from worker.ledger import JobState, RunState, Source, new_run_id
from worker.modelarts import Precondition
from worker.projects import Directory
from worker.settings import Settings, settings

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Sequence

    from scheduler.plan_file import PlanRecord
    from scheduler.planner import Plan
    from scheduler.policy import Policy, PolicyFile
    from scheduler.prices import Prices
    from scheduler.sweep import Swept

EXIT_BRAKED = 3

policy_app = typer.Typer(help="Check policies, or print their schema.", no_args_is_help=True)

File = Annotated[
    Path | None,
    typer.Argument(
        metavar="[POLICIES]", help="The policy file; without it, POOLSWEEP_POLICIES_FILE."
    ),
]
Only = Annotated[
    list[str] | None, typer.Option("--only", metavar="NAME", help="Only this policy; repeatable.")
]
PriceFile = Annotated[
    Path | None, typer.Option("--prices", help="A YAML file of prices, to tell the money freed.")
]


@policy_app.command()
def check(path: File = None) -> None:
    """Validate a policy file: every mistake at once, each with its line."""
    path = policies_path(path)
    found = policy.load(path)
    say(f"{path}: {len(found.policies)} policies for {len(found.projects)} projects; no mistake")


@policy_app.command()
def schema() -> None:
    """Print the JSON Schema of policy files, for editors."""
    sys.stdout.write(json.dumps(policy.json_schema(), indent=1) + "\n")


def plan(
    path: File = None,
    only: Only = None,
    price_file: PriceFile = None,
    as_json: Annotated[
        bool, typer.Option("--json", help="One JSON object, which `sweep --plan` carries out.")
    ] = False,
) -> None:
    """Show what policies would delete and keep, and why. Writes nothing to the cloud."""
    path = policies_path(path)
    policy_file = policy.load(path)
    chosen = choose(policy_file, only)
    known = None if price_file is None else prices.load(price_file)
    asyncio.run(_plan(settings(), policy_file, chosen, known, as_json))


async def _plan(
    config: Settings,
    policy_file: PolicyFile,
    chosen: dict[str, Policy],
    known: Prices | None,
    as_json: bool,
) -> None:
    async with office_of(config, policy_file) as office:
        plans = await _plan_all(office, policy_file, chosen)
    if as_json:
        records = [plan_file.record_of(name, each, known) for name, each in plans]
        sys.stdout.write(plan_file.dumps(records))
        return
    for name, each in plans:
        show_plan(name, each, known)
    say("Plan only: nothing was deleted. `poolsweep sweep` carries it out.")


def sweep(
    path: File = None,
    only: Only = None,
    yes: Annotated[
        bool, typer.Option("--yes", help="Do not ask: for programs and schedules.")
    ] = False,
    saved: Annotated[
        Path | None,
        typer.Option("--plan", help="Carry out exactly this saved plan, or refuse."),
    ] = None,
    price_file: PriceFile = None,
    wait: Annotated[
        bool, typer.Option("--wait/--detach", help="Wait for the runs' ends, or print their ids.")
    ] = True,
) -> None:
    """Delete what policies match: shown first, then asked, then carried out."""
    path = policies_path(path)
    policy_file = policy.load(path)
    known = None if price_file is None else prices.load(price_file)
    records = None if saved is None else plan_file.load(saved, datetime.now(UTC))
    if records is not None:
        only = only or [record.policy for record in records]
    chosen = choose(policy_file, only)
    code = asyncio.run(_sweep(settings(), path, policy_file, chosen, known, records, yes, wait))
    if code:
        raise typer.Exit(code)


async def _sweep(
    config: Settings,
    path: Path,
    policy_file: PolicyFile,
    chosen: dict[str, Policy],
    known: Prices | None,
    records: Sequence[PlanRecord] | None,
    yes: bool,
    wait: bool,
) -> int:
    """Returns the exit code."""
    async with office_of(config, policy_file) as office:
        plans = await _plan_all(office, policy_file, chosen)
        if records is not None:
            plans = [(name, _as_saved(each, _record(records, name, each))) for name, each in plans]
        for name, each in plans:
            show_plan(name, each, known)
        total = sum(len(each.deletions) for _, each in plans)
        if not yes and total and not _confirmed(total):
            return 0
        announcer = Announcer(office.redis, office.ledger, policy_file.notifications)
        with contextlib.ExitStack() as stack:
            # An interrupted maker would leave half a run: this much is always brought to its end.
            making = asyncio.create_task(_carry_out_all(office, announcer, chosen, plans))
            try:
                swept = await asyncio.shield(making)
                code = await _see_through(office, path, swept, stack, wait)
            except asyncio.CancelledError:
                for found in await making:
                    if not found.run.ended:
                        remark(f"Interrupted. See it with: poolsweep results {found.run.run_id}")
                raise
            await announcer.tell()
            return code


async def _carry_out_all(
    office: Office,
    announcer: Announcer,
    chosen: dict[str, Policy],
    plans: Sequence[tuple[str, Plan]],
) -> list[Swept]:
    swept = []
    for name, each in plans:
        run_id = new_run_id(datetime.now(UTC))
        if each.deletions:
            await announcer.expect(run_id, name, chosen[name])
        found = await carry_out(
            office,
            name,
            chosen[name],
            each,
            source=Source.CLI,
            requester=requester(),
            run_id=run_id,
        )
        await announcer.swept(chosen[name], found)
        swept.append(found)
    return swept


async def _see_through(
    office: Office, path: Path, swept: Sequence[Swept], stack: contextlib.ExitStack, wait: bool
) -> int:
    """Follow what was started to its end. Returns the exit code."""
    code = 0
    for each in swept:
        run = each.run
        if each.marked:
            say(f"{len(each.marked)} pools are marked now; see `poolsweep marks`")
        if run.state is RunState.BRAKED:
            say(f"Braked, nothing was deleted: {run.note}")
            say(f"It is recorded as run {run.run_id}")
            code = EXIT_BRAKED
        elif run.total and not wait:
            say(run.run_id)
        elif run.total:
            attendance = Attendance(
                office.directory.settings,
                office.redis,
                endpoint=run.endpoint,
                may_start=True,
                stack=stack,
                projects_file=path,
            )
            ended = await follow(office.ledger, run.run_id, attendance)
            await show_end(office.ledger, ended)
            if ended.braked_ms:
                code = EXIT_BRAKED
            elif ended.counts[JobState.FAILED]:
                code = code or EXIT_FAILURES
    return code


def _confirmed(total: int) -> bool:
    """Whether the user types the number of deletions."""
    if not sys.stdin.isatty():
        say("Preview only: nothing was deleted. Add --yes to delete.")
        return False
    say(f"This deletes {total} pools for good. Type {total} to go on, anything else to stop.")
    if sys.stdin.readline().strip() == str(total):
        return True
    say("Stopped: nothing was deleted.")
    return False


def _record(records: Sequence[PlanRecord], name: str, fresh: Plan) -> PlanRecord | None:
    """The saved plan for what was planned just now; None: it has none."""
    for record in records:
        if (record.policy, record.project_id) == (name, fresh.project_id):
            return record
    return None


def _as_saved(fresh: Plan, saved: PlanRecord | None) -> Plan:
    """A fresh plan, cut to exactly the deletions of a saved one."""
    if saved is None:
        return fresh.only((), lambda _: "not in the saved plan")
    if saved.endpoint != fresh.endpoint:
        raise UsageError(
            f"--plan: it was made for {saved.endpoint}, and the policy file says {fresh.endpoint}."
        )
    if changed := plan_file.differences(saved, fresh):
        more = f", and {len(changed) - 3} more" if len(changed) > 3 else ""
        raise UsageError(
            f"--plan: the pools are not as they were planned: {'; '.join(changed[:3])}{more}; "
            "make a new plan with `poolsweep plan --json`."
        )
    planned = {pool.pool_name: pool.precondition for pool in saved.deletions}
    chosen = [
        decision
        for decision in fresh.deletions
        if planned.get(decision.pool.pool_id) == Precondition.of(decision.pool)
    ]
    return fresh.only(chosen, lambda _: "not in the saved plan")


def show_plan(name: str, each: Plan, known: Prices | None, *, brief: bool = False) -> None:
    """A plan as a table, with its totals.

    Args:
        name: the policy.
        each: its plan over one project.
        known: what nodes cost; None: not known.
        brief: leave out the table of the pools to delete.
    """
    say(f"Policy {name}, project {each.project_id} at {each.endpoint}:")
    if each.deletions and not brief:
        stdout.print(tables.decisions(each.deletions, each.at))
    if each.refusals:
        say("Kept, and why:")
        stdout.print(tables.kept(each.refusals))
    freed = plan_file.freed_by(each.decisions, known)
    text = (
        f"Delete {freed.pools} of {each.pools} pools; frees {tables.nodes(freed.nodes)}, "
        f"{freed.node_hours_per_day} node-hours a day"
    )
    if freed.money_per_day is not None:
        text += f", {freed.money_per_day:,.2f} {freed.currency} a day"
    say(text)
    if each.unreadable:
        say(f"{each.unreadable} pools of the project could not be read; they stay.")


async def _plan_all(
    office: Office, policy_file: PolicyFile, chosen: dict[str, Policy]
) -> list[tuple[str, Plan]]:
    return [
        (
            name,
            await plan_policy(office, each, policy_file.projects[project].id, datetime.now(UTC)),
        )
        for name, each in chosen.items()
        for project in each.projects
    ]


def policies_path(given: Path | None) -> Path:
    """The policy file to use.

    Raises:
        UsageError: none is named.
    """
    path = given or settings().policies_file
    if path is None:
        raise UsageError(
            "POLICIES: no policy file is named; accepted: a path, here or in "
            "POOLSWEEP_POLICIES_FILE."
        )
    return path


def choose(policy_file: PolicyFile, only: Sequence[str] | None) -> dict[str, Policy]:
    """The policies with these names, or all.

    Raises:
        UsageError: there is no policy of a name.
    """
    for name in only or ():
        if name not in policy_file.policies:
            raise UsageError(
                f"--only: there is no policy {name!r}; accepted: {', '.join(policy_file.policies)}."
            )
    return {name: each for name, each in policy_file.policies.items() if not only or name in only}


@contextlib.asynccontextmanager
async def office_of(config: Settings, policy_file: PolicyFile) -> AsyncIterator[Office]:
    """The connections for a policy file's projects.

    Raises:
        UsageError, RedisError: Redis cannot be used.
    """
    async with open_ledger(config) as (redis, ledger):
        yield Office(Directory(config, policy_file.projects), redis, ledger)
