"""A command's run, from its start to its end or to the Ctrl-C that leaves it to others."""

from __future__ import annotations

import asyncio
from functools import partial
from typing import TYPE_CHECKING

import structlog

from scheduler.cli.progress import follow
from scheduler.cli.session import say, stdout
from scheduler.review import tables
from worker.ledger import JobState

if TYPE_CHECKING:
    from collections.abc import Coroutine
    from typing import Any

    from scheduler.cli.attendance import Attendance
    from worker.ledger import Ledger, Run

log = structlog.get_logger(__name__)


async def start(making: Coroutine[Any, Any, Run], attendance: Attendance) -> Run:
    """Start a run, or bring its making to its end: an interrupted maker would leave half of one.

    Args:
        making: makes the run.
        attendance: tells what becomes of the run, if the user interrupts.
    """
    task = asyncio.create_task(making)
    try:
        return await asyncio.shield(task)
    except asyncio.CancelledError:
        await attendance.leave(await task)
        raise


async def see_through(ledger: Ledger, run: Run, attendance: Attendance) -> Run:
    """Follow a run to its end and show what became of it.

    Args:
        ledger: where it is.
        run: the run.
        attendance: sees to it that somebody executes it; tells what becomes of it, if the user
            interrupts.

    Returns:
        The run when it has ended.

    Raises:
        RunNotFoundError: Redis has lost it.
    """
    try:
        ended = await follow(ledger, run.run_id, partial(attendance.look, run.endpoint))
    except asyncio.CancelledError:
        # It may have ended meanwhile, or begun.
        await attendance.leave(await ledger.run(run.run_id))
        raise
    # Also told by the worker, unless that is this command's own and stops with it.
    log.info("run_ended", **ended.told())
    await show_end(ledger, ended)
    if ended.counts[JobState.FAILED]:
        say(f"Try them again:  poolsweep retry {run.run_id}")
    return ended


async def show_end(ledger: Ledger, run: Run) -> None:
    """What became of a run, every failure with its reason, and how to see it again.

    Args:
        ledger: where its jobs are.
        run: as it ended.
    """
    stdout.print(tables.outcomes(run))
    if run.note:
        say(run.note)
    failures = [job async for job in ledger.all_jobs(run.run_id, outcome=JobState.FAILED)]
    if failures:
        stdout.print(tables.failures(failures))
    say(f"Look again with: poolsweep results {run.run_id}")
    if failures:
        say(f"Only failures:   poolsweep results {run.run_id} --outcome failed")
