"""YAML files whose errors name the line: what is read, and where each part of it stands."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, TypeAlias

import yaml

from worker.modelarts.answers import printable

if TYPE_CHECKING:
    from collections.abc import Collection, Iterator
    from pathlib import Path

    from pydantic import ValidationError
    from pydantic_core import ErrorDetails

Location: TypeAlias = tuple[int | str, ...]

_VALUE_LIMIT = 60
_KEY_LIMIT = 80
LARGEST = 1 << 20
MOST_PARTS = 100_000
"""A file of a few lines whose aliases repeat each other can stand for billions of parts."""
DEEPEST = 50

_NEEDED = {
    "model_type": "a map is needed",
    "dict_type": "a map is needed",
    "list_type": "a list is needed",
    "string_type": "a text is needed; put it in quotes",
}
"""Pydantic's words for these are about Python, or about its own models."""


class YamlError(ValueError):
    """The file cannot be used. One sentence for each thing that is wrong with it.

    Attributes:
        sentences: each names file, line, field, value and what is accepted.
    """

    def __init__(self, sentences: list[str]) -> None:
        super().__init__("\n".join(sentences))
        self.sentences = sentences


_HALF = re.compile("[\ud800-\udfff]")


class _Loader(yaml.SafeLoader):
    """YAML 1.2's core schema: `no` and `on` are texts, and so are 22:00, 1e3 and 2026-01-01."""

    yaml_implicit_resolvers: ClassVar = {  # type: ignore[misc] # as PyYAML's own loaders do
        first: [
            (tag, pattern)
            for tag, pattern in resolvers
            if tag.rpartition(":")[2] in {"null", "merge"}
        ]
        for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }

    def compose_scalar_node(self, anchor: dict[Any, Any]) -> yaml.ScalarNode:
        node: yaml.ScalarNode = super().compose_scalar_node(anchor)
        if _HALF.search(node.value):
            # JSON, which is YAML, writes characters beyond U+FFFF as escapes of two halves.
            try:
                node.value = node.value.encode("utf-16", "surrogatepass").decode("utf-16")
            except UnicodeDecodeError:
                raise yaml.MarkedYAMLError(
                    problem="half of a surrogate pair is no text", problem_mark=node.start_mark
                ) from None
        return node


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:bool", re.compile(r"(?:true|True|TRUE|false|False|FALSE)$"), list("tTfF")
)
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:int", re.compile(r"[-+]?(?:0|[1-9][0-9]*)$"), list("-+0123456789")
)
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(
        r"(?:[-+]?(?:[0-9]+\.[0-9]*|\.[0-9]+)(?:[eE][-+]?[0-9]+)?|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN))$"
    ),
    list("-+.0123456789"),
)
_TEXT = "tag:yaml.org,2002:str"
_MERGE = "tag:yaml.org,2002:merge"


@dataclass(frozen=True, slots=True)
class YamlSource:
    """A YAML document as read.

    Attributes:
        path: the file's, as errors name it.
        data: its content.
    """

    path: str
    data: Any
    _lines: dict[Location, int] = field(repr=False)

    def line(self, location: Location) -> int:
        """The line that a part begins in, or that of the nearest part around it."""
        while location and location not in self._lines:
            location = location[:-1]
        return self._lines.get(location, 1)

    def place(self, location: Location) -> Location:
        """Where in the document a validation error's location lies: its own names left out."""
        found: Location = ()
        for part in location:
            if (*found, part) in self._lines:
                found = (*found, part)
        return found

    def sentences(
        self,
        error: ValidationError,
        *,
        secret: Collection[str] = (),
        schema: dict[str, Any] | None = None,
    ) -> list[str]:
        """What a validation error says, a sentence each, in the order of the lines.

        Args:
            error: of the document's `data`.
            secret: fields below which no value may be repeated.
            schema: the JSON Schema of the document, which knows what fields there are.
        """
        said = sorted(
            (self.line(self.place(item["loc"])), self._sentence(item, secret, schema))
            for item in error.errors(include_url=False)
        )
        return [f"{self.path}:{line}: {sentence}" for line, sentence in dict.fromkeys(said)]

    def _sentence(
        self, item: ErrorDetails, secret: Collection[str], schema: dict[str, Any] | None
    ) -> str:
        location, kind, value = self.place(item["loc"]), item["type"], item["input"]
        is_secret = any(part in secret for part in location)
        if kind == "missing":
            return f"{_dotted((*location, item['loc'][-1]))}: it is missing"
        if kind == "extra_forbidden":
            known = sorted(_fields(schema, location[:-1])) if schema else []
            accepted = f"; accepted: {', '.join(known)}" if known else ""
            # Where a secret belongs, what was taken for a field's name may be the secret.
            shown = location[:-1] if is_secret else location
            return f"{_dotted(shown)}: there is no such field{accepted}"
        message = _NEEDED.get(kind) or item["msg"].removeprefix("Value error, ")
        if item.get("ctx", {}).get("min_length") == 1:
            message = "it must not be empty"
        message = printable(message[:1].lower() + message[1:], 500)
        if is_secret or isinstance(value, dict | list) or _may_hold_a_secret(value):
            return f"{_dotted(location)}: {message}"
        text = json.dumps(value) if value is None or isinstance(value, bool) else repr(value)
        if message.startswith(text[:500]):
            return f"{_dotted(location)}: {message}"
        if len(text) > _VALUE_LIMIT:
            text = text[: _VALUE_LIMIT - 1] + "…"
        joint = ";" if message.startswith("accepted:") else ":"
        return f"{_dotted(location)}: {text} is not accepted{joint} {message}"


def _may_hold_a_secret(value: Any) -> bool:
    """Whether it looks like a URL, which often holds a password or a token."""
    return isinstance(value, str) and ("://" in value or "@" in value)


def _dotted(location: Location) -> str:
    text = ""
    for part in location:
        text += f"[{part}]" if isinstance(part, int) else f".{printable(part, _KEY_LIMIT)}"
    return text.removeprefix(".") or "the document"


def _fields(schema: dict[str, Any], location: Location) -> set[str]:
    """The fields that a JSON Schema knows of the map at a location."""
    parts = list(_branches(schema, schema))
    for step in location:
        below = []
        for part in parts:
            if isinstance(step, int):
                below.append(part.get("items"))
            else:
                below.append(part.get("properties", {}).get(step))
                below += part.get("patternProperties", {}).values()
        parts = [each for part in below for each in _branches(part, schema)]
    return {name for part in parts for name in part.get("properties", {})}


def _branches(part: Any, schema: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """A part of a JSON Schema, or all that it may be."""
    if not isinstance(part, dict):
        return
    if "$ref" in part:
        part = schema["$defs"][part["$ref"].rpartition("/")[2]]
    choices = part.get("anyOf") or part.get("oneOf")
    if not choices:
        yield part
    for choice in choices or ():
        yield from _branches(choice, schema)


def read_yaml(path: Path, *, secret: Collection[str] = ()) -> YamlSource:
    """Read a YAML file.

    Args:
        path: the file; at most 1 MiB.
        secret: fields below which nothing may be repeated.

    Raises:
        YamlError: as with `parse_yaml`, or it cannot be read.
    """
    name = str(path)
    try:
        with path.open("rb") as file:
            raw = file.read(LARGEST + 1)
    except OSError as error:
        raise YamlError([f"{name}: it cannot be read: {error.strerror}"]) from None
    return parse_yaml(raw, name, secret=secret)


def parse_yaml(raw: bytes | str, name: str, *, secret: Collection[str] = ()) -> YamlSource:
    """Read a YAML text.

    Args:
        raw: the text, in UTF-8.
        name: what errors call it.
        secret: fields below which nothing may be repeated.

    Raises:
        YamlError: it is no YAML, is too large, is nested too deeply, refers to itself, has a key
            twice in one map or one that is no text, or uses tags (`!!binary`).
    """
    if len(raw) > LARGEST:
        raise YamlError([f"{name}: it is larger than {LARGEST >> 20} MiB"])
    try:
        text = raw if isinstance(raw, str) else raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = error.object[: error.start].count(b"\n") + 1
        raise YamlError([f"{name}:{line}: it is not UTF-8"]) from None
    survey = _Survey(name, secret)
    try:
        loader = _Loader(text)
        try:
            node = loader.get_single_node()
            if node is not None:
                survey.walk(node, loader)
            if survey.wrong:
                raise YamlError([f"{name}:{line}: {what}" for line, what in sorted(survey.wrong)])
            data = None if node is None else loader.construct_document(node)
        finally:
            loader.dispose()
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        line = mark.line + 1 if mark else 1
        # An alias or a tag that is quoted there may be an unquoted password.
        problem = re.sub(
            r" '(?!\\.')[^'<]{2,}'", "", error.problem or error.context or "it is broken"
        )
        raise YamlError([f"{name}:{line}: it is not YAML: {problem}"]) from None
    except yaml.reader.ReaderError as error:
        line = text[: error.position].count("\n") + 1
        raise YamlError([f"{name}:{line}: it is not YAML: {error.reason}"]) from None
    except RecursionError:
        raise YamlError([f"{name}: it is nested too deeply"]) from None
    except ValueError as error:
        if isinstance(error, YamlError):
            raise
        raise YamlError([f"{name}: it holds a number that is too long"]) from None
    return YamlSource(name, data, survey.lines)


@dataclass(slots=True)
class _Survey:
    """Where everything stands, aliases written out, and what should not stand there.

    Attributes:
        name: what errors call the document.
        secret: fields below which nothing may be repeated.
        lines: where everything stands.
        wrong: lines, and what is wrong there.
    """

    name: str
    secret: Collection[str]
    lines: dict[Location, int] = field(default_factory=dict)
    wrong: list[tuple[int, str]] = field(default_factory=list)
    parts: int = 0

    def walk(self, node: yaml.Node, loader: _Loader) -> None:
        """Look at a document.

        Raises:
            YamlError: it is too large, too deep, or endless.
        """
        self._visit(node, (), frozenset(), loader)

    def _visit(
        self, node: yaml.Node, location: Location, above: frozenset[int], loader: _Loader
    ) -> None:
        line = self._count(node, above)
        self.lines.setdefault(location, line)
        if node.tag != _untagged(node, loader):
            self.wrong.append((line, f"{self._named(location)}: tags with ! are not taken"))
        above = above | {id(node)}
        if isinstance(node, yaml.SequenceNode):
            for index, item in enumerate(node.value):
                self._visit(item, (*location, index), above, loader)
        elif isinstance(node, yaml.MappingNode):
            self._visit_map(node, location, above, loader)

    def _visit_map(
        self, node: yaml.MappingNode, location: Location, above: frozenset[int], loader: _Loader
    ) -> None:
        seen: set[str] = set()
        merged: list[yaml.Node] = []
        for key, value in node.value:
            line = key.start_mark.line + 1
            if key.tag not in {_TEXT, _MERGE}:
                what = f"{self._named(location)}: a key is not text; put it in quotes"
                self.wrong.append((line, what))
                continue
            there = (*location, key.value)
            if key.value in seen:
                self.wrong.append((line, f"{self._named(there)}: the key is there twice"))
            seen.add(key.value)
            if key.tag == _MERGE:
                merged += value.value if isinstance(value, yaml.SequenceNode) else [value]
                continue
            self.lines.setdefault(there, line)
            self._visit(value, there, above, loader)
        # What is merged in counts only where the map itself says nothing.
        for part in merged:
            self._count(part, above)
            if isinstance(part, yaml.MappingNode):
                self._visit_map(part, location, above | {id(part)}, loader)

    def _count(self, node: yaml.Node, above: frozenset[int]) -> int:
        self.parts += 1
        problem = None
        if id(node) in above:
            problem = "an anchor refers to itself"
        elif self.parts > MOST_PARTS:
            problem = f"it has more than {MOST_PARTS} parts, aliases written out"
        elif len(above) > DEEPEST:
            problem = f"it is nested more than {DEEPEST} deep"
        line = int(node.start_mark.line) + 1
        if problem:
            raise YamlError([f"{self.name}:{line}: {problem}"])
        return line

    def _named(self, location: Location) -> str:
        for place, part in enumerate(location):
            if part in self.secret:
                return _dotted(location[: place + 1])
        return _dotted(location)


def _untagged(node: yaml.Node, loader: _Loader) -> str:
    """The tag that a node has if the text gives it none."""
    if isinstance(node, yaml.ScalarNode):
        plain = node.style is None
        return str(loader.resolve(yaml.ScalarNode, node.value, (plain, not plain)))  # type: ignore[no-untyped-call]
    return str(loader.resolve(type(node), None, True))  # type: ignore[no-untyped-call]
