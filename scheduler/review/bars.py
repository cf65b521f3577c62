"""Bars of outcomes over days, as numbers to draw, and how each outcome is told apart. Pure.

Lengths are in the picture's own units; y grows downwards, as in SVG. `bars.html` draws them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from worker.ledger import JobState

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

SIGNS: Final = {
    JobState.DELETED: "✓",
    JobState.ALREADY_DELETED: "○",
    JobState.ACCEPTED: "→",
    JobState.SKIPPED: "–",
    JobState.FAILED: "✕",
    JobState.CANCELLED: "■",
    JobState.LEASED: "▸",
    JobState.PENDING: "…",
}
"""The outcomes from the foot of a bar to its top, with what tells them apart besides colours."""
WIDTH: Final = 400.0
HEIGHT: Final = 160.0
LEAST_HEIGHT: Final = 2.0
"""No piece is lower: few among many must be seen too. The largest of its bar gives the rest."""
_RIGHT, _TOP, _BOTTOM = 4.0, 8.0, 18.0
_DIGIT: Final = 6.0
"""Room for one, left of the bars."""
_WIDEST: Final = 28.0
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
        kinds: those that there are, from the bottom up.
        left, right, bottom: where the bars' field ends.
        width, height: of the whole.
    """

    pieces: tuple[Piece, ...]
    ticks: tuple[Label, ...]
    days: tuple[Label, ...]
    kinds: tuple[str, ...]
    left: float
    right: float = WIDTH - _RIGHT
    bottom: float = HEIGHT - _BOTTOM
    width: float = WIDTH
    height: float = HEIGHT


def stacked(days: Sequence[tuple[str, Mapping[str, int]]]) -> Picture:
    """Bars of outcomes, one for each day.

    Args:
        days: each day and its counts by outcome.
    """
    tallest = max((sum(counts.values()) for _, counts in days), default=0)
    step = _step(tallest)
    top = max(step, -(-tallest // step) * step)
    foot = HEIGHT - _BOTTOM
    unit = (foot - _TOP) / top
    left = _DIGIT * (len(f"{top:,}") + 1)
    room = (WIDTH - left - _RIGHT) / max(1, len(days))
    width = min(_WIDEST, room * 0.8)
    every = -(-len(days) // _MOST_LABELS) or 1
    pieces, labels = [], []
    for place, (day, counts) in enumerate(days):
        middle = left + room * (place + 0.5)
        y = foot
        for kind, height in _heights(counts, unit).items():
            y -= height
            pieces.append(Piece(middle - width / 2, y, width, height, kind, day, counts[kind]))
        if (len(days) - 1 - place) % every == 0:  # the last has one
            labels.append(Label(middle, day))
    ticks = (Label(foot - unit * value, f"{value:,}") for value in range(0, top + 1, step))
    shown = {piece.kind for piece in pieces}
    present = tuple(kind for kind in SIGNS if kind in shown)
    return Picture(tuple(pieces), tuple(ticks), tuple(labels), present, left)


def _heights(counts: Mapping[str, int], unit: float) -> dict[str, float]:
    exact = {str(kind): counts[kind] * unit for kind in SIGNS if counts.get(kind)}
    heights = {kind: max(LEAST_HEIGHT, height) for kind, height in exact.items()}
    if heights:
        largest = max(heights, key=lambda kind: heights[kind])
        given = sum(heights.values()) - sum(exact.values())
        heights[largest] = max(LEAST_HEIGHT, heights[largest] - given)
    return heights


def _step(tallest: int) -> int:
    """The smallest of 1, 2, 5, 10, 20 and so on that makes few enough ticks."""
    size = 1
    while True:
        for step in (size, 2 * size, 5 * size):
            if -(-tallest // step) <= _MOST_TICKS:
                return step
        size *= 10
