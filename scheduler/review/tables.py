"""Plans, runs and jobs as tables for a terminal."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING, Any

from rich import markup
from rich.console import Group
from rich.table import Table

from scheduler.review.records import timestamp
from scheduler.review.text import one_line
from worker.ledger import JobState
from worker.modelarts import UnreadableTagsError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping, Sequence
    from datetime import datetime

    from rich.console import Console, ConsoleOptions, RenderableType, RenderResult

    from scheduler.marks import Mark
    from scheduler.review.sections import Section
    from scheduler.selection import Decision
    from worker.ledger import Job, Kept, Run
    from worker.modelarts import Pool

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


NOT_TOLD = {
    "forgotten": "its record has aged out",
    "unread": "a newer poolsweep made it, or its record is damaged",
}
"""What is said of a night's run that is not shown."""


MOST_REASONS = 20
"""Some reasons quote a tag, so that there may be as many as pools."""


def escape(text: str) -> str:
    """A text from outside as a cell takes it: on one line, without markup and escapes."""
    return markup.escape(one_line(text))


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


class _ByWidth:
    """A table that is laid out for the width that it is printed in.

    Args:
        wide: makes it with a line for each row; for where there is no bound, or a wide terminal.
        narrow: makes it with some lines for each row, so that it fits 80 columns.
        columns: from this width on it is the wide one.
    """

    def __init__(
        self, wide: Callable[[], Table], narrow: Callable[[], Table], columns: int
    ) -> None:
        self._wide = wide
        self._narrow = narrow
        self._columns = columns

    def __rich_console__(self, _: Console, options: ConsoleOptions) -> RenderResult:
        yield self._wide() if options.max_width >= self._columns else self._narrow()


def _stacked(*headers: str) -> Table:
    """A table without lines, whose cells hold several: the last column takes what is left."""
    table = Table(*headers, box=None, padding=(0, 2, 0, 0), pad_edge=False)
    for column in table.columns[:-1]:
        column.no_wrap = True
    table.columns[-1].overflow = "fold"
    return table


def decisions(rows: Sequence[Decision], now: datetime) -> RenderableType:
    """What is to become of pools, and why."""

    def wide() -> Table:
        table = Table(
            "decision", "pool", "name", "age", "nodes", "phase", "billing", "tags", "reason"
        )
        table.columns[1].no_wrap = True
        for row in rows:
            pool = row.pool
            table.add_row(
                _decision(row),
                escape(pool.pool_id),
                escape(pool.display_name),
                age(pool.created_at, now),
                escape(nodes(pool.nodes_by_flavor)),
                escape(pool.phase or "?"),
                escape(str(pool.billing)),
                escape(_tags(pool)),
                escape(row.reason),
            )
        return table

    def narrow() -> Table:
        table = _stacked("decision", "pool")
        for row in rows:
            pool = row.pool
            name, old = pool.display_name or "no name", age(pool.created_at, now)
            lines = (
                f"{name}, {old} old, {nodes(pool.nodes_by_flavor)}",
                f"phase {pool.phase or '?'}, {pool.billing}, tags: {_tags(pool) or '-'}",
                row.reason,
            )
            table.add_row(
                _decision(row),
                "\n".join([escape(pool.pool_id), *(f"[dim]{escape(line)}[/]" for line in lines)]),
            )
        return table

    return _ByWidth(wide, narrow, 240)


def _right(table: Table, *headers: str) -> None:
    for column in table.columns:
        if column.header in headers:
            column.justify = "right"


def _decision(row: Decision) -> str:
    return "[red]delete[/]" if row.delete else "[green]keep[/]"


def _tags(pool: Pool) -> str:
    try:
        return " ".join(f"{key}={value}" for key, value in pool.tags.items())
    except UnreadableTagsError:
        return "unreadable"


def outcomes(run: Run) -> Table:
    """A run's jobs counted by outcome."""
    table = Table("outcome", "jobs")
    _right(table, "jobs")
    for state in JobState:
        if count := run.counts[state]:
            table.add_row(_state(state), str(count))
    table.add_section()
    table.add_row("total", str(run.total))
    return table


def jobs(rows: Sequence[Job]) -> RenderableType:
    """Jobs with their outcome and its reason."""

    def wide() -> Table:
        table = Table("outcome", "pool", "calls", "reason")
        table.columns[1].no_wrap = True
        _right(table, "calls")
        for job in rows:
            calls = str(len(job.attempts))
            table.add_row(_state(job.state), escape(job.pool_name), calls, escape(job.reason))
        return table

    def narrow() -> Table:
        table = _stacked("outcome", "pool, calls and reason")
        for job in rows:
            count = len(job.attempts)
            reason = f"{count} call{'' if count == 1 else 's'}; {job.reason or 'no reason yet'}"
            table.add_row(_state(job.state), f"{escape(job.pool_name)}\n[dim]{escape(reason)}[/]")
        return table

    return _ByWidth(wide, narrow, 150)


def _state(state: JobState) -> str:
    return f"[{STYLES[state]}]{state}[/]"


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
    reasons = Counter(row.reason.split(": ")[0] for row in rows).most_common()
    for reason, count in reasons[:MOST_REASONS]:
        table.add_row(str(count), escape(reason))
    if others := sum(count for _, count in reasons[MOST_REASONS:]):
        table.add_row(str(others), "for other reasons")
    return table


def runs(rows: Sequence[Run]) -> RenderableType:
    """Runs, a line each."""

    def wide() -> Table:
        table = Table("run", "state", "created", "jobs", "done", "failed", "by", "endpoint")
        table.columns[0].no_wrap = True
        _right(table, "jobs", "done", "failed")
        for run in rows:
            counts = _run_counts(run)
            created = timestamp(run.created_ms)
            table.add_row(run.run_id, run.state, created, *counts, _by(run), escape(run.endpoint))
        return table

    def narrow() -> Table:
        table = _stacked("run", "state", "jobs", "done", "failed", "by, and endpoint")
        _right(table, "jobs", "done", "failed")
        for run in rows:
            by = f"{_by(run)}\n[dim]{escape(run.endpoint)}[/]"
            table.add_row(run.run_id, run.state, *_run_counts(run), by)
        return table

    return _ByWidth(wide, narrow, 150)


def _run_counts(run: Run) -> tuple[str, str, str]:
    return str(run.total), str(run.done), str(run.counts[JobState.FAILED])


def _by(run: Run) -> str:
    return escape(f"{run.requester} ({run.source})" if run.requester else run.source)


def kept_pools(rows: Iterable[Kept]) -> Table:
    """Pools that a run's plan kept, each with the reason."""
    table = _stacked("pool", "kept because")
    for pool in rows:
        table.add_row(escape(pool.pool_name), escape(pool.reason))
    return table


def marks(rows: Sequence[Mark]) -> RenderableType:
    """Marked pools, and when each is due."""

    def wide() -> Table:
        table = Table("due", "pool", "name", "policy", "project", "reason")
        for mark in rows:
            table.add_row(
                f"{mark.due_at:%Y-%m-%d %H:%MZ}",
                escape(mark.pool_id),
                escape(mark.display_name),
                escape(mark.policy),
                mark.project_id,
                escape(mark.reason),
            )
        return table

    def narrow() -> Table:
        table = _stacked("due", "pool")
        for mark in rows:
            lines = (
                f"{mark.display_name or 'no name'}, policy {mark.policy}",
                f"project {mark.project_id}",
                mark.reason,
            )
            table.add_row(
                f"{mark.due_at:%Y-%m-%d %H:%MZ}",
                "\n".join([escape(mark.pool_id), *(f"[dim]{escape(line)}[/]" for line in lines)]),
            )
        return table

    return _ByWidth(wide, narrow, 200)


def schedule(rows: Sequence[Mapping[str, Any]]) -> RenderableType:
    """Each policy's next night, and its last ones with what came of them."""
    table = _stacked("policy", "night")
    for row in rows:
        lines = [escape(f"next  {row['next']}")]
        for night in row["past"]:
            lines.append(escape(f"{night['state']}  {night['at']}  {night['note']}"))
            for run in night["runs"]:
                told = f"run {run['run_id']}: {NOT_TOLD.get(run['state'], run['state'])}"
                if "counts" in run:
                    counts = ", ".join(f"{n} {state}" for state, n in run["counts"].items())
                    told += f", {counts or 'no jobs'}"
                lines.append(f"      {escape(told)}")
        table.add_row(escape(row["policy"]), "\n".join(lines))
    return table


def section(found: Section) -> RenderableType:
    """A section of a report, with its title and note."""

    def wide() -> Table:
        table = _stacked(*found.headers)
        _right(table, *found.numbers)
        for row in found.rows:
            table.add_row(*map(escape, row))
        return table

    def narrow() -> Table:
        lead, rest = found.headers[: found.lead], found.headers[found.lead :]
        table = _stacked(*lead, *([", ".join(rest)] if rest else []))
        _right(table, *found.numbers)
        for row in found.rows:
            cells = [escape(text) for text in row]
            lines = cells[found.lead : found.lead + 1]
            lines += [f"[dim]{text}[/]" for text in cells[found.lead + 1 :]]
            table.add_row(*cells[: found.lead], *(["\n".join(lines)] if rest else []))
        return table

    parts: list[RenderableType] = [f"[bold]{escape(found.title)}[/]"]
    if found.rows:
        parts.append(_ByWidth(wide, narrow, 150))
    if found.note:
        parts.append(f"[dim]{escape(found.note)}[/]")
    return Group(*parts)
