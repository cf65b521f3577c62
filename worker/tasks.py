"""The Celery tasks: thin; they call the rooms."""

from __future__ import annotations

from worker import process
from worker.app import app
from worker.broker import EXECUTE_BATCH


@app.task(name=EXECUTE_BATCH)
def execute_batch(run_id: str, numbers: list[int]) -> None:
    """Execute the jobs of a run that have these numbers."""
    process.current().execute(run_id, numbers)
