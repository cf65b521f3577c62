"""The OpenAPI 3.1 document of the intake's HTTP API, made from what reads and writes its bodies.

The models here describe the records of `scheduler.review.records`, field by field.
"""

from __future__ import annotations

from datetime import timedelta
from functools import cache
from importlib.metadata import version
from typing import Annotated, Any, Final, Literal

from pydantic import AwareDatetime, BaseModel, ConfigDict, Field
from pydantic.json_schema import GenerateJsonSchema, models_json_schema

from scheduler.durations import format_duration
from scheduler.intake import problems
from scheduler.intake.desk import LONGEST_KEY
from scheduler.intake.request import LARGEST, MOST_POOLS, Request
from worker.ledger import JobState, RunState, Source

OPENAPI: Final = "3.1.1"
RUN_ID: Final = "^[0-9]{8}-[0-9]{6}-[0-9a-f]{10}$"
"""The form of a run's id, as `new_run_id` gives it."""
KEY: Final = f"^[!-~]{{1,{LONGEST_KEY}}}$"
"""The form of an idempotency key: visible ASCII."""
CURSOR: Final = "^[0-9]{1,8}$"
MOST_JOBS: Final = 1_000
JOBS: Final = 100


class _Part(BaseModel):
    # Every field is always there, so that a client need not ask.
    model_config = ConfigDict(extra="forbid")


Count = Annotated[int, Field(ge=0)]
Moment = AwareDatetime | None


class Accepted(_Part):
    """A request that was accepted: nothing loses it any more."""

    run_id: Annotated[str, Field(pattern=RUN_ID)]
    url: str = Field(description="Where its run is seen, relative to this API.")
    state: Literal["queued"] = Field(description="The state in which a run begins.")


class Links(_Part):
    """Where more of a run is found, relative to this API."""

    self: str
    jobs: str
    events: str
    cancel: str | None = Field(description="Null once the run has ended.")


class Run(_Part):
    """A run. Times are null as long as they have not come."""

    run_id: Annotated[str, Field(pattern=RUN_ID)]
    source: Source
    policy: str | None
    client: str | None
    selector: dict[str, Any] | None = Field(
        description="By project, what its pools were chosen by; null: by name."
    )
    projects: list[str]
    requester: str
    reason: str
    endpoint: str
    state: RunState = Field(
        description="queued: waits to be planned. creating: its jobs are written down. running. "
        "finished: every job has ended. planned: a dry run, nothing was deleted. braked: a brake "
        "held it, nothing was deleted. aborted: cancelled or given up before it began. `note` "
        "says why."
    )
    verify: bool
    total: Count = Field(description="Jobs, one for each pool; 0 until it is planned.")
    done: Count = Field(description="Jobs that have ended.")
    counts: dict[JobState, Count] = Field(description="Jobs by outcome; 0 is left out.")
    created_at: Moment
    planned_at: Moment
    started_at: Moment
    finished_at: Moment
    cancelled_at: Moment
    braked_at: Moment
    note: str
    links: Links


class Attempt(_Part):
    """One DELETE call."""

    at: Moment
    duration_ms: Count
    status: int | None = Field(description="The HTTP status; null: there was no answer.")
    error_code: str | None
    request_id: str | None


class Job(_Part):
    """One pool of a run."""

    job_id: str
    project_id: str
    pool_name: str = Field(description="The pool's id (metadata.name).")
    name: str = Field(description="The name that its user gave it.")
    outcome: JobState
    reason: str
    chosen: str = Field(description="Why it was chosen.")
    pool_created_at: str | None
    attempts: list[Attempt]
    due_at: Moment
    ended_at: Moment


class Jobs(_Part):
    """A page of a run's jobs."""

    jobs: list[Job] = Field(max_length=MOST_JOBS)
    next: str = Field(
        default="", description="The next page, relative to this API; not there at the end."
    )


class Event(_Part):
    """One event of a run's stream."""

    event: Literal["progress", "end"]
    id: str
    data: str = Field(
        json_schema_extra={
            "contentMediaType": "application/json",
            "contentSchema": {"$ref": "#/components/schemas/Run"},
        }
    )


class Health(_Part):
    """The process lives, or takes requests."""

    status: Literal["ok"]


class Fault(_Part):
    """Something that is wrong with a body."""

    pointer: str = Field(description="Where, as a JSON pointer (RFC 6901); empty: the whole.")
    detail: str


class Problem(_Part):
    """Problem details (RFC 9457)."""

    type: str = Field(
        json_schema_extra={"enum": [problems.PREFIX + kind.name for kind in problems.KINDS]}
    )
    title: str
    status: Annotated[int, Field(ge=400, le=599)]
    detail: str
    errors: list[Fault] = Field(default=[], description="All that is wrong with the body.")


_BODIES: tuple[type[BaseModel], ...] = (Request, Accepted, Run, Jobs, Event, Health, Problem)

_IN_WORDS: Final = {
    ("UtilisationOptions", "over"): "From 1h to 30d.",
    ("TtlOptions", "default"): "Longer than nothing.",
    ("Request", "targets"): f"No project twice, and no more than {MOST_POOLS} pools in all.",
}
"""What no JSON Schema can tell."""
# A JSON Schema cannot be had of these rules from the models, which check them by code.
_EXACTLY_ONE_OF: Final[dict[str, tuple[tuple[str, str], ...]]] = {
    "Target": (("pools", "array"), ("selector", "object")),
    "NameOptions": (("glob", "string"), ("regex", "string")),
}
_ONE_AT_MOST_OF: Final[dict[str, tuple[str, ...]]] = {
    "TagOptions": ("exists", "equals", "one_of", "glob")
}
_SOME_OF: Final[dict[str, tuple[str, ...]]] = {"DriverOptions": ("gpu", "npu")}


class _AsWritten(GenerateJsonSchema):
    def encode_default(self, dft: Any) -> Any:
        return format_duration(dft) if isinstance(dft, timedelta) else super().encode_default(dft)


@cache
def document() -> dict[str, Any]:
    """The document; not to be changed."""
    return {
        "openapi": OPENAPI,
        "info": {
            "title": "poolsweep intake",
            "version": version("poolsweep"),
            "summary": "Bulk deletion of ModelArts resource pools, for other systems.",
            "description": "Paths in answers are relative to this API. Parameters that are not "
            "listed, or are there twice, are refused.",
        },
        "paths": _paths(),
        "components": {
            "schemas": _schemas(),
            "securitySchemes": {"token": {"type": "http", "scheme": "bearer"}},
        },
        "security": [{"token": []}],
    }


def _schemas() -> dict[str, Any]:
    _, schema = models_json_schema(
        [(body, "validation") for body in _BODIES],
        by_alias=True,
        ref_template="#/components/schemas/{model}",
        schema_generator=_AsWritten,
    )
    found: dict[str, Any] = schema["$defs"]
    for name, choices in _EXACTLY_ONE_OF.items():
        found[name]["oneOf"] = [
            {
                "required": [chosen],
                "properties": {
                    chosen: {"type": kind},
                    **{other: {"type": "null"} for other, _ in choices if other != chosen},
                },
            }
            for chosen, kind in choices
        ]
    for name, fields in _ONE_AT_MOST_OF.items():
        found[name]["anyOf"] = [
            {"properties": {other: {"type": "null"} for other in fields if other != chosen}}
            for chosen in fields
        ]
    for name, fields in _SOME_OF.items():
        found[name]["anyOf"] = [
            {"required": [chosen], "properties": {chosen: {"type": "string"}}} for chosen in fields
        ]
    for (name, part), words in _IN_WORDS.items():
        described = found[name]["properties"][part]
        described["description"] = f"{described.get('description', '')} {words}".strip()
    return found


def _paths() -> dict[str, Any]:
    run_id = _parameter("run_id", "path", {"type": "string", "pattern": RUN_ID}, required=True)
    return {
        "/v1/runs": {
            "post": {
                "operationId": "createRun",
                "summary": "Ask for pools to be deleted",
                "description": "Answered only once nothing loses the request any more. The same "
                "request with the same Idempotency-Key gets the same run for 24 hours, also when "
                "two race; without a key every request is another. Counts against the client's "
                f"request rate. No more than {LARGEST} bytes are accepted.",
                "parameters": [
                    _parameter(
                        "Idempotency-Key",
                        "header",
                        {"type": "string", "pattern": KEY},
                        "Chosen by the client, for this request alone.",
                    )
                ],
                "requestBody": {
                    "required": True,
                    "content": {"application/json": {"schema": _ref("Request")}},
                },
                "responses": {
                    "202": _answer(
                        "Accepted: the run waits to be planned.",
                        "Accepted",
                        headers={"Location": {"type": "string", "pattern": "^/v1/runs/"}},
                        links={
                            "run": _link("getRun", "$response.body#/run_id"),
                            "jobs": _link("listJobs", "$response.body#/run_id"),
                            "cancel": _link("cancelRun", "$response.body#/run_id"),
                            "events": _link("watchRun", "$response.body#/run_id"),
                        },
                    ),
                    **_problems(400, 401, 403, 408, 413, 415, 417, 422, 429, 500, 503),
                },
            }
        },
        "/v1/runs/{run_id}": {
            "parameters": [run_id],
            "get": {
                "operationId": "getRun",
                "summary": "See a run",
                "description": "Only the client's own runs are there.",
                "responses": {
                    "200": _answer("The run.", "Run"),
                    **_problems(400, 401, 403, 404, 500, 503),
                },
            },
        },
        "/v1/runs/{run_id}/jobs": {
            "parameters": [run_id],
            "get": {
                "operationId": "listJobs",
                "summary": "List a run's jobs, page by page",
                "description": "Empty until the run is planned. Without `outcome`, by number: "
                "every job once. With a final outcome, in the order in which they ended: what "
                "ends while the pages are read comes last. With another outcome jobs move on "
                "between two pages, and some may be passed over.",
                "parameters": [
                    _parameter(
                        "outcome", "query", {"type": "string", "enum": [str(o) for o in JobState]}
                    ),
                    _parameter(
                        "limit",
                        "query",
                        {"type": "integer", "minimum": 1, "maximum": MOST_JOBS, "default": JOBS},
                    ),
                    _parameter(
                        "cursor",
                        "query",
                        {"type": "string", "pattern": CURSOR},
                        "From `next`; not to be made up.",
                    ),
                ],
                "responses": {
                    "200": _answer("A page of jobs.", "Jobs"),
                    **_problems(400, 401, 403, 404, 500, 503),
                },
            },
        },
        "/v1/runs/{run_id}/cancel": {
            "parameters": [run_id],
            "post": {
                "operationId": "cancelRun",
                "summary": "Cancel what a run has not called yet",
                "description": "What is being deleted is not stopped. Doing it again changes "
                "nothing. Counts against the client's request rate.",
                "responses": {
                    "202": _answer("The run, which ends soon.", "Run"),
                    **_problems(400, 401, 403, 404, 409, 429, 500, 503),
                },
            },
        },
        "/v1/runs/{run_id}/events": {
            "parameters": [run_id],
            "get": {
                "operationId": "watchRun",
                "summary": "Watch a run",
                "description": "Server-sent events: `progress` with the run whenever it has "
                "changed, `end` with the run once it has ended, and then the stream closes. A "
                "stream can be taken up with Last-Event-ID.",
                "parameters": [
                    _parameter(
                        "Last-Event-ID",
                        "header",
                        {"type": "string"},
                        "The last event that was received: it is not sent again.",
                    )
                ],
                "responses": {
                    "200": {
                        "description": "The events, one after the other. Lines that begin with "
                        "a colon say only that the stream lives.",
                        "content": {"text/event-stream": {"schema": _ref("Event")}},
                    },
                    "204": {"description": "The run's end was received: there is no more."},
                    **_problems(400, 401, 403, 404, 429, 500, 503),
                },
            },
        },
        "/v1/openapi.json": {
            "get": {
                "operationId": "describe",
                "summary": "This document",
                "security": [],
                "responses": {
                    "200": {
                        "description": "This document.",
                        "content": {"application/json": {"schema": {"type": "object"}}},
                    },
                    **_problems(400, 500),
                },
            }
        },
        "/healthz": {
            "get": {
                "operationId": "isAlive",
                "summary": "Whether the process lives",
                "security": [],
                "responses": {"200": _answer("It lives.", "Health"), **_problems(400, 500)},
            }
        },
        "/readyz": {
            "get": {
                "operationId": "isReady",
                "summary": "Whether the process takes requests",
                "security": [],
                "responses": {"200": _answer("It does.", "Health"), **_problems(400, 500, 503)},
            }
        },
    }


def _ref(name: str) -> dict[str, str]:
    return {"$ref": f"#/components/schemas/{name}"}


def _parameter(
    name: str, where: str, schema: dict[str, Any], description: str = "", *, required: bool = False
) -> dict[str, Any]:
    said = {"description": description} if description else {}
    return {"name": name, "in": where, "required": required, "schema": schema, **said}


def _answer(
    description: str,
    body: str,
    *,
    headers: dict[str, dict[str, Any]] | None = None,
    links: dict[str, Any] | None = None,
) -> dict[str, Any]:
    return {
        "description": description,
        "content": {"application/json": {"schema": _ref(body)}},
        **({"headers": _headers(headers)} if headers else {}),
        **({"links": links} if links else {}),
    }


def _headers(schemas: dict[str, dict[str, Any]]) -> dict[str, Any]:
    return {name: {"required": True, "schema": schema} for name, schema in schemas.items()}


def _link(operation: str, run_id: str) -> dict[str, Any]:
    return {"operationId": operation, "parameters": {"run_id": run_id}}


def _problems(*statuses: int) -> dict[str, Any]:
    heads: dict[int, dict[str, dict[str, Any]]] = {
        401: {"WWW-Authenticate": {"type": "string", "pattern": "^Bearer"}},
        429: {"Retry-After": {"type": "integer", "minimum": 1}},
        503: {"Retry-After": {"type": "integer", "minimum": 1}},
    }
    found = {}
    for status in statuses:
        kinds = [kind for kind in problems.KINDS if kind.status == status]
        found[str(status)] = {
            "description": "; or ".join(f"{kind.title} ({kind.name})" for kind in kinds) + ".",
            "content": {problems.CONTENT_TYPE: {"schema": _ref("Problem")}},
            **({"headers": _headers(heads[status])} if status in heads else {}),
        }
    return found
