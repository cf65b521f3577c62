"""Follows a run until it ends, with a live bar on a terminal."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from scheduler.cli.session import stderr
from scheduler.review.tables import STYLES
from worker.ledger import JobState

if TYPE_CHECKING:
    from worker.ledger import Ledger, Run

POLL_S = 0.2


async def follow(ledger: Ledger, run_id: str) -> Run:
    """Watch a run to its end.

    Args:
        ledger: where it is.
        run_id: the run.

    Returns:
        The run when it has ended.

    Raises:
        RunNotFoundError: Redis has lost it.
    """
    run = await ledger.run(run_id)
    with Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("{task.fields[counts]}"),
        console=stderr,
    ) as bar:
        task = bar.add_task(f"Run {run_id}", total=run.total, counts="")
        while True:
            bar.update(task, completed=run.done, counts=_counts(run))
            if run.ended:
                return run
            await asyncio.sleep(POLL_S)
            run = await ledger.run(run_id)


def _counts(run: Run) -> str:
    shown = [state for state in JobState if run.counts[state] and state is not JobState.PENDING]
    return "  ".join(f"[{STYLES[state]}]{state} {run.counts[state]}[/]" for state in shown)
