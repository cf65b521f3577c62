"""What an HTTP request's head and body say: checked, and bounded in size and time."""

from __future__ import annotations

import asyncio
import re
from typing import TYPE_CHECKING, Final

from aiohttp import web

from scheduler.intake import openapi, problems
from scheduler.intake.desk import LONGEST_KEY
from scheduler.intake.problems import ProblemError
from scheduler.intake.request import LARGEST, NotJsonError, read_request
from worker.ledger import JobState
from worker.modelarts.answers import printable

if TYPE_CHECKING:
    from scheduler.intake.request import Request

_BEARER = re.compile(r"(?i:bearer) +([!-~]+)")
_CHALLENGE: Final = 'Bearer realm="poolsweep"'
_JSON = re.compile(r'(?i)application/json(?:\s*;\s*charset="?utf-8"?)?\s*')


def check_head(request: web.Request) -> None:
    """What every request must have.

    Raises:
        ProblemError: it has not.
    """
    hosts = request.headers.getall("Host", [])
    if len(hosts) > 1 or (not hosts and request.version >= (1, 1)):
        raise ProblemError(problems.BAD_REQUEST, "Host: exactly one is accepted (RFC 9112)")


async def expect_later(_: web.Request) -> None:
    """Says nothing yet to `Expect`: a body that is refused by its head need not be sent."""


def token_of(request: web.Request) -> str:
    """The bearer token of a request (RFC 6750 section 2.1).

    Raises:
        ProblemError: there is none, or more than one.
    """
    given = request.headers.getall("Authorization", [])
    match = _BEARER.fullmatch(given[0]) if len(given) == 1 else None
    if match is None:
        raise unauthenticated("accepted: one header `Authorization: Bearer <token>`", given=False)
    return match[1]


def unauthenticated(detail: str, *, given: bool) -> ProblemError:
    """Why nothing is answered.

    Args:
        detail: what is wrong with the token.
        given: whether there was one.
    """
    # RFC 6750 section 3.1: the error is named only to those who tried.
    challenge = _CHALLENGE + (', error="invalid_token"' if given else "")
    headers = {"WWW-Authenticate": challenge}
    return ProblemError(problems.UNAUTHENTICATED, detail, headers=headers)


def query_of(request: web.Request, *names: str) -> dict[str, str]:
    """The query's parameters by name.

    Args:
        request: the request.
        names: those that are accepted.

    Raises:
        ProblemError: there are others, or one is there twice.
    """
    found: dict[str, str] = {}
    for name, value in request.query.items():
        shown = printable(name, 40)
        if name not in names:
            accepted = ", ".join(names) or "none"
            raise ProblemError(
                problems.BAD_REQUEST, f"the parameter {shown!r} is not known; accepted: {accepted}"
            )
        if name in found:
            raise ProblemError(problems.BAD_REQUEST, f"the parameter {shown!r} is there twice")
        found[name] = value
    return found


def number(name: str, text: str, least: int, most: int) -> int:
    """A parameter that is a whole number.

    Raises:
        ProblemError: it is none, or out of its bounds.
    """
    if not re.fullmatch(r"[0-9]{1,9}", text, re.ASCII) or not least <= int(text) <= most:
        raise ProblemError(
            problems.BAD_REQUEST,
            f"{name}: {printable(text, 40)!r} is not accepted: a number from {least} to {most}",
        )
    return int(text)


def outcome_of(text: str | None) -> JobState | None:
    """The outcome that a parameter names; None: it is not there.

    Raises:
        ProblemError: there is no such outcome.
    """
    if text is None:
        return None
    if text not in set(JobState):
        raise ProblemError(
            problems.BAD_REQUEST,
            f"outcome: {printable(text, 40)!r} is not accepted: one of {', '.join(JobState)}",
        )
    return JobState(text)


def offset_of(cursor: str | None) -> int:
    """How many jobs lie before a page.

    Raises:
        ProblemError: the cursor is none of ours.
    """
    if cursor is None:
        return 0
    if not re.fullmatch(openapi.CURSOR, cursor, re.ASCII):
        raise ProblemError(
            problems.BAD_REQUEST,
            f"cursor: {printable(cursor, 40)!r} is not accepted: what `next` of a page says",
        )
    return int(cursor)


def idempotency_key(request: web.Request) -> str | None:
    """A request's idempotency key; None: it has none.

    Raises:
        ProblemError: it is not of the form that is accepted, or there are two.
    """
    given = request.headers.getall("Idempotency-Key", [])
    if not given:
        return None
    if len(given) > 1 or not re.fullmatch(openapi.KEY, given[0], re.ASCII):
        raise ProblemError(
            problems.BAD_REQUEST,
            f"Idempotency-Key: accepted: one of 1 to {LONGEST_KEY} visible ASCII characters",
        )
    return given[0]


def check_body_form(request: web.Request) -> None:
    """By the head alone.

    Raises:
        ProblemError: the body is not of a form that is accepted.
    """
    if not _JSON.fullmatch(request.headers.get("Content-Type", "")):
        raise ProblemError(problems.UNSUPPORTED, "Content-Type: accepted: application/json")
    if "Content-Encoding" in request.headers:
        raise ProblemError(problems.UNSUPPORTED, "Content-Encoding: none is accepted")
    if (request.content_length or 0) > LARGEST:
        raise _too_large()
    expected = request.headers.getall("Expect", [])
    if expected and [each.lower() for each in expected] != ["100-continue"]:
        raise ProblemError(problems.EXPECTATION, "accepted: Expect: 100-continue, or none")


async def body_of(request: web.Request, within_s: float) -> bytes:
    """A request's body.

    Args:
        request: the request; `check_body_form` has seen its head.
        within_s: seconds in which all of it must be there.

    Raises:
        ProblemError: it is too large or too slow, or breaks off.
    """
    if "Expect" in request.headers and request.version >= (1, 1):
        await request.writer.write(b"HTTP/1.1 100 Continue\r\n\r\n")
        request.writer.output_size = 0  # what was said so far is no part of the answer
    body = bytearray()
    try:
        async with asyncio.timeout(within_s):
            async for chunk in request.content.iter_any():
                body += chunk
                if len(body) > LARGEST:
                    raise _too_large()
    except TimeoutError:
        raise ProblemError(
            problems.TOO_SLOW,
            f"the body was not there within {within_s:g} s",
            headers={"Connection": "close"},
        ) from None
    except web.RequestPayloadError:
        raise ProblemError(problems.BAD_REQUEST, "the body ended early, or is not framed") from None
    return bytes(body)


def read(body: bytes) -> Request:
    """What a body asks for.

    Raises:
        ProblemError: it is not JSON.
        RequestError: it is, but asks for nothing that can be done.
    """
    try:
        return read_request(body)
    except NotJsonError:
        raise ProblemError(
            problems.BAD_REQUEST, "the body is not JSON (RFC 8259) in UTF-8"
        ) from None


def _too_large() -> ProblemError:
    return ProblemError(problems.TOO_LARGE, f"no more than {LARGEST} bytes are accepted")
