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


def kept(run_id: str) -> str:
    """LIST: the pools that the run's plan keeps (JSON), for the record."""
    return f"{PREFIX}:{{{run_id}}}:kept"


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
        kept(run_id),
    ]


INDEX = f"{PREFIX}:{{runs}}:index"
"""ZSET: every run, by the ms of its creation."""


SCHEMA = f"{PREFIX}:{{runs}}:schema"
"""STRING: the newest schema that a run was opened with here; see schema.py."""


def active(endpoint: str) -> str:
    """SET: the runs against one endpoint that are not finished."""
    return f"{PREFIX}:{{runs}}:active:{endpoint}"


def project(endpoint: str, project_id: str) -> str:
    """STRING: the run that has a project to itself, until it has ended."""
    return f"{PREFIX}:{{project:{endpoint}:{project_id}}}"


def marks(endpoint: str, project_id: str, policy: str) -> str:
    """HASH: pool id -> mark (JSON): what a policy deletes in a project when its grace is over."""
    return f"{PREFIX}:{{marks:{endpoint}:{project_id}}}:{policy}"


REQUESTS = f"{PREFIX}:{{intake}}:requests"
"""HASH: run id -> the request that it is to be planned from (JSON), until it has been."""

REQUESTS_DUE = f"{PREFIX}:{{intake}}:due"
"""ZSET: the run ids of these, by the ms when they are planned next or their lease runs out."""

REQUESTS_TRIED = f"{PREFIX}:{{intake}}:tried"
"""HASH: run id -> how often its planning was begun and came to no end."""

REQUESTS_TROUBLE = f"{PREFIX}:{{intake}}:trouble"
"""HASH: run id -> why it could not be planned yet."""


def idempotency(client: str, digest: str) -> str:
    """STRING: the run id and the content's digest of a client's request with a certain key."""
    return f"{PREFIX}:{{intake}}:idempotency:{client}:{digest}"


STREAM = f"{PREFIX}:requests"
"""STREAM: requests from other systems."""

REJECTED = f"{{{STREAM}}}:rejected"
"""STREAM: requests by the broker or the stream that were refused, with the reason. In the slot of
`STREAM`, so that an entry moves from one to the other at once."""

MARKED = f"{PREFIX}:{{marked}}"
"""SET: endpoint, project id and policy (JSON) of every HASH of marks."""


def vetoes(endpoint: str, project_id: str) -> str:
    """HASH: pool id -> veto (JSON): what somebody keeps in a project."""
    return f"{PREFIX}:{{vetoes:{endpoint}:{project_id}}}"


def idle(endpoint: str, project_id: str) -> str:
    """HASH: pool id -> its incarnation and the ms since when it was seen without workloads."""
    return f"{PREFIX}:{{idle:{endpoint}:{project_id}}}"


SCHEDULER = f"{PREFIX}:{{scheduler}}:leader"
"""STRING: the scheduler process that leads."""

SCHEDULER_STATE = f"{PREFIX}:{{scheduler}}:state"
"""STRING: what the leader last said of itself and its policies (JSON)."""

NIGHTS = f"{PREFIX}:{{scheduler}}:nights"
"""HASH: policy -> the last night that was handled, and what came of it (JSON)."""


def past_nights(policy: str) -> str:
    """LIST: the latest nights of a policy and what came of them (JSON), newest first."""
    return f"{PREFIX}:{{scheduler}}:past:{policy}"


PAUSED = f"{PREFIX}:{{control}}:paused"
"""HASH: project id, or `*` for all -> who paused it, when and why (JSON)."""


def workers(endpoint: str) -> str:
    """ZSET: the worker processes that serve an endpoint, by the ms when last seen."""
    return f"{PREFIX}:{{workers}}:{endpoint}"


def reconciler(endpoint: str) -> str:
    """STRING: the worker that reconciles an endpoint's runs at present."""
    return f"{PREFIX}:{{reconciler}}:{endpoint}"


def limiter(endpoint: str, project_id: str) -> str:
    """HASH: the state of the rate limit of one project at one endpoint."""
    return f"{PREFIX}:{{limiter:{endpoint}:{project_id}}}"


def late_calls(endpoint: str, project_id: str) -> str:
    """HASH: number of a slot whose call was late -> ms before which the one it may crowd waits."""
    return f"{limiter(endpoint, project_id)}:late"


def notices(room: str) -> str:
    """HASH: channel|notice id -> a notice on its way and its attempts (JSON)."""
    return f"{PREFIX}:{{{room}}}:notices"


def notices_due(room: str) -> str:
    """ZSET: the notices on their way, by the ms when they are sent next or their lease runs out."""
    return f"{PREFIX}:{{{room}}}:due"


def notices_posted(room: str) -> str:
    """ZSET: channel|notice id of all that was ever posted, by ms; kept for 30 days."""
    return f"{PREFIX}:{{{room}}}:posted"


def undelivered(room: str) -> str:
    """LIST: the notices that were given up (JSON), the newest first."""
    return f"{PREFIX}:{{{room}}}:undelivered"


def watched(room: str) -> str:
    """HASH: run that owes notices -> which channels want them (JSON)."""
    return f"{PREFIX}:{{{room}}}:watched"


def of_outbox(room: str) -> list[str]:
    """The keys of the notices of one outbox, in the order in which its script expects them."""
    return [notices(room), notices_due(room), notices_posted(room), undelivered(room)]
