"""A report in words, for people: titled tables of text, whichever way they are shown. Pure."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from worker.ledger import JobState

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from scheduler.review.report import DueMarks, Freed, Reason, Report

OUTCOMES: Final = tuple(JobState)
NOTHING: Final = "-"
NOT_KNOWN: Final = "not known"
"""Stands for the pool of a job whose record is damaged."""


@dataclass(frozen=True, slots=True)
class Section:
    """A table of texts as they came: whoever shows them escapes them.

    Attributes:
        title: in a few words.
        headers: of the columns.
        rows: the cells, as many in each row as there are headers.
        lead: how many of the first columns are short.
        numbers: headers of the columns that hold numbers.
        note: what is to be said below it; empty: nothing.
    """

    title: str
    headers: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    lead: int = 1
    numbers: frozenset[str] = frozenset()
    note: str = ""


def title_of(report: Report) -> str:
    """What a report is about, in a line."""
    if report.run_id is not None:
        return f"Run {report.run_id}"
    return f"Runs from {_minute(report.since or '')} to {_minute(report.made_at)}"


def sections(report: Report) -> tuple[Section, ...]:
    """The sections that have something in them, the summary first."""
    found = (
        _summary(report),
        _days(report),
        _failures(report),
        _reasons("Skipped, and why", "jobs", report.skipped),
        _reasons("Kept by the plans, and why", "pools", report.kept),
        _slowest(report),
        _marks(report.marks),
        _stopped(report),
    )
    return tuple(section for section in found if section and (section.rows or section.note))


def unread_runs(count: int) -> str:
    """What is said of runs that are left out; of none nothing."""
    if not count:
        return ""
    runs, them, their = ("run", "it", "its") if count == 1 else ("runs", "them", "their")
    return (
        f"{number(count)} {runs} cannot be read: a newer poolsweep made {them}, or {their} record "
        "is damaged."
    )


def number(count: int) -> str:
    """A number with its thousands apart."""
    return f"{count:,}"


def span(ms: int) -> str:
    """How long something took, in the unit that fits."""
    seconds = ms / 1000
    if seconds < 60:
        return f"{seconds:.1f} s"
    if seconds < 3_600:
        return f"{seconds / 60:.1f} min"
    return f"{seconds / 3_600:.1f} h"


def money(freed: Freed) -> str | None:
    """The money that is freed, a day; None: not known."""
    if freed.money_per_day is None:
        return None
    return f"{freed.money_per_day:,.2f} {freed.currency} a day"


def counts(by_name: Mapping[str, int]) -> str:
    """Counts by name, such as `3 deleted, 1 failed`."""
    return ", ".join(f"{number(count)} {name}" for name, count in by_name.items()) or NOTHING


def _minute(timestamp: str | None) -> str:
    """A record's time to the minute."""
    return f"{timestamp[:10]} {timestamp[11:16]}Z" if timestamp else NOTHING


def _summary(report: Report) -> Section:
    freed = report.freed
    nodes = ", ".join(f"{number(count)} x {name}" for name, count in freed.nodes.items())
    rows = [
        ("runs", f"{number(report.runs)}: {counts(report.runs_by_state)}"),
        ("jobs", f"{number(report.jobs)}: {counts(report.outcomes)}"),
        ("pools freed", number(freed.pools)),
    ]
    # Of pools whose nodes are not recorded nothing is said rather than 0.
    if nodes or not freed.unsized:
        rows.append(("nodes freed", nodes or NOTHING))
        rows.append(("node-hours a day", number(freed.node_hours_per_day)))
        if (text := money(freed)) is not None:
            rows.append(("money", text))
    notes = []
    if freed.unsized:
        notes.append(f"The nodes of {number(freed.unsized)} of the freed pools are not recorded.")
    if freed.unpriced:
        notes.append(f"Not in the money, for want of a price: {', '.join(freed.unpriced)}.")
    if report.runs_unread:
        notes.append(unread_runs(report.runs_unread))
    return Section("Summary", ("what", "how much"), tuple(rows), note=" ".join(notes))


def _days(report: Report) -> Section:
    told = [str(state) for state in OUTCOMES if report.outcomes.get(state)]
    headers = ("day", "runs", *told)
    rows = tuple(
        (day.day, number(day.runs), *(number(day.outcomes.get(name, 0)) for name in told))
        for day in report.days
        if day.runs
    )
    return Section(
        "Jobs by the day of their run, in UTC",
        headers,
        rows,
        lead=len(headers),
        numbers=frozenset(headers[1:]),
    )


def _failures(report: Report) -> Section:
    rows = []
    for group in report.failures:
        status = f"HTTP {group.status}" if group.status else ""
        example = group.example
        name = f" ({example.name})" if example.name else ""
        request = f", request {example.request_id}" if example.request_id else ""
        rows.append(
            (
                number(group.count),
                " ".join(filter(None, (status, group.error_code))) or NOTHING,
                group.what_to_do,
                f"{example.pool_name or NOT_KNOWN}{name}",
                f"{example.reason}; job {example.job_id}{request}",
            )
        )
    return Section(
        "Failed, by error",
        ("jobs", "error", "what to do", "for example", "its reason"),
        tuple(rows),
        lead=1,
        numbers=frozenset({"jobs"}),
        note="To try the failed jobs of a run again: poolsweep retry RUN" if rows else "",
    )


def _reasons(title: str, what: str, reasons: Iterable[Reason]) -> Section:
    rows = tuple((number(reason.count), reason.reason) for reason in reasons)
    return Section(title, (what, "reason"), rows, numbers=frozenset({what}))


def _slowest(report: Report) -> Section:
    rows = tuple(
        (
            span(job.took_ms),
            number(job.attempts),
            job.outcome,
            f"{job.pool_name} ({job.name})" if job.name else job.pool_name,
            job.job_id,
        )
        for job in report.slowest
    )
    return Section(
        "Slowest, from the first call to the end",
        ("took", "calls", "outcome", "pool", "job"),
        rows,
        lead=3,
        numbers=frozenset({"took", "calls"}),
    )


def _marks(marks: DueMarks | None) -> Section | None:
    if marks is None:
        return None
    rows = tuple(
        (
            _minute(mark["due_at"]),
            f"{mark['pool_name']} ({mark['name']})" if mark["name"] else mark["pool_name"],
            mark["project_id"],
            mark["policy"],
            mark["reason"],
        )
        for mark in marks.first
    )
    if not marks.due + marks.waiting:
        return None
    said = f"{number(marks.due)} due, {number(marks.waiting)} not due yet."
    return Section(
        "Marked, and due for deletion by the next sweep",
        ("due", "pool", "project", "policy", "reason"),
        rows,
        note=f"{said} To keep a pool: poolsweep keep POOL --project PROJECT",
    )


def _stopped(report: Report) -> Section:
    rows = tuple(
        (_minute(run.created_at), run.state, run.run_id, run.policy or NOTHING, run.note)
        for run in report.stopped
    )
    untold = report.stopped_runs - len(rows)
    return Section(
        "Runs that were braked or aborted",
        ("made", "state", "run", "policy", "why"),
        rows,
        lead=2,
        note=f"… and {number(untold)} before these." if untold else "",
    )
