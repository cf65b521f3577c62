"""A selector on the command line: flags that become the policies' own matchers."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from pydantic import TypeAdapter, ValidationError

from scheduler.cli.errors import UsageError
from scheduler.matchers import All, Matcher
from worker.yaml_source import YamlError, parse_yaml

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

_MATCHER: TypeAdapter[Matcher] = TypeAdapter(Matcher)


def selector(
    *,
    tags: Sequence[str],
    older_than: str | None,
    name: str | None,
    expired: bool,
    idle: str | None,
    match: str | None,
) -> Matcher | None:
    """The matcher that flags stand for: all of them must match. None: none is given.

    Args:
        tags: each a key, or a key, `=` and its value.
        older_than, idle: durations such as 30d.
        name: a glob over the user-given name and the id.
        expired: whether the tag `expires-at` must have passed.
        match: any matcher, in YAML.

    Raises:
        UsageError: one cannot be used; the sentence names its flag.
    """
    found = [
        _read(flag, value, form)
        for flag, value, form in _forms(tags, older_than, name, expired, idle)
    ]
    if match is not None:
        found.append(_read_yaml(match))
    if not found:
        return None
    return found[0] if len(found) == 1 else All(all=found)


def _forms(
    tags: Sequence[str], older_than: str | None, name: str | None, expired: bool, idle: str | None
) -> Iterator[tuple[str, str, dict[str, Any]]]:
    """Each flag with its value and the matcher as a policy has it."""
    for tag in tags:
        key, given, value = tag.partition("=")
        if not key:
            raise UsageError(f"--tag: {tag!r} names no key; accepted: KEY or KEY=VALUE.")
        yield "--tag", tag, {"tags": {"key": key, **({"equals": value} if given else {})}}
    if older_than is not None:
        yield "--older-than", older_than, {"older_than": older_than}
    if name is not None:
        yield "--name", name, {"name": name}
    if expired:
        yield "--expired", "", {"expired": None}
    if idle is not None:
        yield "--idle", idle, {"idle": idle}


def _read(flag: str, value: str, form: dict[str, Any]) -> Matcher:
    try:
        return _MATCHER.validate_python(form)
    except ValidationError as error:
        why = error.errors(include_url=False)[0]["msg"].removeprefix("Value error, ").rstrip(".")
        if repr(value) not in why:
            why = f"{value!r} is not accepted: {why[:1].lower()}{why[1:]}"
        raise UsageError(f"{flag}: {why}.") from None


def _read_yaml(text: str) -> Matcher:
    try:
        source = parse_yaml(text, "--match")
        try:
            return _MATCHER.validate_python(source.data)
        except ValidationError as error:
            raise YamlError(source.sentences(error)) from None
    except UnicodeEncodeError:
        raise UsageError("--match: it is not UTF-8; accepted: a matcher in YAML.") from None
