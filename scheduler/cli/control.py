"""`poolsweep pause`, `resume` and `cancel`: stop what is going on."""

from __future__ import annotations

import asyncio
import re
from typing import Annotated

import typer

from scheduler.cli.errors import UsageError
from scheduler.cli.projects import project_id
from scheduler.cli.session import open_ledger, requester, say
from worker import pause as pauses
from worker.settings import settings

ID = re.compile(r"[0-9a-f]{32}")
"""What can be no name. Source: the API document, the path parameter `project_id`."""

Scope = Annotated[
    str | None,
    typer.Option(
        "--project",
        help="Only this project, by id or by its name in the projects file; else everything.",
    ),
]


def pause(
    project: Scope = None,
    reason: Annotated[str, typer.Option(help="Why, for the record.")] = "",
) -> None:
    """Stop every DELETE call, on all workers, within two seconds; runs wait."""
    asyncio.run(_pause(_scope(project), reason))


def resume(project: Scope = None) -> None:
    """End a pause: the runs that wait go on."""
    asyncio.run(_resume(_scope(project)))


def cancel(run: Annotated[str, typer.Argument(metavar="RUN", help="The run's id.")]) -> None:
    """Cancel what a run has not called yet; what is being deleted is not stopped."""
    asyncio.run(_cancel(run))


def _scope(project: str | None) -> str:
    if project is None:
        return pauses.EVERYTHING
    # Stopping must depend on no file, nor wait for what takes a while to load; only a name does.
    if ID.fullmatch(project):
        return project
    from worker.projects import Directory

    return project_id(Directory.of(settings()), project)


async def _pause(scope: str, reason: str) -> None:
    async with open_ledger(settings()) as (redis, _):
        await pauses.pause(redis, scope, by=requester(), reason=reason)
        await _tell(await pauses.pauses(redis))


async def _resume(scope: str) -> None:
    async with open_ledger(settings()) as (redis, _):
        if not await pauses.resume(redis, scope):
            say("It was not paused.")
        await _tell(await pauses.pauses(redis))


def sentence(pause: pauses.Pause) -> str:
    """What is paused, by whom and why."""
    return f"{str(pause)[:1].upper()}{str(pause)[1:]}"


async def _tell(found: dict[str, pauses.Pause]) -> None:
    for each in found.values():
        say(sentence(each))
    if not found:
        say("Nothing is paused.")


async def _cancel(run_id: str) -> None:
    async with open_ledger(settings()) as (_, ledger):
        await ledger.run(run_id)
        if not await ledger.cancel(run_id):
            state = (await ledger.run(run_id)).state
            raise UsageError(f"RUN: {run_id} is {state}; accepted: a run that is running.")
        run = await ledger.run(run_id)
        say(f"Run {run_id} is cancelled: {run.done} of {run.total} jobs have ended by now")
