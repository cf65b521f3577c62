"""Tables of GitHub Flavored Markdown: text from outside shows as it is, and is no markup."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Final

from scheduler.review.text import one_line

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from scheduler.review.sections import Section

_MARKUP: Final = re.compile(r"[\\`*_\[\]~|#$!]")
_CHARACTERS: Final = str.maketrans({"&": "&amp;", "<": "&lt;", ">": "&gt;", "@": "&#64;"})
"""Beside HTML: what makes a mention, which would call somebody."""
_LINKS: Final = (("://", "&#58;//"), ("www.", "www&#46;"))


def cell(text: str) -> str:
    """A text as a cell takes it: on one line, without markup, links and mentions.

    Source: GitHub Flavored Markdown, 4.10 tables, 6.1 backslash escapes, 6.9 autolinks.
    """
    escaped = _MARKUP.sub(r"\\\g<0>", one_line(text)).translate(_CHARACTERS)
    for link, broken in _LINKS:
        escaped = re.sub(re.escape(link), broken, escaped, flags=re.IGNORECASE)
    return escaped


def row(cells: Iterable[str]) -> str:
    """A line of a table."""
    return f"| {' | '.join(map(cell, cells))} |\n"


def header(names: Sequence[str], numbers: frozenset[str] = frozenset()) -> str:
    """The first two lines of a table.

    Args:
        names: of its columns.
        numbers: those of them that are aligned to the right.
    """
    rule = " | ".join("--:" if name in numbers else "---" for name in names)
    return f"{row(names)}| {rule} |\n"


def document(title: str, sections: Iterable[Section]) -> str:
    """A report.

    Args:
        title: its heading.
        sections: what is in it.
    """
    parts = [f"# {cell(title)}\n"]
    for section in sections:
        parts.append(f"\n## {cell(section.title)}\n")
        if section.rows:
            parts.append("\n" + header(section.headers, section.numbers))
            parts += map(row, section.rows)
        if section.note:
            parts.append(f"\n{cell(section.note)}\n")
    return "".join(parts)
