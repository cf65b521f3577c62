"""The Celery tasks: thin; they call the rooms."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any

from celery import signals

from worker import process
from worker.app import app

if TYPE_CHECKING:
    from collections.abc import Callable

    task: Callable[..., Callable[[Callable[..., None]], Any]]
task = app.task


@task(name="poolsweep.execute_batch")
def execute_batch(run_id: str, numbers: list[int]) -> None:
    """Execute the jobs of a run with these numbers."""
    process.current().execute(run_id, numbers)


async def send_batch(run_id: str, numbers: list[int]) -> None:
    """Put a batch on the broker, without holding up the event loop meanwhile."""
    await asyncio.to_thread(
        execute_batch.apply_async, kwargs={"run_id": run_id, "numbers": numbers}
    )


@signals.celeryd_init.connect
def _join_redis(**_: Any) -> None:
    process.join_redis()


@signals.worker_ready.connect
def _start(**_: Any) -> None:
    process.current().reconcile()


@signals.worker_shutting_down.connect
def _drain(**_: Any) -> None:
    process.current().drain()


@signals.worker_shutdown.connect
def _stop(**_: Any) -> None:
    process.stop()
