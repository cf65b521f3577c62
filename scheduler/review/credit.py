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

    from worker.ledger import Job, Run

DELETION_MS: Final = 6 * 3_600_000
"""A pool whose deletion was accepted is taken to be there for this long, where nobody looks."""
_NO_ANSWER: Final = 500
"""From this status on, as without any, a call may have done what it was to do."""


CLAIMING: Final = (JobState.DELETED, JobState.ACCEPTED)
"""The states of jobs whose pool is gone by them, or going."""


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
        end = float("inf")
        if run.finished_ms:
            end = run.finished_ms + (0 if run.verify else DELETION_MS)
        for project_id in run.projects:
            self._spans[run.endpoint, project_id].append((run.started_ms, end, run.run_id))

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
        if 200 <= call.status <= 299 or not call.status or call.status >= _NO_ANSWER
    ]
    return min(claims, default=None)


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
