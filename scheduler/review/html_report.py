"""A report as one HTML file that needs nothing else: to be sent, printed and kept."""

from __future__ import annotations

from functools import cache
from importlib.resources import files
from typing import TYPE_CHECKING, Any

from jinja2 import Environment, PackageLoader, StrictUndefined, Template
from markupsafe import Markup

from scheduler.review import bars
from scheduler.review.sections import sections, title_of
from worker.modelarts.answers import printable

if TYPE_CHECKING:
    from scheduler.review.report import Report

_LONGEST_TEXT = 4_000


def html(report: Report) -> str:
    """The file's text. What is in the report from outside is escaped.

    Args:
        report: what it tells.
    """
    days = [(day.day, day.outcomes) for day in report.days]
    picture = bars.stacked(days, tuple(bars.SIGNS), least=bars.LEAST_HEIGHT)
    return _template().render(
        title=title_of(report),
        report=report,
        sections=sections(report),
        picture=picture if report.jobs else None,
        signs=bars.SIGNS,
    )


@cache
def _template() -> Template:
    environment = Environment(
        loader=PackageLoader("scheduler.review", "."),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
        finalize=_shown,
    )
    style = files("scheduler.review.web") / "static" / "style.css"
    # Our own file: there is nothing in it to escape.
    environment.globals["style"] = Markup(style.read_text(encoding="utf-8"))  # noqa: S704
    return environment.get_template("report.html")


def _shown(value: Any) -> Any:
    """What stands in the page for a value: a text is on one line."""
    # Markup is a text too, one that the template has made.
    return printable(value, _LONGEST_TEXT) if type(value) is str else value
