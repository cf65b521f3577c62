"""Which of the runs that are worked on were cancelled, by somebody or by their brakes."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

import structlog
from redis.exceptions import RedisError

from worker.cancellation import cancel
from worker.pause import LOOK_S

if TYPE_CHECKING:
    from worker.ledger import Ledger

log = structlog.get_logger(__name__)


class CancelledRuns:
    """Looks at the runs of all batches under way at once, however many there are.

    Args:
        ledger: where the runs are.
    """

    def __init__(self, ledger: Ledger) -> None:
        self._ledger = ledger
        self._waiting: dict[str, list[asyncio.Event]] = {}
        self._looking: asyncio.Task[None] | None = None

    async def wait_for(self, run_id: str) -> None:
        """Wait until a run is cancelled, or is not there any more.

        Its jobs that wait here for the rate limit have not been called yet: given back, they are
        cancelled too.
        """
        cancelled = asyncio.Event()
        self._waiting.setdefault(run_id, []).append(cancelled)
        if self._looking is None:
            self._looking = asyncio.create_task(self._look())
        try:
            await cancelled.wait()
        finally:
            waiting = self._waiting[run_id]
            waiting.remove(cancelled)
            if not waiting:
                del self._waiting[run_id]
            if not self._waiting:
                looking, self._looking = self._looking, None
                await cancel(looking)

    async def _look(self) -> None:
        while True:
            await asyncio.sleep(LOOK_S)
            try:
                gone = await self._ledger.cancelled(list(self._waiting))
            except RedisError as error:
                log.warning("redis_unreachable", reason=str(error))
                continue
            except Exception:
                log.exception("cancelled_runs_crashed")
                continue
            for run_id in gone:
                for cancelled in self._waiting.get(run_id, ()):
                    cancelled.set()
