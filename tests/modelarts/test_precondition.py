"""The fingerprint: what changed about a pool since it was chosen is found, and named."""

from __future__ import annotations

import copy
import json
from random import Random
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.modelarts.pool_documents import (
    EXAMPLE,
    FULL,
    HALVES_TOO,
    SUBPOOLS,
    TAGS,
    exact,
    json_values,
    mutations,
    with_value,
)
from worker.modelarts import Pool, Precondition, changes
from worker.modelarts.precondition import PARTS

patient = settings(deadline=None)

maps = st.dictionaries(st.text(max_size=10), st.text(max_size=10), max_size=4)


def of(raw: Any) -> Precondition:
    return Precondition.of(Pool.parse(raw))


def changed(before: Any, after: Any) -> tuple[str, ...]:
    return changes(of(before), Pool.parse(after))


def reordered(value: Any, random: Random) -> Any:
    """The same JSON with its keys in another order."""
    if isinstance(value, dict):
        return {key: reordered(value[key], random) for key in random.sample([*value], len(value))}
    if isinstance(value, list):
        return [reordered(item, random) for item in value]
    return value


@patient
@given(mutations())
def test_a_pool_that_is_as_it_was_fulfils_its_precondition(raw: dict[str, Any]) -> None:
    assert changed(raw, copy.deepcopy(raw)) == ()


@patient
@given(mutations(), st.integers(0, 1_000))
def test_the_order_of_keys_is_no_change(raw: dict[str, Any], seed: int) -> None:
    assert of(reordered(raw, Random(seed))) == of(raw)


def test_a_precondition_survives_the_way_through_json() -> None:
    precondition = of(FULL)
    text = json.dumps([precondition.created, precondition.fingerprint])
    assert changes(Precondition(*json.loads(text)), Pool.parse(FULL)) == ()


def test_the_fingerprint_has_a_digest_for_each_part() -> None:
    digests = of(FULL).fingerprint.split("-")
    assert [len(digest) for digest in digests] == [8] * len(PARTS)


@patient
@given(maps, maps)
def test_any_change_of_the_labels_is_found_and_named(before: Any, after: Any) -> None:
    path = "metadata.labels"
    found = changed(with_value(path, before), with_value(path, after))
    assert found == (("labels changed",) if before != after else ())


@patient
@given(maps, maps)
def test_any_change_of_the_annotations_is_found_and_named(before: Any, after: Any) -> None:
    path = "metadata.annotations"
    found = changed(with_value(path, before), with_value(path, after))
    assert found == (("annotations changed",) if before != after else ())


@patient
@given(st.text(), st.text())
def test_any_change_of_the_tags_is_found_and_named(before: str, after: str) -> None:
    was, now = copy.deepcopy(EXAMPLE), copy.deepcopy(EXAMPLE)
    was["metadata"]["annotations"][TAGS] = before
    now["metadata"]["annotations"][TAGS] = after
    found = changed(was, now)
    assert found[:1] == (("tags changed",) if before != after else ())
    assert len(found) == (2 if before != after else 0)


@patient
@given(maps, maps)
def test_any_change_of_the_tags_on_nodes_is_found_and_named(before: Any, after: Any) -> None:
    def with_tags(tags: dict[str, str]) -> Any:
        items = [{"key": key, "value": value} for key, value in tags.items()]
        return with_value("spec.resources", [{"flavor": "a", "count": 1, "tags": items}])

    same = list(before.items()) == list(after.items())
    assert changed(with_tags(before), with_tags(after))[:1] == (() if same else ("tags changed",))


@patient
@given(st.integers(0, 64), st.integers(0, 64))
def test_any_change_of_the_control_mode_is_found_and_named(before: int, after: int) -> None:
    path = "spec.controlMode"
    found = changed(with_value(path, before), with_value(path, after))
    assert found == (("control mode changed",) if before != after else ())


@patient
@given(st.text(), st.text())
def test_another_incarnation_is_found_and_named(before: str, after: str) -> None:
    path = "metadata.creationTimestamp"
    found = changed(with_value(path, before), with_value(path, after))
    assert len(found) == (before != after)
    assert all(phrase.startswith("another incarnation, created ") for phrase in found)


def test_an_incarnation_is_named_by_its_time() -> None:
    path = "metadata.creationTimestamp"
    found = changed(with_value(path, "2021-11-01T03:49:41Z"), with_value(path, None))
    assert found == ("another incarnation, created at an unknown time (was 2021-11-01T03:49:41Z)",)


def test_every_change_is_named() -> None:
    after = copy.deepcopy(EXAMPLE)
    after["metadata"]["creationTimestamp"] = "2023-01-01T00:00:00Z"
    after["metadata"]["labels"]["team"] = "vision"
    after["metadata"]["annotations"]["os.modelarts/billing.mode"] = "1"
    after["metadata"]["annotations"][TAGS] = '[{"key": "poolsweep/protect", "value": "yes"}]'
    after["spec"]["controlMode"] = 8
    assert changed(EXAMPLE, after) == (
        "another incarnation, created 2023-01-01T00:00:00Z (was 2022-09-16T03:10:40Z)",
        "labels changed",
        "annotations changed",
        "tags changed",
        "control mode changed",
        'tags are now [{"key": "poolsweep/protect", "value": "yes"}]',
    )


def test_tags_that_were_taken_away_are_said_to_be_none() -> None:
    before = with_value("metadata.annotations", {TAGS: "{}"})
    assert changed(before, with_value("metadata.annotations", {})) == (
        "tags changed",
        "tags are now none",
    )


def test_tags_are_told_in_one_bounded_line_without_what_no_file_takes() -> None:
    text = "[\n\u202e\ud800" + "x" * 1_000
    _, told = changed(EXAMPLE, with_value("metadata.annotations", {TAGS: text}))[1:]
    assert told == "tags are now [ " + "x" * 198


@patient
@given(json_values(), json_values())
def test_the_number_of_subpools_is_looked_at_elsewhere(before: Any, after: Any) -> None:
    path = "metadata.annotations"
    was = with_value(path, {SUBPOOLS: before})
    assert changed(was, with_value(path, {SUBPOOLS: after})) == ()
    assert changed(was, with_value(path, {})) == ()


@pytest.mark.parametrize("path", ["metadata.labels", "metadata.annotations"])
@pytest.mark.parametrize("value", [["text"], "text", 7, True])
def test_a_map_that_cannot_be_read_any_more_is_a_change(path: str, value: Any) -> None:
    empty: list[Any] = [{}, None]
    for before in empty:
        assert f"{path.partition('.')[2]} changed" in changed(
            with_value(path, before), with_value(path, value)
        )


@pytest.mark.parametrize("path", ["metadata.labels", "metadata.annotations"])
def test_an_empty_map_and_none_are_the_same(path: str) -> None:
    assert changed(with_value(path, {}), with_value(path, None)) == ()


@pytest.mark.parametrize("value", [None, [], "text"])
def test_a_spec_that_cannot_be_read_any_more_is_a_change(value: Any) -> None:
    found = changed(EXAMPLE, with_value("spec", value))
    assert found[:2] == ("tags changed", "control mode changed")


@pytest.mark.parametrize("value", [True, "0", 8.0, -1])
def test_a_control_mode_that_cannot_be_read_any_more_is_a_change(value: Any) -> None:
    documented: list[Any] = [0, 1, None]
    for before in documented:
        was = with_value("spec.controlMode", before)
        assert changed(was, with_value("spec.controlMode", value)) == ("control mode changed",)


def test_a_label_that_changes_its_type_only_is_a_change() -> None:
    before = with_value("metadata.labels", {"a": 1})
    assert changed(before, with_value("metadata.labels", {"a": True})) == ("labels changed",)
    assert changed(before, with_value("metadata.labels", {"a": "1"})) == ("labels changed",)


@pytest.mark.parametrize("fingerprint", ["", "absent", "12345678", "-".join(["12345678"] * 5)])
def test_a_fingerprint_of_another_make_holds_for_no_pool(fingerprint: str) -> None:
    precondition = Precondition("2022-09-16T03:10:40Z", fingerprint)
    assert changes(precondition, Pool.parse(EXAMPLE)) == ("its fingerprint is of another make",)


@patient
@given(mutations(), mutations())
def test_there_is_no_change_only_if_all_that_a_plan_looks_at_is_equal(
    before: dict[str, Any], after: dict[str, Any]
) -> None:
    def looked_at(raw: dict[str, Any]) -> list[Any]:
        pool = Pool.parse(raw)
        own = {key: value for key, value in pool.annotations.items() if key != SUBPOOLS}
        return [pool.created, exact(pool.labels), exact(own), pool.control_mode, pool.frozen]

    if changed(before, after) == ():
        assert looked_at(before) == looked_at(after)
    if looked_at(before) != looked_at(after):
        assert changed(before, after)


@patient
@given(mutations(HALVES_TOO).filter(lambda raw: isinstance(raw.get("spec"), dict)))
def test_a_change_is_told_in_one_line_that_every_file_takes(raw: dict[str, Any]) -> None:
    try:
        pool = Pool.parse(raw)
    except ValueError:
        return
    for phrase in changes(of(EXAMPLE), pool):
        assert len(phrase) < 1_000
        assert phrase.splitlines() == [phrase]
        phrase.encode()
