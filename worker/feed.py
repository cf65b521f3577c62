"""From the ledger to the broker: which batches are sent, and when.

The broker carries only a run's next seconds of work. Workers ask for more as they claim, and
the reconciler asks once a second for whatever is due, so messages are a wake-up call and never
the record: losing or repeating one changes nothing but the time.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from worker.ledger import Ledger
    from worker.settings import Settings


class Send(Protocol):
    """Puts one batch on the broker."""

    async def __call__(self, run_id: str, numbers: list[int]) -> None: ...


class Feed:
    """Sends due jobs of a run to the workers, as far as the run's window has room.

    Args:
        ledger: where the jobs are.
        send: puts a batch on the broker.
        settings: window, batch size and when a message counts as lost.
    """

    def __init__(self, ledger: Ledger, send: Send, settings: Settings) -> None:
        self._ledger = ledger
        self._send = send
        self._settings = settings

    async def __call__(self, run_id: str, *, projects: int = 1) -> int:
        """Send what is due.

        Args:
            run_id: the run.
            projects: how many projects it is about: each has room for jobs of its own.

        Returns:
            How many jobs that were.

        Should sending fail, the jobs are taken again when their messages count as lost.
        """
        settings = self._settings
        numbers = await self._ledger.take(
            run_id,
            window=settings.window(projects),
            batch_size=settings.batch_size,
            resend_s=settings.resend_s,
        )
        for start in range(0, len(numbers), settings.batch_size):
            await self._send(run_id, numbers[start : start + settings.batch_size])
        return len(numbers)
