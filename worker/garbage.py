"""How often Python looks for garbage in circles."""

from __future__ import annotations

import gc


def collect_seldom() -> None:
    """Have Python look for garbage in circles less often than it would.

    By default it looks after every 700 new objects, of which one list of pools has thousands: that
    took a third of a worker's time, and half of a large plan's.
    """
    gc.set_threshold(50_000, 20, 100)


def settle() -> None:
    """The same for a process that is to live long: what is loaded by now lives as long as it."""
    gc.collect()
    gc.freeze()
    collect_seldom()
