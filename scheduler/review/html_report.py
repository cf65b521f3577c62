"""A report as one HTML file that needs nothing else: to be sent, printed and kept."""

from __future__ import annotations

from functools import cache
from importlib.resources import files
from typing import TYPE_CHECKING, Any

from jinja2 import Environment, StrictUndefined, Template

from scheduler.review import bars
from scheduler.review.sections import OUTCOMES, number, sections, title_of
from worker.modelarts.answers import printable

if TYPE_CHECKING:
    from scheduler.review.report import Report

_LONGEST_TEXT = 4_000


def html(report: Report) -> str:
    """The file's text. What is in the report from outside is escaped.

    Args:
        report: what it tells.
    """
    kinds = [str(state) for state in OUTCOMES]
    days = [(day.day, day.outcomes) for day in report.days]
    return _template().render(
        title=title_of(report),
        report=report,
        sections=sections(report),
        picture=bars.stacked(days, kinds) if report.jobs else None,
        kinds=[kind for kind in kinds if report.outcomes.get(kind)],
        width=bars.WIDTH,
        height=bars.HEIGHT,
    )


@cache
def _template() -> Template:
    environment = Environment(
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
        finalize=_shown,
    )
    environment.filters["number"] = number
    source = files("scheduler.review") / "report.html"
    return environment.from_string(source.read_text(encoding="utf-8"))


def _shown(value: Any) -> Any:
    """What stands in the page for a value: text on one line, lengths to a hundredth."""
    if isinstance(value, float):
        return f"{value:.2f}".rstrip("0").rstrip(".")
    # Markup is a text too, one that the template has made.
    return printable(value, _LONGEST_TEXT) if type(value) is str else value
