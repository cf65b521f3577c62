"""Whether a plan still holds for a pool just before its deletion."""

from __future__ import annotations

import copy
import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.modelarts.pool_documents import (
    BILLING,
    EXAMPLE,
    FULL,
    SUBPOOLS,
    TAGS,
    json_values,
    mutations,
    with_value,
)
from worker.deletion import ABSENT, judge
from worker.ledger import Job, JobState, NewJob
from worker.modelarts import Pool, Precondition

patient = settings(deadline=None)


def planned(raw: Any) -> Job:
    """A job as a plan over this document makes it."""
    pool = Pool.parse(raw)
    was = Precondition.of(pool)
    return job(pool.pool_id, was.created, was.fingerprint)


def job(pool_name: str, created: str, fingerprint: str) -> Job:
    new = NewJob("project", pool_name, created=created, fingerprint=fingerprint)
    return Job.parse("run", 0, new.record())


def judged(before: Any, after: Any) -> JobState | None:
    """What becomes of a pool that was planned as it was before; None: it is deleted."""
    end = judge(planned(before), Pool.parse(after))
    if end is None:
        return None
    state, reason = end
    assert reason
    assert reason.splitlines() == [reason]
    return state


def with_annotation(key: str, value: Any) -> Any:
    raw = copy.deepcopy(EXAMPLE)
    raw["metadata"]["annotations"][key] = value
    return raw


def test_a_pool_that_is_as_it_was_is_deleted() -> None:
    assert judged(EXAMPLE, EXAMPLE) is None
    assert judged(FULL, FULL) is None


def test_what_a_plan_does_not_look_at_may_change() -> None:
    after = copy.deepcopy(EXAMPLE)
    after["status"]["phase"] = "Abnormal"
    after["status"]["message"] = "a node is down"
    after["status"]["resources"] = {}
    after["new"] = "field"
    assert judged(EXAMPLE, after) is None


def test_a_pool_that_is_gone_is_deleted_already() -> None:
    assert judge(planned(EXAMPLE), None) == (
        JobState.ALREADY_DELETED,
        "the pool is gone: reading it answers pool not found",
    )
    assert judge(job("pool", "", ABSENT), None) is not None


def test_a_pool_that_was_not_there_when_it_was_asked_for_is_not_deleted() -> None:
    assert judge(job("pool", "", ABSENT), Pool.parse(EXAMPLE)) == (
        JobState.SKIPPED,
        "changed since it was chosen: it was not there then",
    )


@pytest.mark.parametrize("fingerprint", ["", "0", "of another make"])
def test_a_job_without_a_precondition_of_our_make_deletes_nothing(fingerprint: str) -> None:
    pool = Pool.parse(EXAMPLE)
    end = judge(job(pool.pool_id, pool.created, fingerprint), pool)
    assert end is not None
    assert end[0] is JobState.SKIPPED


@pytest.mark.parametrize(
    ("path", "value", "change"),
    [
        ("metadata.creationTimestamp", "2023-01-01T00:00:00Z", "another incarnation"),
        ("metadata.creationTimestamp", None, "another incarnation"),
        ("metadata.labels", {"os.modelarts/name": "renamed"}, "labels changed"),
        ("metadata.labels", None, "labels changed"),
        ("metadata.annotations", {}, "annotations changed"),
        ("metadata.annotations", {BILLING: "1"}, "annotations changed"),
        ("metadata.annotations", ["unreadable"], "annotations changed"),
        ("spec.controlMode", 8, "control mode changed"),
        ("spec.controlMode", True, "control mode changed"),
        ("spec.resources", [{"tags": [{"key": "keep", "value": "yes"}]}], "tags changed"),
        ("spec", None, "control mode changed"),
    ],
)
def test_a_pool_that_changed_is_skipped_with_what_changed(
    path: str, value: Any, change: str
) -> None:
    end = judge(planned(EXAMPLE), Pool.parse(with_value(path, value)))
    assert end is not None
    assert end[0] is JobState.SKIPPED
    assert end[1].startswith("changed since it was chosen: ")
    assert change in end[1]


def test_a_protection_added_since_is_obeyed_and_named() -> None:
    text = json.dumps([{"key": "poolsweep/protect", "value": "true"}])
    end = judge(planned(EXAMPLE), Pool.parse(with_annotation(TAGS, text)))
    assert end is not None
    assert end[0] is JobState.SKIPPED
    assert "poolsweep/protect" in end[1]


def test_a_pool_that_is_being_deleted_already_is_accepted_without_a_call() -> None:
    assert judged(EXAMPLE, with_value("status.phase", "Deleting")) is JobState.ACCEPTED


def test_a_pool_that_changed_and_is_being_deleted_is_no_success_of_ours() -> None:
    after = with_value("status.phase", "Deleting")
    after["metadata"]["labels"] = {}
    assert judged(EXAMPLE, after) is JobState.SKIPPED


@pytest.mark.parametrize("count", ["1", "2", "17"])
def test_a_pool_waits_for_its_subpools(count: str) -> None:
    end = judge(planned(EXAMPLE), Pool.parse(with_annotation(SUBPOOLS, count)))
    assert end == (JobState.PENDING, f"waits until its {count} logical sub-pools are gone")


def test_a_pool_goes_when_its_subpools_are_gone() -> None:
    assert judged(with_annotation(SUBPOOLS, "2"), with_annotation(SUBPOOLS, "0")) is None
    assert judged(with_annotation(SUBPOOLS, "2"), EXAMPLE) is None


@pytest.mark.parametrize(
    "count",
    [None, "", "many", "-1", 0, 1, True, [], pytest.param("9" * 5_000, id="too many")],
    ids=str,
)
def test_a_pool_whose_number_of_subpools_cannot_be_read_any_more_is_not_deleted(count: Any) -> None:
    assert judged(EXAMPLE, with_annotation(SUBPOOLS, count)) is not None


@patient
@given(mutations(), mutations())
def test_only_what_a_plan_saw_is_deleted(before: dict[str, Any], after: dict[str, Any]) -> None:
    was, now = Pool.parse(before), Pool.parse(after)
    state = judged(before, after)
    if Precondition.of(was) != Precondition.of(now):
        assert state is JobState.SKIPPED
    elif now.phase == "Deleting":
        assert state is JobState.ACCEPTED
    elif now.subpool_count:
        assert state is JobState.PENDING
    elif now.subpool_count == 0:
        assert state is None
    else:
        assert state is not None


@patient
@given(json_values())
def test_any_other_number_of_subpools_than_0_keeps_the_pool_for_now(count: Any) -> None:
    kept = judged(EXAMPLE, with_annotation(SUBPOOLS, count)) is not None
    assert kept == (Pool.parse(with_annotation(SUBPOOLS, count)).subpool_count != 0)


@patient
@given(st.text(), mutations())
def test_whatever_stands_in_a_record_is_judged(fingerprint: str, raw: dict[str, Any]) -> None:
    pool = Pool.parse(raw)
    fulfilled = Precondition.of(pool).fingerprint == fingerprint
    assert judge(job(pool.pool_id, pool.created, fingerprint), pool) is not None or fulfilled
