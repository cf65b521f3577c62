"""One batch: claim its jobs, carry them out concurrently, hold the lease, give back the rest."""

from __future__ import annotations

import asyncio
from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import structlog
from redis.exceptions import RedisError

from worker.cancellation import cancel
from worker.cancelled_runs import CancelledRuns
from worker.deletion import Lease
from worker.inventory import FEW
from worker.leader import process_name
from worker.ledger import Attempt, JobState, Move, RunNotFoundError
from worker.metrics import CLAIMED, GIVEN_BACK

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from worker.deletion import Deleter
    from worker.feed import Feed
    from worker.ledger import Job, Ledger, Run
    from worker.pause import PauseWatch
    from worker.recorder import Recorder
    from worker.settings import Settings

log = structlog.get_logger(__name__)


@dataclass(frozen=True, slots=True)
class Site:
    """What executes at one endpoint.

    Attributes:
        deleter: carries out one job.
        feed: asked for a run's next batches as soon as one is claimed.
        recorder: where moves go: the deleter's own, so that they keep their order.
    """

    deleter: Deleter
    feed: Feed
    recorder: Recorder


class Executor:
    """Executes batches on one event loop.

    Args:
        sites: the APIs that this worker is configured for, by base URL; it touches no run against
            another.
        ledger: where the jobs are.
        pause: the kill switch; it must be known before the first call.
        settings: lease, batch time and shutdown time.
    """

    def __init__(
        self,
        *,
        sites: Mapping[str, Site],
        ledger: Ledger,
        pause: PauseWatch,
        settings: Settings,
    ) -> None:
        self._sites = sites
        self._ledger = ledger
        self._pause = pause
        self._settings = settings
        self._cancelled_runs = CancelledRuns(ledger)
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
        try:
            run = await self._ledger.run(run_id)
        except RunNotFoundError as error:
            log.error("batch_of_unknown_run", run_id=run_id, reason=str(error))
            return
        await self._pause.ready()
        site = self._sites.get(run.endpoint)
        if site is None:
            log.error("batch_of_other_endpoint", run_id=run_id, endpoint=run.endpoint)
            return
        settings = self._settings
        owner = process_name()
        lease = Lease(
            run_id=run_id,
            owner=owner,
            valid_until=asyncio.get_running_loop().time() + settings.lease_s,
            claimed_ms=await self._ledger.now_ms(),
            planned_ms=run.planned_ms,
        )
        jobs = await self._ledger.claim(run_id, numbers, owner=owner, lease_s=settings.lease_s)
        log.info("batch_claimed", run_id=run_id, asked=len(numbers), claimed=len(jobs))
        if not jobs:
            return
        CLAIMED.labels(run.endpoint).inc(len(jobs))
        lease.held.update(job.number for job in jobs)
        try:
            # A batch that comes while this worker ends is only given back, for another to take.
            if not self._draining.is_set():
                await self._ask_for_more(site, run)
                await self._carry_out(site, jobs, lease)
        finally:
            await self._give_back(lease, run.endpoint, site.recorder)

    async def _ask_for_more(self, site: Site, run: Run) -> None:
        try:
            await site.feed(run.run_id, projects=len(run.projects))
        except RedisError as error:  # the reconciler asks too
            log.warning("batches_not_sent", run_id=run.run_id, reason=str(error))

    async def _carry_out(self, site: Site, jobs: Sequence[Job], lease: Lease) -> None:
        projects = Counter(job.project_id for job in jobs)
        tasks = {
            job.number: asyncio.create_task(
                site.deleter.delete(job, lease, alone=projects[job.project_id] <= FEW)
            )
            for job in jobs
        }
        keeper = asyncio.create_task(self._keep(lease, tasks))
        draining = asyncio.ensure_future(self._draining.wait())
        cancelled = asyncio.ensure_future(self._cancelled_runs.wait_for(lease.run_id))
        finished = asyncio.gather(*tasks.values(), return_exceptions=True)
        any_of: set[asyncio.Future[Any]] = {finished, draining, cancelled}
        try:
            await asyncio.wait(
                any_of,
                timeout=self._settings.batch_max_s,
                return_when=asyncio.FIRST_COMPLETED,
            )
            if not finished.done():
                lease.closing = True
                for number, task in tasks.items():
                    if number not in lease.calling:
                        task.cancel()
                await asyncio.wait({finished}, timeout=self._settings.shutdown_s)
            await cancel(*tasks.values())
            results = await finished
        finally:
            draining.cancel()
            await cancel(keeper, cancelled)
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
            lost &= lease.held
            if lost:
                log.warning("lease_lost", run_id=lease.run_id, count=len(lost))
            for number in lost:
                lease.held.discard(number)
                tasks[number].cancel()

    async def _give_back(self, lease: Lease, endpoint: str, recorder: Recorder) -> None:
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
            GIVEN_BACK.labels(endpoint).inc(len(moves))
            log.info("jobs_given_back", run_id=lease.run_id, count=len(moves))
            await asyncio.gather(*(recorder.record(lease.run_id, move) for move in moves))
