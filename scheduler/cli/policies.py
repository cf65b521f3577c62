"""`poolsweep plan` and `sweep`: policies previewed and carried out."""

from __future__ import annotations

import asyncio
import contextlib
import sys
from collections import Counter
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from scheduler import plan_file, policy, prices
from scheduler.announcer import Announcer
from scheduler.cli.attendance import Attendance
from scheduler.cli.confirmation import can_ask, confirmed, pools
from scheduler.cli.errors import UsageError
from scheduler.cli.execution import see_through
from scheduler.cli.outcome import EXIT_DONE, EXIT_HELD, exit_code
from scheduler.cli.policy_files import File, policies_path
from scheduler.cli.session import heed_interrupt, open_ledger, requester, say, stderr, stdout
from scheduler.durations import format_duration
from scheduler.review import tables
from scheduler.sweep import Office, carry_out, plan_policy
from worker.ledger import RunState, Source, new_run_id
from worker.modelarts import Precondition
from worker.projects import Directory
from worker.settings import Settings, settings

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Sequence

    from rich.console import Console

    from scheduler.plan_file import PlanRecord
    from scheduler.planner import Plan
    from scheduler.policy import Policy, PolicyFile
    from scheduler.prices import Prices
    from scheduler.sweep import Swept

Only = Annotated[
    list[str] | None, typer.Option("--only", metavar="NAME", help="Only this policy; repeatable.")
]
PriceFile = Annotated[
    Path | None, typer.Option("--prices", help="A YAML file of prices, to tell the money freed.")
]


def plan(
    path: File = None,
    only: Only = None,
    price_file: PriceFile = None,
    kept: Annotated[
        bool, typer.Option("--kept", help="List the pools to keep too, each with the reason.")
    ] = False,
    as_json: Annotated[
        bool, typer.Option("--json", help="One JSON object, which `sweep --plan` carries out.")
    ] = False,
) -> None:
    """Show what policies would delete and keep, and why. Writes nothing to the cloud."""
    path = policies_path(path)
    policy_file = policy.load(path)
    chosen = choose(policy_file, only)
    known = None if price_file is None else prices.load(price_file)
    asyncio.run(_plan(settings(), policy_file, chosen, known, kept, as_json))


async def _plan(
    config: Settings,
    policy_file: PolicyFile,
    chosen: dict[str, Policy],
    known: Prices | None,
    kept: bool,
    as_json: bool,
) -> None:
    async with office_of(config, policy_file) as office:
        plans = await _plan_all(office, policy_file, chosen)
    if as_json:
        records = [plan_file.record_of(name, each, known) for name, each in plans]
        sys.stdout.write(plan_file.dumps(records))
        return
    for name, each in plans:
        show_plan(name, each, known, kept=kept)
        _show_grace(chosen[name], each, stdout)
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
    chosen = choose(policy_file, only)
    if records is not None:
        records = [record for record in records if not only or record.policy in only]
        chosen = _planned(policy_file, chosen, records, only or ())
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
            plans = [
                (name, _as_saved(each, record))
                for name, each in plans
                if (record := _record(records, name, each))
            ]
        out = stdout if wait else stderr
        for name, each in plans:
            show_plan(name, each, known, out=out)
            _show_grace(chosen[name], each, out)
        total = sum(len(each.deletions) for _, each in plans)
        if not yes and total:
            if not can_ask():
                out.print("Preview only: nothing was deleted. Add --yes to delete.", markup=False)
                return EXIT_DONE
            marks = any(chosen[name].grace is not None for name, each in plans if each.deletions)
            what = f"deletes {pools(total)}"
            if marks:
                what = f"marks {pools(total)}, or deletes those whose grace is over,"
            if not await confirmed(what, total, out):
                return EXIT_HELD
        heed_interrupt()
        announcer = Announcer(office.redis, office.ledger, policy_file.notifications)
        code = EXIT_DONE
        with contextlib.ExitStack() as stack:
            attendance = Attendance(
                config, office.redis, may_start=wait, stack=stack, projects_file=path
            )
            for some in _rounds(plans) if wait else [plans]:
                # An interrupted maker would leave half a run: this is always brought to its end.
                making = asyncio.create_task(_carry_out_all(office, announcer, chosen, some))
                try:
                    swept = await asyncio.shield(making)
                except asyncio.CancelledError:
                    for found in await making:
                        if not found.run.ended:
                            await attendance.leave(found.run)
                    raise
                code = max(code, await _see_through(office, swept, attendance, wait))
                await announcer.tell()
        return code


def _rounds(plans: Sequence[tuple[str, Plan]]) -> list[list[tuple[str, Plan]]]:
    """Plans sorted into rounds with one plan for each project: its runs must not overlap."""
    rounds: list[list[tuple[str, Plan]]] = []
    times: Counter[str] = Counter()
    for name, each in plans:
        if times[each.project_id] == len(rounds):
            rounds.append([])
        rounds[times[each.project_id]].append((name, each))
        times[each.project_id] += 1
    return rounds


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
    office: Office, swept: Sequence[Swept], attendance: Attendance, wait: bool
) -> int:
    """Follow what was started to its end. Returns the exit code."""
    out = stdout if wait else stderr
    code = EXIT_DONE
    started = []
    for each in swept:
        run = each.run
        if each.marked:
            text = f"{len(each.marked)} pools are marked now; see `poolsweep marks`"
            out.print(text, markup=False)
        if run.state is RunState.BRAKED:
            out.print(f"Braked, nothing was deleted: {run.note}", markup=False)
            out.print(f"It is recorded as run {run.run_id}", markup=False)
            code = EXIT_HELD
        elif run.total:
            started.append(run)
    for number, run in enumerate(started):
        if not wait:
            await attendance.look(run.endpoint)
            say(run.run_id)
            continue
        try:
            code = max(code, exit_code(await see_through(office.ledger, run, attendance)))
        except asyncio.CancelledError:
            for later in started[number + 1 :]:
                await attendance.leave(await office.ledger.run(later.run_id))
            raise
    return code


def _planned(
    policy_file: PolicyFile,
    chosen: dict[str, Policy],
    records: Sequence[PlanRecord],
    only: Sequence[str],
) -> dict[str, Policy]:
    """The policies that saved plans are of, if the policy file still has all of them."""
    planned = {record.policy for record in records}
    for name in only:
        if name not in planned:
            raise UsageError(f"--only: policy {name!r} is not in the saved plan.")
    chosen = {name: each for name, each in chosen.items() if name in planned}
    for record in records:
        names = chosen[record.policy].projects if record.policy in chosen else ()
        if record.project_id not in {policy_file.projects[name].id for name in names}:
            raise UsageError(
                f"--plan: it has policy {record.policy!r} for project {record.project_id}, and "
                "the policy file has not; make a new plan with `poolsweep plan --json`."
            )
    return chosen


def _record(records: Sequence[PlanRecord], name: str, fresh: Plan) -> PlanRecord | None:
    """The saved plan for what was planned just now; None: it has none."""
    for record in records:
        if (record.policy, record.project_id) == (name, fresh.project_id):
            return record
    return None


def _as_saved(fresh: Plan, saved: PlanRecord) -> Plan:
    """A fresh plan, cut to exactly the deletions of a saved one."""
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


def show_plan(
    name: str,
    each: Plan,
    known: Prices | None,
    *,
    kept: bool = False,
    brief: bool = False,
    out: Console = stdout,
) -> None:
    """A plan as a table, with its totals.

    Args:
        name: the policy.
        each: its plan over one project.
        known: what nodes cost; None: not known.
        kept: list the pools to keep too, instead of counting them by reason.
        brief: leave out the table of the pools to delete.
        out: where to.
    """
    out.print(f"Policy {name}, project {each.project_id} at {each.endpoint}:", markup=False)
    if kept and each.decisions:
        out.print(tables.decisions([*each.deletions, *each.refusals], each.at))
    elif each.deletions and not brief:
        out.print(tables.decisions(each.deletions, each.at))
    if each.refusals and not kept:
        out.print("Kept, and why:", markup=False)
        out.print(tables.kept(each.refusals))
    freed = plan_file.freed_by(each.decisions, known)
    text = (
        f"Delete {freed.pools} of {each.pools} pools; frees {tables.nodes(freed.nodes)}, "
        f"{freed.node_hours_per_day} node-hours a day"
    )
    if freed.money_per_day is not None:
        text += f", {freed.money_per_day:,.2f} {freed.currency} a day"
    out.print(text, markup=False)
    if unpriced := known.per_day(freed.nodes)[1] if known else []:
        out.print(f"Not in the money, for want of a price: {', '.join(unpriced)}", markup=False)
    if each.unreadable:
        text = f"{each.unreadable} pools of the project could not be read; they stay."
        out.print(text, markup=False)


def _show_grace(each: Policy, found: Plan, out: Console) -> None:
    if each.grace is not None and found.deletions:
        text = (
            f"Its grace is {format_duration(each.grace)}: a pool is marked first, and deleted only "
            "if it still matches when that is over; see `poolsweep marks`."
        )
        out.print(text, markup=False)


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
