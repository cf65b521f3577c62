"""Durations as people write them: `90m`, `12h`, `7d`, `2w`."""

from __future__ import annotations

import re
from datetime import timedelta
from functools import lru_cache
from typing import Annotated, Any

from pydantic import BeforeValidator, PlainSerializer, WithJsonSchema
from pydantic_core import PydanticCustomError

ACCEPTED = "a number and a unit, such as 90m, 12h, 7d or 2w"
# Small letters of ASCII only: who writes 1M means a month, and would get a minute.
_FORM = re.compile(r"([0-9]{1,6}) ?(s|m|min|h|d|w)")
_UNITS = {"s": 1, "m": 60, "min": 60, "h": 3_600, "d": 86_400, "w": 604_800}
PATTERN = rf"^\s*{_FORM.pattern}\s*$"
"""The form as a regular expression of JSON Schema."""


def parse_duration(text: str) -> timedelta:
    """Read a duration.

    Args:
        text: a whole number and `s`, `m` (or `min`), `h`, `d` or `w`; `m` means minutes.

    Raises:
        ValueError: it is none; the sentence says what is accepted.
    """
    match = _FORM.fullmatch(text.strip())
    if not match:
        raise ValueError(f"{text!r} is not a duration; accepted: {ACCEPTED}")
    return timedelta(seconds=int(match[1]) * _UNITS[match[2]])


@lru_cache(maxsize=4096)
def format_duration(duration: timedelta) -> str:
    """A duration in the largest unit that divides it, such as `90m`."""
    seconds = round(duration.total_seconds())
    for unit in ("w", "d", "h", "m"):
        if seconds and seconds % _UNITS[unit] == 0:
            return f"{seconds // _UNITS[unit]}{unit}"
    return f"{seconds}s"


def read_duration(value: Any) -> timedelta:
    """A field's value as a duration; a bare number is none, since it does not say of what.

    Raises:
        ValueError: it is none.
    """
    if isinstance(value, timedelta):
        return value
    if isinstance(value, str):
        return parse_duration(value)
    raise PydanticCustomError("duration", "accepted: {accepted}", {"accepted": ACCEPTED})


Duration = Annotated[
    timedelta,
    BeforeValidator(read_duration),
    PlainSerializer(format_duration),
    WithJsonSchema({"type": "string", "pattern": PATTERN, "description": f"Accepted: {ACCEPTED}."}),
]
"""A field that takes a duration's text."""
