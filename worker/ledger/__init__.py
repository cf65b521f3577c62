"""Runs, jobs and attempts in Redis; the Lua scripts beside it are its only writers."""

from worker.ledger.ledger import HALF_MADE_S, Ledger
from worker.ledger.records import (
    Attempt,
    Job,
    JobState,
    Kept,
    Move,
    NewJob,
    NewRun,
    Run,
    RunState,
    Source,
    new_run_id,
)
from worker.ledger.schema import DamagedRunError, RunNotFoundError, SchemaError

__all__ = [
    "HALF_MADE_S",
    "Attempt",
    "DamagedRunError",
    "Job",
    "JobState",
    "Kept",
    "Ledger",
    "Move",
    "NewJob",
    "NewRun",
    "Run",
    "RunNotFoundError",
    "RunState",
    "SchemaError",
    "Source",
    "new_run_id",
]
