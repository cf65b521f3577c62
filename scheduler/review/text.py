"""A text from outside, made fit for whichever page or table shows it."""

from __future__ import annotations

from typing import Final

from worker.modelarts.answers import printable

LONGEST: Final = 4_000
"""Characters that are shown of one."""


def one_line(text: str) -> str:
    """A text without control characters and those that reorder it, and not too long."""
    return printable(text, LONGEST)
