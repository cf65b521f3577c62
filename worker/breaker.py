"""A circuit breaker for each project: in an outage its jobs wait, and one probe finds the end.

In memory of one worker process, and without I/O: time is the clock's that it is given.

Source: M. Nygard, "Release It!", 2nd edition, 2018, chapter 5, "Circuit Breaker".
"""

from __future__ import annotations

import math
import random
import time
from collections import deque
from typing import TYPE_CHECKING, Final, Self

import structlog

if TYPE_CHECKING:
    from collections.abc import Callable

    from worker.modelarts import Answer

WINDOW_S: Final = 30
"""How far back calls count: this second and those before it, so many in all."""
LEAST_FAILURES: Final = 10
"""Fewer failures in the window open nothing; nor do those that are less than half of the calls."""
LEAST_IN_A_ROW: Final = 3
ROW_S: Final = 5.0
"""So many failures in a row over so long open it too: a cloud that answers nothing, or one list for
all jobs, fails seldom."""
FIRST_PAUSE_S: Final = 5.0
"""From the opening to the first probe; each probe that fails doubles the pause."""
LONGEST_PAUSE_S: Final = 60.0
JITTER: Final = 0.25
"""Up to this share is taken off a pause, at random, so that workers do not probe in step."""
PROBE_S: Final = 90.0
"""A probe that has said nothing for so long is lost, and another may go: longer than a read and a
DELETE take together."""

log = structlog.get_logger(__name__)


class CircuitOpenError(Exception):
    """No call may be made for now: too many failed lately.

    Attributes:
        wait_s: seconds until it makes sense to ask again.
    """

    def __init__(self, wait_s: float) -> None:
        super().__init__("waits until the cloud is well again: too many calls failed lately")
        self.wait_s = wait_s


def is_well(answer: Answer) -> bool:
    """Whether an answer shows a cloud at work: any answer but a 5xx, refusals too."""
    return answer.status is not None and answer.status < 500


class Breakers:
    """The circuit breakers of one endpoint's projects: one for each, made on first use.

    Args:
        clock: seconds that only ever grow.
        draw: a random number from 0 to 1, for the jitter.
    """

    def __init__(
        self,
        clock: Callable[[], float] = time.monotonic,
        draw: Callable[[], float] = random.random,
    ) -> None:
        self._clock = clock
        self._draw = draw
        self._projects: dict[str, _Breaker] = {}

    def admit(self, project_id: str) -> Admission:
        """Ask to make a call, and the reads that go before it; in an outage, only a probe may.

        Args:
            project_id: the project that the call goes to.

        Returns:
            To be used as a context: a probe that leaves it without a report makes room for another.

        Raises:
            CircuitOpenError: no call may be made for now.
        """
        if project_id not in self._projects:
            self._projects[project_id] = _Breaker(project_id, self._clock, self._draw)
        return self._projects[project_id].admit()

    def states(self) -> dict[str, bool]:
        """Of each project that a call was asked for, whether its breaker is open."""
        return {project_id: each.is_open for project_id, each in self._projects.items()}


class Admission:
    """Leave to make a call.

    Attributes:
        outages: how many the project had had by then.
    """

    def __init__(self, breaker: _Breaker, outages: int) -> None:
        self._breaker = breaker
        self.outages = outages

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._breaker.left(self)

    def check(self) -> None:
        """Ask again just before the call, which may have waited for its turn.

        Raises:
            CircuitOpenError: the breaker has opened since.
        """
        self._breaker.check(self)

    def report(self, *, ok: bool) -> None:
        """Say how a call went.

        Args:
            ok: whether the cloud is at work, see `is_well`.
        """
        self._breaker.report(self, ok=ok)


class _Breaker:
    """One project's. Whoever is refused is told a time, and only a probe puts that time off."""

    def __init__(
        self, project_id: str, clock: Callable[[], float], draw: Callable[[], float]
    ) -> None:
        self._clock = clock
        self._draw = draw
        self._log = log.bind(project_id=project_id)
        self._recent = _Recent()
        self._row, self._row_since = 0, 0.0  # the failures since the last success
        self._outages = 0
        self._opened_at: float | None = None
        self._closed_at = -math.inf
        self._pause_s = 0.0
        self._probe: Admission | None = None
        self._next_probe_at = 0.0

    @property
    def is_open(self) -> bool:
        return self._opened_at is not None

    def admit(self) -> Admission:
        admission = Admission(self, self._outages)
        if self._opened_at is not None:
            now = self._clock()
            if now < self._next_probe_at:
                raise CircuitOpenError(self._wait_s(now))
            self._probe = admission
            self._next_probe_at = now + PROBE_S
        return admission

    def check(self, admission: Admission) -> None:
        if self._opened_at is not None and admission is not self._probe:
            raise CircuitOpenError(self._wait_s(self._clock()))

    def report(self, admission: Admission, *, ok: bool) -> None:
        if admission.outages != self._outages:
            return  # a call from before the outage says nothing about its end
        now = self._clock()
        if self._opened_at is None:
            self._recent.add(now, ok=ok)
            self._row_since = self._row_since if self._row else now
            self._row = 0 if ok else self._row + 1
            in_a_row = self._row >= LEAST_IN_A_ROW and now - self._row_since >= ROW_S
            if not ok and (self._recent.are_bad() or in_a_row):
                self._open(now)
        elif ok:  # the probe's, or one's that was given up for lost
            self._close(now)
        elif admission is self._probe:
            self._pause(now, 2 * self._pause_s)

    def left(self, admission: Admission) -> None:
        if admission is self._probe:
            self._probe = None
            self._next_probe_at = self._clock()

    def _wait_s(self, now: float) -> float:
        wait_s = max(0.0, self._next_probe_at - now)
        return min(wait_s, FIRST_PAUSE_S) if self._probe else wait_s

    def _open(self, now: float) -> None:
        self._opened_at = now
        self._outages += 1
        # A cloud that bears one probe but not the jobs gets longer pauses too.
        relapsed = now - self._closed_at < WINDOW_S
        self._pause(now, 2 * self._pause_s if relapsed else FIRST_PAUSE_S)
        failed, calls = self._recent.failed, self._recent.calls
        self._log.warning(
            "circuit_opened", failed=failed, calls=calls, pause_s=round(self._pause_s, 1)
        )
        self._recent, self._row = _Recent(), 0

    def _close(self, now: float) -> None:
        opened_at = now if self._opened_at is None else self._opened_at
        self._opened_at = self._probe = None
        self._closed_at = now
        self._log.info("circuit_closed", open_s=round(now - opened_at, 1))

    def _pause(self, now: float, pause_s: float) -> None:
        self._probe = None
        self._pause_s = min(pause_s, LONGEST_PAUSE_S)
        self._next_probe_at = now + self._pause_s * (1 - JITTER * self._draw())


class _Recent:
    """How many calls were made and failed lately, counted by the second."""

    def __init__(self) -> None:
        self.calls = 0
        self.failed = 0
        self._seconds: deque[tuple[int, int, int]] = deque()

    def add(self, now: float, *, ok: bool) -> None:
        second, calls, failed = math.floor(now), 1, int(not ok)
        self.calls += calls
        self.failed += failed
        if self._seconds and self._seconds[-1][0] == second:
            _, calls_before, failed_before = self._seconds.pop()
            calls, failed = calls + calls_before, failed + failed_before
        self._seconds.append((second, calls, failed))
        while self._seconds[0][0] <= second - WINDOW_S:
            _, calls, failed = self._seconds.popleft()
            self.calls -= calls
            self.failed -= failed

    def are_bad(self) -> bool:
        return self.failed >= LEAST_FAILURES and 2 * self.failed >= self.calls
