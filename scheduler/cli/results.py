"""`poolsweep results` and `poolsweep runs`: read what happened."""

from __future__ import annotations

import asyncio
import sys
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated

import typer

from scheduler.cli.control import sentence
from scheduler.cli.errors import UsageError
from scheduler.cli.forms import Form, chosen
from scheduler.cli.session import open_ledger, remark_unread, say, say_json, stdout
from scheduler.review import records, tables
from worker.ledger import JobState
from worker.pause import pauses
from worker.settings import settings

if TYPE_CHECKING:
    from worker.ledger import Ledger, SchemaError

AsLines = Annotated[bool, typer.Option("--jsonl", help="JSON lines, one object on each.")]
AsMarkdown = Annotated[bool, typer.Option("--markdown", help="A table in Markdown.")]


def results(
    run: Annotated[str, typer.Argument(metavar="RUN", help="The run's id.")],
    outcome: Annotated[
        JobState | None, typer.Option(help="Only jobs with this outcome, or in this state.")
    ] = None,
    kept: Annotated[
        bool, typer.Option("--kept", help="The pools that the run's plan kept, and why.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object.")] = False,
    as_lines: AsLines = False,
    as_csv: Annotated[bool, typer.Option("--csv", help="One CSV line for each job.")] = False,
    as_markdown: AsMarkdown = False,
) -> None:
    """Show what happened to every pool of a run."""
    form = chosen(
        {
            Form.JSON: as_json,
            Form.LINES: as_lines,
            Form.CSV: as_csv,
            Form.MARKDOWN: as_markdown,
        }
    )
    if kept and outcome:
        raise UsageError("--kept and --outcome: only one of them is accepted.")
    asyncio.run(_results(run, outcome, kept, form))


async def _results(run_id: str, outcome: JobState | None, kept: bool, form: Form) -> None:
    async with open_ledger(settings()) as (_, ledger):
        if kept:
            await _kept(ledger, run_id, form)
        else:
            await _jobs(ledger, run_id, outcome, form)


async def _jobs(ledger: Ledger, run_id: str, outcome: JobState | None, form: Form) -> None:
    run = await ledger.run(run_id)
    jobs = ledger.all_jobs(run_id, outcome=outcome)
    match form:
        case Form.JSON:
            await records.write_json(run, jobs, sys.stdout)
        case Form.LINES:
            lines = (records.job_record(job) async for job in jobs)
            await records.write_json_lines(lines, sys.stdout)
        case Form.CSV:
            await records.write_csv(jobs, sys.stdout)
        case Form.MARKDOWN:
            rows = (records.job_row(job) async for job in jobs)
            await records.write_markdown(rows, records.MARKDOWN_COLUMNS, sys.stdout)
        case _:
            stdout.print(tables.outcomes(run))
            if run.note:
                say(run.note)
            if shown := [job async for job in jobs]:
                stdout.print(tables.jobs(shown))
            else:
                say(f"No jobs that are {outcome}." if outcome else "No jobs.")


async def _kept(ledger: Ledger, run_id: str, form: Form) -> None:
    await ledger.run(run_id)
    pools = ledger.all_kept(run_id)
    rows = (records.kept_record(pool) async for pool in pools)
    match form:
        case Form.JSON:
            say_json([asdict(pool) async for pool in pools])
        case Form.LINES:
            await records.write_json_lines(rows, sys.stdout)
        case Form.CSV:
            await records.write_csv_rows(rows, records.KEPT_COLUMNS, sys.stdout)
        case Form.MARKDOWN:
            await records.write_markdown(rows, records.KEPT_COLUMNS, sys.stdout)
        case _:
            if found := [pool async for pool in pools]:
                stdout.print(tables.kept_pools(found))
            else:
                say("The run's plan kept nothing.")


def runs(
    limit: Annotated[int, typer.Option(min=1, max=10_000, help="How many at most.")] = 20,
    as_json: Annotated[bool, typer.Option("--json", help="A JSON list.")] = False,
) -> None:
    """List the runs, newest first, and what is paused."""
    asyncio.run(_runs(limit, as_json))


async def _runs(limit: int, as_json: bool) -> None:
    async with open_ledger(settings()) as (redis, ledger):
        unread: list[SchemaError] = []
        found = await ledger.runs(limit=limit, unread=unread.append)
        paused = await pauses(redis)
    if as_json:
        rows = [records.run_record(run) for run in found]
        say_json(rows)
    else:
        if found:
            stdout.print(tables.runs(found))
        elif not unread:
            say("No runs yet.")
        for each in paused.values():
            say(sentence(each))
    remark_unread(len(unread))
