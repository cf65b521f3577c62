"""Whether and when a call is made again."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from worker.retry import (
    MAX_PAUSE_S,
    GiveUp,
    RetryPolicy,
    Wait,
    backoff_s,
    decide,
    tried_s,
)

POLICY = RetryPolicy(max_attempts=8, max_total_s=3_600, base_s=1, cap_s=60)

patient = settings(deadline=None)
seconds = st.floats(0, 1e9)


def decided(
    policy: RetryPolicy = POLICY,
    *,
    attempts: int = 1,
    elapsed_s: float = 0,
    backoff_s: float = 1,
    retry_after_s: float | None = None,
) -> Wait | GiveUp:
    return decide(
        policy,
        attempts=attempts,
        elapsed_s=elapsed_s,
        backoff_s=backoff_s,
        retry_after_s=retry_after_s,
    )


@given(st.lists(st.integers(0, 10**8), min_size=1, max_size=8).map(sorted))
def test_only_the_waits_of_retries_count_for_how_long_a_job_was_tried(moments: list[int]) -> None:
    tried = tried_s(POLICY, moments)
    assert 0 <= tried <= (moments[-1] - moments[0]) / 1000 + 1e-6
    assert tried <= MAX_PAUSE_S * (len(moments) - 1)
    if all(b - a <= 60_000 for a, b in pairwise(moments)):
        assert tried == pytest.approx((moments[-1] - moments[0]) / 1000)


def test_hours_in_the_queue_of_a_long_run_are_no_hours_of_trying() -> None:
    assert tried_s(POLICY, [0, 5_000, 3 * 3_600_000]) == 5 + MAX_PAUSE_S


@patient
@given(st.integers(1, 1_000), st.floats(0.001, 600), st.floats(0.001, 3_600))
def test_a_backoff_lies_between_0_and_a_bound_that_doubles_up_to_the_cap(
    attempts: int, base_s: float, cap_s: float
) -> None:
    policy = RetryPolicy(8, 3_600, base_s, cap_s)
    bound = min(cap_s, base_s * 2.0 ** (attempts - 1))
    assert 0 <= backoff_s(policy, attempts) <= bound


@pytest.mark.parametrize(
    ("attempts", "bound"), [(1, 1), (2, 2), (3, 4), (6, 32), (7, 60), (50, 60)]
)
def test_a_backoff_is_spread_evenly_over_its_whole_range(attempts: int, bound: float) -> None:
    draws = [backoff_s(POLICY, attempts) for _ in range(2_000)]
    assert max(draws) <= bound
    quarters = [
        sum(math.floor(4 * draw / bound) == quarter for draw in draws) for quarter in range(4)
    ]
    # 500 each, give or take six standard deviations.
    assert all(384 <= count <= 616 for count in quarters), quarters


@patient
@given(
    st.integers(1, 100),
    st.integers(1, 100),
    seconds,
    seconds,
    seconds,
    st.none() | seconds,
)
def test_a_call_is_made_again_just_within_both_bounds(
    max_attempts: int,
    attempts: int,
    max_total_s: float,
    elapsed_s: float,
    drawn_s: float,
    retry_after_s: float | None,
) -> None:
    policy = RetryPolicy(max_attempts, max_total_s, 1, 60)
    found = decided(
        policy,
        attempts=attempts,
        elapsed_s=elapsed_s,
        backoff_s=drawn_s,
        retry_after_s=retry_after_s,
    )
    wait_s = max(drawn_s, retry_after_s or 0)
    if attempts < max_attempts and elapsed_s + wait_s <= max_total_s:
        assert found == Wait(wait_s)
    else:
        assert isinstance(found, GiveUp)
        assert f"{attempts} attempts" in found.reason


def test_the_last_attempt_is_the_last() -> None:
    assert decided(attempts=7) == Wait(1)
    assert decided(attempts=8) == GiveUp("given up after 8 attempts")
    assert decided(attempts=9) == GiveUp("given up after 9 attempts")


def test_no_call_comes_later_than_the_time_allowed() -> None:
    assert decided(elapsed_s=3_599, backoff_s=1) == Wait(1)
    assert decided(elapsed_s=3_599, backoff_s=1.001) == GiveUp(
        "given up after 1 attempts: the next would come later than 3600 s after the first"
    )
    assert isinstance(decided(elapsed_s=4_000, backoff_s=0), GiveUp)


def test_what_the_cloud_asks_for_is_obeyed_beyond_the_cap() -> None:
    assert decided(backoff_s=60, retry_after_s=600) == Wait(600)
    assert decided(backoff_s=60, retry_after_s=3_600) == Wait(3_600)


def test_what_the_cloud_asks_for_never_shortens_the_backoff() -> None:
    assert decided(backoff_s=10, retry_after_s=2) == Wait(10)
    assert decided(backoff_s=10, retry_after_s=0) == Wait(10)


@pytest.mark.parametrize("retry_after_s", [3_601, 1e12, math.inf])
def test_a_wait_longer_than_the_time_allowed_is_given_up_and_not_cut(retry_after_s: float) -> None:
    assert isinstance(decided(retry_after_s=retry_after_s), GiveUp)


def test_a_clock_that_went_back_does_not_end_the_tries() -> None:
    assert decided(elapsed_s=-100, backoff_s=1) == Wait(1)
