"""Follows a run until it ends: a live display on a terminal, now and then a line elsewhere."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections import deque
from datetime import timedelta
from typing import TYPE_CHECKING

from rich.console import Group
from rich.live import Live
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn
from rich.text import Text

from scheduler.cli.attendance import TO_BE_PLANNED
from scheduler.cli.session import heed_interrupt, remark, stderr
from scheduler.review.tables import STYLES
from worker.ledger import JobState, RunState

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Iterator

    from worker.ledger import Ledger, Run

    Show = Callable[[Run, "Pace"], None]

POLL_S = 0.2
LINE_EVERY_S = 60.0
RATE_OVER_S = 30.0
QUEUED_FOR_S = 1.0
"""A run that is queued for longer than this is remarked on: most are planned sooner."""


class Pace:
    """How fast jobs end, from what was seen of late, and how long the rest takes at that: pure.

    Args:
        begun_s: when the run began, on the clock that `saw` is given.
    """

    def __init__(self, begun_s: float) -> None:
        self._begun_s = begun_s
        self._seen: deque[tuple[float, int]] = deque()

    def saw(self, at_s: float, done: int) -> None:
        """Note how many jobs have ended at a moment; later moments come later."""
        self._seen.append((at_s, done))
        while len(self._seen) > 2 and self._seen[1][0] <= at_s - RATE_OVER_S:
            self._seen.popleft()

    @property
    def elapsed_s(self) -> float:
        """Seconds from the run's beginning to what was seen last."""
        return max(0.0, self._seen[-1][0] - self._begun_s) if self._seen else 0.0

    @property
    def per_second(self) -> float | None:
        """Jobs that end a second; None: not known yet."""
        if len(self._seen) < 2:
            return None
        (start_s, before), (end_s, done) = self._seen[0], self._seen[-1]
        return (done - before) / (end_s - start_s) if end_s > start_s else None

    def left_s(self, total: int) -> float | None:
        """Seconds until all jobs have ended at this rate; None: not known."""
        done = self._seen[-1][1] if self._seen else 0
        if done >= total:
            return 0.0
        return (total - done) / self.per_second if self.per_second else None


async def follow(ledger: Ledger, run_id: str, attend: Callable[[], Awaitable[None]]) -> Run:
    """Watch a run to its end.

    Args:
        ledger: where it is.
        run_id: the run.
        attend: called at every look while the run is running; it sees to it that somebody
            executes it.

    Returns:
        The run when it has ended.

    Raises:
        RunNotFoundError: Redis has lost it.
    """
    run = await ledger.run(run_id)
    # By the server's clock, so that whoever joins later sees the run's own time.
    age_ms = await ledger.now_ms() - (run.started_ms or run.created_ms)
    began_s = time.monotonic()
    pace = Pace(began_s - age_ms / 1000)
    told = False
    with _live(run) if stderr.file.isatty() else _lines(run) as show:
        while True:
            pace.saw(time.monotonic(), run.done)
            show(run, pace)
            if run.ended:
                return run
            if run.state is RunState.RUNNING:
                await attend()
            elif (
                run.state is RunState.QUEUED
                and not told
                and time.monotonic() - began_s >= QUEUED_FOR_S
            ):
                told = True
                remark(f"Run {run_id} {TO_BE_PLANNED}", "yellow")
            heed_interrupt()
            await asyncio.sleep(POLL_S)
            run = await ledger.run(run_id)


@contextlib.contextmanager
def _live(run: Run) -> Iterator[Show]:
    """Two lines that fit 80 columns: a bar, and the jobs counted by state below it."""
    bar = Progress(
        TextColumn("Run {task.description}"),
        BarColumn(bar_width=None),
        TaskProgressColumn(),
        TextColumn("{task.fields[pace]}", style="dim"),
        expand=True,
        auto_refresh=False,
        console=stderr,
    )
    task = bar.add_task(run.run_id, total=None, pace="")
    # The streams are left alone: this writes to a terminal while stdout may be a file.
    with Live(
        console=stderr, auto_refresh=False, redirect_stdout=False, redirect_stderr=False
    ) as live:

        def show(run: Run, pace: Pace) -> None:
            words = f"{_rate(pace)} {_clock(pace.elapsed_s)}"
            if not run.ended:
                left = pace.left_s(run.total) if run.total else None
                words += f", {_clock(left)} left"
            bar.update(task, total=run.total or None, completed=run.done, pace=words)
            live.update(Group(bar, _counts(run)), refresh=True)

        yield show


@contextlib.contextmanager
def _lines(run: Run) -> Iterator[Show]:
    said = time.monotonic()
    stderr.print(f"Run {run.run_id}: {f'{run.total} jobs' if run.started_ms else run.state}")

    def show(run: Run, pace: Pace) -> None:
        nonlocal said
        now = time.monotonic()
        if run.ended or now - said >= LINE_EVERY_S:
            said = now
            words = f"{run.done} of {run.total} jobs ended after {pace.elapsed_s:.0f} s"
            if not run.ended and (left_s := pace.left_s(run.total)) is not None:
                words += f", {_rate(pace)}, about {_clock(left_s)} left"
            stderr.print(f"Run {run.run_id}: {words}:", _counts(run))

    yield show


def _rate(pace: Pace) -> str:
    return "-/s" if pace.per_second is None else f"{pace.per_second:.3g}/s"


def _clock(seconds: float | None) -> str:
    """Hours, minutes and seconds."""
    return "-:--:--" if seconds is None else str(timedelta(seconds=round(seconds)))


def _counts(run: Run) -> Text:
    if run.state in {RunState.QUEUED, RunState.CREATING}:
        return Text(f"{run.state}: not started yet", "dim")
    shown = [state for state in JobState if run.counts[state]]
    return Text(", ").join(Text(f"{run.counts[state]} {state}", STYLES[state]) for state in shown)
