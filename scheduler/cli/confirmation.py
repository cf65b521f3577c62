"""The question before anything is deleted: answered by typing what is at stake."""

from __future__ import annotations

import asyncio
import sys
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import Console


def can_ask() -> bool:
    """Whether somebody is there to answer."""
    return sys.stdin.isatty()


def pools(count: int) -> str:
    """So many pools, in words."""
    return "1 pool" if count == 1 else f"{count} pools"


async def confirmed(what: str, total: int, out: Console, *, project_id: str = "") -> bool:
    """Ask, and wait for the answer without blocking, so that Ctrl-C is heeded.

    Args:
        what: what happens on a yes, such as `deletes 3 pools`.
        total: the number that is a yes when typed.
        out: where the question goes.
        project_id: the project, whose id is a yes too; empty: several.

    Returns:
        Whether it was a yes; if not, it says that nothing was deleted.
    """
    words = f"{total} or the project's id, {project_id}," if project_id else str(total)
    out.print(f"This {what} for good. Type {words} to go on, anything else to stop.", markup=False)
    answer = (await _typed()).strip()
    if answer and answer in {str(total), project_id}:
        return True
    out.print("Stopped: nothing was deleted.", markup=False)
    return False


async def _typed() -> str:
    loop, ready = asyncio.get_running_loop(), asyncio.Event()
    loop.add_reader(sys.stdin.fileno(), ready.set)
    try:
        await ready.wait()
    finally:
        loop.remove_reader(sys.stdin.fileno())
    return sys.stdin.readline()
