"""The forms in which a command can write what it found, of which the user chooses one."""

from __future__ import annotations

from enum import Enum, auto
from typing import TYPE_CHECKING

from scheduler.cli.errors import UsageError

if TYPE_CHECKING:
    from collections.abc import Mapping


class Form(Enum):
    """How something is written."""

    TABLE = auto()
    JSON = auto()
    LINES = auto()
    CSV = auto()
    MARKDOWN = auto()
    HTML = auto()


FLAGS = {
    Form.JSON: "--json",
    Form.LINES: "--jsonl",
    Form.CSV: "--csv",
    Form.MARKDOWN: "--markdown",
    Form.HTML: "--html",
}


def chosen(given: Mapping[Form, bool]) -> Form:
    """The form that the user chose; none: a table.

    Args:
        given: which forms were asked for.

    Raises:
        UsageError: several were.
    """
    forms = [form for form, wanted in given.items() if wanted]
    if len(forms) > 1:
        names = " and ".join(FLAGS[form] for form in forms)
        raise UsageError(f"{names}: only one of them is accepted.")
    return forms[0] if forms else Form.TABLE
