"""How fast a project's calls go, from what the limiter holds: pure.

Source: worker/limiter.lua, which changes the same numbers.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Mapping

DOUBLING_S = 2.0
HOLD_S = 20.0
PROBE_S = 30.0
PAUSED_MS = 1_000
"""Slots that far ahead, and two slots ahead, mean that the cloud asked for a pause."""


@dataclass(frozen=True, slots=True)
class Rate:
    """What the limiter allows in one project at a moment.

    Attributes:
        limit: calls/s at most.
        now: calls/s at the moment.
        sent: calls since `since_ms`.
        refused: those of them that the cloud refused with 429.
        since_ms: since when calls have gone without a break or a cut; in ms since the epoch.
        paused_ms: for how many ms more no call goes; 0: calls may go.
    """

    limit: float
    now: float
    sent: int
    refused: int
    since_ms: int
    paused_ms: int

    @property
    def reduced(self) -> bool:
        """Whether the cloud's refusals hold it below its limit."""
        return self.now < self.limit


def rate_of(state: Mapping[str, str], limit: float, now_ms: float) -> Rate | None:
    """The rate of a project.

    Args:
        state: the limiter's hash; empty: there were no calls for an hour.
        limit: calls/s that it may come to.
        now_ms: the server's clock, in ms since the epoch.

    Returns:
        The rate; None: nothing is known, or there is no limit.
    """
    if not state or limit <= 0:
        return None
    now = limit
    if "cut" in state:
        base = float(state["rate"])
        plateau = min(limit, float(state.get("plateau", limit)))
        seconds = max(0.0, now_ms - float(state["cut"])) / 1000
        rising_s = max(0.0, DOUBLING_S * math.log2(plateau / base))
        if seconds < rising_s:
            now = base * 2 ** (seconds / DOUBLING_S)
        else:
            probing_s = max(0.0, seconds - rising_s - float(state.get("hold", HOLD_S)))
            now = min(limit, plateau + limit * (probing_s / PROBE_S) ** 3)
    ahead_ms = float(state.get("tat", 0)) - now_ms
    return Rate(
        limit=limit,
        now=now,
        sent=int(state.get("sent", 0)),
        refused=int(state.get("refused", 0)),
        since_ms=round(float(state.get("since", 0))),
        paused_ms=round(ahead_ms) if ahead_ms > max(PAUSED_MS, 2_000 / now) else 0,
    )
