"""`poolsweep requests`: what waits to be planned, and what was refused."""

from __future__ import annotations

import asyncio
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.markup import escape
from rich.table import Table

from scheduler.cli.session import open_ledger, say, say_json, stdout
from scheduler.intake.requests import Filed, Requests
from scheduler.review import records
from worker.modelarts.answers import printable
from worker.settings import settings

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from scheduler.intake.requests import Rejected, Waiting

WAITING = ("run_id", "client", "way", "projects", "age_s", "tried", "trouble")
REJECTED = ("at", "way", "client", "reason", "message_id")
_SHOWN = 200


def requests(
    rejected: Annotated[
        bool, typer.Option("--rejected", help="Messages that were refused, and why.")
    ] = False,
    limit: Annotated[int, typer.Option(min=1, max=10_000, help="How many at most.")] = 20,
    as_json: Annotated[
        bool, typer.Option("--json", help="A JSON list; of refused messages, with their content.")
    ] = False,
) -> None:
    """List the requests of other systems that wait to be planned, or were refused."""
    asyncio.run(_rejected(limit, as_json) if rejected else _waiting(limit, as_json))


async def _waiting(limit: int, as_json: bool) -> None:
    async with open_ledger(settings()) as (redis, ledger):
        found = await Requests(redis).waiting(limit)
        now_ms = await ledger.now_ms()
    rows = [_waiting_record(each, now_ms) for each in found]
    if as_json:
        say_json(rows)
    elif rows:
        stdout.print(_table(WAITING, rows))
    else:
        say("No request waits to be planned.")


async def _rejected(limit: int, as_json: bool) -> None:
    async with open_ledger(settings()) as (redis, _):
        found = await Requests(redis).rejected(limit)
    rows = [_rejected_record(each) for each in found]
    if as_json:
        say_json(rows)
    elif rows:
        stdout.print(_table(REJECTED, rows))
    else:
        say("No message was refused.")


def _waiting_record(waiting: Waiting, now_ms: int) -> dict[str, Any]:
    record: dict[str, Any] = {"run_id": waiting.run_id}
    try:
        filed = Filed.parse(waiting.run_id, waiting.record)
    except ValueError:
        record |= {"client": "", "way": "", "projects": [], "age_s": None}
        trouble = "its record cannot be read by this version"
    else:
        record |= {
            "client": filed.client,
            "way": str(filed.way),
            "projects": filed.request.projects,
            "age_s": max(0, round((now_ms - filed.accepted_ms) / 1000)),
        }
        trouble = waiting.trouble
    return {**record, "tried": waiting.tried, "trouble": trouble}


def _rejected_record(rejected: Rejected) -> dict[str, Any]:
    at = datetime.fromtimestamp(int(rejected.entry_id.partition("-")[0]) / 1000, UTC)
    return {
        "at": records.moment(at),
        "way": rejected.way,
        "client": rejected.client,
        "reason": rejected.reason,
        "message_id": rejected.message_id,
        "content": rejected.content,
    }


def _table(names: Sequence[str], rows: Iterable[dict[str, Any]]) -> Table:
    table = Table()
    for name in names:
        table.add_column(name.replace("_", " "), overflow="fold")
    for row in rows:
        table.add_row(*(_cell(row[name]) for name in names))
    return table


def _cell(value: Any) -> str:
    text = ", ".join(value) if isinstance(value, list) else str(value)
    return escape(printable(text, _SHOWN))
