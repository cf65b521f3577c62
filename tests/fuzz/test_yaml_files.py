"""Every YAML file that somebody writes, with slips in it: read, or refused with its lines."""

from __future__ import annotations

import json
import re
import string
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from scheduler import policy, prices
from scheduler.intake import clients
from tests.fuzz.mutation import broken_bytes, broken_json, is_fit_to_show
from worker import projects
from worker.yaml_source import DEEPEST, LARGEST, MOST_PARTS, YamlError, parse_yaml

if TYPE_CHECKING:
    from collections.abc import Callable

EXAMPLES = Path(__file__).parents[2] / "examples"
READERS: dict[str, tuple[Callable[[Path], Any], str]] = {
    "policies": (policy.load, "policies.yaml"),
    "projects": (projects.read_projects, "policies.yaml"),
    "prices": (prices.load, "prices.yaml"),
    "clients": (clients.load, "clients.yaml"),
}
WHOLE = {name: (EXAMPLES / file).read_bytes() for name, (_, file) in READERS.items()}
DOCUMENTS = {name: parse_yaml(raw, name).data for name, raw in WHOLE.items()}
PIECES = [
    piece.encode()
    for piece in [
        ": ", "- ", "? ", "\n", "\n  ", "\n\t", "#", "&a ", "*a", "<<: *a", "!!binary ", "!x ", "|",
        ">", "{", "}", "[", "]", "'", '"', "\\", "\\x", "---\n", "...\n", "%YAML 9\n", "null", "~",
        "true", "0x1F", "1e400", ".nan", "-.inf", "00:00", "7d", "9" * 5_000, "\ufeff", "\u2028",
        "\U0001f600", "\ud7ff", "a: {b: *a}", "id: x", "match:", "regex: '('", "glob: '[!'",
    ]
] + [b"\xff", b"\x00", b"\x85", b"\xc3("]  # fmt: skip
LONGEST_SENTENCE = 2_000


def read(name: str, raw: bytes, folder: Path) -> list[str] | None:
    """The sentences in which a file is refused; None: it is accepted."""
    path = folder / f"{name}.yaml"
    path.write_bytes(raw)
    try:
        READERS[name][0](path)
    except YamlError as error:
        return [sentence.removeprefix(str(folder)) for sentence in error.sentences]
    return None


def see_that_it_is_told(sentences: list[str], name: str, raw: bytes) -> None:
    """Each sentence is one line that can be shown, and begins with the file and a line of it."""
    assert sentences
    last = len(re.findall(rb"\r\n|\r|\n|\xc2\x85|\xe2\x80[\xa8\xa9]", raw)) + 1
    for sentence in sentences:
        found = re.match(rf"/{name}\.yaml(:([0-9]+))?: \S", sentence)
        assert found, sentence
        assert found[2] is None or 1 <= int(found[2]) <= last, sentence
        # Only what is wrong with the file as a whole stands in no line of it.
        assert found[2] or re.search("nested too deeply|larger than|too long", sentence), sentence
        assert is_fit_to_show(sentence), ascii(sentence)
        assert len(sentence) <= LONGEST_SENTENCE
        assert not re.search(r"Traceback|Error\b|0x[0-9a-f]{6}|pydantic", sentence), sentence


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("yaml")


@pytest.mark.parametrize("name", READERS)
def test_every_example_is_accepted(folder: Path, name: str) -> None:
    assert read(name, WHOLE[name], folder) is None


@given(st.data())
@pytest.mark.parametrize("name", READERS)
def test_an_example_with_slips_is_read_or_refused_with_lines(
    folder: Path, name: str, data: st.DataObject
) -> None:
    raw = data.draw(broken_bytes(WHOLE[name], PIECES))
    sentences = read(name, raw, folder)
    if sentences is not None:
        see_that_it_is_told(sentences, name, raw)


@given(st.data())
@pytest.mark.parametrize("name", READERS)
def test_an_example_that_says_something_else_somewhere_is_read_or_refused_with_lines(
    folder: Path, name: str, data: st.DataObject
) -> None:
    # JSON is YAML, in which halves of characters can be written.
    raw = json.dumps(data.draw(broken_json(DOCUMENTS[name])), indent=0).encode()
    sentences = read(name, raw, folder)
    if sentences is not None:
        see_that_it_is_told(sentences, name, raw)


SECRET = "s3cr3t-" + string.ascii_lowercase


@given(st.data())
def test_a_secret_that_stands_where_only_its_place_may_is_never_repeated(
    folder: Path, data: st.DataObject
) -> None:
    places = re.compile(rb"\{(?:env|file): [^}]*\}")
    name = data.draw(st.sampled_from(["policies", "projects"]))
    whole = WHOLE[name]
    spot = data.draw(st.sampled_from(list(places.finditer(whole))))
    form = data.draw(st.sampled_from(["{}", "'{}'", '"{}"', "[{}]", "{{{}: x}}", "{{env: {}}}"]))
    form = data.draw(st.sampled_from([form, "!{}", "&{} x", "*{}", "|\n        {}", "{{x: {}}}"]))
    written = form.format(SECRET).encode()
    sentences = read(name, whole[: spot.start()] + written + whole[spot.end() :], folder)
    assert sentences is None or SECRET not in "\n".join(sentences)


def _bomb(levels: int, width: int) -> str:
    lines = ["a0: &a0 [x]"]
    lines += [f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * width)}]" for n in range(1, levels)]
    return "\n".join(lines)


BOMBS = {
    "laughs": _bomb(30, 9),
    "merges": "a: &a {b: c}\n" + "\n".join(f"x{n}: &x{n} {{<<: *a, d: e}}" for n in range(1_000)),
    "a merge of merges": "a0: &a0 {k: v}\n"
    + "\n".join(f"a{n}: &a{n} {{<<: [*a{n - 1}, *a{n - 1}, *a{n - 1}]}}" for n in range(1, 30)),
    "in itself": "a: &a [*a]",
    "merged in itself": "a: &a {<<: *a}",
    "deep lists": "[" * 20_000,
    "deep maps": "{a: " * 20_000,
    "deep keys": "? " * 20_000 + "x",
    "deep blocks": "\n".join(" " * n + "a:" for n in range(1_000)),
    "deep dashes": "- " * 20_000,
    "a long scalar": "currency: " + "x" * 1_000_000,
    "a long quoted scalar": 'currency: "' + "\\n" * 50_000 + '"',
    "a long folded scalar": "currency: >\n" + "  x\n" * 20_000,
    "a long key": "x" * 900_000 + ": 1",
    "a long number": "version: " + "9" * 500_000,
    "a long float": "rate: " + "1" * 500_000 + ".0",
    "many keys": "\n".join(f"k{n}: 1" for n in range(5_000)),
    "the same key": "k: 1\n" * 5_000,
    "many anchors": "\n".join(f"- &a{n} x" for n in range(5_000)),
    "many documents": "---\nx\n" * 100_000,
    "many comments": "#\n" * 100_000,
    "an open quote": '"' + "x " * 100_000,
    "blanks": " " * 1_000_000 + "x: 1",
    "tabs": "\t" * 1_000_000,
    "too large": "x" * (LARGEST + 1),
}


@pytest.mark.timeout(60)
@pytest.mark.parametrize("bomb", BOMBS)
def test_what_is_made_to_hurt_is_refused_in_a_bounded_text(folder: Path, bomb: str) -> None:
    sentences = read("prices", BOMBS[bomb].encode(), folder)
    assert sentences is not None
    assert len("\n".join(sentences)) < 64 << 20
    for sentence in sentences[:10]:
        assert re.match(r"/prices\.yaml(:[0-9]+)?: \S", sentence)
        assert len(sentence) <= LONGEST_SENTENCE


def test_the_bounds_are_those_that_the_bombs_are_made_for() -> None:
    assert (LARGEST, MOST_PARTS, DEEPEST) == (1 << 20, 100_000, 50)


def test_a_character_of_two_halves_is_one_and_half_of_it_is_refused() -> None:
    assert parse_yaml('a: "\\ud83d\\ude00"', "x").data == {"a": "\U0001f600"}
    for text in ('b: "\\ud83d"', '"\\ude00": b', 'b: "\\ude00\\ud83d"'):
        with pytest.raises(YamlError) as refusal:
            parse_yaml(f"a: 1\n{text}", "x")
        assert refusal.value.sentences == [
            "x:2: it is not YAML: half of a surrogate pair is no text"
        ]
