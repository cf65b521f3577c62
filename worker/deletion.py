"""One job, from its precondition to its outcome."""

from __future__ import annotations

import asyncio
import time
from collections import defaultdict
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from http import HTTPStatus
from typing import TYPE_CHECKING

import structlog
from redis.exceptions import RedisError

from worker.breaker import Breakers, CircuitOpenError, is_well
from worker.ledger import Attempt, JobState, Move
from worker.limiter import PATIENCE_S, LongWaitError
from worker.modelarts import (
    ApiError,
    AuthError,
    Precondition,
    Verdict,
    VerdictKind,
    changes,
    classify,
    nodes_obstacle,
)
from worker.retry import GiveUp, RetryPolicy, backoff_s, decide, tried_s

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from worker.breaker import Admission
    from worker.inventory import Inventory, Sight
    from worker.ledger import Job
    from worker.limiter import Limiter, Permit
    from worker.modelarts import Answer, Pool
    from worker.modelarts.client import ModelArtsClient
    from worker.pause import PauseWatch
    from worker.recorder import Recorder

log = structlog.get_logger(__name__)


@dataclass(slots=True)
class Lease:
    """A batch's hold on its jobs.

    Attributes:
        run_id: the run.
        owner: the fence: the ledger accepts moves of these jobs from this owner alone.
        valid_until: when it runs out unless renewed, in seconds of the event loop's clock.
        claimed_ms: when it began, in ms of the ledger's clock.
        planned_ms: when its run was made, by the same clock.
        held: the jobs that are neither ended nor given back.
        calling: since when (ms since the epoch) a job's DELETE is under way, or not recorded yet.
        closing: whether the batch is to end soon, so that nothing is tried again within it.
    """

    run_id: str
    owner: str
    valid_until: float
    claimed_ms: int
    planned_ms: int
    held: set[int] = field(default_factory=set)
    calling: dict[int, int] = field(default_factory=dict)
    closing: bool = False

    def holds(self, number: int) -> bool:
        """Whether the job may be acted on right now."""
        return number in self.held and asyncio.get_running_loop().time() < self.valid_until


class LeaseLostError(Exception):
    """The job is another worker's by now."""


class _TurnMissedError(Exception):
    """The call came to nothing in its time: the pool is looked at anew, and a slot waited for."""


class _PausedError(Exception):
    """No call may be made for now; the text says why."""


ABSENT = "absent"
"""The fingerprint of a pool that was not there when it was asked for."""

MOST_LOOKS = 3
"""Reads in a row that may be too old when they arrive, or when the call's turn comes; one that its
turn was given to among them."""

PAUSED_WAIT_S = 5.0
"""A job that finds its project paused is looked at again after so long."""

LEAST_WAIT_S = 1.0
"""No job comes back from the ledger sooner."""

TURN_S = 0.5
"""A slot that is not used for so long, as when signing in takes its time, is lost."""


def judge(job: Job, pool: Pool | None) -> tuple[JobState, str] | None:
    """Whether the plan still holds for a pool as it is now: pure.

    Args:
        job: what was planned.
        pool: the pool as just read; None: it is gone.

    Returns:
        None if the pool is to be deleted now; `PENDING` if it must wait for its sub-pools; else
        how the job ends; each with the reason.
    """
    if pool is None:
        return JobState.ALREADY_DELETED, "the pool is gone: reading it answers pool not found"
    if job.fingerprint == ABSENT:
        return JobState.SKIPPED, "changed since it was chosen: it was not there then"
    if changed := changes(Precondition(job.created, job.fingerprint), pool):
        return JobState.SKIPPED, "changed since it was chosen: " + "; ".join(changed)
    if pool.phase == "Deleting":
        return JobState.ACCEPTED, "the pool was being deleted already"
    if pool.subpool_count is None:
        return JobState.SKIPPED, "the number of its logical sub-pools cannot be read any more"
    if pool.subpool_count:
        return JobState.PENDING, f"waits until its {pool.subpool_count} logical sub-pools are gone"
    return None


class Deleter:
    """Carries out jobs, one call of `delete` each.

    Args:
        client: the API.
        inventory: fresh reads for the precondition.
        limiter: the shared rate limit.
        recorder: where moves go.
        pause: the kill switch.
        policy: when to give up.
        in_flight: how many jobs of one project have a call under way, or are next in line, at
            once in this process. Each project has its own bound, so that one whose calls take long
            leaves the others theirs.
        longest_line: so many jobs of one project may wait for their turn in this process, if that
            is more than a second ahead; others go back to the ledger and leave room.
        inline_wait_s: backoffs up to this many seconds are waited here; longer ones are the
            ledger's.
        blocked_wait_s: seconds until a pool that waits for its sub-pools is looked at again.
        verify_deadline_s: how long a deletion may take in the cloud.
        plan_max_age_s: a job whose run was made longer ago is not called any more.
    """

    def __init__(
        self,
        *,
        client: ModelArtsClient,
        inventory: Inventory,
        limiter: Limiter,
        recorder: Recorder,
        pause: PauseWatch,
        policy: RetryPolicy,
        in_flight: int,
        longest_line: int,
        inline_wait_s: float,
        blocked_wait_s: float,
        verify_deadline_s: float,
        plan_max_age_s: float,
    ) -> None:
        self._client = client
        self._inventory = inventory
        self._limiter = limiter
        self._recorder = recorder
        self._pause = pause
        self._policy = policy
        self._longest_line = longest_line
        self._breakers = Breakers()
        self._lanes = defaultdict[str, _Lane](lambda: _Lane(asyncio.Semaphore(in_flight)))
        self._inline_wait_s = inline_wait_s
        self._blocked_wait_s = blocked_wait_s
        self._verify_deadline_s = verify_deadline_s
        self._plan_max_age_s = plan_max_age_s

    @property
    def breakers(self) -> Breakers:
        """The circuit breakers of its projects."""
        return self._breakers

    async def delete(self, job: Job, lease: Lease, *, alone: bool) -> None:
        """Bring a leased job to its next state, and record it.

        Args:
            job: the job.
            lease: the batch's hold on it.
            alone: whether few other pools of its project are in the batch.

        Raises:
            RedisError: the ledger or the limiter cannot be reached; the job stays leased.
        """
        task = _Task(self, job, lease, alone)
        try:
            await task.run()
        except LeaseLostError:
            task.log.warning("lease_lost")
        except RedisError:
            raise
        except Exception as error:
            # A defect must neither lose the job nor repeat it for ever.
            task.log.exception("job_crashed")
            name = type(error).__name__
            await task.retry(_mark(name), f"internal error: {name}", None, inline=False)


@dataclass(slots=True)
class _Lane:
    """The calls of one project in this process.

    Attributes:
        places: for those under way and next in line.
        line: how many jobs have a place or wait for one.
        failure: the last read that failed; one list fails for all that want it.
    """

    places: asyncio.Semaphore
    line: int = 0
    failure: ApiError | None = None


class _Task:
    def __init__(self, deleter: Deleter, job: Job, lease: Lease, alone: bool) -> None:
        self._deleter = deleter
        self._job = job
        self._lease = lease
        self._alone = alone
        self._attempts = list(job.attempts)
        self._renewed = False
        self._is_news = True
        self._sight: Sight | None = None
        self._turn = 0.0
        self._permit: Permit | None = None
        self.log = log.bind(
            run_id=job.run_id,
            job_id=job.job_id,
            project_id=job.project_id,
            pool_name=job.pool_name,
        )

    async def run(self) -> None:
        age_s = (self._lease.claimed_ms - self._lease.planned_ms) / 1000
        if self._job.fingerprint and age_s > self._deleter._plan_max_age_s:
            reason = f"its plan is {age_s / 3600:.1f} h old: plan anew"
            return await self._move(JobState.SKIPPED, reason)
        misses = 0
        while True:
            try:
                self._heed_pause()
                async with self._place() as admission:
                    end = await self._until_ready()
                    if end is None:
                        answer = await self._call(admission)
                if end is not None:
                    return await self._end_or_wait(*end)
                attempt, verdict = _attempt(answer), classify(answer)
            except _PausedError as error:
                return await self._wait(str(error), PAUSED_WAIT_S)
            except _TurnMissedError:
                misses += 1
                if misses < MOST_LOOKS:
                    continue
                return await self._wait("waits until a call is made in its turn", PAUSED_WAIT_S)
            except CircuitOpenError as error:
                return await self._wait(str(error), max(error.wait_s, LEAST_WAIT_S))
            except LongWaitError as error:
                # Back before its turn could come, so that no slot is missed for want of a job.
                wait_s = min(error.wait_s, PATIENCE_S) / 2
                return await self._wait(f"waits: {error}", wait_s)
            except ApiError as error:
                # Not a DELETE: the read before it failed, and nothing is deleted on doubt.
                attempt, verdict = _attempt(error.answer), _of_a_read(error.verdict)
            except AuthError as error:
                attempt, verdict = _mark("sign_in_failed"), _of_a_sign_in(error)
            if not await self._handle(attempt, verdict):
                return None

    @asynccontextmanager
    async def _place(self) -> AsyncIterator[Admission]:
        """A place among the project's calls.

        Raises:
            LongWaitError: the line is so long that waiting in it would only keep out others.
            CircuitOpenError: the cloud fails at present.
        """
        deleter, project_id = self._deleter, self._job.project_id
        lane = deleter._lanes[project_id]
        wait_s = deleter._limiter.wait_s(project_id, lane.line)
        is_full = lane.line >= deleter._longest_line and wait_s > LEAST_WAIT_S
        if is_full or wait_s > PATIENCE_S:
            raise LongWaitError(wait_s)
        lane.line += 1
        try:
            async with lane.places:
                with deleter._breakers.admit(project_id) as admission:
                    try:
                        yield admission
                    except ApiError as error:
                        self._is_news = error is not lane.failure
                        lane.failure = error
                        if self._is_news:
                            admission.report(ok=is_well(error.answer))
                        raise
        finally:
            lane.line -= 1

    async def _wait(self, reason: str, seconds: float) -> None:
        await self._move(JobState.PENDING, reason, wait_ms=round(seconds * 1000))

    def _heed_pause(self) -> None:
        if pause := self._deleter._pause.covers(self._job.project_id):
            raise _PausedError(f"waits: {pause}")

    async def _end_or_wait(self, state: JobState, reason: str) -> None:
        wait_ms = 0
        if state is JobState.PENDING:
            # The sub-pools are deleted by the same run, in minutes to an hour; a wait for them is
            # no attempt, and ends when it has taken longer than such a deletion may.
            deleter, since_ms = self._deleter, self._job.blocked_ms or self._lease.claimed_ms
            wait_ms = round(deleter._blocked_wait_s * 1000)
            if self._lease.claimed_ms - since_ms > deleter._verify_deadline_s * 1000:
                state, reason = JobState.FAILED, f"given up: it still {reason}"
        await self._move(state, reason, wait_ms=wait_ms, blocked=state is JobState.PENDING)

    async def _until_ready(self) -> tuple[JobState, str] | None:
        """Wait until the call may be made now; or find how the job ends without one."""
        deleter, job = self._deleter, self._job
        if not job.fingerprint:
            self._permit = await deleter._limiter.permit(job.project_id, patient=False)
            self._turn = asyncio.get_running_loop().time()
            return None
        self._permit = None
        for look in range(MOST_LOOKS):
            waited = look > 0
            sight = await deleter._inventory.look(
                job.project_id, job.pool_name, alone=self._alone, has_turn=waited
            )
            if end := judge(job, sight.pool):
                return end
            # Having waited its turn once, a job whose sight grew old meanwhile goes to the front.
            self._permit = await deleter._limiter.permit(
                job.project_id, urgent=waited, patient=False
            )
            if not (waited or self._alone) and deleter._inventory.is_list_due(job.project_id):
                continue  # and its turn goes to the list that all others need soon, too
            if end := await self._nodes_in_the_way():
                return end
            self._turn = asyncio.get_running_loop().time()
            self._sight = sight
            if deleter._inventory.is_fresh(sight):
                return None
            newer = deleter._inventory.known(job.project_id, job.pool_name)
            if newer and not job.check_nodes:  # its nodes were looked at as long ago as the pool
                self._sight = newer
                return judge(job, newer.pool)
        raise _PausedError("waits until the cloud answers fast enough to be sure of the pool")

    async def _nodes_in_the_way(self) -> tuple[JobState, str] | None:
        """How the job ends because of its pool's nodes, if the plan left it to look at these."""
        deleter, job = self._deleter, self._job
        if not job.check_nodes:
            return None
        # The turn that was waited for is this call's; the DELETE has the next one.
        try:
            nodes = await deleter._client.list_nodes(job.project_id, job.pool_name)
        except ApiError as error:
            if error.verdict.kind is not VerdictKind.ALREADY_DELETED:
                raise
            # Only the pool's own 404 says that it is gone.
            await deleter._limiter.permit(job.project_id, urgent=True, patient=False)
            if await deleter._client.show_pool(job.project_id, job.pool_name) is not None:
                raise
            return judge(job, None)
        if why := nodes_obstacle(nodes):
            return JobState.SKIPPED, why
        self._permit = await deleter._limiter.permit(job.project_id, urgent=True, patient=False)
        return None

    async def _call(self, admission: Admission) -> Answer:
        answer = await self._deleter._client.delete_pool(
            self._job.project_id, self._job.pool_name, before=lambda: self._check(admission)
        )
        if self._permit is not None and answer.status == HTTPStatus.OK:
            self._permit.answered(answer.duration_s)
        self._is_news = True
        admission.report(ok=is_well(answer))
        return answer

    def _check(self, admission: Admission) -> None:
        """See that the call may be made: the last look, once it is signed, which may take long."""
        number, inventory = self._job.number, self._deleter._inventory
        if not self._lease.holds(number):
            raise LeaseLostError
        self._heed_pause()
        admission.check()
        is_late = asyncio.get_running_loop().time() - self._turn > TURN_S
        if is_late or (self._sight is not None and not inventory.is_fresh(self._sight)):
            raise _TurnMissedError
        if self._permit is not None:
            self._permit.sent()
        self._lease.calling[number] = time.time_ns() // 1_000_000

    async def _handle(self, attempt: Attempt, verdict: Verdict) -> bool:
        """Record what an attempt came to. Returns whether to go on trying here."""
        if not (verdict.throttled and self._is_news):
            return await self._settle(attempt, verdict)
        # All slow down at once, and yet the record does not depend on it.
        limiter, project_id = self._deleter._limiter, self._job.project_id
        ago_s = self._permit.due_ago_s if self._permit else attempt.duration_ms / 1000
        throttling = asyncio.create_task(
            limiter.throttled(project_id, verdict.retry_after_s, sent_ago_s=ago_s)
        )
        try:
            return await self._settle(attempt, verdict)
        finally:
            await throttling

    async def _settle(self, attempt: Attempt, verdict: Verdict) -> bool:
        match verdict.kind:
            case VerdictKind.ACCEPTED:
                await self._move(JobState.ACCEPTED, verdict.reason, attempt)
            case VerdictKind.ALREADY_DELETED:
                await self._move(JobState.ALREADY_DELETED, verdict.reason, attempt)
            case VerdictKind.RENEW if not self._renewed:
                self._renewed = True
                await self._note(attempt, verdict.reason)
                try:
                    await self._deleter._client.renew_credentials(self._job.project_id)
                except AuthError as error:
                    return await self._handle(_mark("sign_in_failed"), _of_a_sign_in(error))
                return True
            case VerdictKind.RENEW | VerdictKind.FAILED:
                await self._move(JobState.FAILED, verdict.reason, attempt)
            case VerdictKind.RETRY:
                return await self.retry(attempt, verdict.reason, verdict.retry_after_s)
        return False

    async def retry(
        self, attempt: Attempt, reason: str, retry_after_s: float | None, *, inline: bool = True
    ) -> bool:
        """Wait here, go back to the ledger to wait there, or give up. Returns True for here."""
        policy = self._deleter._policy
        made = [*self._attempts, attempt]
        decision = decide(
            policy,
            attempts=len(made),
            elapsed_s=tried_s(policy, [each.at_ms for each in made]),
            backoff_s=backoff_s(policy, len(made)),
            retry_after_s=retry_after_s,
        )
        if isinstance(decision, GiveUp):
            await self._move(JobState.FAILED, f"{reason} ({decision.reason})", attempt)
            return False
        self.log.info("retry", reason=reason, wait_s=round(decision.seconds, 3))
        inline = inline and not self._lease.closing
        if inline and decision.seconds <= self._deleter._inline_wait_s:
            await self._note(attempt, reason)
            await asyncio.sleep(decision.seconds)
            return True
        wait_ms = round(decision.seconds * 1000)
        await self._move(JobState.PENDING, reason, attempt, wait_ms)
        return False

    async def _note(self, attempt: Attempt, reason: str) -> None:
        self._attempts.append(attempt)
        await self._record(JobState.LEASED, reason, attempt)

    async def _move(
        self,
        target: JobState,
        reason: str,
        attempt: Attempt | None = None,
        wait_ms: int = 0,
        *,
        blocked: bool = False,
    ) -> None:
        await self._record(target, reason, attempt, wait_ms, blocked)
        self._lease.held.discard(self._job.number)
        if target is not JobState.PENDING:
            status = attempt.status if attempt else None
            made = self._attempts if attempt is None else [*self._attempts, attempt]
            attempts = [told(each) for each in made]
            self.log.info(
                "job_moved", state=target, reason=reason, status=status, attempts=attempts
            )

    async def _record(
        self,
        target: JobState,
        reason: str,
        attempt: Attempt | None,
        wait_ms: int = 0,
        blocked: bool = False,
    ) -> None:
        move = Move(
            number=self._job.number,
            source=JobState.LEASED,
            target=target,
            owner=self._lease.owner,
            attempt=attempt,
            reason=reason,
            wait_ms=wait_ms,
            blocked=blocked,
        )
        if not await self._deleter._recorder.record(self._job.run_id, move):
            self._lease.held.discard(self._job.number)
            raise LeaseLostError
        if attempt is not None:
            self._lease.calling.pop(self._job.number, None)


def told(attempt: Attempt) -> dict[str, int | str]:
    """An attempt as a log line has it: times in ms, as in the ledger."""
    return {
        "at_ms": attempt.at_ms,
        "duration_ms": attempt.duration_ms,
        "status": attempt.status,
        "code": attempt.code,
        "request_id": attempt.request_id,
    }


def _of_a_read(verdict: Verdict) -> Verdict:
    """What a failed read means for the job: it is retried or fails, and is never done."""
    kind = VerdictKind.RETRY if verdict.kind is VerdictKind.RETRY else VerdictKind.FAILED
    reason = f"the pool could not be read before its deletion: {verdict.reason}"
    return Verdict(kind, reason, verdict.retry_after_s, verdict.throttled)


def _of_a_sign_in(error: AuthError) -> Verdict:
    kind = VerdictKind.RETRY if error.temporary else VerdictKind.FAILED
    return Verdict(kind, str(error))


def _mark(code: str) -> Attempt:
    """An attempt that came to no call."""
    return Attempt(time.time_ns() // 1_000_000, 0, 0, code, "")


def _attempt(answer: Answer) -> Attempt:
    code = answer.error_code or answer.failure or ""
    return Attempt(
        at_ms=answer.received_ms,
        duration_ms=round(answer.duration_s * 1000),
        status=answer.status or 0,
        code=code if answer.method == "DELETE" else f"{answer.method} {code}".strip(),
        request_id=answer.request_id or "",
    )
