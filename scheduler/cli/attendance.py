"""Whether somebody executes a run: the workers there are, or one started for its time."""

from __future__ import annotations

from typing import TYPE_CHECKING

from scheduler import children
from scheduler.cli.session import remark
from worker.ledger import RunState
from worker.reconciler import live_workers

if TYPE_CHECKING:
    import contextlib
    from pathlib import Path

    from redis.asyncio import Redis

    from scheduler.children import Child
    from worker.ledger import Run
    from worker.settings import Settings

TO_BE_PLANNED = "waits to be planned, which a running `poolsweep intake` does"
"""What is said of a run that is queued. Nothing tells whether an intake runs."""


class Attendance:
    """Sees to it that somebody executes a command's runs, or says that nobody does.

    Workers may leave while a run goes on, so it looks again and again. One is started only with
    the embedded Redis: whoever runs a Redis server runs workers too.

    Args:
        config: the settings.
        redis: where workers give a sign of life.
        may_start: whether a worker may be started.
        stack: what stops it.
        projects_file: where the worker finds the projects that have something of their own.
    """

    def __init__(
        self,
        config: Settings,
        redis: Redis,
        *,
        may_start: bool,
        stack: contextlib.ExitStack,
        projects_file: Path | None = None,
    ) -> None:
        self._projects_file = projects_file
        self._config = config
        self._redis = redis
        self._may_start = may_start and config.redis_url is None
        self._stack = stack
        self._own: Child | None = None
        self._warned: set[str] = set()

    async def look(self, endpoint: str) -> None:
        """Look once.

        Args:
            endpoint: the base URL of the API that the run is against.

        Raises:
            ChildError: the worker that was started has ended, or none can be started.
        """
        if self._own:
            self._own.check()
        elif await live_workers(self._redis, endpoint):
            self._warned.discard(endpoint)
        elif self._may_start:
            log = self._config.state_dir / "logs" / "worker.log"
            remark(f"No worker is running: started one for the time of this run; its log is {log}")
            env = {}
            if self._projects_file is not None:
                env["POOLSWEEP_PROJECTS_FILE"] = str(self._projects_file.absolute())
            self._own = self._stack.enter_context(children.worker(env, log))
        elif endpoint not in self._warned:
            self._warned.add(endpoint)
            remark(
                "No worker is running for this endpoint: the run waits until one is started with "
                "`poolsweep worker`",
                "yellow",
            )

    async def leave(self, run: Run) -> None:
        """Tell what becomes of a run that an interrupted command follows no longer.

        Args:
            run: the run as it was seen last.
        """
        run_id = run.run_id
        if run.ended:
            remark(f"Interrupted, but run {run_id} has ended.", "yellow")
            remark(f"See what was done with: poolsweep results {run_id}", "yellow")
            return
        remark(f"Interrupted. {await self._prospects(run)}", "yellow")
        remark(f"Watch it with:  poolsweep watch {run_id}", "yellow")
        remark(f"Cancel it with: poolsweep cancel {run_id}", "yellow")

    async def _prospects(self, run: Run) -> str:
        if run.state is RunState.QUEUED:
            return f"Run {run.run_id} {TO_BE_PLANNED}."
        others = await live_workers(self._redis, run.endpoint) - bool(self._own)
        if others > 0:
            return f"Run {run.run_id} goes on: other workers than this command's execute it."
        if self._own:
            return (
                f"The worker that this command started stops with it, and run {run.run_id} waits: "
                "what was accepted is being deleted, and the rest goes on when a worker is started "
                "with `poolsweep worker`, or by watching it."
            )
        return f"Run {run.run_id} waits until a worker is started with `poolsweep worker`."
