"""The kill switch stops every worker; what waits goes on then, or is cancelled; none is lost."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from tests.cli.conftest import one_sentence
from tests.sweep.conftest import (
    REFUSED,
    Operator,
    Sandbox,
    eventually,
    monotonic,
    serving,
    settings_for,
    working,
)
from worker.ledger import JobState

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

POOLS = 200
WITHIN_S = 2.0
LATENCY_MS = 150
FITTING = {"allow_busy": True, "brakes": {"max_deletions": 1_000, "max_percent": 100}}


@pytest.fixture(scope="module")
def slow() -> Iterator[Sandbox]:
    """A cloud that takes its time to answer."""
    with serving(faults={"latency_ms": LATENCY_MS}) as running:
        yield running


@pytest.fixture(scope="module")
def eve(tmp_path_factory: pytest.TempPathFactory, slow: Sandbox, broker: str) -> Iterator[Operator]:
    """Somebody with two workers."""
    home: Path = tmp_path_factory.mktemp("eve")
    # Such that the jobs of a run are all leased at once.
    leases = {"BATCH_SIZE": "40", "WORKER_BATCHES": "8"}
    pace = {"RATE_LIMIT": "25", "PRECONDITION_MAX_AGE_S": "15"}
    settings = settings_for(slow, broker) | leases | pace
    user = Operator(home, settings, policies=home / "policies.yaml")
    with working(user, slow.url), working(user, slow.url):
        yield user


def unlimited(eve: Operator, *arguments: str) -> str:
    """What a command says that reads as fast as it can."""
    ended = eve.run(*arguments, RATE_LIMIT="0")
    assert ended.code == 0, ended.out + ended.err
    return ended.out


def test_a_pause_stops_all_workers_within_two_seconds_and_a_resume_loses_nothing(
    eve: Operator, slow: Sandbox
) -> None:
    lab, plant = slow.project(), slow.project()
    pools, others = lab.add(POOLS), plant.add(3)
    path = eve.writes(
        {"lab": lab, "plant": plant},
        lab={**FITTING, "projects": ["lab"]},
        plant={**FITTING, "projects": ["plant"]},
    )
    sweep = ("sweep", path, "--yes", "--detach", "--only")
    slow.latency(0)
    run_id = unlimited(eve, *sweep, "lab").splitlines()[-1]
    slow.latency(LATENCY_MS)
    eventually(lambda: len(lab.deletes()) >= 10)
    said = unlimited(eve, "pause", "--reason", "a wrong policy")
    paused = monotonic()
    assert "Everything is paused by " in said
    assert said.splitlines()[-1] in unlimited(eve, "runs")
    assert "a wrong policy" in said
    assert len(lab.deletes()) < POOLS, "it is paused midway"
    waiting_id = unlimited(eve, *sweep, "plant").splitlines()[-1]
    eventually(lambda: monotonic() > paused + WITHIN_S)

    def all_wait() -> bool:
        counts = eve.runs()[run_id].counts
        return not counts[JobState.LEASED] and counts[JobState.PENDING] > 0

    eventually(all_wait)
    waits = [job for job in eve.jobs(run_id).values() if job.state is JobState.PENDING]
    assert any("waits: everything is paused by" in job.reason for job in waits)
    # What was called before goes on to its end meanwhile.
    eventually(lambda: eve.runs()[run_id].counts[JobState.ACCEPTED] == 0)
    assert [at for at, _ in lab.calls("DELETE") if at > paused + WITHIN_S] == []
    assert plant.written() == set()
    assert not eve.runs()[run_id].ended, "the run waits"

    cancelled = unlimited(eve, "cancel", waiting_id)
    assert f"Run {waiting_id} is cancelled" in cancelled
    assert eve.ended(waiting_id).counts[JobState.CANCELLED] == len(others)
    assert unlimited(eve, "resume") == "Nothing is paused.\n"
    run = eve.ended(run_id)
    assert run.counts[JobState.DELETED] == run.total == POOLS
    assert sorted(lab.deletes()) == sorted(pools), "each was called once"
    assert plant.written() == set(), "what was cancelled while paused is never called"


def test_a_cancelled_run_calls_nothing_more_although_its_workers_hold_its_jobs(
    eve: Operator, slow: Sandbox
) -> None:
    lab = slow.project()
    lab.add(300)
    slow.latency(0)
    path = eve.writes({"lab": lab}, expired=FITTING)
    run_id = unlimited(eve, "sweep", path, "--yes", "--detach").splitlines()[-1]
    eventually(lambda: len(lab.deletes()) >= 10)
    unlimited(eve, "cancel", run_id)
    cancelled = monotonic()
    run = eve.ended(run_id)
    assert run.counts[JobState.CANCELLED] > 0
    assert run.counts[JobState.CANCELLED] + run.counts[JobState.DELETED] == run.total
    assert [at for at, _ in lab.calls("DELETE") if at > cancelled + WITHIN_S] == []
    called = set(lab.deletes())
    states = {name: job.state for name, job in eve.jobs(run_id).items()}
    assert {name for name, state in states.items() if state is JobState.DELETED} == called
    again = eve.run("cancel", run_id)
    assert again.code == REFUSED
    assert f"{run_id} is finished; accepted: a run that is running" in one_sentence(again)


def test_what_cannot_be_paused_or_cancelled_is_told(eve: Operator) -> None:
    scope, unknown, idle = eve.together(
        ("pause", "--project", "no/project"),
        ("cancel", "20260101-000000-0123456789"),
        ("resume",),
    )
    assert "no/project" in one_sentence(scope)
    assert "20260101-000000-0123456789" in one_sentence(unknown)
    assert scope.code == unknown.code == REFUSED
    assert (idle.code, idle.lines) == (0, ["It was not paused.", "Nothing is paused."])
