"""`poolsweep watch`: join a run from anywhere, and see it to its end."""

from __future__ import annotations

import asyncio
import contextlib
from typing import Annotated

import typer

from scheduler.cli.attendance import Attendance
from scheduler.cli.execution import see_through
from scheduler.cli.outcome import exit_code
from scheduler.cli.session import open_ledger
from worker.settings import settings


def watch(run: Annotated[str, typer.Argument(metavar="RUN", help="The run's id.")]) -> None:
    """Follow a run to its end; Ctrl-C leaves it as it is.

    Exit codes as with delete: 0 all gone, 1 some failed, 3 braked, cancelled, skipped or a dry
    run.
    """
    code = asyncio.run(_watch(run))
    if code:
        raise typer.Exit(code)


async def _watch(run_id: str) -> int:
    config = settings()
    async with open_ledger(config) as (redis, ledger):
        run = await ledger.run(run_id)
        with contextlib.ExitStack() as stack:
            attendance = Attendance(config, redis, may_start=True, stack=stack)
            return exit_code(await see_through(ledger, run, attendance))
