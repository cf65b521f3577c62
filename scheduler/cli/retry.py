"""`poolsweep retry`: the failed jobs of a run again, as a new run."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Annotated

import typer

from scheduler import matchers
from scheduler.cli.delete import Verify, Wait, Yes
from scheduler.cli.errors import UsageError
from scheduler.cli.on_demand import Terms, brakes_of, carry_out, plan_over
from scheduler.cli.outcome import EXIT_DONE, EXIT_FAILURES
from scheduler.cli.session import open_ledger, remark
from scheduler.selection import named
from scheduler.sweep import Office, plan_project
from worker.deletion import ABSENT
from worker.ledger import JobState
from worker.modelarts import Precondition, changes
from worker.projects import Directory
from worker.settings import settings

if TYPE_CHECKING:
    from collections.abc import Mapping

    from scheduler.facts import Facts
    from scheduler.matchers import Finding
    from scheduler.selection import Rules
    from worker.ledger import Job, Run
    from worker.modelarts import Pool


def retry(
    run: Annotated[str, typer.Argument(metavar="RUN", help="The id of a run that has ended.")],
    reason: Annotated[
        str | None, typer.Option(help="Why, for the record; else: retry of RUN.")
    ] = None,
    yes: Yes = False,
    verify: Verify = True,
    wait: Wait = True,
    allow_busy: Annotated[
        bool,
        typer.Option(
            "--allow-busy", help="Of a policy or selector: pools with running workloads too."
        ),
    ] = False,
    allow_shared: Annotated[
        bool,
        typer.Option(
            "--allow-shared", help="Of a policy or selector: shared and public pools too."
        ),
    ] = False,
) -> None:
    """Delete the pools whose jobs failed in a run: shown first, then asked.

    A pool that is no longer as it was when the run chose it is kept; so is one that a policy or a
    selector chose and that is busy or shared now. Exit codes as with delete.
    """
    demand = Demand(
        reason=f"retry of {run}" if reason is None else reason,
        yes=yes,
        verify=verify,
        wait=wait,
        allow_busy=allow_busy,
        allow_shared=allow_shared,
    )
    code = asyncio.run(_retry(run, demand))
    if code:
        raise typer.Exit(code)


@dataclass(frozen=True, slots=True)
class Demand:
    """How somebody wants a run tried again; the attributes are the command's options."""

    reason: str
    yes: bool
    verify: bool
    wait: bool
    allow_busy: bool
    allow_shared: bool


async def _retry(run_id: str, demand: Demand) -> int:
    config = settings()
    directory = Directory.of(config)
    async with open_ledger(config) as (redis, ledger):
        run = await ledger.run(run_id)
        if not run.ended:
            raise UsageError(f"RUN: {run_id} is {run.state}; accepted: a run that has ended.")
        failed: dict[str, dict[str, Job]] = {}
        damaged = 0
        async for job in ledger.all_jobs(run_id, outcome=JobState.FAILED):
            if job.is_damaged:  # which pool it was, and what was planned, is lost
                damaged += 1
            else:
                failed.setdefault(job.project_id, {})[job.pool_name] = job
        if damaged:
            remark(f"Left out, since their records are damaged: {damaged} jobs.", "yellow")
        if not failed:
            which = "other job" if damaged else "job"
            remark(f"No {which} of run {run_id} failed: there is nothing to retry.")
            return EXIT_FAILURES if damaged else EXIT_DONE
        if _was_chosen(run):
            age_s = (await ledger.now_ms() - run.planned_ms) / 1000
            _not_too_old(run, age_s, config.plan_max_age_s)
        office = Office(directory, redis, ledger)
        for project in failed:
            _same_place(office, run, project)
        now = datetime.now(UTC)

        plans = await plan_over(
            list(failed),
            lambda project: plan_project(
                office,
                project,
                _rules(run, failed[project], demand),
                now,
                named=list(failed[project]),
            ),
        )
        terms = Terms(
            brakes=brakes_of(sum(map(len, failed.values()))),
            named=True,
            reason=demand.reason,
            yes=demand.yes,
            verify=demand.verify,
            wait=demand.wait,
            # So that the new run, tried again in its turn, is known for what it is.
            selector=run.selector,
            policy=run.policy,
        )
        code = await carry_out(office, plans, terms)
        return code or (EXIT_FAILURES if damaged else EXIT_DONE)


def _same_place(office: Office, run: Run, project: str) -> None:
    endpoint = office.endpoint(project)
    if endpoint != run.endpoint:
        raise UsageError(
            f"RUN: {run.run_id} was against {run.endpoint}, and project {project} is at {endpoint} "
            "now; accepted: a run at the same endpoint."
        )


def _was_chosen(run: Run) -> bool:
    """Whether a policy or a selector chose a run's pools, rather than somebody by name."""
    return bool(run.policy or run.selector)


def _not_too_old(run: Run, age_s: float, limit_s: float) -> None:
    if age_s > limit_s:
        raise UsageError(
            f"RUN: {run.run_id} was planned {age_s:.0f} s ago, longer than "
            f"POOLSWEEP_PLAN_MAX_AGE_S={limit_s:g} allows; accepted: a newer run: plan anew with "
            "`poolsweep sweep` or `poolsweep delete`."
        )


def _rules(run: Run, jobs: Mapping[str, Job], demand: Demand) -> Rules:
    rules = as_chosen(jobs)
    if not _was_chosen(run):
        return rules
    # Nobody named these pools: what has come to protect them since keeps them.
    return replace(
        rules,
        allow_busy=demand.allow_busy,
        allow_shared=demand.allow_shared,
        nodes_later=False,
    )


def as_chosen(jobs: Mapping[str, Job]) -> Rules:
    """Rules for the pools of failed jobs: one that is not as its job was made for stays. Pure.

    Args:
        jobs: the jobs, by pool id.
    """
    by_name = named(jobs)

    def match(facts: Facts, now: datetime) -> Finding:
        job = jobs.get(facts.pool.pool_id)
        if job is not None and (why := _changed(job, facts.pool)):
            return matchers.no(why)
        return by_name.match(facts, now)

    return replace(by_name, match=match)


def _changed(job: Job, pool: Pool) -> str:
    """How a pool differs from what its job was made for; empty: it does not."""
    if job.fingerprint == ABSENT:
        return "it was not there when the run chose it"
    if not job.fingerprint:
        return ""
    found = changes(Precondition(job.created, job.fingerprint), pool)
    return f"changed since the run chose it: {'; '.join(found)}" if found else ""
