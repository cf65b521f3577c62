"""YAML is read by its core schema, within bounds, and every error names its line."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from worker.yaml_source import DEEPEST, LARGEST, MOST_PARTS, YamlError, parse_yaml, read_yaml

if TYPE_CHECKING:
    from pathlib import Path


def said(raw: bytes | str, **options: Any) -> list[str]:
    """What is wrong with a text; nothing, if it is read."""
    try:
        parse_yaml(raw, "file.yaml", **options)
    except YamlError as error:
        return error.sentences
    return []


# What is read


AMBIGUOUS = """
no No NO on off yes n y 22:00 1:30.5 2026-01-01 2026-01-01T00:00:00Z 007 0x1f 0o7 0b1 1_000 1_0.5
1e3 12e03 = tRue truE +-1 0123456789 v1.2.3 1.2.3
"""


@pytest.mark.parametrize("text", AMBIGUOUS.split())
def test_what_other_versions_of_yaml_take_for_something_else_is_text(text: str) -> None:
    assert parse_yaml(f"a: {text}", "x").data == {"a": text}


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("true", True),
        ("TRUE", True),
        ("False", False),
        ("0", 0),
        ("-12", -12),
        ("+5", 5),
        ("1.5", 1.5),
        (".5", 0.5),
        ("5.", 5.0),
        ("1.5e3", 1500.0),
        ("-.inf", -math.inf),
        ("null", None),
        ("~", None),
        ("", None),
        ("'null'", "null"),
        ('"5"', "5"),
        ("'true'", "true"),
    ],
)
def test_numbers_truths_and_nothing_are_read_as_such(text: str, value: Any) -> None:
    found = parse_yaml(f"a: {text}", "x").data["a"]
    assert (found, type(found)) == (value, type(value))


def test_anchors_aliases_and_merges_are_read() -> None:
    text = "base: &base {a: 1, b: 2}\none: {<<: *base, b: 3}\ntwo: {<<: [*base, {c: 4}]}\n"
    assert parse_yaml(f"{text}same: *base", "x").data == {
        "base": {"a": 1, "b": 2},
        "one": {"a": 1, "b": 3},
        "two": {"a": 1, "b": 2, "c": 4},
        "same": {"a": 1, "b": 2},
    }


def test_every_part_knows_its_line() -> None:
    text = "a:\n  b:\n    - x\n    - c: y\n\n      d: z\ne: {f: 1,\n  g: 2}\n"
    source = parse_yaml(text, "x")
    assert source.line(()) == 1
    assert source.line(("a", "b")) == 2
    assert source.line(("a", "b", 1, "c")) == 4
    assert source.line(("a", "b", 1, "d")) == 6
    assert source.line(("e", "g")) == 8
    assert source.line(("a", "b", 1, "missing", "below")) == 4, "the nearest part around it"


def test_what_is_merged_in_stands_where_it_is_written_and_the_map_itself_comes_first() -> None:
    source = parse_yaml("base: &base\n  a: 1\n  b: 2\nuse:\n  <<: *base\n  b: 3\n", "x")
    assert source.line(("use", "a")) == 2
    assert source.line(("use", "b")) == 6


@pytest.mark.parametrize("raw", ["", b"", "\n\n", "# nothing\n", "---\n", "--- ~\n"])
def test_an_empty_document_is_nothing(raw: bytes | str) -> None:
    source = parse_yaml(raw, "x")
    assert source.data is None
    assert source.line(("anything",)) >= 1


def test_a_byte_order_mark_does_not_matter() -> None:
    assert parse_yaml(b"\xef\xbb\xbfa: 1", "x").data == {"a": 1}


# What is refused, each with its line

NO_MAP = "expected a mapping or list of mappings for merging, but found scalar"


@pytest.mark.parametrize(
    ("raw", "sentences"),
    [
        ("a: 1\nb: [1\nc: 2", ["3: it is not YAML: expected ',' or ']', but got ':'"]),
        ("a: 1\n\tb: 2", ["2: it is not YAML: found character '\\t' that cannot start any token"]),
        ("a: 'x\n", ["2: it is not YAML: found unexpected end of stream"]),
        ("a: 1\n---\nb: 2\n", ["2: it is not YAML: but found another document"]),
        ("a: 1\nb: \x00\n", ["2: it is not YAML: special characters are not allowed"]),
        ("a: 1\nb: '\ud800'", ["2: it is not YAML: special characters are not allowed"]),
        (b"a: 1\nb: \xff\n", ["2: it is not UTF-8"]),
        ("a: 1\n".encode("utf-16"), ["1: it is not UTF-8"]),
        ("a: 1\nb: 2\na: 3", ["3: a: the key is there twice"]),
        ("a: 1\n'a': 2", ["2: a: the key is there twice"]),
        (
            "a:\n  - b: {c: 1, c: 2}\nd: {e: 1, e: 2}",
            ["2: a[0].b.c: the key is there twice", "3: d.e: the key is there twice"],
        ),
        ("<<: {a: 1}\n<<: {b: 2}", ["2: <<: the key is there twice"]),
        ("b: {1: a, 1: b}", 2 * ["1: b: a key is not text; put it in quotes"]),
        ("a:\n  true: 1", ["2: a: a key is not text; put it in quotes"]),
        ("a: 1\nb: {~: 1}", ["2: b: a key is not text; put it in quotes"]),
        ("a: 1\n? [x]\n: 1", ["2: the document: a key is not text; put it in quotes"]),
        ("a: 1\nb: &b [*b]", ["2: an anchor refers to itself"]),
        ("a: &a\n  b: {c: *a}", ["1: an anchor refers to itself"]),
        ("a: &a\n  <<: *a", ["1: an anchor refers to itself"]),
        ("a: &a {<<: [{b: 1}, *a]}", ["1: an anchor refers to itself"]),
        (
            "a: 1\n<<: 5",
            [f"2: it is not YAML: {NO_MAP}"],
        ),
        (
            "a: !!binary aGk=\nb: !x [1]\nc: !!int x",
            [f"{line}: {key}: tags with ! are not taken" for line, key in enumerate("abc", 1)],
        ),
        ("a: !!python/object/apply:os.system ['true']", ["1: a: tags with ! are not taken"]),
    ],
    ids=repr,
)
def test_what_is_refused_is_told_with_its_line(raw: bytes | str, sentences: list[str]) -> None:
    assert said(raw) == [f"file.yaml:{sentence}" for sentence in sentences]


def test_a_number_too_long_for_one_is_refused() -> None:
    assert said(f"a: {'9' * 5_000}") == ["file.yaml: it holds a number that is too long"]


@pytest.mark.parametrize(
    "text",
    [
        "credentials: *hunter2",
        "credentials: !hunter2 x",
        "credentials: !hunter2!x y",
        "credentials: !!hunter2 x",
        "credentials: {hunter2: 1, hunter2: 2}",
        "credentials: {sk: {hunter2: 1, hunter2: 2}}",
        "credentials: {sk: {hunter2: &a [*a]}}",
        "credentials: {hunter2: !x y}",
        "credentials: [hunter2",
        "credentials: 'hunter2",
        "credentials: hunter2: x",
        "credentials: @hunter2",
        "credentials: %hunter2",
        "credentials: &hunter2",
        "credentials: &hunter2 &hunter2 x",
        'credentials: "hunter2\\q"',
        "<<: hunter2",
    ],
)
def test_a_secret_is_never_repeated(text: str) -> None:
    assert said(f"{text}\n[", secret=("credentials",))
    for broken in (text, f"{text}\n["):
        assert "hunter" not in "".join(said(broken, secret=("credentials",)))


def test_a_key_is_told_on_one_line_and_not_at_any_length() -> None:
    (sentence,) = said(f'"a\\n\\e[31m{"x" * 10_000}": 1\n"a\\n\\e[31m{"x" * 10_000}": 2')
    assert "\n" not in sentence
    assert "\x1b" not in sentence
    assert len(sentence) < 200


# Bounds


def laughs(form: str, depth: int = 40) -> str:
    """A document whose last part stands for billions of others."""
    first = "a0: &a0 {x: 1}\n"
    lines = (form.format(up=f"a{n}", low=f"*a{n - 1}") for n in range(1, depth))
    return first + "".join(lines)


@pytest.mark.parametrize(
    "form",
    [
        "{up}: &{up} [{low}, {low}, {low}, {low}]\n",
        "{up}: &{up} {{p: {low}, q: {low}, r: {low}}}\n",
        "{up}: &{up} {{<<: [{low}, {low}, {low}]}}\n",
        "{up}: &{up}\n  ? {low}\n  : {low}\n",
    ],
)
def test_a_billion_laughs_are_refused(form: str) -> None:
    assert said(laughs(form))


def test_many_parts_are_refused_and_those_that_are_allowed_are_read() -> None:
    many = f"a: &a [{'x, ' * 400}]\nb: [{'*a, ' * (MOST_PARTS // 401)}]\n"
    assert said(many) == [f"file.yaml:1: it has more than {MOST_PARTS} parts, aliases written out"]
    fewer = f"a: &a [{'x, ' * 400}]\nb: [{'*a, ' * (MOST_PARTS // 401 - 2)}]\n"
    assert len(parse_yaml(fewer, "x").data["b"]) == MOST_PARTS // 401 - 2


def test_deep_nesting_is_refused_and_what_is_allowed_is_read() -> None:
    def lists(depth: int) -> str:
        return "[\n" * depth + "]" * depth

    assert parse_yaml(lists(DEEPEST), "x").data is not None
    line = DEEPEST + 2
    assert said(lists(DEEPEST + 2)) == [f"file.yaml:{line}: it is nested more than {DEEPEST} deep"]
    assert said("[" * 5_000) == ["file.yaml: it is nested too deeply"]
    assert said("{a: " * 5_000) == ["file.yaml: it is nested too deeply"]


def test_a_huge_file_is_refused_unread(tmp_path: Path) -> None:
    path = tmp_path / "huge.yaml"
    with path.open("wb") as file:
        file.truncate(LARGEST + 1)
    with pytest.raises(YamlError, match=r"huge\.yaml: it is larger than 1 MiB"):
        read_yaml(path)


def test_a_file_that_is_not_there_is_told(tmp_path: Path) -> None:
    with pytest.raises(YamlError, match="it cannot be read: No such file or directory"):
        read_yaml(tmp_path / "missing.yaml")
    with pytest.raises(YamlError, match="it cannot be read: Is a directory"):
        read_yaml(tmp_path)


def test_a_file_is_read_and_named(tmp_path: Path) -> None:
    path = tmp_path / "a.yaml"
    path.write_text("a: é\n", encoding="utf-8")
    source = read_yaml(path)
    assert (source.path, source.data) == (str(path), {"a": "é"})


PIECES = """a :_ -_ _ &a_ *a <<:_ { } [ ] ,_ ?_ ' " |_ >_ !!int_ !x_ # % --- 1 ~ true 1.5"""
pieces = st.sampled_from(["\n", *(piece.replace("_", " ") for piece in PIECES.split())])


@settings(deadline=None)
@given(st.binary(max_size=200) | st.text(max_size=200) | st.lists(pieces).map("".join))
def test_any_text_is_read_or_refused(raw: bytes | str) -> None:
    assert all(sentence.startswith("file.yaml:") for sentence in said(raw))
