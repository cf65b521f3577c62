"""A job, a run and a kept pool as people and programs are shown them: JSON, CSV, Markdown."""

from __future__ import annotations

import csv
import json
import re
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any, TextIO

from scheduler.review import markdown
from worker.ledger import JobState, RunState

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Sequence

    from scheduler.marks import Mark
    from worker.ledger import Job, Kept, Run

COLUMNS = (
    "job_id",
    "project_id",
    "pool_name",
    "name",
    "outcome",
    "reason",
    "chosen",
    "attempts",
    "status",
    "error_code",
    "request_id",
    "ended_at",
)
"""What CSV has of a job."""
MARKDOWN_COLUMNS = ("outcome", "pool_name", "name", "attempts", "reason")
"""What Markdown has of a job."""
RUN_COLUMNS = (
    "run_id",
    "created_at",
    "started_at",
    "finished_at",
    "state",
    "source",
    "policy",
    "requester",
    "reason",
    "endpoint",
    "total",
    "done",
    *JobState,
    "note",
)
"""What CSV has of a run."""
KEPT_COLUMNS = ("project_id", "pool_name", "name", "reason")
_FORMULA_START = tuple("=+-@\t\r\n\0＝＋－＠")
# Beside controls: what reorders a line on a screen or breaks it, and half a character.
_UNSAFE = re.compile("[\x7f-\x9f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")


def json_text(value: Any, *, indent: int | None = None) -> str:
    """A value as JSON that is safe to show on a terminal: what is no visible text is escaped.

    Args:
        value: what JSON can hold.
        indent: spaces for each level; None: all on one line.
    """
    text = json.dumps(value, ensure_ascii=False, indent=indent)
    # JSON itself escapes only those below the space.
    return _UNSAFE.sub(lambda found: f"\\u{ord(found[0]):04x}", text)


def timestamp(at_ms: int) -> str | None:
    """ISO 8601 in UTC with milliseconds; None for 0, which means never."""
    if not at_ms:
        return None
    moment = datetime.fromtimestamp(at_ms / 1000, UTC)
    return moment.isoformat(timespec="milliseconds").replace("+00:00", "Z")


def moment(at: datetime) -> str:
    """An aware time in ISO 8601, in UTC."""
    return timestamp(round(at.timestamp() * 1000)) or ""


def mark_record(mark: Mark) -> dict[str, Any]:
    """A mark's fields for JSON."""
    return {
        "project_id": mark.project_id,
        "pool_name": mark.pool_id,
        "name": mark.display_name,
        "policy": mark.policy,
        "marked_at": moment(mark.marked_at),
        "due_at": moment(mark.due_at),
        "reason": mark.reason,
    }


def run_record(run: Run) -> dict[str, Any]:
    """A run's fields for JSON."""
    return {
        "run_id": run.run_id,
        "source": run.source,
        "policy": run.policy or None,
        "client": run.client or None,
        "selector": json.loads(run.selector) if run.selector else None,
        "projects": list(run.projects),
        "requester": run.requester,
        "reason": run.reason,
        "endpoint": run.endpoint,
        "state": run.state,
        "verify": run.verify,
        "total": run.total,
        "done": run.done,
        "counts": {state: count for state, count in run.counts.items() if count},
        "created_at": timestamp(run.created_ms),
        "planned_at": None if run.state is RunState.QUEUED else timestamp(run.planned_ms),
        "started_at": timestamp(run.started_ms),
        "finished_at": timestamp(run.finished_ms),
        "cancelled_at": timestamp(run.cancelled_ms),
        "braked_at": timestamp(run.braked_ms),
        "note": run.note,
    }


def job_record(job: Job) -> dict[str, Any]:
    """A job's fields for JSON."""
    return {
        "job_id": job.job_id,
        "project_id": job.project_id,
        "pool_name": job.pool_name,
        "name": job.display_name,
        "outcome": job.state,
        "reason": job.reason,
        "chosen": job.chosen,
        "pool_created_at": job.created or None,
        "nodes": job.nodes,
        "attempts": [
            {
                "at": timestamp(attempt.at_ms),
                "duration_ms": attempt.duration_ms,
                "status": attempt.status or None,
                "error_code": attempt.code or None,
                "request_id": attempt.request_id or None,
            }
            for attempt in job.attempts
        ],
        "due_at": timestamp(job.due_ms),
        "ended_at": timestamp(job.done_ms),
    }


async def write_json(run: Run, jobs: AsyncIterator[Job], out: TextIO) -> None:
    """One JSON object: the run, and its jobs under `jobs`; written job by job."""
    out.write('{"run": ' + json_text(run_record(run)) + ', "jobs": [')
    separator = "\n"
    async for job in jobs:
        out.write(separator + json_text(job_record(job)))
        separator = ",\n"
    out.write("\n]}\n")


def kept_record(pool: Kept) -> dict[str, Any]:
    """A kept pool's fields for lines of JSON and CSV."""
    return {
        "project_id": pool.project_id,
        "pool_name": pool.pool_name,
        "name": pool.display_name,
        "reason": pool.reason,
    }


async def write_json_lines(rows: AsyncIterator[dict[str, Any]], out: TextIO) -> None:
    """One JSON object on each line, written as they come."""
    async for row in rows:
        out.write(json_text(row) + "\n")


async def write_csv(jobs: AsyncIterator[Job], out: TextIO) -> None:
    """One line for each job (RFC 4180), the last attempt's answer in it.

    A value that a spreadsheet would take for a formula gets an apostrophe before it.
    """
    await write_csv_rows((job_row(job) async for job in jobs), COLUMNS, out)


async def write_csv_rows(
    rows: AsyncIterator[dict[str, Any]], columns: Sequence[str], out: TextIO
) -> None:
    """Rows as CSV (RFC 4180), harmless to a spreadsheet as with `write_csv`.

    Args:
        rows: the values by column; others are left out.
        columns: the columns, in order.
        out: where to.
    """
    writer = csv.DictWriter(out, columns, lineterminator="\r\n")
    writer.writeheader()
    async for row in rows:
        writer.writerow({column: _harmless(row.get(column)) for column in columns})


async def write_markdown(
    rows: AsyncIterator[dict[str, Any]], columns: Sequence[str], out: TextIO
) -> None:
    """Rows as a table of GitHub Flavored Markdown, written as they come.

    Args:
        rows: the values by column; others are left out.
        columns: the columns, in order.
        out: where to.
    """
    out.write(markdown.header(columns, frozenset({"attempts"})))
    async for row in rows:
        cells = (row.get(column) for column in columns)
        out.write(markdown.row("" if value is None else str(value) for value in cells))


def job_row(job: Job) -> dict[str, Any]:
    """A job's fields on one line: its attempts are a number, and the last one's answer is told."""
    record = job_record(job)
    last = record["attempts"][-1] if record["attempts"] else {}
    return record | last | {"attempts": len(record["attempts"])}


def run_row(run: Run) -> dict[str, Any]:
    """A run's fields on one line, each count a field of its own."""
    return run_record(run) | {str(state): run.counts.get(state, 0) for state in JobState}


def _harmless(value: Any) -> Any:
    if isinstance(value, str) and value.startswith(_FORMULA_START):
        return "'" + value
    return value
