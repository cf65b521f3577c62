"""`poolsweep results` and `poolsweep runs`: what happened, for people and for programs."""

from __future__ import annotations

import asyncio
import csv
import io
import json
import re
import subprocess
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from functools import partial
from typing import TYPE_CHECKING, Any

import pytest
import typer
from redis.asyncio import Redis

from scheduler.cli.errors import UsageError
from scheduler.cli.results import results
from tests.cli.conftest import CONTROL, ESCAPE, POOLSWEEP, Ended, User, one_sentence
from worker import embedded_redis
from worker.ledger import (
    Attempt,
    JobState,
    Kept,
    Ledger,
    Move,
    NewJob,
    NewRun,
    Source,
    keys,
    new_run_id,
)

if TYPE_CHECKING:
    from collections.abc import Iterator

ENDPOINT = "https://modelarts.example.com"
PROJECT = "0123456789abcdef0123456789abcdef"
LONGEST = "a-pool-with-the-longest-name-that-there-is-" + "0123456789abcdef0123"
NO_CALL, FIRST, SECOND = (
    Attempt(1_767_225_600_123, 250, 0, "timeout", ""),
    Attempt(1_767_225_601_456, 31, 503, "ModelArts.50000002", "request-1"),
    Attempt(1_767_225_602_789, 12, 200, "", "request-2"),
)
AWKWARD = 'HTTP 400: the cloud refused (it said "no, never", in ümlauts and [brackets])'
TIMESTAMP = r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z"
CLOSED = 3_000


def pool(number: int) -> str:
    return f"train-atlas-{number:02}-{number:032x}"


async def _make(url: str) -> tuple[str, str]:
    """A run with a job in every state that a worker can leave one in, and a long one."""
    async with Redis.from_url(url, decode_responses=True) as redis:
        ledger = Ledger(redis)
        run_id = new_run_id(datetime.now(UTC))
        await ledger.create(NewRun(run_id, Source.CLI, ENDPOINT, "alice", "no longer needed"))
        await ledger.keep(run_id, [Kept(PROJECT, pool(50), "=1+1", "protected: by a|tag")])
        jobs = [NewJob(PROJECT, pool(n), f"Pool {n}", chosen="asked for by name") for n in range(7)]
        jobs[0] = NewJob(PROJECT, LONGEST, "Größter", "2026-01-01T00:00:00Z", "f", "expired")
        jobs[3] = NewJob(PROJECT, pool(3), "=HYPERLINK(1)", chosen="asked for by name")
        await ledger.add(run_id, jobs)
        await ledger.start(run_id, len(jobs))
        await ledger.claim(run_id, range(6), owner="me", lease_s=600)

        def move(number: int, to: JobState, reason: str, attempt: Attempt | None = None) -> Move:
            return Move(number, JobState.LEASED, to, "me", attempt, reason)

        moves = [
            move(0, JobState.LEASED, "no answer in time", NO_CALL),
            move(0, JobState.LEASED, "HTTP 503: the cloud has a fault", FIRST),
            move(0, JobState.ACCEPTED, "the cloud accepted the deletion", SECOND),
            move(1, JobState.ALREADY_DELETED, "the cloud says: pool not found"),
            move(2, JobState.SKIPPED, "changed since it was chosen: its tags"),
            move(3, JobState.FAILED, AWKWARD, FIRST),
            move(4, JobState.ACCEPTED, "the cloud accepted the deletion", SECOND),
        ]
        assert await ledger.record(run_id, moves) == [True] * len(moves)
        gone = Move(0, JobState.ACCEPTED, JobState.DELETED, reason="the pool is gone")
        assert await ledger.record(run_id, [gone]) == [True]

        long_id = new_run_id(datetime.now(UTC))
        await ledger.create(NewRun(long_id, Source.SCHEDULE, ENDPOINT))
        await ledger.add(long_id, (NewJob(PROJECT, pool(n)) for n in range(CLOSED)))
        await ledger.start(long_id, CLOSED)
        await ledger.cancel(long_id)
        return run_id, long_id


@pytest.fixture(scope="module")
def alice(tmp_path_factory: pytest.TempPathFactory) -> Iterator[User]:
    user = User(tmp_path_factory.mktemp("state"))
    with embedded_redis.join(user.state_dir):
        yield user


@pytest.fixture(scope="module")
def run_ids(alice: User) -> tuple[str, str]:
    return asyncio.run(_make(embedded_redis.url(alice.state_dir)))


@pytest.fixture(scope="module")
def run_id(run_ids: tuple[str, str]) -> str:
    return run_ids[0]


@pytest.fixture(scope="module")
def told(alice: User, run_ids: tuple[str, str]) -> dict[str, Ended]:
    """What the commands tell; side by side, since each is mostly a program that loads."""
    run_id, _ = run_ids
    commands = {
        "json": partial(alice.run, "results", run_id, "--json"),
        "jsonl": partial(alice.run, "results", run_id, "--jsonl"),
        "csv": partial(alice.run, "results", run_id, "--csv"),
        "markdown": partial(alice.run, "results", run_id, "--markdown"),
        "kept": partial(alice.run, "results", run_id, "--kept"),
        "kept jsonl": partial(alice.run, "results", run_id, "--kept", "--jsonl"),
        "kept csv": partial(alice.run, "results", run_id, "--kept", "--csv"),
        "kept markdown": partial(alice.run, "results", run_id, "--kept", "--markdown"),
        "table": partial(alice.run, "results", run_id),
        "failed": partial(alice.run, "results", run_id, "--outcome", "failed"),
        "cancelled": partial(alice.run, "results", run_id, "--outcome", "cancelled"),
        "runs json": partial(alice.run, "runs", "--json"),
        "last run": partial(alice.run, "runs", "--limit", "1"),
        "table of 80": partial(alice.run_on_terminal, "results", run_id, columns=80),
        "runs of 80": partial(alice.run_on_terminal, "runs", columns=80),
    }
    with ThreadPoolExecutor(3) as threads:
        ended = dict(zip(commands, threads.map(lambda run: run(), commands.values()), strict=True))
    assert {name: each.code for name, each in ended.items()} == dict.fromkeys(commands, 0)
    return ended


@pytest.fixture(scope="module")
def document(told: dict[str, Ended]) -> dict[str, Any]:
    """The run as JSON."""
    document: dict[str, Any] = json.loads(told["json"].out)
    return document


def timed(record: dict[str, Any], *names: str) -> dict[str, Any]:
    """The record with the times that the server's clock gave it checked and replaced."""
    for name in names:
        assert re.fullmatch(TIMESTAMP, record[name]), (name, record[name])
    return record | dict.fromkeys(names, "TIME")


def test_a_run_and_its_jobs_are_one_json_object(document: dict[str, Any], run_id: str) -> None:
    assert set(document) == {"run", "jobs"}
    assert timed(document["run"], "created_at", "planned_at", "started_at") == {
        "run_id": run_id,
        "source": "cli",
        "requester": "alice",
        "reason": "no longer needed",
        "endpoint": ENDPOINT,
        "state": "running",
        "verify": True,
        "total": 7,
        "done": 4,
        "counts": {
            "pending": 1,
            "leased": 1,
            "accepted": 1,
            "deleted": 1,
            "already_deleted": 1,
            "skipped": 1,
            "failed": 1,
        },
        "created_at": "TIME",
        "planned_at": "TIME",
        "started_at": "TIME",
        "finished_at": None,
        "cancelled_at": None,
        "braked_at": None,
        "policy": None,
        "client": None,
        "selector": None,
        "projects": [],
        "note": "",
    }
    assert [job["outcome"] for job in document["jobs"]] == [
        "deleted",
        "already_deleted",
        "skipped",
        "failed",
        "accepted",
        "leased",
        "pending",
    ]
    assert timed(document["jobs"][0], "ended_at") == {
        "job_id": f"{run_id}/0",
        "project_id": PROJECT,
        "pool_name": LONGEST,
        "name": "Größter",
        "outcome": "deleted",
        "reason": "the pool is gone",
        "chosen": "expired",
        "pool_created_at": "2026-01-01T00:00:00Z",
        "nodes": None,
        "attempts": [
            {
                "at": "2026-01-01T00:00:00.123Z",
                "duration_ms": 250,
                "status": None,
                "error_code": "timeout",
                "request_id": None,
            },
            {
                "at": "2026-01-01T00:00:01.456Z",
                "duration_ms": 31,
                "status": 503,
                "error_code": "ModelArts.50000002",
                "request_id": "request-1",
            },
            {
                "at": "2026-01-01T00:00:02.789Z",
                "duration_ms": 12,
                "status": 200,
                "error_code": None,
                "request_id": "request-2",
            },
        ],
        "due_at": None,
        "ended_at": "TIME",
    }
    assert document["jobs"][6]["ended_at"] is None


def test_the_jobs_are_lines_of_csv(told: dict[str, Ended], run_id: str) -> None:
    rows = list(csv.DictReader(io.StringIO(told["csv"].out, newline="")))
    assert [row["outcome"] for row in rows] == [
        "deleted",
        "already_deleted",
        "skipped",
        "failed",
        "accepted",
        "leased",
        "pending",
    ]
    assert timed(rows[0], "ended_at") == {
        "job_id": f"{run_id}/0",
        "project_id": PROJECT,
        "pool_name": LONGEST,
        "name": "Größter",
        "outcome": "deleted",
        "reason": "the pool is gone",
        "chosen": "expired",
        "attempts": "3",
        "status": "200",
        "error_code": "",
        "request_id": "request-2",
        "ended_at": "TIME",
    }
    assert rows[3]["reason"] == AWKWARD
    assert rows[3]["name"] == "'=HYPERLINK(1)", "a spreadsheet would run it"
    assert rows[6]["attempts"] == "0"


def test_the_jobs_are_lines_of_json(told: dict[str, Ended], document: dict[str, Any]) -> None:
    assert [json.loads(line) for line in told["jsonl"].lines] == document["jobs"]


def test_the_jobs_are_a_table_of_markdown(told: dict[str, Ended]) -> None:
    lines = told["markdown"].lines
    assert lines[0] == "| outcome | pool\\_name | name | attempts | reason |"
    assert lines[1] == "| --- | --- | --- | --: | --- |"
    assert lines[2] == f"| deleted | {LONGEST} | Größter | 3 | the pool is gone |"
    assert lines[8] == f"| pending | {pool(6)} | Pool 6 | 0 |  |"
    assert len(lines) == 9


def test_the_kept_pools_are_told_in_every_form(told: dict[str, Ended]) -> None:
    assert "protected: by a|tag" in told["kept"].out
    (line,) = told["kept jsonl"].lines
    record = {
        "project_id": PROJECT,
        "pool_name": pool(50),
        "name": "=1+1",
        "reason": "protected: by a|tag",
    }
    assert json.loads(line) == record
    (row,) = csv.DictReader(io.StringIO(told["kept csv"].out, newline=""))
    assert row == record | {"name": "'=1+1"}
    assert told["kept markdown"].lines[2:] == [
        f"| {PROJECT} | {pool(50)} | =1+1 | protected: by a\\|tag |"
    ]


@pytest.mark.parametrize(
    "flags", [("--json", "--jsonl"), ("--csv", "--markdown"), ("--kept", "--outcome", "failed")]
)
def test_only_one_form_is_accepted(flags: tuple[str, ...]) -> None:
    holder = typer.Typer()
    holder.command()(results)
    with pytest.raises(UsageError, match="only one of them is accepted"):
        typer.main.get_command(holder)(("a-run", *flags), standalone_mode=False)


def test_only_failures_are_shown_when_asked_for(told: dict[str, Ended]) -> None:
    lines = told["failed"].lines
    (line,) = [line for line in lines if "train-atlas" in line or LONGEST in line]
    assert pool(3) in line
    assert AWKWARD in line
    assert any(re.search(r"total\W+7\W", line) for line in lines), "the counts are the whole run's"
    assert told["cancelled"].lines[-1] == "No jobs that are cancelled."


def test_a_piped_table_has_a_line_for_each_job_with_nothing_cut_or_broken(
    told: dict[str, Ended], document: dict[str, Any]
) -> None:
    assert not CONTROL.search(told["table"].out)
    for job in document["jobs"]:
        (line,) = [line for line in told["table"].lines if job["pool_name"] in line]
        assert job["outcome"] in line
        assert job["reason"] in line
        assert f" {len(job['attempts'])} " in line


def test_a_terminal_of_80_columns_shows_every_id_whole(
    told: dict[str, Ended], document: dict[str, Any], run_id: str
) -> None:
    lines = ESCAPE.sub("", told["table of 80"].out).splitlines()
    assert max(map(len, lines)) <= 80
    for job in document["jobs"]:
        assert sum(job["pool_name"] in line for line in lines) == 1
    assert AWKWARD in " ".join(" ".join(lines).split())
    listed = ESCAPE.sub("", told["runs of 80"].out).splitlines()
    assert max(map(len, listed)) <= 80
    assert sum(run_id in line for line in listed) == 1


def test_the_runs_are_listed_newest_first(
    told: dict[str, Ended], run_ids: tuple[str, str], document: dict[str, Any]
) -> None:
    run_id, long_id = run_ids
    found = json.loads(told["runs json"].out)
    assert [run["run_id"] for run in found] == [long_id, run_id]
    assert found[1] == document["run"]
    assert found[0]["state"] == "finished"
    assert found[0]["counts"] == {"cancelled": CLOSED}
    (line,) = [line for line in told["last run"].lines if long_id in line]
    for words in ("finished", "schedule", ENDPOINT, f" {CLOSED} ", " 0 "):
        assert words in line
    assert run_id not in told["last run"].out


@pytest.mark.parametrize("form", [[], ["--json"]])
def test_a_reader_that_goes_away_is_no_trouble(
    form: list[str], alice: User, run_ids: tuple[str, str]
) -> None:
    with subprocess.Popen(
        [POOLSWEEP, "results", run_ids[1], *form],
        env=alice.environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as command:
        assert command.stdout
        assert command.stderr
        assert command.stdout.readline()
        command.stdout.close()
        told = command.stderr.read()
    assert command.returncode == 141, told
    assert told.count("\n") == 1, told
    assert "the embedded Redis in" in told


def test_there_may_be_no_runs(user: User) -> None:
    ended = user.run("runs")
    assert (ended.code, ended.out) == (0, "No runs yet.\n")
    assert ended.err == f"Started the embedded Redis in {user.state_dir}\n"
    assert user.processes() == []


def test_runs_that_cannot_be_read_are_left_out_and_counted(user: User) -> None:
    async def make(redis: Redis) -> list[str]:
        ledger, made = Ledger(redis), []
        for _ in range(3):
            made.append(new_run_id(datetime.now(UTC)))
            await ledger.create(NewRun(made[-1], Source.CLI, "https://modelarts.example.com"))
        await redis.hset(keys.run(made[0]), "schema", 99)
        return made

    newer, old, other = user.ask(make)
    told = "1 run cannot be read: a newer poolsweep made it, or its record is damaged.\n"
    ended = user.run("runs")
    assert (ended.code, newer in ended.out) == (0, False)
    assert old in ended.out
    assert ended.err.endswith(told)
    ended = user.run("runs", "--json")
    assert {run["run_id"] for run in json.loads(ended.out)} == {old, other}
    assert ended.err.endswith(told)
    ended = user.run("report", "--since", "1d", "--jsonl")
    assert (ended.code, len(ended.lines)) == (0, 2)
    assert ended.err.endswith(told)
    assert told.strip() in user.run("report", "--since", "1d").out
    for command in ("results", "watch", "retry", "cancel", "report"):
        ended = user.run(command, newer)
        assert ended.code == 2
        assert "written by a newer poolsweep" in one_sentence(ended)

    async def all_newer(redis: Redis) -> None:
        for run_id in (old, other):
            await redis.hset(keys.run(run_id), "schema", 99)

    user.ask(all_newer)
    ended = user.run("runs")
    assert (ended.code, ended.out) == (0, "")
    assert ended.err.endswith(
        "3 runs cannot be read: a newer poolsweep made them, or their record is damaged.\n"
    )
