"""A list is taken apart without reading the pools, whatever stands in it."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.modelarts.pool_documents import document
from worker.modelarts import Pool, UnreadablePoolError
from worker.modelarts.answers import Body, parse_error_body
from worker.modelarts.listing import ListedPool, parse_list

if TYPE_CHECKING:
    from worker.modelarts.answers import ErrorBody

anything = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda children: st.lists(children, max_size=3) | st.dictionaries(st.text(), children),
    max_leaves=8,
)
entries = st.lists(
    anything
    | st.fixed_dictionaries({"metadata": st.fixed_dictionaries({"name": st.text() | anything})}),
    max_size=5,
)


def items_of(body: ErrorBody) -> list[ListedPool]:
    assert body.document is not None
    found: list[ListedPool] = body.document["items"]
    return found


@given(entries)
def test_a_list_holds_each_of_its_entries_by_name(items: list[Any]) -> None:
    raw = json.dumps({"kind": "PoolList", "items": items}).encode()
    found = items_of(parse_list(raw))
    # As text, since NaN equals nothing.
    assert [json.dumps(each.document()) for each in found] == [json.dumps(each) for each in items]
    for each, item in zip(found, items, strict=True):
        try:
            name = item["metadata"]["name"]
        except (KeyError, TypeError, IndexError):
            name = ""
        assert each.name == (name if isinstance(name, str) else "")


def test_a_pool_is_read_as_if_it_were_read_by_itself() -> None:
    whole = document()
    (listed,) = items_of(parse_list(json.dumps({"items": [whole]}).encode()))
    assert listed.name == whole["metadata"]["name"]
    assert listed.read().document.to_json() == Pool.parse(whole).document.to_json()


@pytest.mark.parametrize(
    "text",
    [
        b'{"metadata": {"name": "a"}, "metadata": {"name": "b", "x": "\xff"}}',
        b'{"metadata": {"name": "a", "x": "\xff"}}',
        b'{"metadata": {"name": "a", "name": 7}}',
        b'{"metadata": {}}',
        b'{"metadata": null}',
        b"[]",
        b"7",
    ],
)
def test_an_entry_that_is_no_pool_is_no_pool_and_spoils_no_other(text: bytes) -> None:
    good = json.dumps(document()).encode()
    first, bad, last = items_of(parse_list(b'{"items": [' + b",".join([good, text, good]) + b"]}"))
    assert first.read().pool_id == last.read().pool_id
    with pytest.raises(UnreadablePoolError):
        bad.read()


@pytest.mark.parametrize(
    "odd", [r'"\ud800"', "NaN", "1e999", "123456789012345678901234567890", "-Infinity"]
)
def test_what_only_the_standard_library_reads_is_read_all_the_same(odd: str) -> None:
    raw = b'{"items": [{"metadata": {"name": "a", "odd": ' + odd.encode() + b"}}]}"
    (listed,) = items_of(parse_list(raw))
    assert listed.name == "a"
    assert json.dumps(listed.document()) == json.dumps(json.loads(raw)["items"][0])
    assert listed.read().pool_id == "a"


@given(st.binary() | anything.map(lambda value: json.dumps(value).encode()))
def test_what_is_no_list_is_read_as_any_other_answer(raw: bytes) -> None:
    expected = parse_error_body(raw)
    holds_list = expected.document is not None and isinstance(expected.document.get("items"), list)
    assert holds_list or parse_list(raw) == expected


def test_nesting_without_end_is_no_list() -> None:
    depth = 100_000
    nested = b'{"items": [{"metadata": {"name": "a"}, "x": ' + b"[" * depth + b"]" * depth + b"}]}"
    assert parse_list(nested).body is Body.OTHER
