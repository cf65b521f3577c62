"""Which run freed a pool that several wanted: pure. It is the one whose call was accepted first.

A pool is told from another by its endpoint, project, id and creation time: an id may come again.
"""

from __future__ import annotations

import hashlib
from collections import defaultdict
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from worker.ledger import JobState

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from worker.ledger import Attempt, Job, Run

DELETION_MS: Final = 6 * 3_600_000
"""A pool whose deletion was accepted is taken to be there for this long, where nobody looks."""
_FAULT: Final = 500
"""From this status on a call may have done what it was to do."""
_UNANSWERED: Final = frozenset(
    {"timeout", "reset", "oversized", "invalid_answer", "lease_expired", "cut_short"}
)
"""So may one without an answer, with these codes: it was under way. With others, such as
`connect` and `sign_in_failed`, none was."""

CLAIMING: Final = (JobState.DELETED, JobState.ACCEPTED)
"""The states of jobs whose pool is gone by them, or going."""


def pools(run: Run) -> int:
    """How many of a run's jobs count as a pool that is gone."""
    return sum(count for state, count in run.counts.items() if frees(run, state))


def rivals_until_ms(run: Run) -> float:
    """Until when another run may find the pools of this one there, in ms since the epoch."""
    if not run.finished_ms:
        return float("inf")
    return run.finished_ms + (0 if run.verify else DELETION_MS)


def frees(run: Run, state: JobState) -> bool:
    """Whether a job in this state of this run counts as a pool that is gone."""
    return state is JobState.DELETED or (state is JobState.ACCEPTED and not run.verify)


class Overlaps:
    """Which runs may have called for a pool that another of them called for too.

    These worked on the same project at the same time. Where one had ended, and seen all its pools
    gone, before the other began, the other's call finds no pool.
    """

    def __init__(self) -> None:
        self._spans: defaultdict[tuple[str, str], list[tuple[int, float, str]]] = defaultdict(list)

    def add(self, run: Run) -> None:
        """Take a run into account; the order in which they come does not matter."""
        if not run.started_ms:
            return
        for project_id in run.projects:
            span = (run.started_ms, rivals_until_ms(run), run.run_id)
            self._spans[run.endpoint, project_id].append(span)

    def found(self) -> frozenset[str]:
        """The ids of these runs."""
        found: set[str] = set()
        for spans in self._spans.values():
            longest, until = "", float("-inf")
            for start, end, run_id in sorted(spans):
                if start <= until and run_id != longest:
                    found |= {longest, run_id}
                if end > until:
                    longest, until = run_id, end
        return frozenset(found)


def called_at(job: Job) -> tuple[int, int] | None:
    """The call of a job to which its pool's end can be put down, in the order of such claims.

    Returns:
        Whether its answer is missing, and its time in ms since the epoch: a call that was accepted
        comes before one whose answer was lost. None: somebody else was deleting the pool already.
    """
    claims = [
        (int(not 200 <= call.status <= 299), call.at_ms)
        for call in job.attempts
        if _may_have_begun_it(call)
    ]
    return min(claims, default=None)


def _may_have_begun_it(call: Attempt) -> bool:
    if call.code.partition(" ")[0] == "GET":  # the read before a call, which was not made then
        return False
    if not call.status:
        return call.code in _UNANSWERED
    return 200 <= call.status <= 299 or call.status >= _FAULT


@dataclass(frozen=True, slots=True)
class _Claim:
    """What a job says of a pool: the least of several holds."""

    order: tuple[tuple[int, int], str, int]
    counts: bool
    nodes: tuple[tuple[str, int], ...] | None


class Credit:
    """Pools that several runs may have called for, each credited to one of them.

    What is held is some 300 bytes for each pool.
    """

    def __init__(self) -> None:
        self._claims: dict[bytes, _Claim] = {}
        self._shapes: dict[tuple[tuple[str, int], ...], tuple[tuple[str, int], ...]] = {}

    def add(self, run: Run, job: Job, nodes: Mapping[str, int] | None, *, counts: bool) -> None:
        """Take a job into account; the order in which they come does not matter.

        Args:
            run: its run.
            job: a job in one of the states `CLAIMING`.
            nodes: the nodes by flavor that its pool had; None: not known.
            counts: whether the pool is to be told of if it is this job's.
        """
        called = called_at(job)
        if called is None:
            return
        shape = None if nodes is None else tuple(sorted(nodes.items()))
        if shape is not None:
            shape = self._shapes.setdefault(shape, shape)
        claim = _Claim((called, run.run_id, job.number), counts, shape)
        identity = "\n".join((run.endpoint, job.project_id, job.pool_name, job.created))
        key = hashlib.blake2b(identity.encode("utf-8", "replace"), digest_size=16).digest()
        held = self._claims.get(key)
        if held is None or claim.order < held.order:
            self._claims[key] = claim

    def freed(self) -> Iterator[dict[str, int] | None]:
        """The nodes of each pool that counts, once; None: not known."""
        for claim in self._claims.values():
            if claim.counts:
                yield None if claim.nodes is None else dict(claim.nodes)
