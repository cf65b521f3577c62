"""What holds at the end of every episode, whatever was done to it: pure, from the evidence.

Times of the sandbox's journal are of the machine's monotonic clock, those of the ledger of its
wall clock; the evidence has them all in ms of the wall clock. All processes are on one machine.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final

from worker.ledger import JobState, RunState, Source

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from worker.ledger import Attempt, Job, Run

SLACK_MS: Final = 100
"""Between a time as one process sees it and as another does."""
FINAL: Final = frozenset(JobState) - {JobState.PENDING, JobState.LEASED, JobState.ACCEPTED}
GONE: Final = frozenset({JobState.DELETED, JobState.ALREADY_DELETED})
ACCEPTED: Final = frozenset({200, 202, 204})
CUTS: Final = frozenset({"lease_expired", "cut_short"})
"""The marks of attempts whose worker was lost, or stopped, before it knew the answer."""
TAKES_A_WORKER: Final = frozenset({"kill", "stop", "freeze"})
NO_ANSWER: Final = frozenset({"timeout", "reset", "connect", "invalid_answer"})
DOUBT: Final = "cannot be read"
DEFECT: Final = "_crashed"
"""How an event of a log ends that names a defect rather than trouble."""


@dataclass(frozen=True, slots=True)
class Call:
    """A DELETE that arrived at the sandbox.

    Attributes:
        at_ms: when.
        pool: whose.
        status: what was answered; 0: nothing.
    """

    at_ms: float
    pool: str
    status: int


@dataclass(frozen=True, slots=True)
class Harm:
    """Something that was done: what, to whom, and from when to when in ms."""

    kind: str
    target: str
    begun_ms: float
    ended_ms: float


@dataclass
class Evidence:
    """All that is known at the end of an episode.

    Attributes:
        runs: as the ledger has them.
        jobs: those of each run.
        listed: the numbers of the jobs in a run's lists of outcomes.
        kept: the pools that a run's plan keeps, each with the reason.
        calls: the DELETE calls that arrived at the sandbox, in their order.
        there: the pools that still exist.
        wanted: the pools that were to go, and whether their DELETE is refused for good.
        spared: those that nothing may touch.
        acknowledged: the run of each acknowledged request, and the pools that it asked for.
        seen_ended: runs that were seen to have ended on the way, and how many of their jobs were
            final then.
        harms: what was done.
        complaints: what processes did that they should not.
        logged: the names of the events of all logs.
        lease_ms: how long a lease lasts.
    """

    runs: list[Run]
    jobs: dict[str, list[Job]]
    listed: dict[str, list[int]]
    kept: dict[str, dict[str, str]]
    calls: list[Call]
    there: set[str]
    wanted: dict[str, bool]
    spared: set[str]
    acknowledged: dict[str, list[str]] = field(default_factory=dict)
    seen_ended: dict[str, tuple[int, int]] = field(default_factory=dict)
    harms: list[Harm] = field(default_factory=list)
    complaints: list[str] = field(default_factory=list)
    logged: Counter[str] = field(default_factory=Counter)
    lease_ms: float = 0

    @property
    def all_jobs(self) -> list[Job]:
        return [job for jobs in self.jobs.values() for job in jobs]

    def jobs_by_pool(self) -> dict[str, list[Job]]:
        """The jobs that each pool was the target of."""
        found: defaultdict[str, list[Job]] = defaultdict(list)
        for job in self.all_jobs:
            found[job.pool_name].append(job)
        return found

    def calls_by_pool(self) -> dict[str, list[Call]]:
        """The calls for each pool, in their order."""
        found: defaultdict[str, list[Call]] = defaultdict(list)
        for call in sorted(self.calls, key=lambda call: call.at_ms):
            found[call.pool].append(call)
        return found

    def harmed(self, kinds: Iterable[str], begun_ms: float, ended_ms: float) -> bool:
        """Whether one of these was done at some time between two."""
        wanted = set(kinds)
        return any(
            harm.begun_ms <= ended_ms and harm.ended_ms >= begun_ms
            for harm in self.harms
            if harm.kind in wanted or harm.target in wanted
        )


def check(evidence: Evidence) -> None:
    """All invariants.

    Raises:
        AssertionError: those that do not hold, each with what was found.
    """
    broken = []
    for invariant in INVARIANTS:
        if found := invariant(evidence):
            shown = "\n    ".join(found[:10])
            more = f"\n    and {len(found) - 10} more" if len(found) > 10 else ""
            broken.append(f"{invariant.__name__}:\n    {shown}{more}")
    assert not broken, "\n".join(["invariants that do not hold:", *broken])


def every_job_is_final(evidence: Evidence) -> list[str]:
    """Runs have ended, and so has each of their jobs.

    But a night that was cut off in its making, as when the schedulers are stopped at the end of an
    episode, waits for the next scheduler; none of it is executed.
    """
    found = [
        f"run {run.run_id} is {run.state}"
        for run in evidence.runs
        if not run.ended and (run.state, run.source) != (RunState.CREATING, Source.SCHEDULE)
    ]
    for run in evidence.runs:
        jobs = evidence.jobs[run.run_id]
        if run.started_ms:
            found += [f"{_name(job)} is {job.state}" for job in jobs if job.state not in FINAL]
    return found


def counts_are_those_of_the_jobs(evidence: Evidence) -> list[str]:
    """A run's counts and lists say what its jobs say."""
    found = []
    for run in evidence.runs:
        jobs = evidence.jobs[run.run_id]
        states = Counter(job.state for job in jobs)
        counts = {state: count for state, count in run.counts.items() if count}
        if run.started_ms and (counts != dict(states) or len(jobs) != run.total):
            found.append(f"run {run.run_id}: {counts}, total {run.total}; jobs: {dict(states)}")
        if run.started_ms and sorted(evidence.listed[run.run_id]) != [j.number for j in jobs]:
            found.append(f"run {run.run_id}: its lists of outcomes do not name each job once")
    return found


def what_is_called_gone_is_gone(evidence: Evidence) -> list[str]:
    """A pool whose job ended in success does not exist."""
    return [
        f"{_name(job)} is {job.state}, and its pool {job.pool_name} is there"
        for job in evidence.all_jobs
        if job.state in GONE and job.pool_name in evidence.there
    ]


def only_planned_pools_were_called(evidence: Evidence) -> list[str]:
    """No DELETE for a pool outside the plans, and none for one that is protected."""
    planned = evidence.jobs_by_pool()
    called = {call.pool for call in evidence.calls}
    found = [f"{pool} was called and is in no plan" for pool in called - planned.keys()]
    found += [f"{pool} was called, and was to be spared" for pool in called & evidence.spared]
    found += [
        f"{pool} was planned, and was to be spared" for pool in planned.keys() & evidence.spared
    ]
    found += [f"{pool} is gone, and was to be spared" for pool in evidence.spared - evidence.there]
    return found


def no_call_for_a_job_that_was_settled(evidence: Evidence) -> list[str]:
    """A DELETE comes only while a job of its pool has neither ended nor been accepted."""
    jobs = evidence.jobs_by_pool()
    found = []
    for call in evidence.calls:
        settled = [(_settled_ms(job), job) for job in jobs.get(call.pool, [])]
        if settled and all(call.at_ms > at_ms + SLACK_MS for at_ms, _ in settled):
            at_ms, job = max(settled, key=lambda each: each[0])
            found.append(
                f"{_name(job)} was settled, and its pool called {call.at_ms - at_ms:.0f} ms later "
                f"(answered {call.status}); attempts: {[a.packed() for a in job.attempts]}"
            )
    return found


def _settled_ms(job: Job) -> float:
    """From when on the ledger knew that no more calls are needed."""
    ended_ms = job.done_ms or float("inf")
    return min([ended_ms, *(a.at_ms for a in job.attempts if a.status in ACCEPTED)])


def every_call_is_an_attempt(evidence: Evidence) -> list[str]:
    """Each DELETE is in the ledger, or is the one that a lost or stopped worker left behind."""
    return [
        f"{call.pool}: called at {call.at_ms:.0f}, answered {call.status}: no attempt of "
        f"{[attempt.packed() for attempt in attempts]}"
        for _, attempts, calls, _ in _matched(evidence)
        for call in calls
    ]


def every_attempt_is_a_call(evidence: Evidence) -> list[str]:
    """Each answered attempt is a DELETE that arrived; the others have their explanation."""
    found = []
    for pool, _, _, attempts in _matched(evidence):
        for attempt in attempts:
            begun_ms = attempt.at_ms - attempt.duration_ms - SLACK_MS
            ended_ms = attempt.at_ms + SLACK_MS
            if attempt.status:
                why = "it was answered, and no such call arrived"
            elif attempt.code == "lease_expired":
                lost_ms = begun_ms - 3 * evidence.lease_ms
                if evidence.harmed([*TAKES_A_WORKER, "redis"], lost_ms, ended_ms):
                    continue
                why = "no worker was lost, and Redis was well"
            elif attempt.code == "cut_short":
                if evidence.harmed(["stop", "redis", "network", "api"], begun_ms - 5_000, ended_ms):
                    continue
                why = "no worker was stopped"
            elif attempt.code in NO_ANSWER:
                if evidence.harmed(["network", "freeze"], begun_ms, ended_ms):
                    continue
                why = "nothing was wrong with the network"
            else:
                why = "nothing that was done explains it"
            found.append(f"{pool}: {attempt.packed()}: {why}")
    return found


def _matched(
    evidence: Evidence,
) -> list[tuple[str, list[Attempt], list[Call], list[Attempt]]]:
    """For each pool: its attempts to call, the calls and the attempts without a counterpart."""
    calls_by_pool = evidence.calls_by_pool()
    result = []
    for pool, jobs in evidence.jobs_by_pool().items():
        attempts = sorted(
            (a for job in jobs for a in job.attempts if not a.code.startswith("GET")),
            key=lambda attempt: attempt.at_ms,
        )
        calls = list(calls_by_pool.get(pool, []))
        alone = []
        # Those that say most of themselves choose first.
        for rank in (_was_answered, _got_no_answer, _was_cut):
            for attempt in filter(rank, attempts):
                own = [call for call in calls if _fits(attempt, call)]
                if own:
                    calls.remove(own[0])
                else:
                    alone.append(attempt)
        result.append((pool, attempts, calls, alone))
    return result


def _was_answered(attempt: Attempt) -> bool:
    return attempt.status != 0


def _was_cut(attempt: Attempt) -> bool:
    return attempt.code in CUTS


def _got_no_answer(attempt: Attempt) -> bool:
    return not (_was_answered(attempt) or _was_cut(attempt))


def _fits(attempt: Attempt, call: Call) -> bool:
    if attempt.code == "lease_expired":
        return call.at_ms <= attempt.at_ms + SLACK_MS
    begun_ms = attempt.at_ms - attempt.duration_ms - SLACK_MS
    if attempt.code == "cut_short":
        return call.at_ms >= begun_ms
    in_time = begun_ms <= call.at_ms <= attempt.at_ms + SLACK_MS
    return in_time and attempt.status in {0, call.status}


def no_run_ended_before_its_jobs(evidence: Evidence) -> list[str]:
    """A run that says that it has finished has nothing left to do, from that moment on."""
    found = []
    for run in evidence.runs:
        if run.state is RunState.FINISHED:
            found += [
                f"{_name(job)} ended {job.done_ms - run.finished_ms} ms after its run"
                for job in evidence.jobs[run.run_id]
                if job.done_ms > run.finished_ms
            ]
    found += [
        f"run {run_id} was seen to have ended when {final} of its {total} jobs had"
        for run_id, (final, total) in evidence.seen_ended.items()
        if final != total
    ]
    return found


def no_acknowledged_request_is_lost(evidence: Evidence) -> list[str]:
    """Each has its run, which deletes or keeps whatever was asked for; nothing else made one."""
    if not evidence.acknowledged:
        return []
    runs = {run.run_id: run for run in evidence.runs}
    found = [f"request {run_id} has no run" for run_id in evidence.acknowledged.keys() - runs]
    found += [f"run {run_id} was not asked for" for run_id in runs.keys() - evidence.acknowledged]
    for run_id in evidence.acknowledged.keys() & runs:
        asked = sorted(evidence.acknowledged[run_id])
        planned = [job.pool_name for job in evidence.jobs[run_id]]
        told = sorted([*planned, *(evidence.kept[run_id].keys() - evidence.spared)])
        if asked != told:
            run = runs[run_id]
            found.append(f"{run_id} ({run.state}: {run.note}): asked {asked}, told of {told}")
    return found


def what_was_wanted_is_done(evidence: Evidence) -> list[str]:
    """Faults that pass cost time and nothing else: each pool goes, or was refused for good.

    Or its plan kept it because the API could not be asked about it just then.
    """
    jobs = evidence.jobs_by_pool()
    doubted = {
        pool for kept in evidence.kept.values() for pool, reason in kept.items() if DOUBT in reason
    }
    found = []
    for pool, refused in evidence.wanted.items():
        if pool in doubted and pool not in jobs:
            continue
        states = {job.state for job in jobs.get(pool, [])}
        if refused:
            if states != {JobState.FAILED}:
                found.append(f"{pool} is refused for good, and its jobs are {states}")
        elif pool in evidence.there or not states & GONE:
            reasons = [job.reason for job in jobs.get(pool, [])]
            found.append(f"{pool} was wanted, and its jobs are {states}: {reasons}")
    return found


def no_process_did_what_it_should_not(evidence: Evidence) -> list[str]:
    """None ended by itself or hung at its end, and no log names a defect."""
    found = list(evidence.complaints)
    found += [
        f"the logs say {name} {count} times"
        for name, count in evidence.logged.items()
        if name.endswith(DEFECT)
    ]
    return found


def _name(job: Job) -> str:
    return f"job {job.job_id}"


INVARIANTS: Final[tuple[Callable[[Evidence], list[str]], ...]] = (
    every_job_is_final,
    counts_are_those_of_the_jobs,
    what_is_called_gone_is_gone,
    only_planned_pools_were_called,
    no_call_for_a_job_that_was_settled,
    every_call_is_an_attempt,
    every_attempt_is_a_call,
    no_run_ended_before_its_jobs,
    no_acknowledged_request_is_lost,
    what_was_wanted_is_done,
    no_process_did_what_it_should_not,
)
