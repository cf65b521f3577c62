"""What the ledger holds: runs, jobs, attempts and the moves between a job's states."""

from __future__ import annotations

import json
import re
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


class DamagedRecordError(ValueError):
    """A job's record is missing, or is none."""

    def __init__(self, text: str | None) -> None:
        """Make one.

        Args:
            text: what is there instead; None: nothing.
        """
        super().__init__(
            "its record in the ledger is missing"
            if text is None
            else f"its record in the ledger is damaged: {_NOT_PRINTABLE.sub('?', text[:300])}"
        )


_NOT_PRINTABLE = re.compile(r"[^ -~]")
"""What may hold anything is told in the characters that every reader can show."""


@dataclass(frozen=True, slots=True)
class Attempt:
    """One DELETE call, a read before it that failed, or a mark of what came to no call.

    A read's code begins with `GET`. A mark has status 0: `lease_expired` of a lost worker,
    `cut_short` of one that was stopped, `sign_in_failed`, or the name of an internal error.

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

    @property
    def is_damaged(self) -> bool:
        """Whether its record is missing or damaged, so that even its pool is not known."""
        return not self.pool_name

    @classmethod
    def parse(cls, run_id: str, number: int, text: str | None) -> Job:
        """Read a record.

        Args:
            run_id, number: which job's it is.
            text: what the ledger holds; None: nothing.

        Raises:
            DamagedRecordError: it is no record. Nothing of it is to be relied on: what lacks its
                fingerprint would be deleted without a look.
        """
        fields = _fields(text or "")
        if fields is None:
            raise DamagedRecordError(text)
        return cls(
            run_id=run_id,
            number=number,
            project_id=fields["project"],
            pool_name=fields["pool"],
            display_name=fields["name"],
            created=fields["created"],
            fingerprint=fields["fingerprint"],
            chosen=fields["chosen"],
            check_nodes=fields["check_nodes"],
            state=JobState(fields["state"]),
            reason=fields["reason"],
            due_ms=fields["due"],
            blocked_ms=fields["blocked"],
            done_ms=fields["done"],
            attempts=tuple(Attempt(*packed) for packed in fields["attempts"]),
            nodes=fields["nodes"],
        )

    @classmethod
    def damaged(cls, run_id: str, number: int, state: JobState, error: DamagedRecordError) -> Job:
        """A job of which nothing can be read.

        Args:
            run_id, number: which one.
            state: the one that it is listed with.
            error: what is wrong with its record.
        """
        return cls(
            run_id=run_id,
            number=number,
            project_id="",
            pool_name="",
            display_name="",
            created="",
            fingerprint="",
            chosen="",
            check_nodes=False,
            state=state,
            reason=str(error),
            due_ms=0,
            blocked_ms=0,
            done_ms=0,
            attempts=(),
        )


_STATES = frozenset(JobState)
_ALWAYS = ("project", "pool", "name", "created", "fingerprint", "chosen", "state")
_PERHAPS = {"check_nodes": False, "reason": "", "due": 0, "blocked": 0, "done": 0, "attempts": []}
_FIELDS = (*_ALWAYS, *_PERHAPS)
_TYPES = [*(str for _ in _ALWAYS), *map(type, _PERHAPS.values())]
_ATTEMPT_TYPES = [int, int, int, str, str]


def _fields(text: str) -> dict[str, Any] | None:
    """The fields of a job's record, each of its type; None: it is none."""
    try:
        found = json.loads(text)
    except (ValueError, RecursionError):
        return None
    if type(found) is not dict:
        return None
    fields: dict[str, Any] = _PERHAPS | found
    if (
        list(map(type, map(fields.get, _FIELDS))) != _TYPES
        or fields["state"] not in _STATES
        or not all(
            type(attempt) is list and list(map(type, attempt)) == _ATTEMPT_TYPES
            for attempt in fields["attempts"]
        )
    ):
        return None
    nodes = fields.setdefault("nodes")
    if nodes is not None and not (
        type(nodes) is dict and all(type(count) is int for count in nodes.values())
    ):
        return None
    return fields


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

    @classmethod
    def parse(cls, text: str) -> Kept:
        """Read what is held; of what is damaged only that is said."""
        try:
            fields = json.loads(text)
        except (ValueError, RecursionError):
            fields = None
        if type(fields) is list and [type(each) for each in fields] == [str] * 4:
            return cls(*fields)
        return cls("", "", "", str(DamagedRecordError(text)))


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

    def told(self) -> dict[str, Any]:
        """What a log line says of it when it has ended: times in ms, as in the ledger."""
        return {
            "run_id": self.run_id,
            "state": self.state,
            "source": self.source,
            "policy": self.policy,
            "total": self.total,
            "counts": {state: count for state, count in self.counts.items() if count},
            "note": self.note,
            "started_ms": self.started_ms,
            "finished_ms": self.finished_ms,
        }

    @classmethod
    def parse(cls, run_id: str, fields: dict[str, str]) -> Run:
        """Read a run's hash.

        Raises:
            SchemaError: a newer version wrote it, or it is damaged.
        """
        written = fields.get(schema.FIELD)
        if written is not None and schema.is_newer(written):
            raise schema.SchemaError.of_run(run_id, written)
        try:
            return cls._parse(run_id, fields)
        except (KeyError, ValueError) as error:
            raise schema.DamagedRunError(run_id, error) from None

    @classmethod
    def _parse(cls, run_id: str, fields: dict[str, str]) -> Run:
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
