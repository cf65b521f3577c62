"""A project's slots as one worker holds them, and the clock that they are kept by: no I/O."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from heapq import heapify, heappop, heappush
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence

LATENESS_S = 0.1
"""A slot that is not used for so long is lost, so that after a standstill few calls go at once."""
MOST_PUT_OFF_S = 0.5
"""A slot that would come so much later than it is due is lost: else the one a second's calls after
it might be used first, and after a standstill too many calls would go at once."""
NO_SLOTS = 3
"""Parts of the answer to a reservation that gave none, but for the clock."""
MOST_DRIFT = 0.001
"""No clock gains or loses more on another."""


@dataclass(frozen=True, slots=True, order=True)
class Slot:
    """A place in the sequence of a project's calls.

    Attributes:
        at: when the call may be made, in seconds of the event loop's clock.
        number: its place in the sequence.
        due: when it would have come if no call had been late, by the same clock; or a little
            sooner, since the two clocks are not known to the microsecond.
        due_ms: the same by Redis' clock.
        reserved: when it was reserved, in seconds of the event loop's clock.
    """

    at: float
    number: int
    due: float
    due_ms: float
    reserved: float

    def put_off(self, earliest_ms: str, clock: RedisClock, now: float) -> Slot | None:
        """The slot as Redis has told of it.

        Args:
            earliest_ms: ms of Redis' clock before which it may not come since another was late; as
                with `due_ms`, as that was when it was reserved, should it have been set since.
                Empty: there is none such; `inf`: it is taken back.
            clock: Redis' clock.
            now: when that was heard, in seconds of the event loop's clock: it comes no sooner.

        Returns:
            The slot; None: it is lost.
        """
        later_s = (float(earliest_ms) - self.due_ms) / 1000 if earliest_ms else 0.0
        # What an idle time has earned was due before it was asked for.
        if max(later_s, now - max(self.due, self.reserved)) > MOST_PUT_OFF_S:
            return None
        at = max(self.at, now, self.due + clock.width + max(0.0, later_s))
        return replace(self, at=at, reserved=now)


class RedisClock:
    """Where Redis' clock stands by the event loop's: bounds that each answer narrows.

    Source: Cristian, "Probabilistic clock synchronization", 1989.
    """

    def __init__(self) -> None:
        self._least, self._most = -math.inf, math.inf
        self._read = 0.0

    def heard(self, asked: float, answered: float, redis_ms: float) -> None:
        """Redis' clock was read between two moments.

        Args:
            asked, answered: the moments, in seconds of the event loop's clock.
            redis_ms: what was read.
        """
        drift = MOST_DRIFT * (answered - self._read)
        least, most = asked - redis_ms / 1000, answered - redis_ms / 1000
        # Else one of the clocks was set.
        if least <= self._most + drift and most >= self._least - drift:
            least, most = max(least, self._least - drift), min(most, self._most + drift)
        self._least, self._most, self._read = least, most, asked

    @property
    def width(self) -> float:
        """Seconds by which it may be off."""
        return self._most - self._least

    def earliest(self, redis_ms: float) -> float:
        """Seconds of the event loop's clock at which Redis' comes to that at the earliest."""
        return redis_ms / 1000 + self._least

    def latest(self, redis_ms: float) -> float:
        """Seconds of the event loop's clock at which Redis' has come to that for certain."""
        return redis_ms / 1000 + self._most


def reserved_slots(
    answer: Sequence[str], clock: RedisClock, asked: float, answered: float
) -> tuple[list[Slot], float, float]:
    """What a reservation gave.

    Args:
        answer: what the script answered to `reserve`, but for the clock.
        clock: Redis' clock.
        asked, answered: when it was asked for and when the answer came, in seconds of the event
            loop's clock.

    Returns:
        The slots, those that are lost left out; the seconds between slots; and when the first comes
        that is not reserved, in seconds of the event loop's clock.
    """
    first_ms, interval_ms, number = float(answer[0]), float(answer[1]), int(answer[2])
    put_off = answer[NO_SLOTS:]
    slots = []
    for each, earliest_ms in enumerate(put_off):
        due_ms = first_ms + each * interval_ms
        slot = Slot(answered, number + each, clock.earliest(due_ms), due_ms, reserved=asked)
        # Never before it has come on Redis' clock for certain.
        if kept := slot.put_off(earliest_ms, clock, answered):
            slots.append(kept)
    if not slots and put_off and not earliest_ms:
        # So that calls go on, however slow Redis is.
        slots.append(replace(slot, reserved=answered))
    end = clock.latest(first_ms + len(put_off) * interval_ms)
    return slots, interval_ms / 1000, end


class Slots:
    """Reserved slots, to be used in their order in time.

    Attributes:
        interval: seconds between them.
        end: when the first comes that is not reserved, in seconds of the event loop's clock.

    Args:
        interval, end: what they are at first.
    """

    def __init__(self, interval: float, end: float) -> None:
        self.interval = interval
        self.end = end
        self._heap: list[Slot] = []

    def add(self, slots: Sequence[Slot], interval: float, end: float) -> None:
        """Take in what was reserved, and where it ends."""
        for slot in slots:
            heappush(self._heap, slot)
        self.interval = interval
        self.end = end

    def put_back(self, slot: Slot) -> list[int]:
        """Give back one that was taken, since all must be checked first.

        Returns:
            The numbers of all that are held.
        """
        heappush(self._heap, slot)
        return [each.number for each in self._heap]

    def checked(self, answer: Sequence[str], clock: RedisClock, now: float) -> None:
        """Heed what Redis has told of all that are held.

        Args:
            answer: for each, as with `Slot.put_off`.
            clock: Redis' clock.
            now: when it was heard, in seconds of the event loop's clock.
        """
        told = zip(self._heap, answer, strict=True)
        self._heap = [kept for slot, each in told if (kept := slot.put_off(each, clock, now))]
        heapify(self._heap)

    def take(self, now: float) -> Slot | None:
        """Use the next slot.

        Args:
            now: seconds of the event loop's clock.

        Returns:
            The slot, to be used when its time has come; None: more must be reserved first.
        """
        while self._heap and self._heap[0].at < now - LATENESS_S:
            heappop(self._heap)
        # One that was put off may come after some that are not reserved yet.
        if self._heap and self._heap[0].at <= max(now, self.end):
            return heappop(self._heap)
        return None

    @property
    def next_at(self) -> float:
        """When the next one comes, reserved or not, in seconds of the event loop's clock."""
        return min(self._heap[0].at, self.end) if self._heap else self.end
