"""Templates, the report's too; what comes from outside is written escaped, and printable."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any
from urllib.parse import urlencode

from jinja2 import ChoiceLoader, Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from scheduler.review.bars import SIGNS
from scheduler.review.sections import unread_runs
from scheduler.review.text import one_line

if TYPE_CHECKING:
    from worker.ledger import Run


def _written(value: Any) -> Any:
    """What an expression in a template becomes before it is escaped."""
    # Markup is a text too, one that a template has made.
    return one_line(value) if isinstance(value, str) and not isinstance(value, Markup) else value


def when(at_ms: int) -> str:
    """A time for people: UTC, to the second; empty for 0, which means never."""
    return f"{datetime.fromtimestamp(at_ms / 1000, UTC):%Y-%m-%d %H:%M:%S}Z" if at_ms else ""


def minute(moment: datetime) -> str:
    """A time for people: UTC, to the minute."""
    return f"{moment:%Y-%m-%d %H:%M}Z"


def grouped(number: int) -> str:
    """A whole number with its thousands apart."""
    return f"{number:,}"


def words(name: str) -> str:
    """A state as people say it."""
    return name.replace("_", " ")


def run_state(run: Run) -> str:
    """A run's state, with what else befell it."""
    befell = ", cancelled" if run.cancelled_ms else ""
    return f"{run.state}{befell}{', braked' if run.braked_ms and run.state != 'braked' else ''}"


def link(path: str, **parameters: Any) -> str:
    """A path with the parameters that say something."""
    said = {name: value for name, value in parameters.items() if value not in (None, "", 0)}
    return f"{path}?{urlencode(said)}" if said else path


_templates = Environment(
    loader=ChoiceLoader(
        [PackageLoader("scheduler.review.web", "templates"), PackageLoader("scheduler.review", ".")]
    ),
    autoescape=True,
    finalize=_written,
    undefined=StrictUndefined,
    trim_blocks=True,
    lstrip_blocks=True,
    keep_trailing_newline=True,
)
_templates.filters.update(when=when, minute=minute, grouped=grouped, words=words)
_templates.globals.update(link=link, run_state=run_state, signs=SIGNS, unread_runs=unread_runs)


def render(template: str, **values: Any) -> str:
    """A page as HTML.

    Args:
        template: the template's file.
        values: what it is written with.
    """
    return _templates.get_template(template).render(**values)
