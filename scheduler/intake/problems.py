"""What the intake answers when it does not do what was asked: problem details (RFC 9457).

Every error of every kind has this one form, also those that come from below the routes.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, field
from http import HTTPStatus
from typing import TYPE_CHECKING, Final

from aiohttp import web
from redis.exceptions import RedisError

from scheduler.intake.desk import NotAllowedError
from scheduler.intake.request import RequestError
from scheduler.intake.requests import KeyReusedError
from worker.ledger import DamagedRunError, RunNotFoundError, SchemaError
from worker.modelarts.answers import printable

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from scheduler.intake.request import Fault

CONTENT_TYPE: Final = "application/problem+json"
PREFIX: Final = "urn:poolsweep:problem:"
RETRY_S: Final = 2
_DETAIL_LIMIT = 2_000


@dataclass(frozen=True, slots=True)
class Kind:
    """A kind of problem.

    Attributes:
        name: the last part of its type, which never changes.
        status: the HTTP status that it is answered with.
        title: the same for every problem of the kind.
    """

    name: str
    status: int
    title: str


BAD_REQUEST = Kind("bad-request", 400, "The request is not understood")
UNAUTHENTICATED = Kind("unauthenticated", 401, "A valid bearer token is needed")
FORBIDDEN = Kind("forbidden", 403, "The client may not do this")
NOT_FOUND = Kind("not-found", 404, "There is no such thing")
METHOD_NOT_ALLOWED = Kind("method-not-allowed", 405, "The method is not accepted here")
TOO_SLOW = Kind("too-slow", 408, "The request took too long to arrive")
RUN_ENDED = Kind("run-ended", 409, "The run has ended")
TOO_LARGE = Kind("too-large", 413, "The body is too large")
UNSUPPORTED = Kind("unsupported-media-type", 415, "The body is not of a form that is accepted")
EXPECTATION = Kind("expectation-failed", 417, "The expectation cannot be met")
INVALID = Kind("invalid-request", 422, "The request cannot be accepted")
KEY_REUSED = Kind("key-reused", 422, "The idempotency key was used for another request")
TOO_MANY = Kind("too-many-requests", 429, "The client asks too often")
TOO_MANY_STREAMS = Kind("too-many-streams", 429, "The client has too many event streams open")
CRASHED = Kind("internal-error", 500, "Something went wrong here")
UNAVAILABLE = Kind("unavailable", 503, "The service is not available for the moment")
NOT_READY = Kind("not-ready", 503, "The service takes no requests at present")

KINDS: Final = (
    BAD_REQUEST,
    UNAUTHENTICATED,
    FORBIDDEN,
    NOT_FOUND,
    METHOD_NOT_ALLOWED,
    TOO_SLOW,
    RUN_ENDED,
    TOO_LARGE,
    UNSUPPORTED,
    EXPECTATION,
    INVALID,
    KEY_REUSED,
    TOO_MANY,
    TOO_MANY_STREAMS,
    CRASHED,
    UNAVAILABLE,
    NOT_READY,
)
"""All that the routes answer with."""
_OF_STATUS = {kind.status: kind for kind in reversed(KINDS)}


@dataclass(frozen=True, slots=True)
class Problem:
    """One problem, as it is answered.

    Attributes:
        kind: what kind it is of.
        detail: what happened and what is accepted, in one line.
        faults: all that is wrong, each with a JSON pointer into the request's body.
        headers: what the answer's head says besides.
    """

    kind: Kind
    detail: str
    faults: Sequence[Fault] = ()
    headers: Mapping[str, str] = field(default_factory=dict)

    def response(self) -> web.Response:
        """The answer."""
        document: dict[str, object] = {
            "type": PREFIX + self.kind.name,
            "title": self.kind.title,
            "status": self.kind.status,
            "detail": printable(self.detail, _DETAIL_LIMIT),
        }
        if self.faults:
            document["errors"] = [
                {"pointer": fault.pointer, "detail": fault.detail} for fault in self.faults
            ]
        return web.Response(
            status=self.kind.status,
            body=json.dumps(document).encode(),
            content_type=CONTENT_TYPE,
            headers=self.headers,
        )


class ProblemError(Exception):
    """Ends the handling of a request with a problem.

    Attributes:
        problem: the problem.
    """

    def __init__(
        self, kind: Kind, detail: str, *, headers: Mapping[str, str] | None = None
    ) -> None:
        self.problem = Problem(kind, detail, headers=headers or {})
        super().__init__(detail)


def retry_after(wait_s: float) -> dict[str, str]:
    """The header that says when to come again (RFC 9110 section 10.2.3).

    Args:
        wait_s: seconds from now; rounded up, a second at least.
    """
    return {"Retry-After": str(max(1, math.ceil(wait_s)))}


def problem_of(error: BaseException) -> Problem | None:
    """The problem that an error means to who asked: pure. None: nobody foresaw it.

    Args:
        error: what ended the handling of a request.
    """
    match error:
        case ProblemError():
            return error.problem
        case web.HTTPException():
            return _of_http(error)
        case NotAllowedError():
            return Problem(FORBIDDEN, str(error), error.faults)
        case RequestError():
            return Problem(INVALID, str(error), error.faults)
        case KeyReusedError():
            return Problem(KEY_REUSED, str(error))
        case DamagedRunError():
            return None
        case SchemaError():
            detail = "a newer version decides here; the same request may be sent again"
            return Problem(UNAVAILABLE, detail, headers=retry_after(RETRY_S))
        case RunNotFoundError():
            return Problem(NOT_FOUND, "there is no such run, or it is another client's")
        case RedisError() | TimeoutError():
            # What Redis says names hosts and is of no use to who asked.
            detail = "the record of runs does not answer; the same request may be sent again"
            return Problem(UNAVAILABLE, detail, headers=retry_after(RETRY_S))
        case _:
            return None


def _of_http(error: web.HTTPException) -> Problem:
    """One that aiohttp raises; its text may hold what was sent, so it is not repeated."""
    phrase = HTTPStatus(error.status).phrase
    kind = _OF_STATUS.get(error.status) or Kind(
        phrase.lower().replace(" ", "-"), error.status, phrase
    )
    headers = {"Allow": error.headers["Allow"]} if "Allow" in error.headers else {}
    detail = {
        404: "there is nothing at this path; GET /v1/openapi.json lists what there is",
        405: f"accepted here: {', '.join(sorted(headers.get('Allow', '').split(',')))}",
        417: "accepted: Expect: 100-continue, or none",
    }.get(error.status, f"HTTP {error.status}: {phrase}")
    return Problem(kind, detail, headers=headers)


def crashed() -> Problem:
    """A problem for an error that nobody foresaw; it says nothing of it."""
    return Problem(CRASHED, "the request was not handled; the service's log says why")


def unreadable() -> Problem:
    """A problem for what is not HTTP; what was sent is not repeated."""
    return Problem(
        BAD_REQUEST, "the request is not HTTP/1.1 as RFC 9112 has it, or its head is too large"
    )
