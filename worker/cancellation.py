"""Ending tasks for certain."""

from __future__ import annotations

import asyncio
from typing import Any

AGAIN_S = 0.2


async def cancel(*tasks: asyncio.Task[Any]) -> None:
    """Cancel tasks, and wait until they have ended.

    A cancellation that comes while redis-py sends may be swallowed (`asyncio.wait_for` before
    Python 3.12), so a task that goes on is cancelled again.

    Args:
        tasks: some may have ended already.
    """
    while alive := {task for task in tasks if not task.done()}:
        for task in alive:
            task.cancel()
        await asyncio.wait(alive, timeout=AGAIN_S)
