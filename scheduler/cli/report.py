"""`poolsweep report`: what the runs of a time came to, to be read or sent."""

from __future__ import annotations

import asyncio
import contextlib
import os
import secrets
import sys
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from scheduler import prices
from scheduler.cli.errors import UsageError
from scheduler.cli.forms import FLAGS, Form, chosen
from scheduler.cli.results import AsLines, AsMarkdown
from scheduler.cli.session import open_ledger, remark_unread, say, say_json, stdout
from scheduler.durations import parse_duration
from scheduler.review import markdown, records, tables
from scheduler.review.gathering import report_of_run, report_since, runs_between
from scheduler.review.sections import sections, title_of
from worker.settings import settings

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterator

    from redis.asyncio import Redis

    from scheduler.prices import Prices
    from scheduler.review.report import Report
    from worker.ledger import Ledger, Run

LONGEST = timedelta(days=366)


def report(
    run: Annotated[str | None, typer.Argument(metavar="RUN", help="One run's id.")] = None,
    since: Annotated[
        str | None,
        typer.Option(metavar="DURATION", help="All runs made in the last while, such as 7d."),
    ] = None,
    price_file: Annotated[
        Path | None,
        typer.Option("--prices", help="A YAML file of prices, to tell the money freed."),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object.")] = False,
    as_lines: AsLines = False,
    as_csv: Annotated[bool, typer.Option("--csv", help="One CSV line for each run.")] = False,
    as_markdown: AsMarkdown = False,
    html: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="One HTML file that needs nothing else, to be sent."),
    ] = None,
    force: Annotated[
        bool, typer.Option("--force", help="Let --html write over a file that is there.")
    ] = False,
) -> None:
    """Report what one run, or the runs of a time, came to.

    With --jsonl and --csv there is one line for each run; else it is summed up.
    """
    form = chosen(
        {
            Form.JSON: as_json,
            Form.LINES: as_lines,
            Form.CSV: as_csv,
            Form.MARKDOWN: as_markdown,
            Form.HTML: html is not None,
        }
    )
    if (run is None) == (since is None):
        raise UsageError("RUN and --since: exactly one of them is accepted.")
    if force and html is None:
        raise UsageError("--force: it is accepted with --html only.")
    if price_file is not None and form in {Form.LINES, Form.CSV}:
        raise UsageError(f"--prices: it is not accepted with {FLAGS[form]}, which sums nothing up.")
    window = None if since is None else _window(since)
    known = None if price_file is None else prices.load(price_file)
    if html is not None:
        _check(html, force)
    asyncio.run(_report(run, window, known, form, html, force))


async def _report(
    run_id: str | None,
    window: timedelta | None,
    known: Prices | None,
    form: Form,
    file: Path | None,
    force: bool,
) -> None:
    async with open_ledger(settings()) as (redis, ledger):
        if form in {Form.LINES, Form.CSV}:
            await _write_runs(_runs(redis, ledger, run_id, window), form)
            return
        if window is not None:
            found = await report_since(redis, ledger, window, known)
        else:
            found = await report_of_run(redis, ledger, run_id or "", known)
    _show(found, form, file, force)


def _show(found: Report, form: Form, file: Path | None, force: bool) -> None:
    if form is Form.JSON:
        say_json(found.record())
    elif form is Form.MARKDOWN:
        sys.stdout.write(markdown.document(title_of(found), sections(found)))
    elif file is not None:
        # It brings a template engine along, which no other form has a use for.
        from scheduler.review.html_report import html

        _write(file, html(found), force)
        say(f"Written to {file}")
    else:
        stdout.print(title_of(found), style="bold", markup=False)
        for section in sections(found):
            stdout.print()
            stdout.print(tables.section(section))


async def _runs(
    redis: Redis, ledger: Ledger, run_id: str | None, window: timedelta | None
) -> AsyncIterator[Run]:
    if window is None:
        yield await ledger.run(run_id or "")
        return
    now_ms = await ledger.now_ms()
    since_ms = now_ms - round(window.total_seconds() * 1000)
    count = 0

    def unread() -> None:
        nonlocal count
        count += 1

    async for run in runs_between(redis, ledger, since_ms, now_ms, unread):
        yield run
    remark_unread(count)


async def _write_runs(runs: AsyncIterator[Run], form: Form) -> None:
    rows: AsyncIterator[dict[str, Any]]
    if form is Form.LINES:
        rows = (records.run_record(run) async for run in runs)
        await records.write_json_lines(rows, sys.stdout)
    else:
        rows = (records.run_row(run) async for run in runs)
        await records.write_csv_rows(rows, records.RUN_COLUMNS, sys.stdout)


def _window(text: str) -> timedelta:
    try:
        window = parse_duration(text)
    except (ValueError, OverflowError):
        window = timedelta(0)
    if not timedelta(0) < window <= LONGEST:
        raise UsageError(
            f"--since: {text!r} is not accepted: a duration such as 12h, 7d or 4w, of at most "
            f"{LONGEST.days}d, is needed."
        )
    return window


def _check(file: Path, force: bool) -> None:
    """Refuse a file that cannot be written, before the ledger is read."""
    with _told(file):
        if not file.parent.is_dir():
            raise UsageError(f"--html: {str(file)!r} is not accepted: its folder is not there.")
        if not file.exists():
            return
        if not file.is_file():
            raise UsageError(
                f"--html: {str(file)!r} is no regular file; accepted: the name of one."
            )
        if not force:
            raise FileExistsError


def _write(file: Path, text: str, force: bool) -> None:
    """Write a file whole or not at all: beside it first, under a name that nobody else has."""
    beside = file.with_name(f".poolsweep-{secrets.token_hex(8)}")
    with _told(file):
        try:
            beside.write_text(text, encoding="utf-8")
            if force:
                beside.replace(file)
            else:
                os.link(beside, file)  # unlike a rename it takes no name that is there
        finally:
            beside.unlink(missing_ok=True)


@contextlib.contextmanager
def _told(file: Path) -> Iterator[None]:
    """Tell in a sentence why a file cannot be written."""
    try:
        yield
    except FileExistsError:
        raise UsageError(
            f"--html: {str(file)!r} is there already; accepted: a new name, or --force to write "
            "over it."
        ) from None
    except OSError as error:
        raise UsageError(
            f"--html: {str(file)!r} cannot be written: {error.strerror}; accepted: a file in a "
            "folder that can."
        ) from None
