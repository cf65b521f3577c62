"""Where a command's log goes: to a file, since its streams are for whoever called it."""

from __future__ import annotations

import contextlib
import os
import sys
from typing import TYPE_CHECKING, Final, TextIO, cast

import structlog

from worker import log

if TYPE_CHECKING:
    from pathlib import Path

    from worker.settings import Settings

NAME: Final = "commands.log"
LARGEST: Final = 64 * 1024 * 1024
"""Bytes; a file that has grown beyond it makes room for a new one, and the one before it goes."""


def log_to_file(settings: Settings) -> None:
    """Send this process's log to the commands' file, unless it is sent somewhere already.

    Args:
        settings: the state directory, the level, and the secrets to mask.
    """
    if structlog.is_configured():
        return
    as_json = settings.model_copy(update={"log_format": "json"})
    file = LogFile(settings.state_dir / "logs" / NAME)
    log.configure(as_json, cast("TextIO", file))


class LogFile:
    """A file that is opened when there is something to write, and that stops no command.

    Where it cannot be written, as in a container without a place for it, lines go to standard
    error; on a terminal they would bury what is shown, and are dropped.

    Args:
        path: the file.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._file: TextIO | None = None

    def write(self, text: str) -> int:
        """Write a line, or as many as are in the text."""
        if self._file is None:
            self._file = self._opened()
        with contextlib.suppress(OSError):
            self._file.write(text)
        return len(text)

    def flush(self) -> None:
        """Hand everything to the system: several commands write to the file, a line at a time."""
        with contextlib.suppress(OSError):
            if self._file is not None:
                self._file.flush()

    def _opened(self) -> TextIO:
        try:
            self._path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            if self._path.exists() and self._path.stat().st_size > LARGEST:
                self._path.replace(self._path.with_suffix(".log.1"))
            return open(self._path, "a", encoding="utf-8", opener=_private)
        except OSError as error:
            if not sys.stderr.isatty():
                return sys.stderr
            sys.stderr.write(f"No log is kept: {self._path}: {error.strerror}\n")
            return open(os.devnull, "w", encoding="utf-8")  # noqa: PTH123


def _private(path: str, flags: int) -> int:
    """Open a file that its owner alone can read: it has the names of pools and people in it."""
    return os.open(path, flags, 0o600)
