"""How fast a run is, and how long it still takes."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from scheduler.cli.progress import Pace


def pace(*seen: tuple[float, int], begun_s: float = 0) -> Pace:
    found = Pace(begun_s)
    for at_s, done in seen:
        found.saw(at_s, done)
    return found


def test_a_steady_run_is_told_its_rate_and_what_is_left() -> None:
    found = pace(*((at, 5 * at) for at in range(21)))
    assert found.per_second == pytest.approx(5)
    assert found.left_s(200) == pytest.approx(20)
    assert found.elapsed_s == 20


def test_nothing_is_known_before_something_was_seen() -> None:
    for found in (pace(), pace((3, 7)), pace((3, 7), (3, 9))):
        assert found.per_second is None
        assert found.left_s(100) is None


def test_a_run_that_stands_still_has_no_end_in_sight_unless_it_is_there() -> None:
    found = pace((0, 7), (10, 7))
    assert found.per_second == 0
    assert found.left_s(100) is None
    assert found.left_s(7) == 0


def test_what_ended_before_it_was_watched_does_not_count_as_speed() -> None:
    found = pace((100, 5_000), (110, 5_010), begun_s=-400)
    assert found.per_second == pytest.approx(1)
    assert found.elapsed_s == 510


def test_the_rate_is_that_of_late() -> None:
    quick = [(float(at), 100 * at) for at in range(60)]
    slow = [(60.0 + at, 6_000 + at) for at in range(60)]
    assert pace(*quick, *slow).per_second == pytest.approx(1)


@given(
    st.lists(st.tuples(st.floats(0.001, 60), st.integers(0, 50)), min_size=2, max_size=50),
    st.integers(0, 10_000),
)
def test_the_rate_lies_between_the_slowest_and_the_quickest_moment(
    steps: list[tuple[float, int]], total: int
) -> None:
    found, at_s, done, rates = Pace(0), 0.0, 0, []
    found.saw(at_s, done)
    for seconds, ended in steps:
        at_s, done = at_s + seconds, done + ended
        found.saw(at_s, done)
        rates.append(ended / seconds)
    rate = found.per_second
    assert rate is not None
    assert min(rates) * 0.99 <= rate <= max(rates) * 1.01
    left_s = found.left_s(total)
    assert left_s is None or left_s >= 0
