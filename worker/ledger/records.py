"""What the ledger holds: runs, jobs, attempts and the moves between a job's states."""

from __future__ import annotations

import json
import secrets
from dataclasses import dataclass
from enum import StrEnum
from typing import TYPE_CHECKING, Any

from worker.ledger import schema

if TYPE_CHECKING:
    from datetime import datetime


class JobState(StrEnum):
    """The states of a job's life; docs/outcomes.md says what each outcome means."""

    PENDING = "pending"
    LEASED = "leased"
    ACCEPTED = "accepted"
    DELETED = "deleted"
    ALREADY_DELETED = "already_deleted"
    SKIPPED = "skipped"
    FAILED = "failed"
    CANCELLED = "cancelled"


class RunState(StrEnum):
    """The states of a run: it may wait to be planned, takes jobs, executes them, and ends; or was
    never started, because its maker stopped or somebody cancelled it (`aborted`), because a brake
    held it (`braked`), or because only its plan was wanted (`planned`)."""

    QUEUED = "queued"
    CREATING = "creating"
    RUNNING = "running"
    FINISHED = "finished"
    ABORTED = "aborted"
    BRAKED = "braked"
    PLANNED = "planned"


class Source(StrEnum):
    """Where a run came from."""

    SCHEDULE = "schedule"
    CLI = "cli"
    INTAKE = "intake"


def new_run_id(now: datetime) -> str:
    """A run's id: its UTC time to the second, for people and for sorting, and 40 random bits."""
    return f"{now:%Y%m%d-%H%M%S}-{secrets.token_hex(5)}"


@dataclass(frozen=True, slots=True)
class Attempt:
    """One DELETE call, or the mark of a lost worker (status 0, code `lease_expired`).

    Attributes:
        at_ms: when it was answered, in ms since the epoch.
        duration_ms: how long the answer took.
        status: the HTTP status; 0 if there was no answer.
        code: the cloud's error code, or the kind of transport failure; empty if neither.
        request_id: the cloud's id of the request; empty if there was none.
    """

    at_ms: int
    duration_ms: int
    status: int
    code: str
    request_id: str

    def packed(self) -> list[int | str]:
        """The form in which a record holds it."""
        return [self.at_ms, self.duration_ms, self.status, self.code, self.request_id]


@dataclass(frozen=True, slots=True)
class NewJob:
    """One target of a new run.

    Attributes:
        project_id: the pool's project.
        pool_name: the pool's id (`metadata.name`).
        display_name: the name that the user gave the pool.
        created: the pool's creationTimestamp when it was chosen; empty: no precondition.
        fingerprint: the fingerprint of the pool when it was chosen; empty: no precondition.
        chosen: why it was chosen.
        check_nodes: whether nobody has looked yet how its nodes are paid for.
        nodes: the pool's own nodes by flavor when it was chosen; None: not known.
    """

    project_id: str
    pool_name: str
    display_name: str = ""
    created: str = ""
    fingerprint: str = ""
    chosen: str = ""
    check_nodes: bool = False
    nodes: dict[str, int] | None = None

    def record(self) -> str:
        """The job's first record."""
        return json.dumps(
            {
                "pool": self.pool_name,
                "name": self.display_name,
                "project": self.project_id,
                "created": self.created,
                "fingerprint": self.fingerprint,
                "chosen": self.chosen,
                "state": JobState.PENDING,
                **({"check_nodes": True} if self.check_nodes else {}),
                **({} if self.nodes is None else {"nodes": self.nodes}),
            },
            ensure_ascii=False,
            separators=(",", ":"),
        )


@dataclass(frozen=True, slots=True)
class Job:
    """A job as the ledger holds it. Times are in ms since the epoch, 0 where there is none."""

    run_id: str
    number: int
    project_id: str
    pool_name: str
    display_name: str
    created: str
    fingerprint: str
    chosen: str
    check_nodes: bool
    state: JobState
    reason: str
    due_ms: int
    blocked_ms: int
    done_ms: int
    attempts: tuple[Attempt, ...]
    nodes: dict[str, int] | None = None

    @property
    def job_id(self) -> str:
        """The job's id: its run's and its number there."""
        return f"{self.run_id}/{self.number}"

    @classmethod
    def parse(cls, run_id: str, number: int, text: str | bytes) -> Job:
        """Read a record."""
        record: dict[str, Any] = json.loads(text)
        return cls(
            run_id=run_id,
            number=number,
            project_id=record["project"],
            pool_name=record["pool"],
            display_name=record["name"],
            created=record["created"],
            fingerprint=record["fingerprint"],
            chosen=record["chosen"],
            check_nodes=record.get("check_nodes", False),
            state=JobState(record["state"]),
            reason=record.get("reason", ""),
            due_ms=record.get("due", 0),
            blocked_ms=record.get("blocked", 0),
            done_ms=record.get("done", 0),
            attempts=tuple(Attempt(*packed) for packed in record.get("attempts", ())),
            nodes=record.get("nodes"),
        )


@dataclass(frozen=True, slots=True)
class Move:
    """A wish to move a job; the ledger refuses it if the job is not where it says.

    Attributes:
        number: the job's number in its run.
        source, target: the states.
        owner: the lease's owner, where the source is `leased`.
        attempt: the call that this move follows from.
        reason: why, in one sentence.
        wait_ms: with target `pending`, how long until the job is due again.
        blocked: with target `pending`, that it waits for other pools; the ledger keeps since when.
    """

    number: int
    source: JobState
    target: JobState
    owner: str = ""
    attempt: Attempt | None = None
    reason: str = ""
    wait_ms: int = 0
    blocked: bool = False

    def packed(self) -> dict[str, Any]:
        """The form that the script reads: what is empty is left out."""
        wish: dict[str, Any] = {"n": self.number, "from": self.source, "to": self.target}
        if self.owner:
            wish["owner"] = self.owner
        if self.attempt:
            wish["attempt"] = self.attempt.packed()
        if self.reason:
            wish["reason"] = self.reason
        if self.wait_ms:
            wish["wait_ms"] = self.wait_ms
        if self.blocked:
            wish["blocked"] = True
        return wish


@dataclass(frozen=True, slots=True)
class Kept:
    """A pool that a run's plan keeps, and why."""

    project_id: str
    pool_name: str
    display_name: str
    reason: str

    def record(self) -> str:
        """The form in which it is held."""
        return json.dumps(
            [self.project_id, self.pool_name, self.display_name, self.reason],
            ensure_ascii=False,
            separators=(",", ":"),
        )


@dataclass(frozen=True, slots=True)
class NewRun:
    """What is known of a run when it is opened.

    Attributes:
        run_id: its id.
        source: where it came from.
        endpoint: the base URL of the API that its pools are at.
        requester: who asked for it.
        reason: why, in their words.
        verify: whether a job ends only when its pool is seen to be gone.
        policy: the policy that it carries out; empty: none.
        client: the client of the intake that asked for it; empty: none.
        selector: what its pools were chosen by, as JSON; empty: by name, or by the policy.
        projects: the projects that its pools are in.
        max_failures: more failed jobs than this stop the rest of it; None: any number may fail.
        max_failure_percent: a larger share of the jobs tried, of ten or more, stops it too.
    """

    run_id: str
    source: Source
    endpoint: str
    requester: str = ""
    reason: str = ""
    verify: bool = True
    policy: str = ""
    client: str = ""
    selector: str = ""
    projects: tuple[str, ...] = ()
    max_failures: int | None = None
    max_failure_percent: float | None = None

    def fields(self) -> dict[str, str | int | float]:
        """The run's first fields: what is not given is left out."""
        given: dict[str, str | int | float | None] = {
            "source": self.source,
            "endpoint": self.endpoint,
            "requester": self.requester or None,
            "reason": self.reason or None,
            "verify": int(self.verify),
            "policy": self.policy or None,
            "client": self.client or None,
            "selector": self.selector or None,
            "projects": " ".join(self.projects) or None,
            "max_failures": self.max_failures,
            "max_failure_percent": self.max_failure_percent,
        }
        return {name: value for name, value in given.items() if value is not None}


@dataclass(frozen=True, slots=True)
class Run:
    """A run as the ledger holds it. Times are in ms since the epoch, 0 where there is none.

    Its brakes, `max_failures` and `max_failure_percent`, are those of `NewRun`.
    """

    run_id: str
    source: str
    endpoint: str
    requester: str
    reason: str
    verify: bool
    policy: str
    client: str
    selector: str
    projects: tuple[str, ...]
    state: RunState
    total: int
    created_ms: int
    planned_ms: int
    started_ms: int
    finished_ms: int
    cancelled_ms: int
    braked_ms: int
    note: str
    counts: dict[JobState, int]
    max_failures: int | None = None
    max_failure_percent: float | None = None

    @property
    def done(self) -> int:
        """How many of its jobs have ended."""
        open_states = {JobState.PENDING, JobState.LEASED}
        if self.verify:
            open_states.add(JobState.ACCEPTED)
        return self.total - sum(self.counts.get(state, 0) for state in open_states)

    @property
    def ended(self) -> bool:
        """Whether nothing more will happen to it."""
        return self.state not in {RunState.QUEUED, RunState.CREATING, RunState.RUNNING}

    @classmethod
    def parse(cls, run_id: str, fields: dict[str, str]) -> Run:
        """Read a run's hash.

        Raises:
            SchemaError: a newer version wrote it.
        """
        written = fields.get(schema.FIELD)
        if written is not None and schema.is_newer(written):
            raise schema.SchemaError.of_run(run_id, written)
        most, percent = fields.get("max_failures"), fields.get("max_failure_percent")
        return cls(
            run_id=run_id,
            source=fields["source"],
            endpoint=fields["endpoint"],
            requester=fields.get("requester", ""),
            reason=fields.get("reason", ""),
            verify=fields["verify"] == "1",
            policy=fields.get("policy", ""),
            client=fields.get("client", ""),
            selector=fields.get("selector", ""),
            projects=tuple(fields.get("projects", "").split()),
            state=RunState(fields["state"]),
            total=int(fields["total"]),
            created_ms=int(fields["created_ms"]),
            planned_ms=int(fields.get("planned_ms", fields["created_ms"])),
            started_ms=int(fields.get("started_ms", 0)),
            finished_ms=int(fields.get("finished_ms", 0)),
            cancelled_ms=int(fields.get("cancelled_ms", 0)),
            braked_ms=int(fields.get("braked_ms", 0)),
            note=fields.get("note", ""),
            counts={state: int(fields.get(f"jobs:{state}", 0)) for state in JobState},
            max_failures=None if most is None else int(most),
            max_failure_percent=None if percent is None else float(percent),
        )
