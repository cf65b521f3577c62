"""A report as one HTML file that needs nothing else: to be sent, printed and kept."""

from __future__ import annotations

from importlib.resources import files
from typing import TYPE_CHECKING

from markupsafe import Markup

from scheduler.review import bars
from scheduler.review.sections import sections, title_of
from scheduler.review.web import pages

if TYPE_CHECKING:
    from scheduler.review.report import Report


def html(report: Report) -> str:
    """The file's text. What is in the report from outside is escaped.

    Args:
        report: what it tells.
    """
    days = [(day.day, day.outcomes) for day in report.days]
    style = files("scheduler.review.web") / "static" / "style.css"
    return pages.render(
        "report.html",
        # Our own file: there is nothing in it to escape.
        style=Markup(style.read_text(encoding="utf-8")),  # noqa: S704
        title=title_of(report),
        report=report,
        sections=sections(report),
        picture=bars.stacked(days) if report.jobs else None,
    )
