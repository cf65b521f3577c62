"""One batch: claim its jobs, carry them out concurrently, hold the lease, give back the rest."""

from __future__ import annotations

import asyncio
import os
import secrets
import socket
from collections import Counter
from typing import TYPE_CHECKING, Any

import structlog
from redis.exceptions import RedisError

from worker.deletion import Lease
from worker.inventory import FEW
from worker.ledger import Attempt, JobState, Move, RunNotFoundError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from worker.deletion import Deleter
    from worker.feed import Feed
    from worker.ledger import Job, Ledger
    from worker.recorder import Recorder
    from worker.settings import Settings

log = structlog.get_logger(__name__)


class Executor:
    """Executes batches on one event loop.

    Args:
        endpoint: the API that this worker is configured for; it touches no run against another.
        ledger: where the jobs are.
        recorder: where moves go.
        deleter: carries out one job.
        feed: asked for the run's next batches as soon as this one is claimed.
        settings: lease, batch time and shutdown time.
    """

    def __init__(
        self,
        *,
        endpoint: str,
        ledger: Ledger,
        recorder: Recorder,
        deleter: Deleter,
        feed: Feed,
        settings: Settings,
    ) -> None:
        self._endpoint = endpoint
        self._ledger = ledger
        self._recorder = recorder
        self._deleter = deleter
        self._feed = feed
        self._settings = settings
        self._draining = asyncio.Event()

    def drain(self) -> None:
        """Take nothing new; batches under way give back what they are not calling about."""
        self._draining.set()

    async def execute(self, run_id: str, numbers: Sequence[int]) -> None:
        """Execute a batch. A batch delivered again redoes only what is not finished.

        Args:
            run_id: the run.
            numbers: its jobs.

        Raises:
            RedisError: the ledger cannot be reached. Its jobs come back when their lease ends.
        """
        if self._draining.is_set():
            return  # what nobody claims is sent again
        try:
            run = await self._ledger.run(run_id)
        except RunNotFoundError as error:
            log.error("batch_of_unknown_run", run_id=run_id, reason=str(error))
            return
        if run.endpoint != self._endpoint:
            log.error("batch_of_other_endpoint", run_id=run_id, endpoint=run.endpoint)
            return
        settings = self._settings
        owner = f"{socket.gethostname()}:{os.getpid()}:{secrets.token_hex(4)}"
        lease = Lease(
            run_id=run_id,
            owner=owner,
            valid_until=asyncio.get_running_loop().time() + settings.lease_s,
            claimed_ms=await self._ledger.now_ms(),
        )
        jobs = await self._ledger.claim(run_id, numbers, owner=owner, lease_s=settings.lease_s)
        log.info("batch_claimed", run_id=run_id, asked=len(numbers), claimed=len(jobs))
        if not jobs:
            return
        lease.held.update(job.number for job in jobs)
        try:
            await self._feed(run_id)
            await self._carry_out(jobs, lease)
        finally:
            await self._give_back(lease)

    async def _carry_out(self, jobs: Sequence[Job], lease: Lease) -> None:
        projects = Counter(job.project_id for job in jobs)
        tasks = {
            job.number: asyncio.create_task(
                self._deleter.delete(job, lease, alone=projects[job.project_id] <= FEW)
            )
            for job in jobs
        }
        keeper = asyncio.create_task(self._keep(lease, tasks))
        draining = asyncio.ensure_future(self._draining.wait())
        finished = asyncio.gather(*tasks.values(), return_exceptions=True)
        either: set[asyncio.Future[Any]] = {finished, draining}
        try:
            await asyncio.wait(
                either,
                timeout=self._settings.batch_max_s,
                return_when=asyncio.FIRST_COMPLETED,
            )
            if not finished.done():
                for number, task in tasks.items():
                    if number not in lease.calling:
                        task.cancel()
                await asyncio.wait({finished}, timeout=self._settings.shutdown_s)
            for task in tasks.values():
                task.cancel()
            results = await finished
        finally:
            keeper.cancel()
            draining.cancel()
        for error in {repr(result): result for result in results}.values():
            if isinstance(error, Exception) and not isinstance(error, asyncio.CancelledError):
                log.error("jobs_interrupted", run_id=lease.run_id, reason=str(error))

    async def _keep(self, lease: Lease, tasks: dict[int, asyncio.Task[None]]) -> None:
        """Renew the lease until cancelled; stop what it no longer covers."""
        lease_s = self._settings.lease_s
        while True:
            await asyncio.sleep(lease_s / 3)
            asked = asyncio.get_running_loop().time()
            try:
                lost = await self._ledger.renew(
                    lease.run_id, sorted(lease.held), owner=lease.owner, lease_s=lease_s
                )
            except RedisError as error:
                log.warning("lease_not_renewed", run_id=lease.run_id, reason=str(error))
                continue
            lease.valid_until = asked + lease_s
            # A job that ended while the ledger was asked is not held any more either.
            for number in lost & lease.held:
                lease.held.discard(number)
                tasks[number].cancel()

    async def _give_back(self, lease: Lease) -> None:
        """Return what is still held to the ledger, which sends it again."""
        moves = [
            Move(
                number=number,
                source=JobState.LEASED,
                target=JobState.PENDING,
                owner=lease.owner,
                attempt=Attempt(since_ms, 0, 0, "cut_short", "")
                if (since_ms := lease.calling.get(number))
                else None,
                reason="given back by its worker before it was finished",
            )
            for number in sorted(lease.held)
        ]
        if moves:
            log.info("jobs_given_back", run_id=lease.run_id, count=len(moves))
            await asyncio.gather(*(self._recorder.record(lease.run_id, move) for move in moves))
