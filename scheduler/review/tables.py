"""Plans, runs and jobs as tables for a terminal."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING

from rich.markup import escape
from rich.table import Table

from scheduler.review.records import timestamp
from worker.ledger import JobState
from worker.modelarts import UnreadableTagsError

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence
    from datetime import datetime

    from rich.console import RenderableType

    from scheduler.selection import Decision
    from worker.ledger import Job, Run

STYLES = {
    JobState.DELETED: "green",
    JobState.ALREADY_DELETED: "green",
    JobState.ACCEPTED: "cyan",
    JobState.SKIPPED: "yellow",
    JobState.FAILED: "bold red",
    JobState.CANCELLED: "magenta",
    JobState.PENDING: "dim",
    JobState.LEASED: "dim",
}


def age(created: datetime | None, now: datetime) -> str:
    """How old something is, in the largest unit that fits."""
    if created is None:
        return "?"
    seconds = max(0, (now - created).total_seconds())
    for unit, size in (("d", 86_400), ("h", 3_600), ("min", 60)):
        if seconds >= size:
            return f"{seconds / size:.0f} {unit}"
    return f"{seconds:.0f} s"


def nodes(by_flavor: Counter[str] | dict[str, int]) -> str:
    """Nodes by flavor, such as `2 x modelarts.vm.cpu.4ud`."""
    return ", ".join(f"{count} x {flavor}" for flavor, count in sorted(by_flavor.items())) or "-"


def decisions(rows: Iterable[Decision], now: datetime) -> Table:
    """What is to become of pools, and why."""
    table = Table("decision", "pool", "name", "age", "nodes", "phase", "billing", "tags", "reason")
    for column in table.columns:
        column.overflow = "fold"
    for row in rows:
        pool = row.pool
        try:
            tags = " ".join(f"{key}={value}" for key, value in pool.tags.items())
        except UnreadableTagsError:
            tags = "unreadable"
        table.add_row(
            "[red]delete[/]" if row.delete else "[green]keep[/]",
            escape(pool.pool_id),
            escape(pool.display_name),
            age(pool.created_at, now),
            escape(nodes(pool.nodes_by_flavor)),
            escape(pool.phase or "?"),
            escape(str(pool.billing)),
            escape(tags),
            escape(row.reason),
        )
    return table


def outcomes(run: Run) -> Table:
    """A run's jobs counted by outcome."""
    table = Table("outcome", "jobs")
    table.columns[1].justify = "right"
    for state in JobState:
        if count := run.counts[state]:
            table.add_row(f"[{STYLES[state]}]{state}[/]", str(count))
    table.add_section()
    table.add_row("total", str(run.total))
    return table


def jobs(rows: Iterable[Job]) -> Table:
    """Jobs with their outcome and its reason."""
    table = Table("outcome", "pool", "calls", "reason")
    table.columns[1].overflow = "fold"
    table.columns[2].justify = "right"
    for job in rows:
        table.add_row(
            f"[{STYLES[job.state]}]{job.state}[/]",
            escape(job.pool_name),
            str(len(job.attempts)),
            escape(job.reason),
        )
    return table


def failures(rows: Iterable[Job]) -> RenderableType:
    """Every job with its reason, those with the same reason together."""
    by_reason: dict[str, list[Job]] = {}
    for job in rows:
        by_reason.setdefault(job.reason, []).append(job)
    lines = []
    for reason, group in sorted(by_reason.items(), key=lambda item: -len(item[1])):
        lines.append(f"[bold red]{len(group)} failed:[/] {escape(reason)}")
        lines += [f"    {escape(job.pool_name)}" for job in group]
    return "\n".join(lines)


def kept(rows: Iterable[Decision]) -> Table:
    """How many pools stay, by reason."""
    table = Table("kept", "why", show_header=False, box=None)
    table.columns[0].justify = "right"
    reasons = Counter(row.reason.split(":")[0] for row in rows)
    for reason, count in reasons.most_common():
        table.add_row(str(count), escape(reason))
    return table


def runs(rows: Sequence[Run]) -> Table:
    """Runs, a line each."""
    table = Table("run", "source", "by", "state", "created", "jobs", "done", "failed", "endpoint")
    for run in rows:
        table.add_row(
            run.run_id,
            escape(run.source),
            escape(run.requester),
            run.state,
            timestamp(run.created_ms),
            str(run.total),
            str(run.done),
            str(run.counts[JobState.FAILED]),
            escape(run.endpoint),
        )
    return table
