"""Durations are read as people write them, and nothing else is taken for one."""

from __future__ import annotations

import re
from datetime import timedelta
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import TypeAdapter, ValidationError

from scheduler.durations import ACCEPTED, PATTERN, Duration, format_duration, parse_duration

FIELD: TypeAdapter[timedelta] = TypeAdapter(Duration)


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        ("45s", 45),
        ("90m", 5_400),
        ("90min", 5_400),
        ("90 m", 5_400),
        (" 12h ", 43_200),
        ("7d", 604_800),
        ("2w", 1_209_600),
        ("0d", 0),
        ("007d", 604_800),
        ("999999w", 999_999 * 604_800),
    ],
)
def test_a_number_and_a_unit_are_a_duration(text: str, seconds: int) -> None:
    assert parse_duration(text) == timedelta(seconds=seconds)
    assert FIELD.validate_python(text) == timedelta(seconds=seconds)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "7",
        "d",
        "-7d",
        "+7d",
        "1.5h",
        "1,5h",
        "1h30m",
        "7 days",
        "7  d",
        "7\td",
        "1234567d",
        "7d\n7d",
        "P7D",
        "٧d",
        "７d",
        # A month for many who write it.
        "1M",
        "7D",
        # Letters that some rules of case take for s and i.
        "5ſ",
        "5mın",
        "5mİn",
    ],
)
def test_anything_else_is_refused_with_what_is_accepted(text: str) -> None:
    with pytest.raises(ValueError, match=re.escape(f"{text!r} is not a duration; accepted: ")):
        parse_duration(text)
    with pytest.raises(ValidationError):
        FIELD.validate_python(text)


@pytest.mark.parametrize("value", [7, 7.0, True, None, [], {"days": 7}], ids=str)
def test_a_number_without_a_unit_is_no_duration(value: Any) -> None:
    # Seven what? Taken for seconds it would make every pool old.
    with pytest.raises(ValidationError, match=re.escape(ACCEPTED)):
        FIELD.validate_python(value)


@given(st.text() | st.from_regex(r"\A\s{0,2}[0-9]{0,7} ?[smhdwinSMHDſı]{0,4}\s{0,2}\Z"))
def test_any_text_is_a_duration_or_refused_and_the_published_pattern_agrees(text: str) -> None:
    try:
        parse_duration(text)
    except ValueError:
        assert not re.search(PATTERN, text)
    else:
        assert re.search(PATTERN, text)


@given(st.integers(0, 999_999), st.sampled_from(["s", "m", "min", "h", "d", "w"]))
def test_what_is_written_is_read_as_the_same(number: int, unit: str) -> None:
    duration = parse_duration(f"{number}{unit}")
    try:
        assert parse_duration(format_duration(duration)) == duration
    except ValueError:
        assert duration > timedelta(days=11), "more seconds than six digits hold"


@pytest.mark.parametrize(
    ("text", "written"),
    [("60s", "1m"), ("90m", "90m"), ("24h", "1d"), ("14d", "2w"), ("0d", "0s"), ("61s", "61s")],
)
def test_a_duration_is_written_in_the_largest_unit_that_divides_it(text: str, written: str) -> None:
    assert format_duration(parse_duration(text)) == written
