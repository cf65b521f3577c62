"""A saved plan is carried out exactly as it was shown, or not at all."""

from __future__ import annotations

import hashlib
import json
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from scheduler import matchers, plan_file
from scheduler.facts import Facts
from scheduler.plan_file import (
    Freed,
    PlanFileError,
    PlannedPool,
    PlanRecord,
    differences,
    dumps,
    freed_by,
    load,
    record_of,
)
from scheduler.planner import Plan
from scheduler.prices import Prices
from scheduler.selection import Decision, Rules, select
from tests.modelarts.pool_documents import BILLING, json_values, pool, pool_id
from worker.modelarts import Precondition

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from worker.modelarts import Pool

ENDPOINT = "https://modelarts.example.com"
PROJECT = "0123456789abcdef0123456789abcdef"
NOW = datetime(2026, 1, 2, 3, 4, 5, 678_901, tzinfo=UTC)
HOUR = timedelta(hours=1)
TAGGED = Rules(lambda facts, _now: _tagged(facts), allow_busy=True)


def _tagged(facts: Facts) -> matchers.Finding:
    return matchers.yes("tag go") if "go" in facts.pool.tags else matchers.no("no tag go")


def go(name: str, **changes: Any) -> Pool:
    return pool(name, tags={"go": ""}, **changes)


def plan_of(*pools: Pool) -> Plan:
    """What deletes the pools that are tagged so."""
    facts = [Facts(each, nodes=[]) for each in pools]
    return Plan(PROJECT, ENDPOINT, select(facts, TAGGED, NOW), NOW, len(pools))


PLAN = plan_of(go("a"), pool("b"), go("c", labels={"os.modelarts/name": 'Größe "7" 训练'}))
PRICES = Prices(currency="EUR", per_node_hour={"*": 0.1})


def saved(path: Path, *records: PlanRecord) -> Path:
    path.write_text(dumps(records or [record_of("stale", PLAN)]), encoding="utf-8")
    return path


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "plan.json"


# What is written


def test_a_plan_is_read_back_as_it_was_written(path: Path) -> None:
    records = [record_of("stale", PLAN, PRICES), record_of("other", plan_of())]
    assert load(saved(path, *records), NOW) == records


def test_a_record_tells_of_every_pool_and_of_what_the_deletions_free() -> None:
    record = record_of("stale", PLAN, PRICES)
    assert (record.policy, record.project_id, record.endpoint) == ("stale", PROJECT, ENDPOINT)
    assert (record.planned_at, record.pools_in_project) == (NOW, 3)
    assert [(each.pool_name, each.decision, each.reason) for each in record.pools] == [
        (pool_id("a"), "delete", "tag go"),
        (pool_id("b"), "keep", "no tag go"),
        (pool_id("c"), "delete", "tag go"),
    ]
    assert [each.pool_name for each in record.deletions] == [pool_id("a"), pool_id("c")]
    assert [each.precondition for each in record.deletions] == [
        Precondition.of(each.pool) for each in PLAN.deletions
    ]
    assert record.frees == Freed(
        pools=2,
        nodes={"modelarts.vm.cpu.4ud": 4},
        node_hours_per_day=96,
        money_per_day=9.6,
        currency="EUR",
    )
    assert freed_by(PLAN.decisions, None).money_per_day is None


def test_a_plan_is_one_json_document_that_people_can_read(path: Path) -> None:
    text = saved(path).read_text(encoding="utf-8")
    assert json.loads(text)["format"] == "poolsweep-plan/1"
    assert "Größe" in text
    assert text.endswith("}\n")


def test_a_pool_whose_id_no_encoding_takes_does_not_spoil_the_file(path: Path) -> None:
    plan = plan_of(go("a"), go("\ud800" + "x" * 40))
    (record,) = load(saved(path, record_of("stale", plan)), NOW)
    assert [each.pool_name for each in record.deletions] == [pool_id("a")]


ids = st.text("abcdef", min_size=1, max_size=3).map(pool_id)
texts = st.text(max_size=20)
planned = st.builds(
    PlannedPool,
    pool_name=ids | texts,
    name=texts,
    created_at=texts,
    nodes=st.dictionaries(texts, st.integers(0, 10**6), max_size=2),
    decision=st.sampled_from(["delete", "keep"]),
    reason=texts,
    fingerprint=texts,
)
records = st.builds(
    PlanRecord,
    policy=texts,
    project_id=texts,
    endpoint=texts,
    planned_at=st.timedeltas(timedelta(0), HOUR).map(lambda age: NOW - age),
    pools_in_project=st.integers(0, 10**6),
    frees=st.builds(
        Freed,
        pools=st.integers(0, 10),
        nodes=st.just({}),
        node_hours_per_day=st.integers(0, 10**9),
        money_per_day=st.none() | st.floats(0, 1e9),
        currency=st.none() | st.just("EUR"),
    ),
    pools=st.lists(planned, max_size=3),
)
in_one_file = settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


@in_one_file
@given(st.lists(records, max_size=3))
def test_any_plan_is_read_back_as_it_was_written(path: Path, made: list[PlanRecord]) -> None:
    path.write_text(dumps(made), encoding="utf-8")
    assert load(path, NOW) == made


# What is refused


def tampered(path: Path, change: Callable[[dict[str, Any]], None]) -> None:
    """Change a saved plan, as somebody might with an editor."""
    document = json.loads(saved(path).read_text(encoding="utf-8"))
    change(document)
    path.write_text(json.dumps(document), encoding="utf-8")


def first_plan(document: dict[str, Any]) -> dict[str, Any]:
    plan: dict[str, Any] = document["plans"][0]
    return plan


CHANGES: dict[str, Callable[[dict[str, Any]], None]] = {
    "a kept pool becomes a deletion": lambda d: first_plan(d)["pools"][1].update(decision="delete"),
    "a deletion becomes another pool's": lambda d: first_plan(d)["pools"][0].update(
        pool_name=pool_id("z")
    ),
    "another fingerprint": lambda d: first_plan(d)["pools"][0].update(fingerprint="0-0-0-0"),
    "another incarnation": lambda d: first_plan(d)["pools"][0].update(created_at="2025-01-01"),
    "another date": lambda d: first_plan(d).update(planned_at="2026-01-02T03:04:05.678902Z"),
    "another project": lambda d: first_plan(d).update(project_id="x"),
    "another endpoint": lambda d: first_plan(d).update(endpoint="https://x.example.com"),
    "another policy": lambda d: first_plan(d).update(policy="x"),
    "a pool more": lambda d: first_plan(d)["pools"].append(first_plan(d)["pools"][0]),
    "a pool less": lambda d: first_plan(d)["pools"].pop(),
    "another order": lambda d: first_plan(d)["pools"].reverse(),
    "another reason": lambda d: first_plan(d)["pools"][0].update(reason="x"),
    "a plan more": lambda d: d["plans"].append(d["plans"][0]),
    "no plan": lambda d: d["plans"].clear(),
    "a text for a number": lambda d: first_plan(d).update(pools_in_project="3"),
    "another digest": lambda d: d.update(sha256=hashlib.sha256(b"").hexdigest()),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_a_plan_that_was_changed_is_refused(
    path: Path, change: Callable[[dict[str, Any]], None]
) -> None:
    tampered(path, change)
    with pytest.raises(PlanFileError, match=r"plan\.json was changed after it was written"):
        load(path, NOW)


def test_a_plan_that_was_only_laid_out_anew_is_accepted(path: Path) -> None:
    tampered(path, lambda document: document.update(plans=document["plans"]))
    assert load(path, NOW) == [record_of("stale", PLAN)]


@pytest.mark.parametrize(
    "change",
    [
        lambda d: d.update(format="poolsweep-plan/2"),
        lambda d: d.pop("sha256"),
        lambda d: d.update(more=1),
        lambda d: first_plan(d).update(more=1),
        lambda d: first_plan(d)["pools"][0].update(decision="perhaps"),
        lambda d: first_plan(d)["pools"][0].pop("fingerprint"),
        lambda d: first_plan(d).update(planned_at="2026-01-02T03:04:05"),
        lambda d: d.update(plans={}),
    ],
)
def test_what_is_no_saved_plan_is_refused(
    path: Path, change: Callable[[dict[str, Any]], Any]
) -> None:
    tampered(path, change)
    with pytest.raises(PlanFileError, match="is no saved plan; accepted: what `poolsweep plan"):
        load(path, NOW)


@pytest.mark.parametrize(
    "raw", [b"", b"[]", b"null", b"{", b"\xff", b"[" * 100_000, b'{"plans": [1e999]}', b"9" * 5_000]
)
def test_what_is_no_json_object_is_refused(path: Path, raw: bytes) -> None:
    path.write_bytes(raw)
    with pytest.raises(PlanFileError, match="is no saved plan"):
        load(path, NOW)


def test_a_file_that_cannot_be_read_is_refused(path: Path) -> None:
    with pytest.raises(PlanFileError, match=r"plan\.json cannot be read: No such file"):
        load(path, NOW)
    with pytest.raises(PlanFileError, match="cannot be read: Is a directory"):
        load(path.parent, NOW)


@pytest.mark.parametrize(
    ("age", "accepted"),
    [
        (timedelta(0), True),
        (HOUR, True),
        (HOUR + timedelta(microseconds=1), False),
        (timedelta(days=30), False),
        # Made in the future: somebody's clock is wrong, and nobody knows how old it is.
        (-timedelta(microseconds=1), False),
        (-timedelta(days=30), False),
    ],
)
def test_a_plan_is_carried_out_within_the_hour(path: Path, age: timedelta, accepted: bool) -> None:
    saved(path)
    if accepted:
        assert load(path, NOW + age)
    else:
        with pytest.raises(
            PlanFileError,
            match=r"was made at 2026-01-02T03:04\+00:00; accepted: .* not older than 1h\.",
        ):
            load(path, NOW + age)


@pytest.mark.parametrize("text", ["0001-01-01T00:00:00+14:00", "9999-12-31T23:59:59-14:00"])
def test_a_plan_of_the_first_or_the_last_day_is_refused_too(path: Path, text: str) -> None:
    record = record_of("stale", PLAN)
    moved = record.model_copy(update={"planned_at": datetime.fromisoformat(text)})
    with pytest.raises(PlanFileError, match="was made at"):
        load(saved(path, moved), NOW)


def test_one_plan_that_is_too_old_spoils_the_file(path: Path) -> None:
    record = record_of("stale", PLAN)
    older = record.model_copy(update={"planned_at": NOW - 2 * HOUR})
    with pytest.raises(PlanFileError, match="was made at 2026-01-02T01:04"):
        load(saved(path, record, older), NOW)


@in_one_file
@given(json_values())
def test_no_document_makes_loading_fail_otherwise(path: Path, document: Any) -> None:
    for whole in (
        document,
        {"format": plan_file.FORMAT, "plans": document, "sha256": ""},
        {"format": plan_file.FORMAT, "plans": [document], "sha256": ""},
    ):
        path.write_text(json.dumps(whole), encoding="utf-8")
        with pytest.raises(PlanFileError):
            load(path, NOW)


# What has changed since

SAVED = record_of("stale", PLAN)
PREPAID = "it is prepaid (yearly/monthly): unsubscribe it at the billing service"
A, B, C = (decision.pool for decision in PLAN.decisions)


def test_nothing_has_changed_about_the_same_pools() -> None:
    assert differences(SAVED, PLAN) == []
    assert differences(SAVED, plan_of(C, B, A)) == []


def test_what_the_saved_plan_keeps_may_change_or_go_or_come() -> None:
    assert differences(SAVED, plan_of(A, go("b"), C, go("d"), pool("e"))) == []
    assert differences(SAVED, plan_of(A, C)) == []


@pytest.mark.parametrize(
    ("fresh", "difference"),
    [
        (plan_of(B, C), "is not in the project any more"),
        (plan_of(pool("a"), B, C), "is to be kept now: no tag go"),
        (
            plan_of(go("a", annotations={BILLING: "1"}), B, C),
            f"is to be kept now: {PREPAID}",
        ),
        (plan_of(go("a", created="2025-01-01T00:00:00Z"), B, C), "has changed"),
        (plan_of(go("a", labels={"team": "b"}), B, C), "has changed"),
        (plan_of(go("a", control_mode=4), B, C), "has changed"),
        (
            plan_of(A, B, C, go("n", parent=A.pool_id)),
            f"has the sub-pool {pool_id('n')}, which was not planned for",
        ),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_has_changed_about_a_deletion_is_named(fresh: Plan, difference: str) -> None:
    assert differences(SAVED, fresh) == [f"{A.pool_id} {difference}"]


def test_every_difference_is_told() -> None:
    assert [each.partition(" ")[0] for each in differences(SAVED, plan_of(B))] == [
        A.pool_id,
        C.pool_id,
    ]


def test_a_deletion_that_was_smuggled_in_with_a_new_digest_is_still_found(path: Path) -> None:
    document = json.loads(saved(path).read_text(encoding="utf-8"))
    first_plan(document)["pools"][1]["decision"] = "delete"
    plans = [PlanRecord.model_validate(each) for each in document["plans"]]
    (loaded,) = load(saved(path, *plans), NOW)
    assert differences(loaded, PLAN) == [f"{B.pool_id} is to be kept now: no tag go"]


def test_a_decision_counts_only_once_it_is_made() -> None:
    undecided = Plan(PROJECT, ENDPOINT, [Decision(A, False, "not decided")], NOW, 1)
    assert len(differences(SAVED, undecided)) == 2
