"""Lists of pools with slips in them: what is read is what somebody wrote, or nothing is."""

from __future__ import annotations

import json
import re

from hypothesis import given
from hypothesis import strategies as st

from scheduler.pool_list import Form, form_of, parse
from tests.fuzz.mutation import as_bytes, broken_bytes, broken_json, is_fit_to_show

HERE, THERE = "0123456789abcdef0123456789abcdef", "fedcba9876543210fedcba9876543210"
POOLS = [f"pool-{n}-0123456789abcdef0123456789abcd" for n in range(6)]
DOCUMENTS = [
    POOLS,
    {"project_id": HERE, "pools": POOLS},
    {"targets": [{"project_id": HERE, "pools": POOLS[:3]}, {"project_id": THERE, "pools": POOLS}]},
    {"run": {}, "jobs": [{"pool_name": pool, "project_id": HERE} for pool in POOLS]},
]
TEXTS = {
    "list.txt": "# to go\n" + "\n".join(f"{HERE}/{pool}  # why" for pool in POOLS),
    "list.csv": "project_id,pool_name,name\r\n"
    + "\r\n".join(f'{HERE},{pool},"a, ""b"""' for pool in POOLS),
    "list.json": json.dumps(DOCUMENTS[2], indent=1),
    "list.jsonl": "\n".join(json.dumps({"pool_id": pool, "project_id": HERE}) for pool in POOLS),
    "list": "\n".join(POOLS),
}
PIECES = [
    *(b"\n", b"\r", b",", b'"', b"/", b"#", b"\\", b"\xff", b"\x00", b"\xef\xbb\xbf", b"[", b"]"),
    *(b"{", b"}", b":", b" ", b"\xc3\xa9", b"../", POOLS[0].encode(), HERE.encode()),
]
SHAPE = re.compile("[a-z][a-z0-9-]{34,61}[a-z0-9]")


def project_of(project: str) -> str:
    if project not in {"", HERE, THERE}:
        raise ValueError("there is no such project")
    return project or HERE


def see_that_it_is_read_or_told(name: str, raw: bytes, text: str) -> None:
    """Nothing is made up: each pool and project stands in the list, and each fault in a line."""
    found = parse(raw, form_of(name, raw), project_of)
    for project, pools in found.pools.items():
        assert project in {HERE, THERE}
        for pool in pools:
            assert SHAPE.fullmatch(pool)
            assert pool in text
    lines = raw.count(b"\n") + raw.count(b"\r") + 1
    assert all(1 <= line <= lines for line in found.faults)
    for sentence in found.sentences("list"):
        assert is_fit_to_show(sentence)
        assert len(sentence) < 500
    assert bool(found.sentences("list")) == bool(found.faults)


@given(st.sampled_from(list(TEXTS)).flatmap(lambda name: st.tuples(st.just(name), broken(name))))
def test_a_list_with_slips_names_nothing_that_is_not_in_it(given_list: tuple[str, bytes]) -> None:
    name, raw = given_list
    see_that_it_is_read_or_told(name, raw, raw.decode(errors="replace"))


def broken(name: str) -> st.SearchStrategy[bytes]:
    return broken_bytes(TEXTS[name].encode(), PIECES)


@given(st.sampled_from(DOCUMENTS).flatmap(broken_json).map(as_bytes))
def test_a_document_that_says_something_else_names_nothing_that_is_not_in_it(raw: bytes) -> None:
    see_that_it_is_read_or_told("list.json", raw, raw.decode())


def test_unbroken_lists_name_what_they_say() -> None:
    for name, text in TEXTS.items():
        raw = text.encode()
        found = parse(raw, form_of(name, raw), project_of)
        assert not found.faults, name
        assert list(found.pools[HERE]) == POOLS[: len(found.pools[HERE])]
    for document in DOCUMENTS:
        assert not parse(as_bytes(document), Form.JSON, project_of).faults
