"""Which pools may go: protection wins over every match, and a doubt protects too."""

from __future__ import annotations

import itertools
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import TypeAdapter

from scheduler import matchers, policy
from scheduler.facts import Fact, Facts
from scheduler.marks import Veto
from scheduler.matchers import Finding, Kind, Matcher, parse_expiry
from scheduler.selection import (
    LONGEST_REASON,
    Decision,
    Rules,
    decide,
    named,
    rules_of,
    select,
    totals,
    with_relatives,
)
from tests.modelarts.pool_documents import (
    BILLING,
    FULL,
    TAGS,
    json_values,
    mutations,
    pool,
    pool_id,
    with_value,
)
from worker.modelarts import Pool
from worker.modelarts.activity import UsageSeries
from worker.modelarts.schema import Node, Workload

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from scheduler.selection import Find

NOW = datetime(2026, 1, 2, 3, 4, 5, tzinfo=UTC)
PROTECT = "poolsweep/protect"
MATCHER: TypeAdapter[Matcher] = TypeAdapter(Matcher)

patient = settings(deadline=None, max_examples=70)


def matching(spec: Any) -> Find:
    """What a matcher finds, given as in YAML."""
    matcher = MATCHER.validate_python(spec)
    return lambda facts, now: matchers.find(matcher, facts, now)


def everything(_facts: Facts, _now: datetime) -> Finding:
    """Somebody wants every pool gone."""
    return matchers.yes("all must go")


ALL = Rules(everything)
EXPIRED = Rules(matching({"expired": None}))


def read(found: Pool, **changes: Any) -> Facts:
    """A pool of which all has been read: no nodes, no workloads."""
    return replace(Facts(found, nodes=[], workloads=[], usage={}), **changes)


def decided(
    pools: Sequence[Pool | Facts], rules: Rules = ALL, vetoes: Mapping[str, Veto] | None = None
) -> list[Decision]:
    facts = [each if isinstance(each, Facts) else read(each) for each in pools]
    return select(facts, rules, NOW, vetoes)


def deleted(pools: Sequence[Pool | Facts], rules: Rules = ALL) -> list[str]:
    """The ids of the pools that go, in order."""
    return [each.pool.pool_id for each in decided(pools, rules) if each.delete]


def why_kept(found: Pool | Facts, rules: Rules = ALL) -> str:
    """Why a pool alone in its project stays; empty: it goes."""
    (decision,) = decided([found], rules)
    assert decision.reason
    return "" if decision.delete else decision.reason


# Protection


def test_an_ordinary_pool_goes_if_somebody_wants_it_to() -> None:
    (decision,) = decided([pool()])
    assert (decision.delete, decision.reason) == (True, "all must go")


def test_a_pool_that_nobody_wants_to_be_rid_of_stays() -> None:
    assert why_kept(pool(), named([])) == "not asked for"
    assert why_kept(pool(), Rules(lambda _facts, _now: matchers.no())) == (
        "nothing asks for its deletion"
    )


@pytest.mark.parametrize(
    "value", ["true", "yes", "1", "until 2027", "TRUE", "anything", "off?", ""]
)
def test_a_protected_pool_stays(value: str) -> None:
    # A tag without a value is a mark, and a mark means what it says.
    found = pool(tags={PROTECT: value, "expires-at": "2020-01-01"})
    for rules in (ALL, EXPIRED, named([found.pool_id])):
        assert why_kept(found, rules) == f"it is protected by the tag {PROTECT}"


@pytest.mark.parametrize("value", ["false", "no", "0", "off", " No ", "FALSE"])
def test_a_protection_can_be_switched_off_plainly(value: str) -> None:
    assert not why_kept(pool(tags={PROTECT: value}))


OBSTACLES: dict[str, dict[str, Any]] = {
    "prepaid": {"annotations": {BILLING: "1"}},
    "billing mode is unknown": {"annotations": {BILLING: "2"}},
    "frozen": {"control_mode": 8},
    "creating": {"phase": "Creating"},
    "deleting": {"phase": "Deleting"},
    "only 0 are seen": {"subpools": "9"},
    "cannot be read": {"subpools": "many"},
    "not JSON": {"annotations": {TAGS: "protect!"}},
    "neither a list": {"annotations": {TAGS: '"protect"'}},
    "protected": {"tags": {PROTECT: "yes"}},
    "creation time": {"created": "yesterday"},
    "phase is not given": {"phase": ""},
    "shared or public": {"labels": {"os.modelarts/sharing": "true"}},
}


@pytest.mark.parametrize(("words", "changes"), OBSTACLES.items(), ids=OBSTACLES)
def test_what_keeps_a_pool_is_named(words: str, changes: dict[str, Any]) -> None:
    assert words in why_kept(pool(**changes))


@pytest.mark.parametrize("mode", [8, 16, 24, 9, 31, True, "0", 8.0, -1, [8]], ids=str)
def test_a_pool_that_is_frozen_or_may_be_stays(mode: Any) -> None:
    assert why_kept(pool(control_mode=mode))


@pytest.mark.parametrize("mode", [0, 1, 2, 4, 7, None], ids=str)
def test_other_restrictions_do_not_keep_a_pool(mode: Any) -> None:
    assert not why_kept(pool(control_mode=mode))


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("metadata.annotations", None),
        ("metadata.annotations", []),
        ("metadata.annotations", "text"),
        (f"metadata.annotations|{BILLING}", 0),
        (f"metadata.annotations|{BILLING}", True),
        (f"metadata.annotations|{TAGS}", [{"key": "a", "value": "1"}]),
        (f"metadata.annotations|{TAGS}", '{"key": "poolsweep/protect", "value": "yes"}'),
        (f"metadata.annotations|{TAGS}", '{"poolsweep/protect": "yes", "poolsweep/protect": "no"}'),
        ("spec", None),
        ("spec", "text"),
        ("status", None),
        ("status", "text"),
        ("status.phase", None),
        ("status.phase", 7),
        ("status.parent", 7),
        ("status.parent", ["pool"]),
        ("metadata.creationTimestamp", None),
        ("metadata.creationTimestamp", 1_663_297_840),
        ("metadata.labels", "text"),
        ("metadata.name", "../x"),
        ("metadata.name", "pool\n"),
    ],
    ids=str,
)
def test_a_pool_stays_if_what_decides_about_it_cannot_be_read(path: str, value: Any) -> None:
    path, _, key = path.partition("|")
    base = with_value("status.parent", "", FULL)
    if key:
        value = {**base["metadata"]["annotations"], key: value}
    assert not why_kept(Pool.parse(base))
    odd = Pool.parse(with_value(path, value, base))
    assert why_kept(odd)
    assert why_kept(odd, named([odd.pool_id])), "whoever asks for it"


def test_shared_and_public_pools_stay_unless_they_are_allowed_or_meant() -> None:
    shared = {"os.modelarts/sharing": "true"}
    public = {"os.modelarts.pool/biz": "public"}
    for labels in (shared, public):
        found = pool(labels=labels)
        assert why_kept(found) == "it is shared or public"
        assert not why_kept(found, replace(ALL, allow_shared=True))
        assert not why_kept(found, named([found.pool_id]))


# What somebody keeps


def veto(found: Pool, until: datetime | None = None) -> dict[str, Veto]:
    return {found.pool_id: Veto("p", found.pool_id, until, "ada", "still needed")}


def test_a_veto_keeps_a_pool_whatever_asks_for_it() -> None:
    found = pool()
    for rules in (ALL, named([found.pool_id])):
        (decision,) = decided([found], rules, veto(found))
        assert (decision.delete, decision.reason) == (False, "ada keeps it: still needed")
    assert decided([found], ALL, veto(pool("other")))[0].delete


def test_a_veto_of_a_subpool_keeps_its_parent() -> None:
    family = [pool("a"), logical("b", "a")]
    assert not any(each.delete for each in decided(family, ALL, veto(family[1])))


# What a policy protects

NOT_GPU = {"not": {"flavor": "*gpu*"}}


@pytest.mark.parametrize(
    ("protect", "facts", "reason"),
    [
        ({"tags": "env"}, {}, "protected by the policy: tag env=dev"),
        ({"ttl": None}, {}, "perhaps protected by the policy: ttl='?' is not a duration"),
        ({"not": {"idle": "1d"}}, {}, "protected by the policy: not seen idle before"),
        ({"tags": "other"}, {}, ""),
        ({"all": [{"tags": "other"}, {"idle": "1d"}]}, {"workloads": []}, ""),
        (
            {"not": {"utilisation": {"of": "gpu", "below": 5}}},
            {"unreadable": {Fact.USAGE: "HTTP 500"}, "usage": None},
            "perhaps protected by the policy: its usage cannot be read: HTTP 500",
        ),
    ],
    ids=str,
)
def test_what_a_policy_protects_or_may_protect_stays(
    protect: Any, facts: dict[str, Any], reason: str
) -> None:
    found = read(pool(tags={"env": "dev", "ttl": "?"}), **facts)
    kept = why_kept(found, replace(ALL, protect=matching(protect)))
    assert kept.startswith(reason)
    assert bool(kept) == bool(reason)


def test_a_policy_becomes_rules() -> None:
    text = """
projects: {a: {id: x}}
policies:
  p:
    projects: [a]
    match: {tags: go}
    protect: {tags: stay}
  q:
    projects: [a]
    match: {tags: go}
    allow_busy: true
    allow_shared: true
"""
    policies = policy.parse(text).policies
    strict, lenient = rules_of(policies["p"]), rules_of(policies["q"])
    assert not why_kept(pool(tags={"go": ""}), strict)
    assert "no such tag" in why_kept(pool(), strict)
    assert "protected by the policy" in why_kept(pool(tags={"go": "", "stay": ""}), strict)
    assert not why_kept(pool(tags={"go": "", "stay": ""}), lenient)
    public = pool(tags={"go": ""}, labels={"os.modelarts/sharing": "true"})
    busy = read(public, workloads=[workload("Running")])
    assert why_kept(public, strict) == "it is shared or public"
    assert not why_kept(busy, lenient)


# Nodes and workloads


def node(**metadata: Any) -> Node:
    return Node.model_validate({"metadata": metadata})


def workload(status: str | None, name: str = "w") -> Workload:
    return Workload.model_validate({"status": status, "jobName": name})


@pytest.mark.parametrize(
    ("nodes", "reason"),
    [
        ([], ""),
        ([node(annotations={BILLING: "0"})], ""),
        # One that says nothing is paid for as its pool is.
        ([node()], ""),
        ([node(annotations=None)], ""),
        ([node(annotations={"a": "b"})], ""),
        ([node(annotations={BILLING: "0"}), node(annotations={BILLING: "1"})], "prepaid nodes"),
        ([node(annotations={BILLING: "2"})], "billing mode of a node is unknown"),
        ([node(annotations={BILLING: 1})], "billing mode of a node is unknown"),
        ([node(annotations={BILLING: None})], "billing mode of a node is unknown"),
        ([node(annotations=[BILLING, "1"])], "billing mode of a node is unknown"),
        ([Node.model_validate({"metadata": "text"})], "billing mode of a node is unknown"),
    ],
    ids=str,
)
def test_a_pool_with_prepaid_nodes_or_perhaps_stays(nodes: list[Node], reason: str) -> None:
    kept = why_kept(read(pool(), nodes=nodes))
    assert reason in kept
    assert bool(kept) == bool(reason)


def test_the_nodes_of_a_logical_pool_are_its_parents() -> None:
    assert not why_kept(replace(read(logical("b", "elsewhere")), nodes=None))


@pytest.mark.parametrize("status", ["Queue", "Pending", "Creating", "Running", "Odd", None])
def test_a_pool_in_use_stays_unless_that_is_allowed_or_meant(status: str | None) -> None:
    ended = workload("Completed", "done")
    found = read(pool(), workloads=[ended, workload(status, "train-7"), workload(status, "b")])
    assert why_kept(found) == "it is in use by train-7 and 1 more"
    assert not why_kept(found, replace(ALL, allow_busy=True))
    assert not why_kept(found, named([found.pool.pool_id]))
    assert not why_kept(read(pool(), workloads=[ended]))


@pytest.mark.parametrize("fact", [Fact.NODES, Fact.WORKLOADS])
def test_a_pool_stays_if_what_is_to_be_read_of_it_cannot_be(fact: Fact) -> None:
    found = read(pool(), unreadable={fact: "HTTP 500"}, **{fact: None})
    assert why_kept(found) == f"its {fact} cannot be read: HTTP 500"


def settle(facts: Facts, rules: Rules, truth: Callable[[Fact], dict[str, Any]]) -> list[Fact]:
    """The facts that are read until a pool is decided about, in order."""
    asked: list[Fact] = []
    while needs := decide(facts, rules, NOW, {}).needs:
        for fact in needs:
            assert fact not in asked, "what was read is asked for again"
            asked.append(fact)
            facts = replace(facts, **truth(fact))
    return asked


def test_only_what_is_needed_is_read_and_what_rules_most_out_first() -> None:
    def idle(fact: Fact) -> dict[str, Any]:
        usage = {"gpuUtil": UsageSeries(points, timedelta(minutes=15))}
        found = {Fact.NODES: [], Fact.WORKLOADS: [], Fact.USAGE: usage}
        return {fact: found[fact], "idle_since": NOW - timedelta(days=30)}

    def busy(fact: Fact) -> dict[str, Any]:
        return {fact: [workload("Running")]}

    end = round(NOW.timestamp())
    points = [(at * 1000, 0.0) for at in range(end - 90_000, end + 1, 900)]
    quiet = {"utilisation": {"of": "gpu", "below": 5}}
    nodes, workloads, usage = Fact.NODES, Fact.WORKLOADS, Fact.USAGE
    both = Rules(matching({"all": [quiet, {"idle": "1d"}]}))
    old = Facts(pool())
    assert settle(old, ALL, idle) == [workloads, nodes]
    assert settle(old, ALL, busy) == [workloads]
    assert settle(old, replace(ALL, allow_busy=True), idle) == [nodes]
    assert settle(old, named([old.pool.pool_id]), idle) == [nodes]
    assert settle(old, both, idle) == [workloads, usage, nodes]
    assert settle(old, both, busy) == [workloads]
    guarded = replace(ALL, protect=matching({"not": quiet}), allow_busy=True)
    assert settle(old, guarded, idle) == [usage, nodes]
    for kept in (pool(tags={PROTECT: "yes"}), pool(phase="Creating"), pool(control_mode=8)):
        assert settle(Facts(kept), both, idle) == []
    assert settle(old, Rules(matching({"all": [quiet, {"phase": "Error"}]})), idle) == []
    assert settle(old, named([]), idle) == []


def test_a_pool_that_is_not_decided_yet_stays() -> None:
    (decision,) = decided([Facts(pool())])
    assert not decision.delete
    assert decision.reason == "not decided: its workloads"
    assert decision.needs == frozenset({Fact.WORKLOADS})


def test_a_parent_waits_with_its_subpools_and_is_read_meanwhile() -> None:
    undecided = [Facts(pool("a")), Facts(logical("b", "a"))]
    assert all(each.needs and not each.delete for each in decided(undecided))
    busy = read(logical("b", "a"), workloads=[workload("Running")])
    reasons = {each.pool.pool_id: each for each in decided([Facts(pool("a")), busy])}
    assert not reasons[pool_id("a")].needs, "nothing is read of a parent that stays anyway"


# Sub-pools


def logical(name: str, parent: str, **changes: Any) -> Pool:
    return pool(name, parent=pool_id(parent), **changes)


def ids(*names: str) -> list[str]:
    return [pool_id(name) for name in names]


def in_any_order(*pools: Pool) -> list[tuple[Pool, ...]]:
    return list(itertools.permutations(pools))


def test_subpools_go_before_their_parents() -> None:
    for order in in_any_order(pool("a", subpools="2"), logical("b", "a"), logical("c", "a")):
        found = deleted(order)
        assert sorted(found) == sorted(ids("a", "b", "c"))
        assert found[-1] == pool_id("a")


def test_nested_subpools_go_deepest_first() -> None:
    family = (pool("a", subpools="1"), logical("b", "a", subpools="1"), logical("c", "b"))
    for order in in_any_order(*family):
        assert deleted(order) == ids("c", "b", "a")


def test_a_chain_of_any_length_is_followed_to_its_end() -> None:
    names = [f"n{number}" for number in range(1_500)]
    chain = [pool("n0"), *(logical(low, up) for up, low in itertools.pairwise(names))]
    assert deleted(chain) == ids(*reversed(names))
    assert deleted([*chain[:-1], logical("n1499", "n1498", control_mode=8)]) == []


@pytest.mark.parametrize(("words", "changes"), OBSTACLES.items(), ids=OBSTACLES)
def test_a_subpool_that_stays_keeps_its_parent_whatever_the_order(
    words: str, changes: dict[str, Any]
) -> None:
    for order in in_any_order(pool("a"), logical("b", "a", **changes), logical("c", "a")):
        reasons = {each.pool.pool_id: each.reason for each in decided(order)}
        assert deleted(order) == ids("c")
        assert words in reasons[pool_id("b")]
        assert reasons[pool_id("a")] == f"it has logical sub-pools that stay: {pool_id('b')}"


@pytest.mark.parametrize(("words", "changes"), OBSTACLES.items(), ids=OBSTACLES)
def test_a_nested_subpool_that_stays_keeps_all_above_it_whatever_the_order(
    words: str, changes: dict[str, Any]
) -> None:
    for order in in_any_order(pool("a"), logical("b", "a"), logical("c", "b", **changes)):
        assert deleted(order) == [], [each.pool_id for each in order]


def test_a_subpool_that_nobody_wants_to_be_rid_of_keeps_its_parent() -> None:
    for order in in_any_order(pool("a"), logical("b", "a"), logical("c", "b")):
        assert deleted(order, named(ids("a", "b"))) == []
        assert deleted(order, named(ids("a"))) == []
        assert deleted(order, named(ids("b", "c"))) == ids("c", "b")


def test_a_parent_that_stays_does_not_keep_its_subpools() -> None:
    for order in in_any_order(pool("a", tags={PROTECT: "yes"}), logical("b", "a")):
        assert deleted(order) == ids("b")


def test_a_subpool_whose_parent_is_not_listed_goes() -> None:
    assert deleted([logical("b", "elsewhere")]) == ids("b")


def test_a_pool_with_subpools_that_are_not_seen_stays() -> None:
    family = [pool("a", subpools="3"), logical("b", "a"), logical("c", "a")]
    reasons = {each.pool.pool_id: each.reason for each in decided(family)}
    assert "of which only 2 are seen" in reasons[pool_id("a")]


def test_the_subpools_that_stay_are_named_but_not_all() -> None:
    family = [pool("a"), *(logical(name, "a", control_mode=8) for name in "bcdef")]
    reasons = {each.pool.pool_id: each.reason for each in decided(family)}
    named_ones = ", ".join(ids("b", "c", "d"))
    assert reasons[pool_id("a")] == (f"it has logical sub-pools that stay: {named_ones} and more")


def test_a_subpool_that_is_listed_twice_keeps_its_parent() -> None:
    for subpools in ("1", "2"):
        family = [pool("a", subpools=subpools), logical("b", "a"), logical("b", "a")]
        assert deleted(family) == []


@pytest.mark.parametrize("changes", OBSTACLES.values(), ids=OBSTACLES)
def test_parents_in_a_circle_are_decided_and_keep_each_other(changes: dict[str, Any]) -> None:
    for order in in_any_order(logical("a", "b"), logical("b", "c"), logical("c", "a", **changes)):
        assert deleted(order) == []


def test_parents_in_a_circle_and_what_lies_in_them_stay() -> None:
    for order in in_any_order(
        logical("a", "b"), logical("b", "a"), logical("c", "c"), logical("d", "a")
    ):
        found = decided(order)
        assert sorted(each.pool.pool_id for each in found) == ids("a", "b", "c", "d")
        assert {each.reason for each in found} == {"it lies in itself, by what its parents say"}


# A pool that is listed twice


@pytest.mark.parametrize(("words", "changes"), OBSTACLES.items(), ids=OBSTACLES)
def test_a_pool_that_is_listed_twice_stays_if_one_of_both_must(
    words: str, changes: dict[str, Any]
) -> None:
    for order in in_any_order(pool("a"), pool("a", **changes)):
        assert deleted(order) == []


def test_a_pool_that_is_listed_twice_stays_since_it_is_unknown_which_one_it_is() -> None:
    over = pool("a", tags={"expires-at": "2020-01-01"})
    for other in ({"expires-at": "2030-01-01"}, {"expires-at": "soon"}, {}, dict(over.tags)):
        for order in in_any_order(over, pool("a", tags=other)):
            found = decided(order, EXPIRED)
            assert [each.reason for each in found] == ["it is listed twice"] * 2
            assert not any(each.delete or each.needs for each in found)


# Deciding about anything

short_ids = st.sampled_from(["a", "b", "c", "d", "e"])
changes = st.fixed_dictionaries(
    {},
    optional={
        "parent": short_ids.map(pool_id),
        "subpools": st.sampled_from(["0", "1", "2", "many", ""]),
        "control_mode": st.sampled_from([0, 1, 8, 16, True]),
        "phase": st.sampled_from(["Running", "Abnormal", "Creating", "Deleting", "Error"]),
        "tags": st.dictionaries(
            st.sampled_from([PROTECT, "expires-at", "ttl", "env"]),
            st.sampled_from(["yes", "no", "2020-01-01", "2030-01-01", "1h"]),
        ),
        "annotations": st.fixed_dictionaries({BILLING: st.sampled_from(["0", "0", "0", "1", 0])}),
        "labels": st.fixed_dictionaries({"os.modelarts/sharing": st.sampled_from(["no", "yes"])}),
    },
)
generated = st.builds(lambda name, given_changes: pool(name, **given_changes), short_ids, changes)
nodes = st.lists(
    st.sampled_from(
        [node(), *(node(annotations={BILLING: mode}) for mode in ("0", "0", "1", "2", 1))]
    ),
    max_size=2,
)
workloads = st.lists(st.sampled_from(["Running", "Completed", None]).map(workload), max_size=2)


def facts_of(pools: st.SearchStrategy[Pool]) -> st.SearchStrategy[Facts]:
    return st.builds(
        Facts,
        pools,
        nodes=st.none() | st.just([]) | nodes,
        workloads=st.none() | st.just([]) | workloads,
        usage=st.none() | st.just({}),
        idle_since=st.sampled_from([None, NOW, NOW - timedelta(days=9)]),
        unreadable=st.dictionaries(st.sampled_from(Fact), st.sampled_from(["", "HTTP 500"])),
    )


fleets = st.lists(facts_of(generated), max_size=8)
unique_fleets = st.lists(facts_of(generated), max_size=5, unique_by=lambda each: each.pool.pool_id)
specs = st.recursive(
    st.sampled_from(
        [
            {"expired": None},
            {"ttl": None},
            {"older_than": "1d"},
            {"tags": "env"},
            {"name": "a*"},
            {"phase": "Error"},
            {"type": "Logical"},
            {"idle": "1d"},
            {"utilisation": {"of": "gpu", "below": 50}},
        ]
    ),
    lambda inner: (
        st.builds(lambda each: {"not": each}, inner)
        | st.builds(
            lambda key, each: {key: each},
            st.sampled_from(["all", "any"]),
            st.lists(inner, min_size=1, max_size=3),
        )
    ),
    max_leaves=5,
)
finds = specs.map(matching) | st.just(everything)
rule_sets = st.builds(
    Rules,
    finds,
    protect=st.none() | finds,
    allow_busy=st.booleans(),
    allow_shared=st.booleans(),
) | st.sampled_from([ALL, ALL, named(ids("a", "b"))])


@patient
@given(fleets, rule_sets)
def test_every_pool_is_decided_about_once_with_a_reason(fleet: list[Facts], rules: Rules) -> None:
    found = decided(fleet, rules)
    assert sorted(id(each.pool) for each in found) == sorted(id(each.pool) for each in fleet)
    assert all(each.reason for each in found)
    assert not any(each.delete and each.needs for each in found)


@patient
@given(fleets, rule_sets)
def test_no_pool_goes_before_what_lies_in_it(fleet: list[Facts], rules: Rules) -> None:
    going = set(deleted(fleet, rules))
    for each in fleet:
        if each.pool.pool_id not in going:
            assert each.pool.parent not in going, "a sub-pool that stays keeps its parent"


@patient
@given(unique_fleets)
def test_every_pool_that_goes_comes_after_its_subpools(fleet: list[Facts]) -> None:
    order = {going: place for place, going in enumerate(deleted(fleet))}
    parents = {each.pool.pool_id: each.pool.parent for each in fleet}
    for child, place in order.items():
        if parents[child] in order:
            assert place < order[parents[child]]


@patient
@given(fleets, st.data())
def test_a_few_pools_are_decided_about_without_all_the_others(
    fleet: list[Facts], data: st.DataObject
) -> None:
    ids = {facts.pool.pool_id for facts in fleet}
    wanted = data.draw(st.sets(st.sampled_from(sorted(ids)))) if ids else set()
    near = with_relatives([facts.pool for facts in fleet], wanted)
    few = [facts for facts in fleet if any(facts.pool is pool for pool in near)]
    assert len(few) == len(near)

    def decided(pools: list[Facts]) -> dict[str, tuple[bool, str]]:
        return {
            decision.pool.pool_id: (decision.delete, decision.reason)
            for decision in select(pools, named(wanted), NOW)
            if decision.pool.pool_id in wanted
        }

    assert decided(few) == decided(fleet)


@patient
@given(fleets, rule_sets, st.randoms(use_true_random=False))
def test_the_order_of_the_list_decides_nothing(
    fleet: list[Facts], rules: Rules, random: Any
) -> None:
    shuffled = random.sample(fleet, len(fleet))
    assert set(deleted(shuffled, rules)) == set(deleted(fleet, rules))


@patient
@given(fleets, rule_sets)
def test_nothing_that_is_protected_or_in_doubt_goes(fleet: list[Facts], rules: Rules) -> None:
    facts = {each.pool.pool_id: each for each in fleet}
    for each in decided(fleet, rules):
        if each.delete:
            found = each.pool
            assert found.tags.get(PROTECT, "no") == "no"
            assert found.document.metadata.annotations is not None
            assert found.document.metadata.annotations[BILLING] == "0"
            assert found.document.spec.control_mode in {None, 0, 1}
            assert found.document.spec.control_mode is not True
            assert found.phase not in {"Creating", "Deleting"}
            assert rules.allow_shared or not found.is_shared
            known = facts[found.pool_id]
            assert known.workloads is not None or rules.allow_busy
            assert known.nodes is not None or found.is_logical


@patient
@given(fleets, rule_sets)
def test_what_goes_was_matched_for_certain_and_certainly_not_protected(
    fleet: list[Facts], rules: Rules
) -> None:
    facts = {each.pool.pool_id: each for each in fleet}
    for going in deleted(fleet, rules):
        assert rules.match(facts[going], NOW).kind is Kind.YES
        if rules.protect is not None:
            assert rules.protect(facts[going], NOW).kind is Kind.NO


@patient
@given(fleets, rule_sets, specs)
def test_more_protection_never_makes_for_more_deletions(
    fleet: list[Facts], rules: Rules, more: Any
) -> None:
    before = rules.protect or matching({"not": {"older_than": "0s"}})

    def protect(facts: Facts, now: datetime) -> Finding:
        found = [before(facts, now), matching(more)(facts, now)]
        for kind in (Kind.DOUBT, Kind.YES, Kind.UNREAD):
            for each in found:
                if each.kind is kind:
                    return each
        return matchers.no()

    without = set(deleted(fleet, rules))
    assert set(deleted(fleet, replace(rules, protect=protect))) <= without
    assert set(deleted(fleet, replace(rules, allow_busy=False))) <= without
    assert set(deleted(fleet, replace(rules, allow_shared=False))) <= without
    for kept in fleet:
        vetoes = veto(kept.pool)
        going = {each.pool.pool_id for each in decided(fleet, rules, vetoes) if each.delete}
        assert going <= without - {kept.pool.pool_id}


@patient
@given(facts_of(generated), rule_sets, st.data())
def test_reading_what_is_needed_comes_to_an_end(
    facts: Facts, rules: Rules, data: st.DataObject
) -> None:
    def truth(fact: Fact) -> dict[str, Any]:
        found = {Fact.NODES: nodes, Fact.WORKLOADS: workloads, Fact.USAGE: st.just({})}[fact]
        failed = {**facts.unreadable, fact: ""}
        return data.draw(st.just({"unreadable": failed}) | found.map(lambda each: {fact: each}))

    assert len(settle(facts, rules, truth)) <= len(Fact)


@patient
@given(st.lists(mutations(), max_size=3), rule_sets)
def test_no_document_makes_deciding_fail(raws: list[dict[str, Any]], rules: Rules) -> None:
    pools = []
    for number, raw in enumerate(raws):
        raw["metadata"]["name"] = pool_id(f"p{number}")
        pools.append(Pool.parse(raw))
    found = decided(pools, rules)
    assert len(found) == len(pools)
    count, by_flavor = totals(found)
    assert count == len(deleted(pools, rules))
    assert all(by_flavor.values())


@patient
@given(json_values(), json_values(), json_values())
def test_no_value_where_it_decides_makes_deciding_fail(
    tags: Any, parent: Any, subpools: Any
) -> None:
    raw = with_value("status.parent", parent)
    raw["metadata"]["annotations"] |= {TAGS: tags, "os.modelarts.pool/subpools.count": subpools}
    assert len(decided([Pool.parse(raw)], EXPIRED)) == 1


# What asks for a deletion


@pytest.mark.parametrize(
    ("text", "moment"),
    [
        ("2026-01-02", datetime(2026, 1, 2, tzinfo=UTC)),
        ("20260102", datetime(2026, 1, 2, tzinfo=UTC)),
        (" 2026-01-02 ", datetime(2026, 1, 2, tzinfo=UTC)),
        ("2026-01-02T03:04:05Z", NOW),
        ("2026-01-02T03:04:05", NOW),
        ("2026-01-02 03:04:05", NOW),
        ("2026-01-02T11:04:05+08:00", NOW),
        ("2026-01-02T03:04", datetime(2026, 1, 2, 3, 4, tzinfo=UTC)),
    ],
)
def test_an_expiry_is_a_date_or_a_time_in_utc(text: str, moment: datetime) -> None:
    assert parse_expiry(text) == moment


@pytest.mark.parametrize(
    "text",
    [
        "",
        "never",
        "tomorrow",
        "2026",
        "2026-01",
        "2026-1-2",
        "02.01.2026",
        "01/02/2026",
        "2026-02-30",
        "2026-01-02T25:00:00",
        "30d",
        "1767323045",
        # Milliseconds since 1970, in 2027, that are 1801-12-15T00:00 to a lenient reader.
        "1801121500000",
        "1801121512000",
        "２０２６-01-02",
        "-2026-01-02",
    ],
)
def test_an_expiry_that_cannot_be_read_is_a_doubt(text: str) -> None:
    with pytest.raises(ValueError, match="is not an ISO 8601 date or time"):
        parse_expiry(text)
    either = Rules(matching({"any": [{"expired": None}, {"older_than": "1s"}]}))
    assert "its expiry is unknown" in why_kept(pool(tags={"expires-at": text}), either)


@patient
@given(st.integers(1_600_000_000, 4_000_000_000), st.integers(0, 999))
def test_no_number_of_seconds_or_milliseconds_is_taken_for_a_date(at: int, ms: int) -> None:
    for text in (str(at), f"{at}{ms:03}", f"{at}{ms:03}000"):
        with pytest.raises(ValueError, match="is not an ISO 8601"):
            parse_expiry(text)


@patient
@given(st.text())
def test_any_expiry_text_is_a_moment_or_a_doubt(text: str) -> None:
    try:
        moment = parse_expiry(text)
    except ValueError:
        return
    assert isinstance(moment <= NOW, bool)


@patient
@given(st.timedeltas(timedelta(days=-1_000), timedelta(days=1_000)))
def test_a_pool_goes_from_the_moment_when_it_expires(after: timedelta) -> None:
    text = (NOW + after).isoformat()
    assert bool(why_kept(pool(tags={"expires-at": text}), EXPIRED)) == (after > timedelta())


def test_a_pool_without_an_expiry_never_expires() -> None:
    assert why_kept(pool(), EXPIRED) == "no tag expires-at"
    assert why_kept(pool(tags={"Expires-At": "2020-01-01"}), EXPIRED)


def test_a_pool_is_named_by_its_id_alone() -> None:
    found = pool("a", labels={"os.modelarts/name": "nice"})
    assert not why_kept(found, named([found.pool_id]))
    assert why_kept(found, named(["nice"]))
    assert why_kept(found, named([found.pool_id.upper()]))


def test_the_reasons_of_all_that_matched_are_told() -> None:
    found = pool(tags={"expires-at": "2020-01-01", "team": "a"})
    spec = {"any": [{"expired": None}, {"tags": "team"}, {"tags": "other"}]}
    (decision,) = decided([found], Rules(matching(spec)))
    assert decision.reason == "expired: expires-at=2020-01-01; tag team=a"


def test_a_doubt_of_one_matcher_is_a_doubt_of_all() -> None:
    found = pool(tags={"expires-at": "soon", "team": "a"})
    for parts in itertools.permutations([{"expired": None}, {"tags": "team"}]):
        rules = Rules(matching({"any": list(parts)}))
        assert "its expiry is unknown" in why_kept(found, rules)


def test_a_reason_fits_on_one_line_of_bounded_length() -> None:
    found = pool(tags={"expires-at": "2020-01-01", "team": "a\nb\x1b[31m" + "x" * 1_000})
    (decision,) = decided([found], Rules(matching({"tags": "team"})))
    assert decision.delete
    assert len(decision.reason) <= LONGEST_REASON
    assert decision.reason.isprintable()


def test_totals_count_what_goes() -> None:
    pools = [pool("a"), pool("b"), pool("c", control_mode=8)]
    count, by_flavor = totals(decided(pools))
    assert (count, by_flavor) == (2, {"modelarts.vm.cpu.4ud": 4})


def test_a_logical_pool_frees_no_nodes() -> None:
    count, by_flavor = totals(decided([pool("a"), logical("b", "a")]))
    assert (count, by_flavor) == (2, {"modelarts.vm.cpu.4ud": 2})
