"""The names of the ledger's keys in Redis: all of them, in one place.

The keys of one run share the hash tag `{run_id}`, so that on Redis Cluster they lie in one
slot and a script may touch them together.
"""

from __future__ import annotations

PREFIX = "poolsweep"

OUTCOMES = ("accepted", "deleted", "already_deleted", "skipped", "failed", "cancelled")
"""The states that a job can end in; `accepted` only in a run that does not verify."""


def run(run_id: str) -> str:
    """HASH: the run itself and its counts by state (`jobs:<state>`)."""
    return f"{PREFIX}:{{{run_id}}}:run"


def jobs(run_id: str) -> str:
    """HASH: job number -> record (JSON)."""
    return f"{PREFIX}:{{{run_id}}}:jobs"


def waiting(run_id: str) -> str:
    """ZSET: pending jobs that no message carries, by the ms when they are due."""
    return f"{PREFIX}:{{{run_id}}}:waiting"


def sent(run_id: str) -> str:
    """ZSET: pending jobs that a message carries, by the ms when that counts as lost."""
    return f"{PREFIX}:{{{run_id}}}:sent"


def leased(run_id: str) -> str:
    """ZSET: leased jobs, by the ms when the lease runs out."""
    return f"{PREFIX}:{{{run_id}}}:leased"


def accepted(run_id: str) -> str:
    """ZSET: jobs that await verification, by the ms when the cloud accepted them."""
    return f"{PREFIX}:{{{run_id}}}:accepted"


def outcome(run_id: str, name: str) -> str:
    """LIST: the numbers of the jobs that ended so, in the order in which they ended."""
    return f"{PREFIX}:{{{run_id}}}:outcome:{name}"


def of_run(run_id: str) -> list[str]:
    """Every key of a run, in the order in which the scripts expect them."""
    return [
        run(run_id),
        jobs(run_id),
        waiting(run_id),
        sent(run_id),
        leased(run_id),
        accepted(run_id),
        *(outcome(run_id, name) for name in OUTCOMES),
    ]


INDEX = f"{PREFIX}:{{runs}}:index"
"""ZSET: every run, by the ms of its creation."""


def active(endpoint: str) -> str:
    """SET: the runs against one endpoint that are not finished."""
    return f"{PREFIX}:{{runs}}:active:{endpoint}"


def workers(endpoint: str) -> str:
    """ZSET: the worker processes that serve an endpoint, by the ms when last seen."""
    return f"{PREFIX}:{{workers}}:{endpoint}"


def reconciler(endpoint: str) -> str:
    """STRING: the worker that reconciles an endpoint's runs at present."""
    return f"{PREFIX}:{{reconciler}}:{endpoint}"


def limiter(endpoint: str, project_id: str) -> str:
    """HASH: the state of the rate limit of one project at one endpoint."""
    return f"{PREFIX}:{{limiter:{endpoint}:{project_id}}}"
