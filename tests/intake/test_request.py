"""A request is read whole or refused whole, with everything that is wrong with it."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from scheduler.intake.request import (
    DEEPEST,
    LARGEST,
    MOST_FAULTS,
    MOST_POOLS,
    RequestError,
    read_request,
    validate,
)

PROJECT = "0123456789abcdef0123456789abcdef"
POOL = "pool-0123456789abcdef0123456789abcdef"


def asking(**changes: Any) -> dict[str, Any]:
    return {"targets": [{"project_id": PROJECT, "pools": [POOL]}], **changes}


def faults(data: Any) -> dict[str, str]:
    """What is wrong with a request, by where."""
    with pytest.raises(RequestError) as caught:
        read_request(json.dumps(data))
    return {fault.pointer: fault.detail for fault in caught.value.faults}


def test_a_request_names_pools_or_has_a_selector() -> None:
    by_name = read_request(json.dumps(asking(reason="end of project", dry_run=True)))
    assert by_name.targets[0].pools == [POOL]
    assert (by_name.reason, by_name.dry_run, by_name.verify) == ("end of project", True, True)
    selector = {"all": [{"expired": {}}, {"not": {"name": "keep-*"}}]}
    found = validate({"targets": [{"project_id": PROJECT, "selector": selector}]})
    assert found.targets[0].selector is not None
    assert found.targets[0].pools is None


def test_everything_that_is_wrong_is_told_at_once_and_where() -> None:
    data = {
        "targets": [
            {"project_id": "a/../b", "pools": [POOL]},
            {"project_id": PROJECT, "pools": [POOL, "x"]},
            {"project_id": PROJECT, "selector": {"all": [{"older_than": "30"}]}},
            {"project_id": PROJECT},
        ],
        "dry_run": "yes",
        "reason": "two\nlines",
        "force": True,
    }
    found = faults(data)
    assert set(found) == {
        "/targets/0/project_id",
        "/targets/1/pools/1",
        "/targets/2/selector/all/0/older_than",
        "/targets/3",
        "/dry_run",
        "/reason",
        "/force",
    }
    assert "'x' is not one; accepted:" in found["/targets/1/pools/1"]
    assert found["/targets/3"] == "exactly one of pools and selector is needed"
    assert found["/dry_run"] == "true or false is needed"
    assert found["/force"] == "there is no such field"


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("", "it is not JSON"),
        ("{", "it is not JSON"),
        ("{'targets': []}", "it is not JSON"),
        ('{"targets": NaN}', "NaN is not JSON"),
        ('{"dry_run": true, "dry_run": false}', "a key is there twice in one object"),
        ("[" * 200_000, "it is not JSON"),
        ("null", "an object is needed"),
        ("[]", "an object is needed"),
        (" " * (LARGEST + 1), f"no more than {LARGEST} bytes are accepted"),
    ],
    ids=range(9),
)
def test_what_is_no_request_at_all_is_refused_in_a_sentence(text: str, why: str) -> None:
    with pytest.raises(RequestError) as caught:
        read_request(text)
    assert [(fault.pointer, fault.detail) for fault in caught.value.faults] == [("", why)]


def test_bytes_that_are_no_text_are_refused() -> None:
    with pytest.raises(RequestError, match="it is not JSON"):
        read_request(b'{"targets": "\xff"}')


def test_a_number_is_no_text_and_one_is_not_true() -> None:
    assert set(faults(asking(reason=7, dry_run=1))) == {"/reason", "/dry_run"}


def test_a_project_that_is_there_twice_is_refused() -> None:
    target = {"project_id": PROJECT, "pools": [POOL]}
    assert "there twice" in faults({"targets": [target, target]})[""]


def test_pools_are_bounded_in_one_target_and_in_all() -> None:
    names = [f"pool-{number:032x}" for number in range(MOST_POOLS + 1)]
    assert "/targets/0/pools" in faults(asking(targets=[{"project_id": "p", "pools": names}]))
    half = MOST_POOLS // 2 + 1
    both = [
        {"project_id": "p", "pools": names[:half]},
        {"project_id": "q", "pools": names[:half]},
    ]
    assert "in all" in faults({"targets": both})[""]


def test_what_lies_too_deep_is_refused_before_it_is_read() -> None:
    selector: dict[str, Any] = {"expired": {}}
    for _ in range(DEEPEST):
        selector = {"not": selector}
    data = {"targets": [{"project_id": PROJECT, "selector": selector}]}
    assert faults(data) == {"": f"no more than {DEEPEST} levels are accepted"}


def test_faults_are_bounded_and_say_how_many_more_there_are() -> None:
    data = asking(**{f"field-{number}": 1 for number in range(50)})
    with pytest.raises(RequestError, match="and 30 more") as caught:
        read_request(json.dumps(data))
    assert len(caught.value.faults) == MOST_FAULTS


def test_a_fault_quotes_nothing_that_breaks_a_line() -> None:
    found = faults(asking(**{"a\n\x1b[31m/b~c": 1}))
    assert list(found) == ["/a [31m~1b~0c"]
    (detail,) = faults(asking(reason="x\r\ny" * 100)).values()
    assert "\n" not in detail
    assert len(detail) < 200


anything = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=12,
)
shaped = st.fixed_dictionaries(
    {},
    optional={
        "targets": anything
        | st.lists(
            st.fixed_dictionaries(
                {},
                optional={
                    "project_id": st.just(PROJECT) | anything,
                    "pools": st.just([POOL]) | anything,
                    "selector": anything
                    | st.dictionaries(
                        st.sampled_from(["all", "any", "not", "expired", "ttl", "tags", "name"]),
                        anything,
                        max_size=2,
                    ),
                },
            ),
            max_size=3,
        ),
        "reason": anything,
        "dry_run": anything,
        "webhook": anything,
    },
)


@given(anything | shaped)
def test_whatever_comes_is_a_request_or_is_refused_in_one_line(data: Any) -> None:
    refusal = ""
    try:
        request = read_request(json.dumps(data))
    except RequestError as error:
        refusal = str(error)
    else:
        assert read_request(request.record()) == request
        return
    assert refusal
    assert not {"\n", "\x1b"} & set(refusal)


@given(st.text())
def test_any_text_is_a_request_or_is_refused(text: str) -> None:
    with pytest.raises(RequestError):
        read_request(text)


selectors = st.sampled_from(
    [
        {"expired": None},
        {"expired": {"tag": "until"}},
        {"ttl": {"default": "7d"}},
        {"older_than": "90m"},
        {"tags": "env"},
        {"tags": {"key": "env", "one_of": ["dev", "test"]}},
        {"name": "tmp-*"},
        {"name": {"regex": "^a+$", "of": "id"}},
        {"workspace": "0"},
        {"flavor": "modelarts.*"},
        {"idle": "2d"},
        {"utilisation": {"of": "gpu", "below": 5, "over": "6h"}},
        {"billing": "postpaid"},
    ]
)
nested = st.recursive(
    selectors,
    lambda inner: st.one_of(
        st.lists(inner, min_size=1, max_size=3).map(lambda each: {"all": each}),
        st.lists(inner, min_size=1, max_size=3).map(lambda each: {"any": each}),
        inner.map(lambda each: {"not": each}),
    ),
    max_leaves=6,
)


@given(nested)
def test_a_request_is_read_back_from_its_record_as_it_was(selector: dict[str, Any]) -> None:
    request = validate({"targets": [{"project_id": PROJECT, "selector": selector}]})
    assert read_request(request.record()) == request
