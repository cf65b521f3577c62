"""A file that is read again when it changes: the policies, the clients."""

from __future__ import annotations

from typing import TYPE_CHECKING, Generic, TypeVar

from worker.yaml_source import YamlError

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

T = TypeVar("T")


class FileWatch(Generic[T]):
    """What a file says: the last of it that was good.

    A file that is being written may be well-formed halfway, and lack what protects a pool. So a
    change is taken up by the look after the one that saw it, if the file has been still since.

    Args:
        path: the file.
        load: reads it; raises YamlError if it is not as it must be.

    Attributes:
        current: what is in force.
        rejected: what is wrong with the file as it is now; empty: nothing, it is in force.

    Raises:
        YamlError: all that is wrong with it.
    """

    def __init__(self, path: Path, load: Callable[[Path], T]) -> None:
        self.path = path
        self._load = load
        # Before it is read: what is written in the meantime is a change.
        self._taken = self._seen = _stamp(path)
        self.current = load(path)
        self.rejected = ""

    def look(self) -> bool:
        """Read the file if it has changed. Slow: it may be on a disk far away.

        Returns:
            Whether something else is in force now.

        Raises:
            YamlError: all that is wrong with a changed file, once; what was in force stays.
        """
        before, self._seen = self._seen, _stamp(self.path)
        if self._seen == self._taken or self._seen != before:
            return False
        try:
            found = self._load(self.path)
        except YamlError as error:
            self._taken = self._seen
            self.rejected = str(error)
            raise
        if _stamp(self.path) != self._seen:
            return False
        self._taken = self._seen
        self.rejected = ""
        self.current = found
        return True


def _stamp(path: Path) -> tuple[int, int, int] | None:
    """What changes when a file does; None: it is not there."""
    try:
        found = path.stat()
    except OSError:
        return None
    return found.st_mtime_ns, found.st_size, found.st_ino
