"""Follows a run until it ends: a live display on a terminal, now and then a line elsewhere."""

from __future__ import annotations

import asyncio
import contextlib
import time
from typing import TYPE_CHECKING

from rich.console import Group
from rich.live import Live
from rich.progress import (
    BarColumn,
    Progress,
    ProgressColumn,
    Task,
    TaskProgressColumn,
    TextColumn,
    TimeElapsedColumn,
)
from rich.text import Text

from scheduler.cli.session import heed_interrupt, stderr
from scheduler.review.tables import STYLES
from worker.ledger import JobState

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Iterator

    from worker.ledger import Ledger, Run

    Show = Callable[[Run], None]

POLL_S = 0.2
LINE_EVERY_S = 60.0


async def follow(ledger: Ledger, run_id: str, attend: Callable[[], Awaitable[None]]) -> Run:
    """Watch a run to its end.

    Args:
        ledger: where it is.
        run_id: the run.
        attend: called at every look; it sees to it that somebody executes the run.

    Returns:
        The run when it has ended.

    Raises:
        RunNotFoundError: Redis has lost it.
    """
    run = await ledger.run(run_id)
    with _live(run) if stderr.file.isatty() else _lines(run) as show:
        while True:
            show(run)
            if run.ended:
                return run
            await attend()
            heed_interrupt()
            await asyncio.sleep(POLL_S)
            run = await ledger.run(run_id)


class _Rate(ProgressColumn):
    """Jobs that end a second."""

    def render(self, task: Task) -> Text:
        speed = task.finished_speed or task.speed
        return Text("-/s" if speed is None else f"{speed:.3g}/s", style="dim")


@contextlib.contextmanager
def _live(run: Run) -> Iterator[Show]:
    """Two lines that fit 80 columns: a bar, and the jobs counted by state below it."""
    bar = Progress(
        TextColumn("Run {task.description}"),
        BarColumn(bar_width=None),
        TaskProgressColumn(),
        _Rate(),
        TimeElapsedColumn(),
        expand=True,
        auto_refresh=False,
        console=stderr,
    )
    task = bar.add_task(run.run_id, total=run.total)
    # The streams are left alone: this writes to a terminal while stdout may be a file.
    with Live(
        console=stderr, auto_refresh=False, redirect_stdout=False, redirect_stderr=False
    ) as live:

        def show(run: Run) -> None:
            bar.update(task, completed=run.done)
            live.update(Group(bar, _counts(run)), refresh=True)

        yield show


@contextlib.contextmanager
def _lines(run: Run) -> Iterator[Show]:
    begun = said = time.monotonic()
    stderr.print(f"Run {run.run_id}: {run.total} jobs")

    def show(run: Run) -> None:
        nonlocal said
        now = time.monotonic()
        if run.ended or now - said >= LINE_EVERY_S:
            said = now
            stderr.print(
                f"Run {run.run_id}: {run.done} of {run.total} jobs ended "
                f"after {now - begun:.0f} s:",
                _counts(run),
            )

    yield show


def _counts(run: Run) -> Text:
    shown = [state for state in JobState if run.counts[state]]
    return Text(", ").join(Text(f"{run.counts[state]} {state}", STYLES[state]) for state in shown)
