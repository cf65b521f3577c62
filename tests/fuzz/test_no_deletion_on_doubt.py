"""No deletion on doubt: whatever a document says oddly where it might protect, its pool stays.

Each test takes documents whose pools go, breaks them somewhere, and has a reading of its own
(`reading.py`) say whether the pool may still go.
"""

from __future__ import annotations

import copy
import functools
import json
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from scheduler import policy
from scheduler.facts import Facts
from scheduler.selection import Rules, named, rules_of, select
from tests.fuzz.reading import PROTECT, may_go
from tests.modelarts.pool_documents import (
    BILLING,
    FULL,
    HALVES_TOO,
    SUBPOOLS,
    TAGS,
    document,
    json_values,
    keys,
    nested,
    paths,
    pool_id,
)
from worker.deletion import judge
from worker.ledger import Job, JobState, NewJob
from worker.modelarts import Pool, Precondition, UnreadablePoolError
from worker.modelarts.schema import Node, Workload

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

NOW = datetime(2026, 1, 2, 3, 4, 5, tzinfo=UTC)
EXPIRED = {"expires-at": "2025-01-31", "team": "vision"}

POLICY = rules_of(
    policy.parse(
        """
        projects: {p: {id: 0123456789abcdef0123456789abcdef}}
        policies:
          expired:
            projects: [p]
            match: {expired: }
            protect:
              any:
                - tags: {key: owner, equals: platform}
                - name: "demo-*"
        """
    ).policies["expired"]
)

DOCUMENTS: dict[str, dict[str, Any]] = {
    "example": document(tags=EXPIRED),
    "full": FULL,
    "switched off": document(tags={**EXPIRED, PROTECT: "no"}, control_mode=3),
    "a map of tags": document(annotations={TAGS: json.dumps(EXPIRED)}, subpools="0"),
    "values": document(
        annotations={TAGS: '[{"key": "expires-at", "values": ["2025-01-31T08:00:00+02:00"]}]'}
    ),
    "no labels": {
        **document(tags=EXPIRED),
        "metadata": {**document(tags=EXPIRED)["metadata"], "labels": {}},
    },
}
"""Documents whose pools go, by the policy and by name."""

GONE = "gone"
"""In place of a value: the key or item is taken away."""
ODD: list[Any] = [
    GONE, None, True, False, 0, 1, 8, 16, -1, 2, 0.0, 1.5, 2**63, 10**400, "", " ", "0", "1",
    "true", "no", "null", "Deleting", "Creating", "demo-1", "private", "\x00", "\u200b", "\ud800",
    "００", "١", "é" * 5_000, "2999-01-01", "[]", "{}", "[[]]", '{"poolsweep/protect": "yes"}',
    '[{"key": "poolsweep/protect"}]', [], [[]], {}, {"": None}, {"name": "x"}, [None] * 3,
    nested(200),
]  # fmt: skip
FEW: list[Any] = [GONE, None, [], {}, "", "0", 0, 8, True, 0.0, {"": None}, [{}]]
"""For documents with many places."""


def broken(part: Any, path: Sequence[Any], value: Any) -> Any:
    """A document with another value at a path; what is not on the way there is shared."""
    key, *rest = path
    made = copy.copy(part)
    if rest:
        made[key] = broken(part[key], rest, value)
    elif value is GONE:
        del made[key]
    else:
        made[key] = value
    return made


def every_break(
    raw: dict[str, Any], values: Sequence[Any] = ODD
) -> Iterator[tuple[tuple[Any, ...], Any, dict[str, Any]]]:
    """A document broken in each place in each way."""
    for path in paths(raw):
        for value in values:
            yield path, value, broken(raw, path, value)


def goes(raws: Sequence[Any], rules: Rules) -> set[str]:
    """The ids of the pools that go, of those whose documents can be read at all."""
    found = []
    for raw in raws:
        try:
            found.append(Facts(Pool.parse(raw), nodes=[], workloads=[], usage={}))
        except UnreadablePoolError:
            continue
    return {each.pool.pool_id for each in select(found, rules, NOW) if each.delete}


def rules_for(raw: Any, *, by_policy: bool) -> Rules:
    """The policy's, or those of somebody who names the pool, as far as it has a name."""
    if by_policy:
        return POLICY
    metadata = raw.get("metadata") if isinstance(raw, dict) else None
    name = metadata.get("name") if isinstance(metadata, dict) else None
    return named([name] if isinstance(name, str) else [])


@pytest.mark.parametrize("by_policy", [True, False], ids=["policy", "name"])
@pytest.mark.parametrize("name", DOCUMENTS)
def test_whatever_is_broken_a_pool_goes_only_if_nothing_keeps_it_for_certain(
    name: str, by_policy: bool
) -> None:
    raw = DOCUMENTS[name]
    assert goes([raw], rules_for(raw, by_policy=by_policy)), "unbroken it goes"
    went, stayed = set(), set()
    for path, value, made in every_break(raw, FEW if raw is FULL else ODD):
        if goes([made], rules_for(made, by_policy=by_policy)):
            assert may_go(made, NOW, by_policy=by_policy), (path, value)
            went.add(path)
        else:
            stayed.add(path)
    # What decides makes a difference, and what does not makes none.
    assert {("metadata", "annotations", BILLING), ("status", "phase"), ("status",)} <= stayed
    assert {("spec", "network"), ("spec", "scope", 0), ("kind",)} <= went - stayed


SAYS: set[tuple[Any, ...]] = {
    *(("metadata", "annotations", key) for key in (BILLING, TAGS, SUBPOOLS)),
    *(("metadata",), ("metadata", "annotations")),
    *(("spec",), ("spec", "controlMode")),
    *(("status",), ("status", "phase")),
}
"""Where what protects a pool stands; broken there it may be lost."""


@pytest.mark.parametrize("by_policy", [True, False], ids=["policy", "name"])
def test_what_protects_a_pool_protects_it_whatever_else_is_broken(by_policy: bool) -> None:
    protections: list[dict[str, Any]] = [
        {"annotations": {BILLING: "1"}},
        {"annotations": {BILLING: "2"}},
        {"control_mode": 8},
        {"control_mode": 16 + 4},
        {"phase": "Creating"},
        {"phase": "Deleting"},
        {"subpools": "1"},
        {"tags": {**EXPIRED, PROTECT: "true"}},
        {"tags": {**EXPIRED, PROTECT: ["no"]}},
    ]
    for changes in protections:
        raw = document(**{"tags": EXPIRED, **changes})
        for path, value, made in every_break(raw, FEW):
            if path not in SAYS:
                rules = rules_for(made, by_policy=by_policy)
                assert not goes([made], rules), (changes, path, value)


@st.composite
def random_breaks(draw: st.DrawFn) -> dict[str, Any]:
    """A document broken in up to three places by any JSON, or by another key."""
    made: dict[str, Any] = copy.deepcopy(draw(st.sampled_from(list(DOCUMENTS.values()))))
    for _ in range(draw(st.integers(1, 3))):
        path = draw(st.sampled_from(list(paths(made)) or [()]))
        if not path:
            break
        parent = functools.reduce(lambda part, key: part[key], path[:-1], made)
        how = draw(st.sampled_from(["value", "value", "key", "text", "gone"]))
        old = parent[path[-1]]
        if how == "key" and isinstance(parent, dict):
            del parent[path[-1]]
            odd = st.sampled_from(
                [str.upper, str.title, lambda key: f"{key} ", lambda key: key[:-1]]
            )
            key = draw(keys(HALVES_TOO)) if draw(st.booleans()) else draw(odd)(path[-1])
            parent[key] = old
        elif how == "text" and isinstance(old, str) and old:
            at = draw(st.integers(0, len(old) - 1))
            cut = at + draw(st.integers(0, 3))
            parent[path[-1]] = old[:at] + draw(st.text(HALVES_TOO, max_size=2)) + old[cut:]
        elif how == "gone":
            del parent[path[-1]]
        else:
            # Copied, since the next break may change what is in it.
            odd = st.sampled_from(ODD[1:]).map(copy.deepcopy)
            parent[path[-1]] = draw(json_values(HALVES_TOO) | odd)
    return made


@given(random_breaks(), st.booleans())
def test_however_it_is_broken_a_pool_goes_only_if_nothing_keeps_it_for_certain(
    raw: dict[str, Any], by_policy: bool
) -> None:
    if goes([raw], rules_for(raw, by_policy=by_policy)):
        assert may_go(raw, NOW, by_policy=by_policy), json.dumps(raw)


ALPHABET = '[]{}",: \\0ekvyalus/protectno'


@given(st.text(ALPHABET, max_size=60), st.integers(0, 200), st.integers(0, 12), st.booleans())
def test_a_tags_text_that_is_broken_anywhere_keeps_its_pool_or_is_read_for_certain(
    text: str, at: int, cut: int, by_policy: bool
) -> None:
    for tags in ({**EXPIRED, PROTECT: "yes"}, EXPIRED):
        whole = document(tags=tags)["metadata"]["annotations"][TAGS]
        raw = document(annotations={TAGS: whole[:at] + text + whole[at + cut :]})
        if goes([raw], rules_for(raw, by_policy=by_policy)):
            assert may_go(raw, NOW, by_policy=by_policy), raw["metadata"]["annotations"][TAGS]


# Pools that lie in each other

FAMILY = [
    document("parent", tags=EXPIRED, subpools="2"),
    document("child-1", tags=EXPIRED, parent=pool_id("parent")),
    document("child-2", tags=EXPIRED, parent=pool_id("parent")),
]


@pytest.mark.parametrize("which", range(3))
def test_a_pool_goes_only_with_all_that_lies_in_it_whatever_is_broken(which: int) -> None:
    parent = pool_id("parent")
    assert goes(FAMILY, POLICY) == {raw["metadata"]["name"] for raw in FAMILY}
    for path, value, made in every_break(FAMILY[which]):
        raws = [*FAMILY]
        raws[which] = made
        gone = goes(raws, POLICY)
        inside = [raw for raw in raws if _parent_of(raw) == parent]
        for raw in raws:
            name = _name_of(raw)
            seen = len(inside) if name == parent else 0
            if name in gone:
                assert may_go(raw, NOW, by_policy=True, subpools_seen=seen), (path, value)
        if parent in gone:
            assert all(_name_of(raw) in gone for raw in inside), (path, value)
            if which:  # its number of sub-pools is as it was
                assert len(inside) == 2, (path, value)


def _name_of(raw: Any) -> Any:
    metadata = raw.get("metadata")
    name = metadata.get("name") if isinstance(metadata, dict) else None
    return name if isinstance(name, str) else None


def _parent_of(raw: Any) -> Any:
    status = raw.get("status")
    return status.get("parent") if isinstance(status, dict) else None


# What takes further calls

NODE = {"metadata": {"name": "node-1", "labels": {}, "annotations": {BILLING: "1", "other": "x"}}}
WORKLOAD = {"type": "train", "status": "Running", "name": "job-1", "createTime": 1}


def test_a_pool_stays_unless_its_nodes_say_plainly_that_they_are_not_prepaid() -> None:
    pool = Pool.parse(DOCUMENTS["example"])
    for billing in ("0", "1"):
        node = broken(NODE, ("metadata", "annotations", BILLING), billing)
        for path, value, made in every_break(node):
            facts = Facts(pool, nodes=[Node.model_validate(made)], workloads=[], usage={})
            (decision,) = select([facts], POLICY, NOW)
            assert decision.delete <= _is_plainly_postpaid(made), (path, value)


def _is_plainly_postpaid(node: dict[str, Any]) -> bool:
    """It says so, or it says nothing at all: then it is as its pool is."""
    for key in ("metadata", "annotations"):
        inner = node.get(key)
        if inner is None:
            return True
        if not isinstance(inner, dict):
            return False
        node = inner
    mode = node.get(BILLING, "0")
    return isinstance(mode, str) and mode == "0"


def test_a_pool_stays_unless_every_workload_says_plainly_that_it_is_over() -> None:
    pool = Pool.parse(DOCUMENTS["example"])
    over = {"Abnormal", "Terminating", "Completed", "Terminated", "Failed"}
    for status in ("Running", "Completed"):
        workload = {**WORKLOAD, "status": status}
        for path, value, made in every_break(workload):
            facts = Facts(pool, nodes=[], workloads=[Workload.model_validate(made)], usage={})
            (decision,) = select([facts], POLICY, NOW)
            said = made.get("status")
            assert decision.delete == (isinstance(said, str) and said in over), (path, value)


# Just before the call


def as_planned(raw: dict[str, Any]) -> Job:
    """A job for a pool, as a plan over this document makes it."""
    pool = Pool.parse(raw)
    precondition = Precondition.of(pool)
    new = NewJob("p", pool.pool_id, "", precondition.created, precondition.fingerprint)
    return Job.parse("run", 0, new.record())


@pytest.mark.parametrize("name", DOCUMENTS)
def test_a_pool_is_called_about_only_if_all_that_the_plan_looked_at_is_as_it_was(name: str) -> None:
    raw = DOCUMENTS[name]
    job = as_planned(raw)
    assert judge(job, Pool.parse(raw)) is None
    went = set()
    for path, value, made in every_break(raw, FEW):
        try:
            pool = Pool.parse(made)
        except UnreadablePoolError:
            continue
        end = judge(job, pool)
        assert end is None or end[0] is not JobState.DELETED
        if end is None:
            assert _what_a_plan_looks_at(made) == _what_a_plan_looks_at(raw), (path, value)
            went.add(path)
    assert ("status", "scope") in went


def _what_a_plan_looks_at(raw: dict[str, Any]) -> str:
    """As JSON, in which 1, 1.0 and true differ; what is missing is as what is null."""
    metadata, spec = raw["metadata"], raw.get("spec", {})
    labels, annotations = ({} if (held := metadata.get(key)) is None else held for key in MAPS)
    if isinstance(annotations, dict):
        count = annotations.get(SUBPOOLS, "0")
        none = isinstance(count, str) and count.isascii() and count.isdigit() and not int(count)
        annotations = {TAGS: None, **annotations, SUBPOOLS: "none" if none else count}
    # What is no map may be anything.
    mode = tags = spec
    if isinstance(spec, dict):
        mode = 0 if spec.get("controlMode") is None else spec["controlMode"]
        tags = _node_tags(spec.get("resources"))
    return json.dumps(
        [metadata.get("creationTimestamp"), labels, annotations, mode, tags], sort_keys=True
    )


MAPS = ("labels", "annotations")


def _node_tags(resources: Any) -> Any:
    """The tags on the nodes; all of it where these are not plain."""
    found = []
    for resource in resources if isinstance(resources, list) else [resources or {}]:
        tags = (resource.get("tags") or []) if isinstance(resource, dict) else None
        if not isinstance(tags, list) or not all(isinstance(tag, dict) for tag in tags):
            return resources
        found += [[tag.get("key") or "", tag.get("value") or ""] for tag in tags]
    return found
