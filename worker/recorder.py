"""Group commit: moves that come up while one script call is under way share the next."""

from __future__ import annotations

import asyncio
from collections import defaultdict
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable

    from worker.ledger import Ledger, Move

MOST = 500
"""Moves in one script call: a few milliseconds of the server's time."""


class Recorder:
    """Records the moves of many jobs in few calls; each caller waits until its own is made.

    Args:
        ledger: where they go.
        observe: is told each move that the ledger has made; it must neither wait nor raise.
    """

    def __init__(self, ledger: Ledger, *, observe: Callable[[Move], None] | None = None) -> None:
        self._ledger = ledger
        self._observe = observe
        self._queues: defaultdict[str, list[tuple[Move, asyncio.Future[bool]]]] = defaultdict(list)
        self._writers: dict[str, asyncio.Task[None]] = {}

    async def record(self, run_id: str, move: Move) -> bool:
        """Make one move.

        Returns:
            Whether the ledger made it; False: the job is no longer where the move says.

        Raises:
            redis.RedisError: the ledger cannot be reached; the move may or may not be made.
        """
        future: asyncio.Future[bool] = asyncio.get_running_loop().create_future()
        self._queues[run_id].append((move, future))
        if run_id not in self._writers:
            self._writers[run_id] = asyncio.create_task(self._write(run_id))
        return await future

    async def _write(self, run_id: str) -> None:
        try:
            while entries := self._queues[run_id][:MOST]:
                del self._queues[run_id][:MOST]
                try:
                    made = await self._ledger.record(run_id, [move for move, _ in entries])
                except Exception as error:
                    for _, future in entries:
                        if not future.done():  # its caller waits no longer
                            future.set_exception(error)
                else:
                    for (move, future), done in zip(entries, made, strict=True):
                        if done and self._observe is not None:
                            self._observe(move)
                        if not future.done():
                            future.set_result(done)
        finally:
            del self._queues[run_id], self._writers[run_id]
