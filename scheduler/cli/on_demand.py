"""Pools that somebody wants gone now: previewed, asked for, carried out. `delete` and `retry`."""

from __future__ import annotations

import asyncio
import contextlib
import time
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any
from zoneinfo import ZoneInfo

from pydantic import ValidationError

from scheduler.brakes import held
from scheduler.cli.attendance import Attendance
from scheduler.cli.confirmation import can_ask, confirmed, pools
from scheduler.cli.errors import UsageError
from scheduler.cli.execution import see_through, start
from scheduler.cli.outcome import EXIT_DONE, EXIT_HELD, exit_code
from scheduler.cli.preview import preview
from scheduler.cli.session import heed_interrupt, remark, requester, say, stderr, stdout
from scheduler.dispatch import Order, dispatch
from scheduler.policy import Brakes
from worker.ledger import JobState, RunState, Source

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Sequence

    from scheduler.planner import Plan
    from scheduler.sweep import Office

PROJECTS_AT_ONCE = 8
REMARK_EVERY_S = 5.0


@dataclass(frozen=True, slots=True)
class Terms:
    """On which terms pools are deleted that somebody asks for by hand.

    Attributes:
        brakes: what holds the run, or stops it midway.
        named: whether the pools are named, so that one which must stay was refused.
        reason: why, for the record.
        yes: whether nobody is to be asked.
        verify: whether jobs end only when their pool is seen to be gone.
        wait: whether the run is followed to its end.
        selector: what the pools were chosen by, as JSON; empty: by name, or by a policy.
        policy: the policy that they were chosen by; empty: none.
    """

    brakes: Brakes
    named: bool
    reason: str
    yes: bool
    verify: bool
    wait: bool
    selector: str = ""
    policy: str = ""


def brakes_of(named: int | None, **given: float | None) -> Brakes:
    """The brakes of a run by hand.

    Args:
        named: how many pools are named: as many may go, and fail unless half of them do. None:
            they are selected, and what holds for policies holds.
        given: what somebody says of each brake; None: nothing.

    Raises:
        UsageError: a brake cannot be set so.
    """
    fields: dict[str, Any] = {}
    if named is not None:
        fields = {"max_deletions": named, "max_percent": 100, "max_failures": named}
    try:
        return Brakes(**fields | {name: each for name, each in given.items() if each is not None})
    except ValidationError as error:
        fault = error.errors(include_url=False)[0]
        option = str(fault["loc"][0]).replace("_", "-")
        raise UsageError(
            f"--{option}: {fault['input']!r} is not accepted: {fault['msg'][:1].lower()}"
            f"{fault['msg'][1:]}."
        ) from None


def one_endpoint(office: Office, projects: Sequence[str]) -> str:
    """The base URL of the API that projects are at.

    Raises:
        UsageError: they are not at the same, and a run is at one.
    """
    endpoints = list(dict.fromkeys(office.endpoint(project) for project in projects))
    if len(endpoints) > 1:
        raise UsageError(
            f"--project: the projects are at {' and '.join(endpoints)}; accepted: projects at one "
            "endpoint in one command."
        )
    return endpoints[0]


async def plan_over(projects: Sequence[str], plan: Callable[[str], Awaitable[Plan]]) -> list[Plan]:
    """Plan over projects, some at once; says how far it is if it takes long.

    Args:
        projects: their ids.
        plan: plans over one.

    Raises:
        ApiError, AuthError, SettingsError: the first that any plan raises; the others are stopped.
    """
    turn = asyncio.Semaphore(PROJECTS_AT_ONCE)
    said, planned = time.monotonic(), 0

    async def one(project: str) -> Plan:
        nonlocal said, planned
        async with turn:
            found = await plan(project)
        planned += 1
        now = time.monotonic()
        if now - said >= REMARK_EVERY_S and planned < len(projects):
            said = now
            remark(f"Planned over {planned} of {len(projects)} projects")
        return found

    try:
        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(one(project)) for project in projects]
    except ExceptionGroup as several:
        raise several.exceptions[0] from None
    return [task.result() for task in tasks]


async def carry_out(office: Office, plans: Sequence[Plan], terms: Terms) -> int:
    """Show plans, ask unless there was a yes already, and carry them out as one run.

    With `--detach` the run's id is all that standard output gets.

    Args:
        office: the connections.
        plans: one for each project, all at one endpoint.
        terms: on which terms.

    Returns:
        The exit code.
    """
    out = stdout if terms.wait else stderr
    preview(plans, out)
    counts = {plan.project_id: (len(plan.deletions), plan.pools) for plan in plans}
    total = sum(deletions for deletions, _ in counts.values())
    absent = any(plan.absent for plan in plans)
    refused = terms.named and any(plan.refusals for plan in plans)
    brake = held(terms.brakes, counts, now=datetime.now(UTC), zone=ZoneInfo("UTC"))
    if not terms.yes:
        if brake:
            out.print(f"A brake holds this: {brake}.", markup=False)
        if not can_ask():
            out.print("Preview only: nothing was deleted. Add --yes to delete.", markup=False)
            return EXIT_DONE
        if brake:
            return EXIT_HELD
    if not total and not (absent and terms.yes):
        out.print("Nothing to delete.", markup=False)
        return EXIT_HELD if refused else EXIT_DONE
    only = plans[0].project_id if len(plans) == 1 else ""
    what = f"deletes {pools(total)}"
    if not terms.yes and not await confirmed(what, total, out, project_id=only):
        return EXIT_HELD
    return await _execute(office, plans, terms, brake, refused=refused)


async def _execute(
    office: Office, plans: Sequence[Plan], terms: Terms, brake: str | None, *, refused: bool
) -> int:
    endpoint = plans[0].endpoint
    order = Order(
        endpoint=endpoint,
        source=Source.CLI,
        requester=requester(),
        reason=terms.reason,
        verify=terms.verify,
        brakes=terms.brakes,
        # A selector asked twice would choose the same pools for both runs.
        alone=not terms.named,
        selector=terms.selector,
        policy=terms.policy,
    )
    with contextlib.ExitStack() as stack:
        attendance = Attendance(
            office.directory.settings, office.redis, may_start=terms.wait, stack=stack
        )
        if not brake:
            await attendance.look(endpoint)
        heed_interrupt()
        making = dispatch(
            plans, order, ledger=office.ledger, feed=office.feed(endpoint), brake=brake
        )
        run = await start(making, attendance)
        if run.state is RunState.BRAKED:
            out = stdout if terms.wait else stderr
            out.print(f"Braked, nothing was deleted: {run.note}", markup=False)
            out.print(f"It is recorded as run {run.run_id}", markup=False)
            return EXIT_HELD
        if not terms.wait:
            say(run.run_id)
            return EXIT_HELD if refused else EXIT_DONE
        ended = await see_through(office.ledger, run, attendance)
        # Asked for by hand, even where a policy chose: no later night does it.
        skipped = ended.counts[JobState.SKIPPED] > 0
        return exit_code(ended, refused=refused or skipped)
