"""Templates, and how what comes from outside is written into them: escaped, and printable."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any, Final
from urllib.parse import urlencode

from jinja2 import ChoiceLoader, Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from scheduler.review.bars import SIGNS
from worker.modelarts.answers import printable

LONGEST: Final = 4_000


def _written(value: Any) -> Any:
    """What an expression in a template becomes before it is escaped."""
    if isinstance(value, Markup) or not isinstance(value, str):
        return value
    return printable(value, LONGEST)


def when(at_ms: int) -> str:
    """A time for people: UTC, to the second; empty for 0, which means never."""
    return f"{datetime.fromtimestamp(at_ms / 1000, UTC):%Y-%m-%d %H:%M:%S}Z" if at_ms else ""


def minute(moment: datetime) -> str:
    """A time for people: UTC, to the minute."""
    return f"{moment:%Y-%m-%d %H:%M}Z"


def grouped(number: int) -> str:
    """A whole number with its thousands apart."""
    return f"{number:,}"


def counted(number: int, noun: str) -> str:
    """How many of something there are."""
    return f"{number:,} {noun}" if number == 1 else f"{number:,} {noun}s"


def words(name: str) -> str:
    """A state as people say it."""
    return name.replace("_", " ")


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
)
_templates.filters.update(when=when, minute=minute, grouped=grouped, counted=counted, words=words)
_templates.globals.update(link=link, signs=SIGNS)


def render(template: str, **values: Any) -> str:
    """A page as HTML.

    Args:
        template: the template's file.
        values: what it is written with.
    """
    return _templates.get_template(template).render(**values)
