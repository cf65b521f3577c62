"""`poolsweep marks` and `keep`: what is due when, and what somebody keeps."""

from __future__ import annotations

import asyncio
from datetime import UTC, datetime
from typing import Annotated

import typer

from scheduler.cli.errors import UsageError
from scheduler.cli.projects import project_id
from scheduler.cli.session import open_ledger, requester, say, say_json, stdout
from scheduler.durations import parse_duration
from scheduler.marks import Veto, Vetoes, all_marks
from scheduler.matchers import parse_expiry
from scheduler.review import records, tables
from worker.modelarts import validate_pool_name
from worker.projects import Directory
from worker.settings import settings


def marks(
    as_json: Annotated[bool, typer.Option("--json", help="A JSON list.")] = False,
) -> None:
    """List the pools that are marked, and when each is due."""
    asyncio.run(_marks(as_json))


async def _marks(as_json: bool) -> None:
    async with open_ledger(settings()) as (redis, _):
        found = await all_marks(redis)
    if as_json:
        rows = [records.mark_record(mark) for mark in found]
        say_json(rows)
    elif found:
        stdout.print(tables.marks(found))
    else:
        say("Nothing is marked.")


def keep(
    pool: Annotated[str, typer.Argument(metavar="POOL", help="The pool's id (metadata.name).")],
    project: Annotated[
        str, typer.Option(help="Its project, by id or by its name in the projects file.")
    ],
    until: Annotated[
        str | None,
        typer.Option(
            help="A date, a time, or how long from now, such as 7d; without it, for good."
        ),
    ] = None,
    reason: Annotated[str, typer.Option(help="Why, for the record.")] = "",
    release: Annotated[bool, typer.Option("--release", help="Take the veto back.")] = False,
) -> None:
    """Keep a pool whatever any policy says: a veto."""
    directory = Directory.of(settings())
    place = project_id(directory, project)
    try:
        pool_id = validate_pool_name(pool)
    except ValueError as error:
        raise UsageError(f"POOL: {error}") from None
    moment = None if until is None else _moment(until)
    veto = Veto(place, pool_id, moment, requester(), reason)
    asyncio.run(_keep(directory, veto, release=release))


async def _keep(directory: Directory, veto: Veto, *, release: bool) -> None:
    endpoint = directory.endpoint(veto.project_id).url
    async with open_ledger(directory.settings) as (redis, _):
        vetoes = Vetoes(redis, endpoint)
        if not release:
            await vetoes.put(veto)
            # Named because a project may have an endpoint of its own in a file not read here.
            say(f"{veto.pool_id} at {endpoint}: {veto}")
        elif await vetoes.take_back(veto.project_id, veto.pool_id):
            say(f"{veto.pool_id}: kept no longer")
        else:
            say(f"{veto.pool_id}: nobody kept it")


def _moment(text: str) -> datetime:
    now = datetime.now(UTC)
    try:
        moment = now + parse_duration(text)
    except (ValueError, OverflowError):
        try:
            moment = parse_expiry(text)
        except ValueError:
            raise UsageError(
                f"--until: {text!r} is not accepted: a date or time such as 2026-12-31 or "
                "2026-12-31T18:00Z, or a duration such as 7d, is needed."
            ) from None
    if moment <= now:
        raise UsageError(f"--until: {text!r} has passed; accepted: a moment to come.")
    return moment
