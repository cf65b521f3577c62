"""Matchers find yes, no, a doubt or that more must be read; a doubt outweighs everything."""

# ruff: noqa: E501 - what is matched stands beside what is found
from __future__ import annotations

import itertools
import random
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import TypeAdapter

from scheduler import policy
from scheduler.facts import Fact, Facts
from scheduler.matchers import KEYS, Finding, Kind, Matcher, find
from tests.modelarts.pool_documents import (
    FULL,
    TAGS,
    document,
    json_values,
    mutations,
    pool,
    pool_id,
    with_value,
    without,
)
from worker.modelarts import Pool
from worker.modelarts.activity import UsageSeries
from worker.modelarts.schema import Workload
from worker.yaml_source import YamlError

if TYPE_CHECKING:
    from collections.abc import Sequence

NOW = datetime(2026, 1, 2, 3, 4, 5, tzinfo=UTC)
YES, NO, DOUBT, UNREAD = Kind.YES, Kind.NO, Kind.DOUBT, Kind.UNREAD
MATCHER: TypeAdapter[Matcher] = TypeAdapter(Matcher)

patient = settings(deadline=None, max_examples=70)


def finding(spec: Any, of: Facts | Pool) -> Finding:
    """What a matcher finds, given as in YAML."""
    facts = of if isinstance(of, Facts) else Facts(of)
    return find(MATCHER.validate_python(spec), facts, NOW)


def kind(spec: Any, of: Facts | Pool) -> Kind:
    found = finding(spec, of)
    assert bool(found.needs) == (found.kind is UNREAD)
    return found.kind


def old(**changes: Any) -> Pool:
    """A pool that was created ten days ago."""
    return pool(created="2025-12-23T03:04:05Z", **changes)


def tagged(**tags: str) -> Pool:
    return old(tags=tags)


# Time


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("2026-01-02", YES),
        ("20260102", YES),
        (" 2026-01-02 ", YES),
        ("2026-01-03", NO),
        ("2026-01-02T03:04:05Z", YES),
        ("2026-01-02T03:04:06Z", NO),
        ("2026-01-02 03:04", YES),
        ("2026-01-02T11:04:05+08:00", YES),
        ("2026-01-02T03:04:05-01:00", NO),
        ("0001-01-01T00:00:00+14:00", YES),
        ("9999-12-31T23:59:59-14:00", NO),
        ("", DOUBT),
        ("never", DOUBT),
        ("02.01.2026", DOUBT),
        ("2026-02-30", DOUBT),
        ("1767323045", DOUBT),
    ],
)
def test_a_pool_has_expired_when_the_moment_of_its_tag_has_passed(
    text: str, expected: Kind
) -> None:
    assert kind({"expired": None}, old(tags={"expires-at": text})) is expected
    assert kind({"expired": {"tag": "until"}}, old(tags={"until": text})) is expected
    assert kind({"expired": {"tag": "until"}}, old(tags={"expires-at": text})) is NO


def test_an_expiry_tells_what_it_says() -> None:
    assert finding({"expired": None}, old(tags={"expires-at": "2026-01-01"})) == Finding(
        YES, "expired: expires-at=2026-01-01"
    )
    doubtful = finding({"expired": None}, old(tags={"expires-at": "soon"}))
    assert doubtful.reason == (
        "expires-at='soon' is not an ISO 8601 date or time, so its expiry is unknown"
    )


@pytest.mark.parametrize(
    ("tags", "default", "expected"),
    [
        ({"ttl": "10d"}, None, YES),
        ({"ttl": "240h"}, None, YES),
        ({"ttl": "11d"}, None, NO),
        ({"ttl": "forever"}, "1h", NO),
        ({"ttl": " Forever "}, "1h", NO),
        ({}, None, NO),
        ({}, "forever", NO),
        ({}, "10d", YES),
        ({}, "11d", NO),
        ({"ttl": "11d"}, "1h", NO),
        ({"ttl": "1h"}, "forever", YES),
        ({"ttl": ""}, "1h", DOUBT),
        ({"ttl": "7"}, "1h", DOUBT),
        ({"ttl": "1M"}, "1h", DOUBT),
        ({"ttl": "7D"}, "1h", DOUBT),
        ({"ttl": "5ſ"}, "1h", DOUBT),
        ({"ttl": "never"}, "1h", DOUBT),
        # No time to live, or no end of it?
        ({"ttl": "0"}, "1h", DOUBT),
        ({"ttl": "0d"}, "1h", DOUBT),
        ({"TTL": "1h"}, None, NO),
    ],
)
def test_a_time_to_live_is_over_when_the_pool_is_older(
    tags: dict[str, str], default: str | None, expected: Kind
) -> None:
    spec = {"ttl": None if default is None else {"default": default}}
    assert kind(spec, old(tags=tags)) is expected


@pytest.mark.parametrize(
    ("span", "expected"), [("10d", YES), ("864000s", YES), ("864001s", NO), ("0s", YES)]
)
def test_a_pool_is_older_from_the_very_moment(span: str, expected: Kind) -> None:
    assert kind({"older_than": span}, old()) is expected


@pytest.mark.parametrize("spec", [{"older_than": "0s"}, {"ttl": {"default": "1s"}}, {"utilisation": {"of": "gpu", "below": 5}}])  # fmt: skip
@pytest.mark.parametrize("created", ["2026-01-02T03:04:06Z", "", "yesterday", 5, None])
def test_a_creation_time_that_is_unknown_or_in_the_future_is_a_doubt(
    spec: Any, created: Any
) -> None:
    assert kind(spec, pool(created=created)) is DOUBT
    assert kind({"not": spec}, pool(created=created)) is DOUBT


# Texts


@pytest.mark.parametrize(
    ("spec", "expected"),
    [
        ("env", YES),
        ("Env", NO),
        ({"key": "env"}, YES),
        ({"key": "env", "exists": True}, YES),
        ({"key": "env", "exists": False}, NO),
        ({"key": "other", "exists": False}, YES),
        ({"key": "other", "exists": True}, NO),
        ({"key": "env", "equals": "dev"}, YES),
        ({"key": "env", "equals": "Dev"}, NO),
        ({"key": "env", "equals": "de"}, NO),
        ({"key": "env", "one_of": ["test", "dev"]}, YES),
        ({"key": "env", "one_of": ["test"]}, NO),
        ({"key": "env", "glob": "d*"}, YES),
        ({"key": "env", "glob": "?e?"}, YES),
        ({"key": "env", "glob": "[ab]ev"}, NO),
        ({"key": "env", "glob": "D*"}, NO),
        ({"key": "other", "glob": "*"}, NO),
        ({"key": "empty", "equals": ""}, YES),
        ({"key": "empty", "glob": "*"}, YES),
        ({"key": "empty"}, YES),
    ],
)
def test_tags_are_there_or_have_a_value(spec: Any, expected: Kind) -> None:
    assert kind({"tags": spec}, old(tags={"env": "dev", "empty": ""})) is expected


def test_tags_are_looked_for_where_they_are_said_to_be() -> None:
    found = Pool.parse(with_value("metadata.labels", {"in": "label"}, FULL))
    places = {
        "pool": ("expires-at", "2021-12-01"),
        "nodes": ("cost-center", "42"),
        "labels": ("in", "label"),
        "annotations": ("os.modelarts/order.id", "CS1"),
    }
    for on, where in itertools.product(places, repeat=2):
        key, value = places[where]
        expected = YES if on == where else NO
        assert kind({"tags": {"key": key, "equals": value, "on": on}}, found) is expected


@pytest.mark.parametrize("spec", [{"key": "a"}, {"key": "a", "exists": False}])
@pytest.mark.parametrize(
    ("on", "path", "value"),
    [
        ("pool", "metadata.annotations", "text"),
        ("pool", f"metadata.annotations|{TAGS}", "not JSON"),
        ("pool", f"metadata.annotations|{TAGS}", '[{"key": "b", "value": 5}]'),
        ("nodes", "spec", None),
        ("nodes", "spec.resources", "text"),
        ("nodes", "spec.resources", [{"tags": [{"key": "b", "value": 5}]}]),
        ("labels", "metadata.labels", "text"),
        ("labels", "metadata.labels", ""),
        ("labels", "metadata.labels|a", 5),
        ("labels", "metadata.labels|a", None),
        ("annotations", "metadata.annotations", []),
        ("annotations", "metadata.annotations|a", {"b": "c"}),
    ],
)
def test_tags_that_cannot_be_read_are_a_doubt(spec: Any, on: str, path: str, value: Any) -> None:
    path, _, key = path.partition("|")
    found = Pool.parse(with_value(path, {key: value} if key else value))
    for wrapped in (
        {"tags": {**spec, "on": on}},
        {"not": {"tags": {**spec, "on": on}}},
        {"any": [{"older_than": "1s"}, {"tags": {**spec, "on": on}}]},
        {"all": [{"phase": "Error"}, {"tags": {**spec, "on": on}}]},
    ):
        assert kind(wrapped, found) is DOUBT


@pytest.mark.parametrize(
    ("spec", "expected"),
    [
        ("tmp-*", YES),
        ("tmp-7", YES),
        ("tmp", NO),
        ("TMP-*", NO),
        ("x-pool-*", YES),
        ({"glob": "tmp-*", "of": "name"}, YES),
        ({"glob": "tmp-*", "of": "id"}, NO),
        ({"glob": "x-pool-*", "of": "name"}, NO),
        ({"glob": "x-pool-*", "of": "id"}, YES),
        ({"regex": "tmp-[0-9]+"}, YES),
        ({"regex": "tmp-"}, NO),
        ({"regex": "mp-7"}, NO),
        ({"regex": "(?i)TMP-.*"}, YES),
        ({"regex": ".*", "of": "id"}, YES),
        ({"regex": "tmp|x-pool"}, NO),
    ],
)
def test_a_name_or_an_id_fits_a_pattern_from_beginning_to_end(spec: Any, expected: Kind) -> None:
    found = pool("x-pool", labels={"os.modelarts/name": "tmp-7"})
    assert kind({"name": spec}, found) is expected


def test_a_pool_without_a_name_of_its_own_has_none_that_fits() -> None:
    nameless = Pool.parse(without("metadata.labels"))
    assert kind({"name": {"glob": "*", "of": "name"}}, nameless) is NO
    assert kind({"name": "*"}, nameless) is YES


@pytest.mark.parametrize("name", [5, None, ["prod"], {"a": "b"}], ids=str)
def test_a_name_that_is_not_text_is_a_doubt(name: Any) -> None:
    found = Pool.parse(with_value("metadata.labels", {"os.modelarts/name": name}))
    assert kind({"name": "prod-*"}, found) is DOUBT
    assert kind({"not": {"name": "prod-*"}}, found) is DOUBT
    assert kind({"name": {"glob": "auto-*", "of": "id"}}, found) is YES


@pytest.mark.parametrize(
    "spec",
    [
        {"regex": "(a|a)*b"},
        {"regex": "(a*)*b"},
        {"regex": "(a+)+(a+)+(a+)+b"},
        {"regex": "(.*)(.*)(.*)(.*)(.*)(.*)(.*)(.*)b"},
        {"regex": "(((a?){30})*)*b"},
        {"glob": "*a" * 40 + "b"},
    ],
)
def test_no_pattern_takes_for_ever_on_any_name(spec: Any) -> None:
    # An engine that goes back over what it has matched would not end before the next ice age.
    found = pool(labels={"os.modelarts/name": "a" * 128})
    matcher = MATCHER.validate_python({"name": {**spec, "of": "name"}})
    assert [find(matcher, Facts(found), NOW).kind for _ in range(100)] == [NO] * 100


# What the document says in one word


@pytest.mark.parametrize(
    ("spec", "expected"),
    [
        ({"workspace": "0"}, YES),
        ({"workspace": ["a", "0"]}, YES),
        ({"workspace": "1"}, NO),
        ({"workspace": "*"}, NO),
        ({"type": "Dedicate"}, YES),
        ({"type": "Logical"}, NO),
        ({"scope": "Train"}, YES),
        ({"scope": ["Notebook", "Infer"]}, YES),
        ({"flavor": "modelarts.bm.npu.arm.8snt9b"}, YES),
        ({"flavor": ["modelarts.*.gpu.*", "modelarts.*.npu.*"]}, YES),
        ({"flavor": "modelarts.*.gpu.*"}, NO),
        ({"billing": "postpaid"}, YES),
        ({"billing": "prepaid"}, NO),
        ({"phase": "Running"}, YES),
        ({"phase": ["Error", "Run*"]}, YES),
        ({"phase": "Error"}, NO),
        ({"driver": {"gpu": "535.*"}}, YES),
        ({"driver": {"gpu": "535.*", "npu": "23.0.?"}}, YES),
        ({"driver": {"gpu": "535.*", "npu": "24*"}}, NO),
        ({"driver": {"npu": "535.*"}}, NO),
    ],
    ids=str,
)
def test_what_the_document_says_in_one_word(spec: Any, expected: Kind) -> None:
    full = Pool.parse(FULL)
    assert kind(spec, full) is expected
    assert kind({"not": spec}, full) is {YES: NO, NO: YES}[expected]


def test_a_pool_is_in_the_first_workspace_unless_it_says_otherwise() -> None:
    assert kind({"workspace": "0"}, pool()) is YES
    assert kind({"workspace": "0"}, pool(labels={"os.modelarts/workspace.id": "a"})) is NO


def test_what_a_logical_pool_does_not_have_does_not_match() -> None:
    logical = Pool.parse(
        without("spec.scope", without("status.resources", document(parent=pool_id("parent"))))
    )
    assert kind({"type": "Logical"}, logical) is YES
    assert kind({"scope": "Train"}, logical) is NO
    assert kind({"driver": {"gpu": "*"}}, logical) is NO


def test_a_flavor_counts_even_while_there_are_no_nodes_of_it() -> None:
    # A pool that was scaled down to its CPU nodes is a GPU pool all the same.
    ordered = [{"flavor": "cpu", "count": 2}, {"flavor": "gpu", "count": 0, "maxCount": 9}]
    found = Pool.parse(with_value("spec.resources", ordered))
    assert kind({"flavor": "gpu"}, found) is YES
    for part in ("creating", "available", "abnormal", "deleting"):
        found = Pool.parse(with_value("status.resources", {part: [{"flavor": "gpu"}]}))
        assert kind({"flavor": "gpu"}, found) is YES


@pytest.mark.parametrize(
    ("spec", "path", "value"),
    [
        ({"workspace": "0"}, "metadata.labels", {"os.modelarts/workspace.id": 0}),
        ({"type": "Logical"}, "spec.type", ""),
        ({"type": "Logical"}, "spec.type", 5),
        ({"type": "Logical"}, "spec", "text"),
        ({"scope": "Infer"}, "spec.scope", "Infer"),
        ({"scope": "Infer"}, "spec.scope", ""),
        ({"scope": "Infer"}, "spec.scope", ["Train", ["Infer"]]),
        ({"scope": "Infer"}, "spec.scope", {"Infer": True}),
        ({"flavor": "gpu"}, "spec.resources", {"flavor": "gpu"}),
        ({"flavor": "gpu"}, "spec.resources", [{"flavor": ["gpu"]}]),
        ({"flavor": "gpu"}, "spec.resources", [{"count": 1}]),
        ({"flavor": "gpu"}, "spec.resources", ["gpu"]),
        ({"flavor": "gpu"}, "status.resources", "gpu"),
        ({"flavor": "gpu"}, "status.resources", ""),
        ({"flavor": "gpu"}, "status.resources.abnormal", "gpu"),
        ({"flavor": "gpu"}, "status.resources.deleting", [{"flavor": ""}]),
        ({"billing": "prepaid"}, "metadata.annotations", {}),
        ({"billing": "prepaid"}, "metadata.annotations", {"os.modelarts/billing.mode": 1}),
        ({"phase": "Error"}, "status.phase", None),
        ({"phase": "Error"}, "status.phase", ["Error"]),
        ({"phase": "Error"}, "status", "Error"),
        ({"driver": {"gpu": "535"}}, "spec.driver", "535"),
        ({"driver": {"gpu": "535"}}, "spec.driver", {"gpuVersion": 535}),
        ({"driver": {"gpu": "535"}}, "status.driver", "535"),
        ({"driver": {"gpu": "535"}}, "status.driver", {"gpu": "535"}),
        ({"driver": {"gpu": "535"}}, "status.driver", {"gpu": {"version": ["535"]}}),
    ],
    ids=str,
)
def test_what_cannot_be_read_is_a_doubt_also_where_the_opposite_is_asked_for(
    spec: Any, path: str, value: Any
) -> None:
    found = Pool.parse(with_value(path, value))
    assert kind(spec, found) is DOUBT
    assert kind({"not": spec}, found) is DOUBT


# What takes further calls


def workload(status: str | None, **more: Any) -> Workload:
    return Workload.model_validate({"status": status, "name": "w", **more})


@pytest.mark.parametrize(
    ("statuses", "since", "expected"),
    [
        ([], NOW - timedelta(days=2), YES),
        ([], NOW - timedelta(days=2) + timedelta(seconds=1), NO),
        ([], NOW, NO),
        ([], None, NO),
        ([], NOW + timedelta(days=9), NO),
        (["Completed", "Failed"], NOW - timedelta(days=9), YES),
        (["Completed", "Running"], NOW - timedelta(days=9), NO),
        (["Queue"], NOW - timedelta(days=9), NO),
        ([None], NOW - timedelta(days=9), NO),
        (["Hibernating"], NOW - timedelta(days=9), NO),
    ],
)
def test_a_pool_is_idle_when_nothing_has_used_it_for_so_long(
    statuses: list[str | None], since: datetime | None, expected: Kind
) -> None:
    facts = Facts(old(), workloads=[workload(each) for each in statuses], idle_since=since)
    assert kind({"idle": "2d"}, facts) is expected


def usage(percent: float, days: float = 2, metric: str = "gpuUtil") -> dict[str, UsageSeries]:
    """A metric that was constant for so many days."""
    end = round(NOW.timestamp())
    points = [(at * 1000, percent) for at in range(end - round(days * 86_400), end + 1, 900)]
    return {metric: UsageSeries(points, timedelta(seconds=900))}


@pytest.mark.parametrize(
    ("seen", "expected"),
    [
        (usage(4.9), YES),
        (usage(5), NO),
        (usage(100), NO),
        (usage(0, days=0.5), DOUBT),
        (usage(0, metric="npuUtil"), DOUBT),
        ({}, DOUBT),
    ],
    ids=["below", "at the bound", "above", "half the time", "another metric", "nothing"],
)
def test_a_pool_is_used_little_when_its_peak_over_the_whole_time_is_below(
    seen: Any, expected: Kind
) -> None:
    spec = {"utilisation": {"of": "gpu", "below": 5, "over": "1d"}}
    assert kind(spec, Facts(old(), usage=seen)) is expected


def test_a_pool_younger_than_the_time_asked_about_is_not_looked_at_further() -> None:
    assert kind({"utilisation": {"of": "gpu", "below": 5, "over": "11d"}}, old()) is NO
    assert kind({"utilisation": {"of": "gpu", "below": 5, "over": "10d"}}, old()) is UNREAD


def test_facts_that_are_missing_are_asked_for_and_those_that_could_not_be_read_are_doubts() -> None:
    for spec, fact in (
        ({"idle": "1d"}, Fact.WORKLOADS),
        ({"utilisation": {"of": "gpu", "below": 5}}, Fact.USAGE),
    ):
        for wrapped in (spec, {"not": spec}, {"all": [spec, spec]}, {"any": [spec]}):
            assert finding(wrapped, old()) == Finding(UNREAD, needs=frozenset({fact}))
            failed = finding(wrapped, Facts(old(), unreadable={fact: "HTTP 500"}))
            assert failed == Finding(DOUBT, f"its {fact} cannot be read: HTTP 500")
            # Even if there is nothing to say about why: what is asked for again has no end.
            assert kind(wrapped, Facts(old(), unreadable={fact: ""})) is DOUBT


# Combining

LEAF = {
    YES: {"older_than": "1s"},
    NO: {"phase": "Error"},
    DOUBT: {"ttl": None},
    UNREAD: {"idle": "1d"},
}
FOUR = old(tags={"ttl": "?"})


def test_the_leaves_are_what_they_are_taken_for() -> None:
    assert {each: kind(spec, FOUR) for each, spec in LEAF.items()} == {each: each for each in Kind}


@pytest.mark.parametrize("kinds", [k for n in (1, 2, 3) for k in itertools.product(Kind, repeat=n)])
def test_all_and_any_follow_from_what_is_found_inside(kinds: Sequence[Kind]) -> None:
    inside = [LEAF[each] for each in kinds]
    # The first of these that is found inside outweighs the rest.
    of_all = next(each for each in (DOUBT, NO, UNREAD, YES) if each in kinds)
    of_any = next(each for each in (DOUBT, YES, UNREAD, NO) if each in kinds)
    assert kind({"all": inside}, FOUR) is of_all
    assert kind({"any": inside}, FOUR) is of_any


@pytest.mark.parametrize("inside", Kind)
def test_not_turns_yes_and_no_and_nothing_else(inside: Kind) -> None:
    expected = {YES: NO, NO: YES}.get(inside, inside)
    assert kind({"not": LEAF[inside]}, FOUR) is expected


def test_a_call_is_not_made_where_a_cheaper_matcher_decides() -> None:
    assert kind({"all": [LEAF[UNREAD], LEAF[NO]]}, FOUR) is NO
    assert kind({"any": [LEAF[UNREAD], LEAF[YES]]}, FOUR) is YES
    assert kind({"not": {"any": [LEAF[UNREAD], LEAF[YES]]}}, FOUR) is NO


def test_the_reasons_of_what_matched_are_told() -> None:
    pooled = tagged(env="dev", team="a")
    both = {"all": [{"tags": "env"}, {"tags": "team"}]}
    assert finding(both, pooled).reason == "tag env=dev and tag team=a"
    either = {"any": [{"tags": "env"}, {"tags": "other"}, {"tags": "team"}]}
    assert finding(either, pooled).reason == "tag env=dev; tag team=a"


# Any matcher, any pool

specs = st.recursive(
    st.sampled_from(
        [
            {"expired": None},
            {"ttl": {"default": "3d"}},
            {"older_than": "1d"},
            {"tags": "env"},
            {"tags": {"key": "env", "glob": "d*", "on": "nodes"}},
            {"tags": {"key": "os.modelarts/name", "exists": False, "on": "labels"}},
            {"tags": {"key": "os.modelarts/order.id", "equals": "0", "on": "annotations"}},
            {"name": "t*"},
            {"name": {"regex": "[a-z]+-.*", "of": "id"}},
            {"workspace": "0"},
            {"type": "Logical"},
            {"scope": "Train"},
            {"flavor": "*npu*"},
            {"billing": "postpaid"},
            {"phase": "Running"},
            {"driver": {"gpu": "5*"}},
            {"idle": "1d"},
            {"utilisation": {"of": "gpu", "below": 50}},
        ]
    ),
    lambda inner: (
        st.builds(lambda each: {"not": each}, inner)
        | st.builds(
            lambda key, each: {key: each},
            st.sampled_from(["all", "any"]),
            st.lists(inner, min_size=1, max_size=4),
        )
    ),
    max_leaves=8,
)
pools = mutations().map(Pool.parse) | st.builds(
    lambda tags, created: pool(tags=tags, created=created),
    st.dictionaries(
        st.sampled_from(["env", "ttl", "expires-at"]),
        st.sampled_from(["dev", "1h", "forever", "2020-01-01", "2030-01-01", "?"]),
    ),
    st.sampled_from(["2025-12-23T03:04:05Z", "2026-01-02T00:00:00Z", "?"]),
)
workloads = st.lists(
    st.sampled_from(["Running", "Completed", None]).map(workload)
    | st.dictionaries(st.sampled_from(["status", "name", "jobName", "type"]), json_values()).map(
        Workload.model_validate
    ),
    max_size=2,
)
unreadable = st.dictionaries(st.sampled_from(Fact), st.sampled_from(["", "HTTP 500"]))
facts_read = st.builds(
    Facts,
    pools,
    workloads=st.none() | workloads,
    usage=st.none() | st.sampled_from([usage(0), usage(99), {}]),
    idle_since=st.sampled_from([None, NOW, NOW - timedelta(days=9)]),
    unreadable=unreadable,
)


def shuffled(spec: Any, rng: random.Random) -> Any:
    """The same with every `all` and `any` in another order."""
    (key, inside), *_ = spec.items()
    if key == "not":
        return {key: shuffled(inside, rng)}
    if key in {"all", "any"}:
        parts = [shuffled(each, rng) for each in inside]
        return {key: rng.sample(parts, len(parts))}
    return spec


@patient
@given(specs, facts_read)
def test_looking_always_ends_in_a_finding(spec: Any, facts: Facts) -> None:
    found = finding(spec, facts)
    assert bool(found.needs) == (found.kind is UNREAD)
    for fact in found.needs:
        assert getattr(facts, fact) is None, "what has been read is not asked for again"
        assert fact not in facts.unreadable


@patient
@given(specs, facts_read)
def test_a_double_negation_changes_nothing(spec: Any, facts: Facts) -> None:
    assert kind({"not": {"not": spec}}, facts) is kind(spec, facts)


@patient
@given(specs, facts_read, st.integers())
def test_the_order_inside_changes_nothing(spec: Any, facts: Facts, seed: int) -> None:
    assert kind(shuffled(spec, random.Random(seed)), facts) is kind(spec, facts)


@patient
@given(st.lists(specs, min_size=1, max_size=4), facts_read)
def test_not_all_is_any_not(parts: list[Any], facts: Facts) -> None:
    negated = [{"not": each} for each in parts]
    assert kind({"not": {"all": parts}}, facts) is kind({"any": negated}, facts)
    assert kind({"not": {"any": parts}}, facts) is kind({"all": negated}, facts)


@patient
@given(specs, specs, facts_read)
def test_a_doubt_inside_is_a_doubt_outside(doubtful: Any, other: Any, facts: Facts) -> None:
    if kind(doubtful, facts) is DOUBT:
        for spec in (
            {"not": doubtful},
            {"all": [other, doubtful]},
            {"any": [other, doubtful]},
            {"all": [{"not": {"any": [doubtful, other]}}]},
        ):
            assert kind(spec, facts) is DOUBT


@patient
@given(json_values(), json_values(), json_values())
def test_no_value_where_a_matcher_looks_makes_it_fail(one: Any, two: Any, three: Any) -> None:
    raw = with_value("metadata.annotations", {TAGS: one, "os.modelarts/order.id": two}, FULL)
    raw["metadata"]["labels"] = three
    raw["spec"]["resources"] = one
    raw["status"]["driver"] = two
    for spec in ({"tags": "a"}, {"flavor": "*"}, {"driver": {"gpu": "*", "npu": "*"}}):
        assert kind(spec, Pool.parse(raw)) in Kind


# What is refused


BAD = [
    (
        "expird:",
        "8: match: a map with exactly one of all, any, not, expired, ttl, older_than, tags, name, workspace, type, scope, flavor, billing, phase, driver, idle, utilisation is needed",
    ),
    (
        "older_than: 3d\nidle: 2d",
        "8: match: a map with exactly one of all, any, not, expired, ttl, older_than, tags, name, workspace, type, scope, flavor, billing, phase, driver, idle, utilisation is needed",
    ),
    (
        "all:\n  - older_than: 3d\n    idle: 2d",
        "10: match.all[0]: a map with exactly one of all, any, not, expired, ttl, older_than, tags, name, workspace, type, scope, flavor, billing, phase, driver, idle, utilisation is needed",
    ),
    ("all: []", "9: match.all: it must not be empty"),
    ("any:", "9: match.any: null is not accepted: a list is needed"),
    ("any: {ttl: }", "9: match.any: a list is needed"),
    (
        "not:",
        "9: match.not: null is not accepted: a map with exactly one of all, any, not, expired, ttl, older_than, tags, name, workspace, type, scope, flavor, billing, phase, driver, idle, utilisation is needed",
    ),
    (
        "not: [ttl: ]",
        "9: match.not: a map with exactly one of all, any, not, expired, ttl, older_than, tags, name, workspace, type, scope, flavor, billing, phase, driver, idle, utilisation is needed",
    ),
    (
        "not:\n  not:\n    not: 5",
        "11: match.not.not.not: 5 is not accepted: a map with exactly one of all, any, not, expired, ttl, older_than, tags, name, workspace, type, scope, flavor, billing, phase, driver, idle, utilisation is needed",
    ),
    (
        "not:\n  not: {ttl: }\n  idle: 1d",
        "9: match.not: a map with exactly one of all, any, not, expired, ttl, older_than, tags, name, workspace, type, scope, flavor, billing, phase, driver, idle, utilisation is needed",
    ),
    ("expired: expires-at", "9: match.expired: 'expires-at' is not accepted: a map is needed"),
    ("expired: false", "9: match.expired: false is not accepted: a map is needed"),
    (
        "expired: {tag: ''}",
        "9: match.expired.tag: '' is not accepted: it must not be empty",
    ),
    ("expired:\n  key: x", "10: match.expired.key: there is no such field; accepted: tag"),
    ("ttl: 7d", "9: match.ttl: '7d' is not accepted: a map is needed"),
    (
        "ttl: {default: 7}",
        "9: match.ttl.default: 7 is not accepted; accepted: a number and a unit, such as 90m, 12h, 7d or 2w",
    ),
    (
        "ttl: {default: }",
        "9: match.ttl.default: null is not accepted; accepted: a number and a unit, such as 90m, 12h, 7d or 2w",
    ),
    (
        "ttl: {default: 0d}",
        "9: match.ttl.default: '0d' is not accepted; accepted: a longer time, or forever",
    ),
    (
        "ttl: {default: never}",
        "9: match.ttl.default: 'never' is not a duration; accepted: a number and a unit, such as 90m, 12h, 7d or 2w",
    ),
    (
        "older_than: 30",
        "9: match.older_than: 30 is not accepted; accepted: a number and a unit, such as 90m, 12h, 7d or 2w",
    ),
    (
        "older_than: 1M",
        "9: match.older_than: '1M' is not a duration; accepted: a number and a unit, such as 90m, 12h, 7d or 2w",
    ),
    (
        "older_than: {days: 3}",
        "9: match.older_than: accepted: a number and a unit, such as 90m, 12h, 7d or 2w",
    ),
    ("tags: {env: dev}", "9: match.tags.key: it is missing"),
    (
        "tags: {key: env, value: dev}",
        "9: match.tags.value: there is no such field; accepted: equals, exists, glob, key, on, one_of",
    ),
    (
        "tags: {key: env, equals: 5}",
        "9: match.tags.equals: 5 is not accepted: a text is needed; put it in quotes",
    ),
    (
        "tags: {key: env, equals: true}",
        "9: match.tags.equals: true is not accepted: a text is needed; put it in quotes",
    ),
    (
        "tags: {key: env, one_of: dev}",
        "9: match.tags.one_of: 'dev' is not accepted: a list is needed",
    ),
    (
        "tags: {key: env, one_of: []}",
        "9: match.tags.one_of: it must not be empty",
    ),
    (
        "tags: {key: env, equals: a, glob: b}",
        "9: match.tags: more than one of exists, equals, one_of, glob",
    ),
    (
        "tags: {key: env, on: pools}",
        "9: match.tags.on: 'pools' is not accepted: input should be 'pool', 'nodes', 'labels' or 'annotations'",
    ),
    ("tags: [env]", "9: match.tags: a map is needed"),
    (
        "name: ''",
        "9: match.name: '' is not accepted: it must not be empty",
    ),
    ("name: {}", "9: match.name: exactly one of glob and regex is needed"),
    ("name: {glob: a, regex: b}", "9: match.name: exactly one of glob and regex is needed"),
    (
        "name: {regex: '(a'}",
        "9: match.name.regex: '(a' is not accepted: not a regular expression of RE2: missing ): (a",
    ),
    (
        "name: {regex: '(?=a)b'}",
        "9: match.name.regex: '(?=a)b' is not accepted: not a regular expression of RE2: invalid perl operator: (?=",
    ),
    (
        "name: {regex: '((a{99}){99}){99}'}",
        "9: match.name.regex: '((a{99}){99}){99}' is not accepted: not a regular expression of RE2: invalid repetition size: {99}",
    ),
    (
        "name: {glob: a, of: title}",
        "9: match.name.of: 'title' is not accepted: input should be 'name', 'id' or 'either'",
    ),
    (
        "workspace: 0",
        "9: match.workspace: 0 is not accepted: a text or a list of texts is needed",
    ),
    (
        "workspace: [0]",
        "9: match.workspace[0]: 0 is not accepted: a text is needed; put it in quotes",
    ),
    (
        "type: Physical",
        "9: match.type: 'Physical' is not accepted: input should be 'Dedicate' or 'Logical'",
    ),
    (
        "scope: Training",
        "9: match.scope: 'Training' is not accepted: input should be 'Train', 'Infer' or 'Notebook'",
    ),
    ("scope: []", "9: match.scope: it must not be empty"),
    ("flavor:", "9: match.flavor: null is not accepted: a text or a list of texts is needed"),
    (
        "flavor: [a, '']",
        "9: match.flavor[1]: '' is not accepted: it must not be empty",
    ),
    (
        "billing: free",
        "9: match.billing: 'free' is not accepted: input should be 'postpaid' or 'prepaid'",
    ),
    ("phase: {Error: }", "9: match.phase: a text or a list of texts is needed"),
    (
        "phase:\n  - Error\n  - 5",
        "11: match.phase[1]: 5 is not accepted: a text is needed; put it in quotes",
    ),
    ("driver: 535*", "9: match.driver: '535*' is not accepted: a map is needed"),
    ("driver: {}", "9: match.driver: at least one of gpu and npu is needed"),
    (
        "driver: {gpu: 535}",
        "9: match.driver.gpu: 535 is not accepted: a text is needed; put it in quotes",
    ),
    ("driver: {cpu: a}", "9: match.driver.cpu: there is no such field; accepted: gpu, npu"),
    (
        "idle:",
        "9: match.idle: null is not accepted; accepted: a number and a unit, such as 90m, 12h, 7d or 2w",
    ),
    ("utilisation: {below: 5}", "9: match.utilisation.of: it is missing"),
    ("utilisation: {of: gpu}", "9: match.utilisation.below: it is missing"),
    (
        "utilisation: {of: ram, below: 5}",
        "9: match.utilisation.of: 'ram' is not accepted: input should be 'gpu', 'npu' or 'cpu'",
    ),
    (
        "utilisation: {of: gpu, below: 0}",
        "9: match.utilisation.below: 0 is not accepted: input should be greater than 0",
    ),
    (
        "utilisation: {of: gpu, below: 101}",
        "9: match.utilisation.below: 101 is not accepted: input should be less than or equal to 100",
    ),
    (
        "utilisation: {of: gpu, below: 5%}",
        "9: match.utilisation.below: '5%' is not accepted: input should be a valid number, unable to parse string as a number",
    ),
    (
        "utilisation: {of: gpu, below: 5, over: 59m}",
        "9: match.utilisation.over: '59m' is not accepted: from 1h to 30d are accepted",
    ),
    (
        "utilisation: {of: gpu, below: 5, over: 31d}",
        "9: match.utilisation.over: '31d' is not accepted: from 1h to 30d are accepted",
    ),
]


@pytest.mark.parametrize(("lines", "sentence"), BAD, ids=lambda value: value)
def test_bad_input_is_told_with_line_field_value_and_what_is_accepted(
    lines: str, sentence: str
) -> None:
    inside = "\n".join(f"      {line}" for line in lines.splitlines())
    text = (
        f"\nprojects:\n  a:\n    id: x\npolicies:\n  p:\n    projects: [a]\n    match:\n{inside}\n"
    )
    with pytest.raises(YamlError) as error:
        policy.parse(text, "file")
    line, _, rest = sentence.partition(": ")
    assert f"file:{line}: policies.p.{rest}" in error.value.sentences


def test_every_matcher_has_its_bad_input() -> None:
    assert {lines.partition(":")[0] for lines, _ in BAD} >= set(KEYS)
