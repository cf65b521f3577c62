"""`poolsweep results` and `poolsweep runs`: read what happened."""

from __future__ import annotations

import asyncio
import sys
from dataclasses import asdict
from typing import Annotated

import typer

from scheduler.cli.errors import UsageError
from scheduler.cli.session import open_ledger, say, say_json, stdout
from scheduler.review import records, tables
from worker.ledger import JobState
from worker.settings import settings


def results(
    run: Annotated[str, typer.Argument(metavar="RUN", help="The run's id.")],
    outcome: Annotated[
        JobState | None, typer.Option(help="Only jobs with this outcome, or in this state.")
    ] = None,
    kept: Annotated[
        bool, typer.Option("--kept", help="The pools that the run's plan kept, and why.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object.")] = False,
    as_csv: Annotated[bool, typer.Option("--csv", help="One CSV line for each job.")] = False,
) -> None:
    """Show what happened to every pool of a run."""
    if as_json and as_csv:
        raise UsageError("--json and --csv: only one of them is accepted.")
    if kept:
        asyncio.run(_kept(run, as_json))
    else:
        asyncio.run(_results(run, outcome, as_json, as_csv))


async def _results(run_id: str, outcome: JobState | None, as_json: bool, as_csv: bool) -> None:
    async with open_ledger(settings()) as (_, ledger):
        run = await ledger.run(run_id)
        jobs = ledger.all_jobs(run_id, outcome=outcome)
        if as_json:
            await records.write_json(run, jobs, sys.stdout)
        elif as_csv:
            await records.write_csv(jobs, sys.stdout)
        else:
            stdout.print(tables.outcomes(run))
            if run.note:
                say(run.note)
            if rows := [job async for job in jobs]:
                stdout.print(tables.jobs(rows))
            else:
                say(f"No jobs that are {outcome}." if outcome else "No jobs.")


async def _kept(run_id: str, as_json: bool) -> None:
    async with open_ledger(settings()) as (_, ledger):
        await ledger.run(run_id)
        found = [pool async for pool in ledger.all_kept(run_id)]
    if as_json:
        rows = [asdict(pool) for pool in found]
        say_json(rows)
    elif found:
        stdout.print(tables.kept_pools(found))
    else:
        say("The run's plan kept nothing.")


def runs(
    limit: Annotated[int, typer.Option(min=1, max=10_000, help="How many at most.")] = 20,
    as_json: Annotated[bool, typer.Option("--json", help="A JSON list.")] = False,
) -> None:
    """List the runs, newest first."""
    asyncio.run(_runs(limit, as_json))


async def _runs(limit: int, as_json: bool) -> None:
    async with open_ledger(settings()) as (_, ledger):
        found = await ledger.runs(limit=limit)
    if as_json:
        rows = [records.run_record(run) for run in found]
        say_json(rows)
    elif found:
        stdout.print(tables.runs(found))
    else:
        say("No runs yet.")
