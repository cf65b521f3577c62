"""Whether and when a call is made again: pure."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING

from redis.backoff import FullJitterBackoff

if TYPE_CHECKING:
    from collections.abc import Sequence

MAX_PAUSE_S = 600.0
"""The longest wait that the cloud is taken to have asked for all calls of a project."""


@dataclass(frozen=True, slots=True)
class RetryPolicy:
    """How long a job goes on trying.

    Attributes:
        max_attempts: calls in all.
        max_total_s: seconds since the first call after which none is made.
        base_s: the first wait's upper bound in seconds; it doubles with each attempt.
        cap_s: no backoff is longer, in seconds. The cloud's own Retry-After is obeyed beyond it.
    """

    max_attempts: int
    max_total_s: float
    base_s: float
    cap_s: float


@dataclass(frozen=True, slots=True)
class Wait:
    """Try again after so many seconds."""

    seconds: float


@dataclass(frozen=True, slots=True)
class GiveUp:
    """Try no more, and why."""

    reason: str


def backoff_s(policy: RetryPolicy, attempts: int) -> float:
    """A random wait: exponential backoff with full jitter.

    Args:
        policy: base and cap.
        attempts: calls made so far, at least 1.

    Returns:
        Seconds from 0 to min(cap, base * 2^(attempts-1)), evenly spread.

    Source: M. Brooker, "Exponential Backoff And Jitter", AWS Architecture Blog, 2015.
    """
    return float(FullJitterBackoff(policy.cap_s, policy.base_s).compute(attempts - 1))


def tried_s(policy: RetryPolicy, moments_ms: Sequence[int]) -> float:
    """For how long a job has been tried.

    Args:
        policy: the bounds.
        moments_ms: when its calls were answered, in ms.

    Returns:
        Seconds from the first call to the last, without what it waited for other reasons than its
        retries: its turn in a long run, a pause, an outage.
    """
    longest_s = max(policy.cap_s, MAX_PAUSE_S)
    gaps_s = ((later - earlier) / 1000 for earlier, later in pairwise(moments_ms))
    return sum(min(max(0.0, gap_s), longest_s) for gap_s in gaps_s)


def decide(
    policy: RetryPolicy,
    *,
    attempts: int,
    elapsed_s: float,
    backoff_s: float,
    retry_after_s: float | None,
) -> Wait | GiveUp:
    """Whether to call again.

    Args:
        policy: the bounds.
        attempts: calls made so far.
        elapsed_s: for how long it was tried, in seconds: see `tried_s`.
        backoff_s: the random wait drawn for this attempt, in seconds.
        retry_after_s: what the cloud asked for, in seconds.

    Returns:
        `Wait` for the longer of both waits, or `GiveUp` if the attempts are used up or the next
        would come too late.
    """
    if attempts >= policy.max_attempts:
        return GiveUp(f"given up after {attempts} attempts")
    wait_s = max(backoff_s, retry_after_s or 0)
    if elapsed_s + wait_s > policy.max_total_s:
        return GiveUp(
            f"given up after {attempts} attempts: the next would come later than "
            f"{policy.max_total_s:g} s after the first"
        )
    return Wait(wait_s)
