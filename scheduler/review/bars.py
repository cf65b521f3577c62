"""The geometry of stacked bars over days, for a picture without scripts. Pure.

Lengths are in the picture's own units; y grows downwards, as in SVG.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

WIDTH: Final = 720.0
HEIGHT: Final = 220.0
_LEFT, _RIGHT, _TOP, _BOTTOM = 56.0, 8.0, 8.0, 24.0
_WIDEST: Final = 48.0
_MOST_TICKS: Final = 5
_MOST_LABELS: Final = 9


@dataclass(frozen=True, slots=True)
class Piece:
    """A rectangle: what one kind has of one bar, and its count."""

    x: float
    y: float
    width: float
    height: float
    kind: str
    day: str
    count: int


@dataclass(frozen=True, slots=True)
class Label:
    """A text at a place on an axis."""

    at: float
    text: str


@dataclass(frozen=True, slots=True)
class Picture:
    """Stacked bars.

    Attributes:
        pieces: what there is of each kind on each day, from the bottom up.
        ticks: the lines of the scale, with what they stand for; `at` is y.
        days: days along the axis, as many as there is room for; `at` is x.
        left, right, bottom: where the bars' field ends.
    """

    pieces: tuple[Piece, ...]
    ticks: tuple[Label, ...]
    days: tuple[Label, ...]
    left: float = _LEFT
    right: float = WIDTH - _RIGHT
    bottom: float = HEIGHT - _BOTTOM


def stacked(days: Sequence[tuple[str, Mapping[str, int]]], kinds: Sequence[str]) -> Picture:
    """Bars of counts, one for each day.

    Args:
        days: each day and its counts by kind.
        kinds: the kinds, from the bottom up; others are left out.
    """
    tallest = max((sum(counts.get(kind, 0) for kind in kinds) for _, counts in days), default=0)
    step = _step(tallest)
    top = max(step, -(-tallest // step) * step)
    field = HEIGHT - _TOP - _BOTTOM
    room = (WIDTH - _LEFT - _RIGHT) / max(1, len(days))
    width = min(_WIDEST, room * 0.8)
    every = -(-len(days) // _MOST_LABELS) or 1
    pieces, labels = [], []
    for place, (day, counts) in enumerate(days):
        middle = _LEFT + room * (place + 0.5)
        below = 0
        for kind in kinds:
            if count := counts.get(kind, 0):
                below += count
                y = HEIGHT - _BOTTOM - field * below / top
                height = field * count / top
                pieces.append(Piece(middle - width / 2, y, width, height, kind, day, count))
        if place % every == 0:
            labels.append(Label(middle, day))
    ticks = (
        Label(HEIGHT - _BOTTOM - field * value / top, f"{value:,}")
        for value in range(0, top + 1, step)
    )
    return Picture(tuple(pieces), tuple(ticks), tuple(labels))


def _step(tallest: int) -> int:
    """The smallest of 1, 2, 5, 10, 20 and so on that makes few enough ticks."""
    size = 1
    while True:
        for step in (size, 2 * size, 5 * size):
            if -(-tallest // step) <= _MOST_TICKS:
                return step
        size *= 10
