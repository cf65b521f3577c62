"""The circuit breaker: it opens on failures alone, and always finds the end of an outage."""

from __future__ import annotations

import contextlib
import itertools
import math
import random
from dataclasses import dataclass, field

import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule
from structlog.testing import capture_logs

from worker.breaker import (
    FIRST_PAUSE_S,
    JITTER,
    LEAST_FAILURES,
    LEAST_IN_A_ROW,
    LONGEST_PAUSE_S,
    PROBE_S,
    ROW_S,
    WINDOW_S,
    Admission,
    Breakers,
    CircuitOpenError,
    is_well,
)
from worker.modelarts import Answer, Failure

ONE, OTHER = "a" * 32, "b" * 32
ROUNDING_S = 1e-6


def ask(breakers: Breakers, project: str) -> Admission | float:
    """What one is told: to go, or how many seconds to wait."""
    try:
        return breakers.admit(project)
    except CircuitOpenError as error:
        return error.wait_s


@dataclass
class Clock:
    now: float = 1_000.0

    def __call__(self) -> float:
        return self.now


@dataclass
class Stage:
    """Breakers on a clock of the test's own, without jitter unless it is asked for."""

    draw: float = 0.0
    clock: Clock = field(default_factory=Clock)

    def __post_init__(self) -> None:
        self.breakers = Breakers(self.clock, lambda: self.draw)

    def call(self, *, ok: bool, project: str = ONE) -> None:
        with self.breakers.admit(project) as admission:
            admission.report(ok=ok)

    def wait_s(self, project: str = ONE) -> float:
        """How long an open breaker says to wait."""
        with pytest.raises(CircuitOpenError) as error:
            self.breakers.admit(project)
        return error.value.wait_s

    def fail(self, times: int = LEAST_FAILURES, project: str = ONE) -> None:
        for _ in range(times):
            self.call(ok=False, project=project)


@pytest.mark.parametrize(
    ("answer", "well"),
    [
        (Answer("DELETE", 200), True),
        (Answer("DELETE", 302), True),
        (Answer("DELETE", 404), True),
        (Answer("DELETE", 429), True),
        (Answer("GET", 499), True),
        (Answer("GET", 500), False),
        (Answer("DELETE", 503), False),
        *((Answer("DELETE", None, failure=failure), False) for failure in Failure),
    ],
)
def test_a_cloud_is_well_that_answers_with_anything_but_a_fault_of_its_own(
    answer: Answer, well: bool
) -> None:
    assert is_well(answer) is well


def test_ten_failures_open_it_and_nine_do_not() -> None:
    stage = Stage()
    stage.fail(LEAST_FAILURES - 1)
    stage.breakers.admit(ONE)
    stage.fail(1)
    assert stage.wait_s() == FIRST_PAUSE_S


def test_failures_that_are_less_than_half_of_the_calls_do_not_open_it() -> None:
    stage = Stage()
    for _ in range(50):
        stage.call(ok=True)
    stage.fail(49)
    stage.breakers.admit(ONE)
    stage.fail(1)
    stage.wait_s()


def test_failures_that_are_long_past_do_not_count() -> None:
    stage = Stage()
    stage.fail(LEAST_FAILURES - 1)
    stage.clock.now += WINDOW_S
    stage.call(ok=True)
    stage.fail(LEAST_FAILURES - 1)
    stage.breakers.admit(ONE)


def test_a_cloud_that_answers_nothing_opens_it_though_it_fails_seldom() -> None:
    stage = Stage()
    for _ in range(LEAST_IN_A_ROW - 1):
        stage.fail(1)
        stage.clock.now += WINDOW_S
        stage.breakers.admit(ONE)
    stage.fail(1)
    stage.wait_s()


def test_a_few_failures_at_one_moment_are_no_outage() -> None:
    stage = Stage()
    stage.fail(LEAST_FAILURES - 1)
    stage.breakers.admit(ONE)


def test_one_success_ends_a_row_of_failures() -> None:
    stage = Stage()
    for _ in range(5):
        stage.fail(LEAST_IN_A_ROW - 1)
        stage.clock.now += WINDOW_S
        stage.call(ok=True)
    stage.breakers.admit(ONE)


def test_a_call_that_goes_well_does_not_open_it_though_older_ones_count_no_longer() -> None:
    stage = Stage()
    for _ in range(2 * LEAST_FAILURES):
        stage.call(ok=True)
    stage.clock.now += 1
    stage.fail(LEAST_FAILURES)
    stage.clock.now += WINDOW_S - 1
    stage.call(ok=True)
    stage.breakers.admit(ONE)
    stage.fail(1)
    stage.wait_s()


def test_one_projects_outage_does_not_touch_another() -> None:
    stage = Stage()
    stage.fail()
    stage.wait_s()
    for _ in range(50):
        stage.call(ok=True, project=OTHER)
    stage.wait_s()
    stage.breakers.admit(OTHER)


def test_pauses_double_to_a_bound_with_each_probe_that_fails() -> None:
    stage = Stage()
    stage.fail()
    pauses = []
    for _ in range(7):
        pauses.append(stage.wait_s())
        stage.clock.now += pauses[-1]
        stage.fail(1)
    assert pauses == [5, 10, 20, 40, 60, 60, 60]


@given(st.floats(0, 1))
def test_jitter_only_ever_shortens_a_pause(draw: float) -> None:
    stage = Stage(draw)
    stage.fail()
    assert FIRST_PAUSE_S * (1 - JITTER) <= stage.wait_s() <= FIRST_PAUSE_S


def test_workers_do_not_probe_in_step() -> None:
    clock, waits = Clock(), set()
    for _ in range(20):
        breakers = Breakers(clock)
        for _ in range(LEAST_FAILURES):
            breakers.admit(ONE).report(ok=False)
        with pytest.raises(CircuitOpenError) as error:
            breakers.admit(ONE)
        waits.add(error.value.wait_s)
    assert len(waits) > 10


def test_while_a_probe_is_out_the_others_wait() -> None:
    stage = Stage()
    stage.fail()
    stage.clock.now += FIRST_PAUSE_S
    with stage.breakers.admit(ONE) as probe:
        probe.check()
        assert stage.wait_s() == FIRST_PAUSE_S
        probe.report(ok=True)
        stage.breakers.admit(ONE)


def test_a_probe_that_is_cancelled_makes_room_for_another() -> None:
    stage = Stage()
    stage.fail()
    stage.clock.now += FIRST_PAUSE_S
    with contextlib.suppress(TimeoutError), stage.breakers.admit(ONE):
        raise TimeoutError
    with stage.breakers.admit(ONE):
        stage.wait_s()


def test_a_probe_that_is_lost_makes_room_for_another_in_a_bounded_time() -> None:
    stage = Stage()
    stage.fail()
    stage.clock.now += FIRST_PAUSE_S
    lost = stage.breakers.admit(ONE)
    stage.clock.now += PROBE_S - 1
    assert stage.wait_s() == 1
    stage.clock.now += 1
    second = stage.breakers.admit(ONE)
    lost.report(ok=False)  # it is no probe any more
    assert stage.wait_s() == FIRST_PAUSE_S
    second.report(ok=False)
    assert stage.wait_s() == 2 * FIRST_PAUSE_S
    lost.report(ok=True)  # and yet the cloud answered it
    stage.breakers.admit(ONE)


def test_a_call_that_waited_for_its_turn_is_not_made_once_the_breaker_has_opened() -> None:
    stage = Stage()
    waiting = stage.breakers.admit(ONE)
    waiting.check()
    stage.fail()
    with pytest.raises(CircuitOpenError) as error:
        waiting.check()
    assert error.value.wait_s == FIRST_PAUSE_S
    stage.clock.now += FIRST_PAUSE_S
    with pytest.raises(CircuitOpenError) as error:  # the next probe is who asks for it
        waiting.check()
    assert error.value.wait_s == 0
    stage.call(ok=True)
    waiting.check()


def test_answers_to_calls_from_before_the_outage_say_nothing_about_its_end() -> None:
    stage = Stage()
    late = [stage.breakers.admit(ONE) for _ in range(4 * LEAST_FAILURES)]
    stage.fail()
    late.pop().report(ok=True)
    assert stage.wait_s() == FIRST_PAUSE_S
    stage.clock.now += FIRST_PAUSE_S
    with stage.breakers.admit(ONE) as probe:
        late.pop().report(ok=False)
        late.pop().report(ok=True)
        assert stage.wait_s() == FIRST_PAUSE_S  # the probe is still out
        probe.report(ok=True)
    for admission in late:
        admission.report(ok=False)
    stage.breakers.admit(ONE)


def test_a_cloud_that_bears_a_probe_but_not_the_jobs_gets_longer_and_longer_pauses() -> None:
    stage = Stage()
    pauses = []
    for _ in range(6):
        stage.fail()
        pauses.append(stage.wait_s())
        stage.clock.now += pauses[-1]
        stage.call(ok=True)
    assert pauses == [5, 10, 20, 40, 60, 60]
    stage.clock.now += WINDOW_S
    stage.fail()
    assert stage.wait_s() == FIRST_PAUSE_S


def test_opening_and_closing_are_logged_once_each_with_their_project() -> None:
    with capture_logs() as logs:
        stage = Stage()
        stage.call(ok=True)
        stage.fail()
        for _ in range(3):
            stage.clock.now += LONGEST_PAUSE_S
            stage.fail(1)
        stage.clock.now += LONGEST_PAUSE_S
        stage.call(ok=True)
    assert logs == [
        {
            "event": "circuit_opened",
            "log_level": "warning",
            "project_id": ONE,
            "failed": LEAST_FAILURES,
            "calls": LEAST_FAILURES + 1,
            "pause_s": FIRST_PAUSE_S,
        },
        {
            "event": "circuit_closed",
            "log_level": "info",
            "project_id": ONE,
            "open_s": 4 * LONGEST_PAUSE_S,
        },
    ]


@given(outage_s=st.floats(1, 3_000), callers=st.integers(1, 40), seed=st.integers(0, 2**32))
def test_an_outage_costs_few_calls_and_its_end_is_found_soon(
    outage_s: float, callers: int, seed: int
) -> None:
    clock = Clock()
    start = clock.now
    breakers = Breakers(clock, random.Random(seed).random)
    turns = [start] * callers  # when each asks next; a call takes a moment and is made again
    failed = 0
    while True:
        clock.now = min(turns)
        caller = turns.index(clock.now)
        asked = ask(breakers, ONE)
        if isinstance(asked, float):
            turns[caller] += asked
            continue
        if clock.now >= start + outage_s:
            break
        with asked:
            asked.report(ok=False)
        turns[caller] += 0.1
        failed += 1
    assert clock.now <= start + outage_s + LONGEST_PAUSE_S + ROUNDING_S
    doublings = math.ceil(math.log2(LONGEST_PAUSE_S / FIRST_PAUSE_S))
    probes = doublings + math.ceil(outage_s / (LONGEST_PAUSE_S * (1 - JITTER)))
    assert failed <= LEAST_FAILURES + probes


class Breaking(RuleBasedStateMachine):
    """Two projects' breakers beside a record of all that happened, kept in the simplest form."""

    def __init__(self) -> None:
        super().__init__()
        self.clock = Clock()
        self.draw = 0.0
        self.breakers = Breakers(self.clock, lambda: self.draw)
        self.calls: dict[str, list[tuple[float, bool]]] = {ONE: [], OTHER: []}
        self.open = {ONE: False, OTHER: False}
        self.out: dict[str, list[Admission]] = {ONE: [], OTHER: []}
        self.stale: set[Admission] = set()
        self.probes: dict[Admission, float] = {}  # those that are out, and since when

    project = st.sampled_from([ONE, OTHER])

    @rule(seconds=st.sampled_from([0.5, 5.0, 60.0]) | st.integers(0, 100), draw=st.floats(0, 1))
    def wait(self, seconds: float, draw: float) -> None:
        self.clock.now += seconds
        self.draw = draw

    @rule(project=project)
    def ask(self, project: str) -> None:
        asked = ask(self.breakers, project)
        if isinstance(asked, float):
            assert self.open[project]
            assert 0 < asked <= LONGEST_PAUSE_S + ROUNDING_S
            return
        self.out[project].append(asked)
        if self.open[project]:
            self.probes[asked] = self.clock.now

    @rule(project=project, count=st.integers(1, 12), failures=st.integers(0, 12))
    def call_often(self, project: str, count: int, failures: int) -> None:
        for number in range(count):
            if not self.open[project]:
                self.ask(project)
                self.answer(project, ok=number >= failures, which=-1)

    @precondition(lambda self: self.out[ONE] or self.out[OTHER])
    @rule(project=project, ok=st.booleans(), which=st.integers(0, 50))
    def answer(self, project: str, ok: bool, which: int) -> None:
        if not self.out[project]:
            return
        admission = self.out[project].pop(which % len(self.out[project]))
        with admission:
            admission.report(ok=ok)
        since = self.probes.pop(admission, None)
        if admission in self.stale:
            return
        if self.open[project]:
            assert since is not None
            if ok:
                self.change(project, is_open=False)
            return
        self.calls[project].append((self.clock.now, ok))
        oldest = math.floor(self.clock.now) - WINDOW_S
        recent = [good for at, good in self.calls[project] if math.floor(at) > oldest]
        row = list(itertools.takewhile(lambda call: not call[1], reversed(self.calls[project])))
        lasting = len(row) >= LEAST_IN_A_ROW and row[0][0] - row[-1][0] >= ROW_S
        bad = recent.count(False) >= max(LEAST_FAILURES, recent.count(True))
        if not ok and (bad or lasting):
            self.change(project, is_open=True)

    @rule(project=project, which=st.integers(0, 50))
    def leave(self, project: str, which: int) -> None:
        if self.out[project]:
            with self.out[project].pop(which % len(self.out[project])) as admission:
                self.probes.pop(admission, None)

    def change(self, project: str, *, is_open: bool) -> None:
        self.open[project] = is_open
        self.calls[project].clear()
        if is_open:
            self.stale.update(self.out[project])
        for admission in self.out[project]:
            self.probes.pop(admission, None)

    @invariant()
    def never_more_than_one_probe_of_a_project_is_out(self) -> None:
        for project in (ONE, OTHER):
            live = [
                admission
                for admission in self.out[project]
                if self.clock.now - self.probes.get(admission, -math.inf) < PROBE_S
            ]
            assert len(live) <= 1

    @invariant()
    def an_admission_of_before_is_good_while_it_is_closed_and_no_longer(self) -> None:
        for project in (ONE, OTHER):
            for admission in self.out[project]:
                if admission in self.probes:
                    continue
                with contextlib.suppress(CircuitOpenError):
                    admission.check()
                    assert not self.open[project]

    def teardown(self) -> None:
        """Whatever came before, a well cloud is called again, as soon as one waits as told."""
        for project in (ONE, OTHER):
            for _ in range(math.ceil(PROBE_S / FIRST_PAUSE_S) + 1):
                asked = ask(self.breakers, project)
                if isinstance(asked, Admission):
                    asked.report(ok=True)
                    break
                self.clock.now += asked + ROUNDING_S
            for _ in range(5):
                self.breakers.admit(project)


TestBreaking = Breaking.TestCase
