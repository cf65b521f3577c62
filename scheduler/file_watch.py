"""A policy file that is read again when it changes."""

from __future__ import annotations

from typing import TYPE_CHECKING

from scheduler import policy as policies
from worker.yaml_source import YamlError

if TYPE_CHECKING:
    from pathlib import Path

    from scheduler.policy import PolicyFile


class PolicyWatch:
    """The policies of a file: the last ones that were good.

    A file that is being written may be well-formed halfway, and lack what protects a pool. So a
    change is taken up by the look after the one that saw it, if the file has been still since.

    Args:
        path: the file.

    Attributes:
        policies: what is in force.
        rejected: what is wrong with the file as it is now; empty: nothing, it is in force.

    Raises:
        YamlError: all that is wrong with it.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        # Before it is read: what is written in the meantime is a change.
        self._taken = self._seen = _stamp(path)
        self.policies: PolicyFile = policies.load(path)
        self.rejected = ""

    def look(self) -> bool:
        """Read the file if it has changed. Slow: it may be on a disk far away.

        Returns:
            Whether other policies are in force now.

        Raises:
            YamlError: all that is wrong with a changed file, once; the old policies stay.
        """
        before, self._seen = self._seen, _stamp(self.path)
        if self._seen == self._taken or self._seen != before:
            return False
        try:
            found = policies.load(self.path)
        except YamlError as error:
            self._taken = self._seen
            self.rejected = str(error)
            raise
        if _stamp(self.path) != self._seen:
            return False
        self._taken = self._seen
        self.rejected = ""
        self.policies = found
        return True


def _stamp(path: Path) -> tuple[int, int, int] | None:
    """What changes when a file does; None: it is not there."""
    try:
        found = path.stat()
    except OSError:
        return None
    return found.st_mtime_ns, found.st_size, found.st_ino
