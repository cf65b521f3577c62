"""Projects as somebody names them in a command."""

from __future__ import annotations

from typing import TYPE_CHECKING

from scheduler.cli.errors import UsageError

if TYPE_CHECKING:
    from worker.projects import Directory


def project_id(directory: Directory, text: str) -> str:
    """The id of a project that is named by its id, or by its name in the projects file.

    Args:
        directory: the projects that have something of their own.
        text: what `--project` was given.

    Raises:
        UsageError: it is neither.
    """
    try:
        return directory.find(text)
    except ValueError as error:
        raise UsageError(f"--project: {error}") from None
