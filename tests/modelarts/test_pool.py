"""What a pool's document means, however oddly it says it: a doubt is never read as a yes to go."""

from __future__ import annotations

import json
from collections import Counter
from datetime import UTC, datetime, timedelta, timezone
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
    document,
    exact,
    json_values,
    mutations,
    nested,
    pool,
    with_value,
    without,
)
from worker.modelarts import Billing, Pool, UnreadableTagsError, node_billing
from worker.modelarts.pool import parse_tags
from worker.modelarts.schema import Node

patient = settings(deadline=None)


def read(path: str, value: Any) -> Pool:
    """The example with one other value."""
    return Pool.parse(with_value(path, value))


def read_without(path: str) -> Pool:
    """The example without one field."""
    return Pool.parse(without(path))


def annotated(key: str, value: Any) -> Pool:
    return pool(annotations={key: value})


def test_the_example_means_what_it_says() -> None:
    found = Pool.parse(EXAMPLE)
    assert found.pool_id == "auto-pool-os-86c13962597848eeb29c5861153a391f"
    assert found.display_name == "auto-pool-os"
    assert found.created == "2022-09-16T03:10:40Z"
    assert found.created_at == datetime(2022, 9, 16, 3, 10, 40, tzinfo=UTC)
    assert (found.phase, found.message, found.parent) == ("Running", "", "")
    assert (found.billing, found.control_mode, found.frozen) == (Billing.POSTPAID, 0, False)
    assert (found.is_logical, found.subpool_count) == (False, 0)
    assert found.nodes_by_flavor == {"modelarts.vm.cpu.4ud": 2}
    assert (found.tags, found.node_tags) == ({}, [])
    assert repr(found) == "Pool('auto-pool-os-86c13962597848eeb29c5861153a391f')"


@patient
@given(mutations())
def test_no_document_makes_a_fact_fail(raw: dict[str, Any]) -> None:
    found = Pool.parse(raw)
    assert isinstance(found.billing, Billing)
    assert isinstance(found.frozen, bool)
    assert isinstance(found.is_logical, bool)
    assert found.created_at is None or found.created_at.tzinfo
    assert found.control_mode is None or type(found.control_mode) is int
    assert found.subpool_count is None or type(found.subpool_count) is int
    assert all(type(count) is int for count in found.nodes_by_flavor.values())
    texts = [found.display_name, found.created, found.phase, found.message, found.parent]
    assert all(isinstance(text, str) for text in texts)
    for read_tags in (lambda: found.tags.items(), lambda: found.node_tags):
        try:
            pairs = list(read_tags())
        except UnreadableTagsError:
            continue
        assert all(isinstance(key, str) and isinstance(value, str) for key, value in pairs)


# Billing


def test_billing_is_known_only_if_it_is_said_plainly() -> None:
    assert annotated(BILLING, "0").billing is Billing.POSTPAID
    assert annotated(BILLING, "1").billing is Billing.PREPAID


@patient
@given(json_values().filter(lambda value: exact(value) not in {'"0"', '"1"'}))
def test_any_other_billing_is_unknown(value: Any) -> None:
    assert annotated(BILLING, value).billing is Billing.UNKNOWN


@pytest.mark.parametrize("value", [0, 1, False, True, None, "", " 0", "0 ", "0\n", "00", "2", "٠"])
def test_a_billing_that_only_looks_like_one_is_unknown(value: Any) -> None:
    assert annotated(BILLING, value).billing is Billing.UNKNOWN


def test_billing_is_unknown_if_the_annotations_are_missing_or_no_map() -> None:
    assert read_without("metadata.annotations").billing is Billing.UNKNOWN
    for value in (None, [], [{BILLING: "0"}], "0", 7, True):
        assert read("metadata.annotations", value).billing is Billing.UNKNOWN


def test_a_nodes_billing_is_read_like_a_pools() -> None:
    def node(metadata: Any) -> Node:
        return Node.model_validate({"metadata": metadata})

    assert node_billing(node({"annotations": {BILLING: "1"}})) is Billing.PREPAID
    assert node_billing(node({"annotations": {BILLING: "0"}})) is Billing.POSTPAID
    odd: list[Any] = [None, [], "1", {}, {"annotations": None}, {"annotations": {BILLING: 1}}]
    for metadata in odd:
        assert node_billing(node(metadata)) is Billing.UNKNOWN


# Frozen


@patient
@given(st.integers(0, 2**70))
def test_a_pool_is_frozen_if_one_of_two_bits_is_set(mode: int) -> None:
    found = pool(control_mode=mode)
    assert found.control_mode == mode
    assert found.frozen == (mode // 8 % 2 == 1 or mode // 16 % 2 == 1)


@pytest.mark.parametrize(
    ("mode", "frozen"),
    [(0, False), (1, False), (2, False), (4, False), (7, False), (8, True), (16, True), (31, True)],
)
def test_the_documented_control_modes(mode: int, frozen: bool) -> None:
    assert pool(control_mode=mode).frozen is frozen


@patient
@given(json_values().filter(lambda value: value is not None and type(value) is not int))
def test_a_control_mode_that_is_no_number_may_be_frozen(value: Any) -> None:
    assert pool(control_mode=value).control_mode is None
    assert pool(control_mode=value).frozen


@pytest.mark.parametrize("value", [True, False, 0.0, "0", "", [], {}, -1, -32])
def test_a_control_mode_that_only_looks_like_one_may_be_frozen(value: Any) -> None:
    assert pool(control_mode=value).frozen


def test_a_pool_without_a_control_mode_is_not_frozen() -> None:
    assert not read("spec.controlMode", None).frozen
    assert not read_without("spec").frozen


@pytest.mark.parametrize("value", [None, [], "", 7, True, [{"controlMode": 0}]])
def test_a_pool_whose_spec_cannot_be_read_may_be_frozen(value: Any) -> None:
    assert read("spec", value).frozen


# Sub-pools


@patient
@given(st.integers(0, 999_999_999))
def test_the_number_of_subpools_is_read(count: int) -> None:
    assert annotated(SUBPOOLS, str(count)).subpool_count == count


@patient
@given(json_values().filter(lambda value: not (isinstance(value, str) and value.isdecimal())))
def test_a_number_of_subpools_that_is_none_is_not_taken_for_0(value: Any) -> None:
    assert annotated(SUBPOOLS, value).subpool_count is None


@pytest.mark.parametrize(
    "value",
    [0, 2, False, None, "", " ", "-1", "+1", "1.0", "0x1", "1\n", "٣", "²", "1_0", "9" * 5_000],
)
def test_a_number_of_subpools_that_only_looks_like_one_is_unknown(value: Any) -> None:
    assert annotated(SUBPOOLS, value).subpool_count is None


def test_a_pool_that_does_not_say_has_no_subpools() -> None:
    assert read_without("metadata.annotations").subpool_count == 0


def test_a_logical_pool_names_its_parent() -> None:
    found = pool("child", parent="parent")
    assert (found.is_logical, found.parent) == (True, "parent")
    odd: list[Any] = [None, 7, True, [], {}]
    for value in odd:
        assert read("status.parent", value).parent == ""


# Creation


@pytest.mark.parametrize(
    ("text", "moment"),
    [
        ("2021-11-01T03:49:41Z", datetime(2021, 11, 1, 3, 49, 41, tzinfo=UTC)),
        ("2021-11-01T03:49:41", datetime(2021, 11, 1, 3, 49, 41, tzinfo=UTC)),
        ("2021-11-01T03:49:41.123456789Z", datetime(2021, 11, 1, 3, 49, 41, 123456, tzinfo=UTC)),
        ("2021-11-01T03:49:41+08:00", datetime(2021, 10, 31, 19, 49, 41, tzinfo=UTC)),
        ("0001-01-01T00:00:00+14:00", datetime(1, 1, 1, tzinfo=timezone(timedelta(hours=14)))),
    ],
)
def test_the_creation_is_read_in_utc_unless_it_says_otherwise(text: str, moment: datetime) -> None:
    assert pool(created=text).created_at == moment
    assert pool(created=text).created == text


@pytest.mark.parametrize(
    "value",
    [
        "",
        "yesterday",
        "2021-13-01T00:00:00Z",
        "2021-02-29T00:00:00Z",
        "2021-11-01T25:00:00Z",
        "0000-00-00T00:00:00Z",
        "10000-01-01T00:00:00Z",
        "2021-11-01T00:00:00+99:99",
        "1635738581",
        "\ud800",
        None,
        1635738581,
        True,
        [],
        {},
    ],
    ids=ascii,
)
def test_a_creation_that_cannot_be_read_is_unknown(value: Any) -> None:
    assert pool(created=value).created_at is None
    assert pool(created=value).created == (value if isinstance(value, str) else "")


@patient
@given(st.text(st.characters()) | st.text("0123456789-:T.Z+ W", max_size=30))
def test_no_creation_text_fails_and_every_moment_can_be_compared(text: str) -> None:
    moment = pool(created=text).created_at
    if moment is not None:
        assert isinstance(moment < datetime.now(UTC), bool)
        assert isinstance(datetime.now(UTC) - moment, timedelta)


# Nodes


def test_nodes_are_those_there_are() -> None:
    # 3 available, 1 abnormal, 1 creating; those being deleted count no more.
    assert Pool.parse(FULL).nodes_by_flavor == {"modelarts.bm.npu.arm.8snt9b": 5}


def test_nodes_are_those_ordered_if_the_status_is_blank() -> None:
    assert read_without("status.resources").nodes_by_flavor == {"modelarts.vm.cpu.4ud": 2}


@pytest.mark.parametrize("count", [True, False, None, "2", 2.0, -2, 0, [], {}])
def test_a_count_that_is_none_counts_no_nodes(count: Any) -> None:
    available = [{"flavor": "a", "count": count}, 7, {"flavor": 7, "count": 1}, {"count": 1}]
    raw = document()
    raw["status"]["resources"]["available"] = [*available, {"flavor": "b", "count": 1}]
    assert Pool.parse(raw).nodes_by_flavor == Counter(b=1)


# Tags


def tagged(text: Any) -> Pool:
    return annotated(TAGS, text)


@pytest.mark.parametrize(
    ("text", "tags"),
    [
        ("", {}),
        ("[]", {}),
        ("{}", {}),
        ('[{"key": "a", "value": "1"}, {"key": "b", "value": "2"}]', {"a": "1", "b": "2"}),
        ('[{"key": "a"}]', {"a": ""}),
        ('[{"key": "a", "value": null}]', {"a": ""}),
        ('[{"key": "a", "values": ["1"]}]', {"a": "1"}),
        ('[{"key": "a", "values": "1"}]', {"a": "1"}),
        ('[{"key": "a", "values": []}]', {"a": ""}),
        ('[{"key": "a", "values": ["1"], "value": "1"}]', {"a": "1"}),
        ('[{"key": "a", "value": "1", "type": "user"}]', {"a": "1"}),
        ('[{"key": "a", "value": "1"}, {"key": "a", "value": "1"}]', {"a": "1"}),
        ('{"a": "1", "b": null}', {"a": "1", "b": ""}),
        ('{"key": "1"}', {"key": "1"}),
        (' {"ü": "池"} ', {"ü": "池"}),
    ],
)
def test_tags_are_read_in_every_form(text: str, tags: dict[str, str]) -> None:
    assert tagged(text).tags == tags


@pytest.mark.parametrize(
    "text",
    [
        " ",
        "null",
        "true",
        "7",
        '"a"',
        "a=1",
        "{",
        "[[]]",
        '["a"]',
        '[["a", "1"]]',
        '[{"key": "a", "value": "1"}, "b"]',
        '[{"value": "1"}]',
        "[{}]",
        '[{"key": null, "value": "1"}]',
        '[{"key": 7, "value": "1"}]',
        '[{"key": "a", "value": 1}]',
        '[{"key": "a", "value": true}]',
        '[{"key": "a", "value": ["1"]}]',
        '[{"key": "a", "Value": "1"}]',
        '[{"key": "a", "val": "1"}]',
        '[{"Key": "a", "Value": "1"}]',
        '[{"a": "1"}]',
        '{"a": 1}',
        '{"a": ["1"]}',
        '{"a": {"value": "1"}}',
        '{"tags": [{"key": "a", "value": "1"}]}',
        '{"tags": [], "total": 0}',
        # Which tag it is cannot be told.
        '{"key": "a", "value": "1"}',
        '{"key": "a", "values": "1"}',
        # Two things of one key.
        '[{"key": "a", "value": "1"}, {"key": "a", "value": "2"}]',
        '[{"key": "a", "value": "1"}, {"key": "a"}]',
        '[{"key": "a", "values": ["1", "2"]}]',
        '[{"key": "a", "values": ["1"], "value": "2"}]',
        '[{"key": "a", "key": "b", "value": "1"}]',
        '[{"key": "a", "value": "1", "value": "2"}]',
        '{"a": "1", "a": "2"}',
        "[" * 5_000 + "]" * 5_000,
        '{"a": ' + "9" * 5_000 + "}",
    ],
    ids=lambda text: str(text)[:40],
)
def test_tags_that_leave_a_doubt_are_unreadable(text: str) -> None:
    with pytest.raises(UnreadableTagsError, match="its tags"):
        _ = tagged(text).tags


@pytest.mark.parametrize("value", [0, 7, False, [], [{"key": "a", "value": "1"}], {}, {"a": "1"}])
def test_tags_that_are_no_text_are_unreadable(value: Any) -> None:
    with pytest.raises(UnreadableTagsError, match="its tags"):
        _ = tagged(value).tags


def test_tags_that_are_null_are_none() -> None:
    assert tagged(None).tags == {}


tags = st.dictionaries(st.text(max_size=10), st.text(max_size=10), max_size=5)


@patient
@given(tags)
def test_all_forms_of_the_same_tags_are_read_alike(given_tags: dict[str, str]) -> None:
    pairs = [{"key": key, "value": value} for key, value in given_tags.items()]
    lists = [{"key": key, "values": [value]} for key, value in given_tags.items()]
    assert tagged(json.dumps(pairs)).tags == given_tags
    assert tagged(json.dumps(lists)).tags == given_tags
    if not {"key", "value"} <= given_tags.keys() and not {"key", "values"} <= given_tags.keys():
        assert tagged(json.dumps(given_tags)).tags == given_tags


@patient
@given(tags.filter(bool), st.data())
def test_a_tag_that_is_said_twice_differently_is_a_doubt(
    given_tags: dict[str, str], data: st.DataObject
) -> None:
    pairs = [{"key": key, "value": value} for key, value in given_tags.items()]
    key = data.draw(st.sampled_from(sorted(given_tags)))
    pairs.append({"key": key, "value": given_tags[key] + "!"})
    with pytest.raises(UnreadableTagsError, match="two things of one key"):
        parse_tags(json.dumps(data.draw(st.permutations(pairs))))


@patient
@given(json_values() | json_values().map(json.dumps) | st.text())
def test_tags_are_read_or_unreadable_and_never_guessed(text: Any) -> None:
    try:
        found = parse_tags(text)
    except UnreadableTagsError:
        return
    raw = json.loads(text)
    assert isinstance(raw, dict | list)
    assert len(found) <= len(raw)
    assert bool(found) == bool(raw)
    assert all(isinstance(key, str) and isinstance(value, str) for key, value in found.items())


def test_a_pool_without_the_annotation_has_no_tags() -> None:
    assert read_without("metadata.annotations").tags == {}
    assert read("metadata.annotations", None).tags == {}


@pytest.mark.parametrize("value", [[], [1], "", "text", 0, False, nested(3)])
def test_annotations_that_are_no_map_may_hide_tags(value: Any) -> None:
    with pytest.raises(UnreadableTagsError, match="annotations are not a map"):
        _ = read("metadata.annotations", value).tags


def test_the_tags_of_nodes_are_read() -> None:
    assert Pool.parse(FULL).node_tags == [("cost-center", "42")]
    resources = [{"tags": [{"key": "a"}, {"key": "b", "value": "1"}]}, {}, {"tags": None}]
    assert read("spec.resources", resources).node_tags == [("a", ""), ("b", "1")]
    assert read_without("spec").node_tags == []


@pytest.mark.parametrize(
    "resources",
    [
        {},
        "text",
        [7],
        [{"tags": [{"key": "a", "value": "1"}]}, None],
        [{"tags": {"a": "1"}}],
        [{"tags": ["a"]}],
        [{"tags": [{"key": 7, "value": "1"}]}],
        [{"tags": [{"key": "a", "value": True}]}],
    ],
    ids=str,
)
def test_tags_of_nodes_that_leave_a_doubt_are_unreadable(resources: Any) -> None:
    with pytest.raises(UnreadableTagsError, match="the tags of its nodes"):
        _ = read("spec.resources", resources).node_tags


def test_a_spec_that_cannot_be_read_may_hide_the_tags_of_nodes() -> None:
    with pytest.raises(UnreadableTagsError, match="the tags of its nodes"):
        _ = read("spec", []).node_tags
