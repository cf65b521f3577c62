"""What a command says by its exit code."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from redis.exceptions import ConnectionError as RedisConnectionError
from redis.exceptions import RedisError

from scheduler.cli.errors import UnreachableError, UsageError
from scheduler.cli.outcome import (
    EXIT_DONE,
    EXIT_FAILURES,
    EXIT_HELD,
    EXIT_UNREACHABLE,
    EXIT_USAGE,
    exit_code,
)
from scheduler.cli.trouble import code_of
from worker.ledger import JobState, Run, RunNotFoundError, RunState
from worker.modelarts import Answer, ApiError, AuthError, Body, Failure, classify


def run(state: RunState = RunState.FINISHED, *, policy: str = "", **counts: int) -> Run:
    fields: dict[str, Any] = {f"jobs:{outcome}": str(count) for outcome, count in counts.items()}
    fields |= {"source": "cli", "endpoint": "x", "verify": "1", "state": state, "policy": policy}
    total = str(sum(counts.values()))
    return Run.parse("r", fields | {"total": total, "created_ms": "1", "braked_ms": "0"})


@pytest.mark.parametrize(
    ("ended", "code"),
    [
        (run(deleted=3, already_deleted=2), EXIT_DONE),
        (run(accepted=3), EXIT_DONE),
        (run(), EXIT_DONE),
        (run(RunState.PLANNED, pending=3), EXIT_HELD),
        (run(RunState.PLANNED), EXIT_HELD),
        (run(deleted=3, failed=1), EXIT_FAILURES),
        (run(failed=1, skipped=1), EXIT_FAILURES),
        (run(failed=1, cancelled=1), EXIT_FAILURES),
        (run(RunState.BRAKED), EXIT_HELD),
        (run(RunState.ABORTED), EXIT_HELD),
        (run(deleted=3, cancelled=1), EXIT_HELD),
        (run(deleted=3, skipped=1), EXIT_HELD),
        (run(deleted=3, skipped=1, policy="nightly"), EXIT_DONE),
    ],
)
def test_the_code_tells_how_a_run_ended(ended: Run, code: int) -> None:
    assert exit_code(ended) == code


def test_a_brake_that_stopped_a_run_is_told_before_the_failures_that_it_was_for() -> None:
    fields = {"source": "cli", "endpoint": "x", "verify": "1", "state": "finished", "total": "9"}
    braked = fields | {"created_ms": "1", "braked_ms": "2", "jobs:failed": "5"}
    assert exit_code(Run.parse("r", braked)) == EXIT_HELD


outcomes = st.sampled_from([each for each in JobState if each not in {"pending", "leased"}])


@given(st.dictionaries(outcomes, st.integers(0, 3)), st.booleans())
def test_a_refusal_changes_only_what_would_have_been_all_well(
    counts: dict[JobState, int], refused: bool
) -> None:
    named: dict[str, Any] = {str(outcome): count for outcome, count in counts.items()}
    ended = run(**named)
    code = exit_code(ended)
    assert exit_code(ended, refused=refused) == (EXIT_HELD if refused and not code else code)
    gone = {JobState.DELETED, JobState.ALREADY_DELETED, JobState.ACCEPTED}
    assert (code == EXIT_DONE) == all(not counts[each] for each in counts.keys() - gone)


def api_error(**answer: Any) -> ApiError:
    given = Answer(method="GET", **answer)
    return ApiError("listing the pools", given, classify(given))


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (api_error(status=None, failure=Failure.CONNECT), EXIT_UNREACHABLE),
        (api_error(status=None, failure=Failure.TIMEOUT), EXIT_UNREACHABLE),
        (api_error(status=503, body=Body.HTML), EXIT_UNREACHABLE),
        (api_error(status=429, body=Body.OBJECT), EXIT_UNREACHABLE),
        (api_error(status=403, body=Body.OBJECT), EXIT_USAGE),
        (api_error(status=404, body=Body.HTML), EXIT_USAGE),
        (api_error(status=401, body=Body.OBJECT), EXIT_USAGE),
        (AuthError("x", temporary=True), EXIT_UNREACHABLE),
        (AuthError("x", temporary=False), EXIT_USAGE),
        (RedisConnectionError("x"), EXIT_UNREACHABLE),
        (RedisError("x"), EXIT_UNREACHABLE),
        (UnreachableError("x"), EXIT_UNREACHABLE),
        (UsageError("x"), EXIT_USAGE),
        (RunNotFoundError("x"), EXIT_USAGE),
    ],
)
def test_what_does_not_answer_is_told_from_what_refuses(error: Exception, code: int) -> None:
    assert code_of(error) == code
