"""Runs a command as a container does that has dropped every capability: `confined.py COMMAND...`.

Without capabilities even root obeys the permissions of files.
"""

from __future__ import annotations

import ctypes
import os
import sys
from pathlib import Path

_PR_CAPBSET_DROP = 24
_PR_SET_NO_NEW_PRIVS = 38


def _last_capability() -> int:
    return int(Path("/proc/sys/kernel/cap_last_cap").read_text())


if __name__ == "__main__":
    libc = ctypes.CDLL(None)
    for number in range(_last_capability() + 1):
        libc.prctl(_PR_CAPBSET_DROP, number, 0, 0, 0)  # whoever is not root has none to drop
    libc.prctl(_PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)
    os.execv(sys.argv[1], sys.argv[1:])  # noqa: S606 - a command of the tests' own
