"""What an answer of the API means: pure.

Above all: a 404 is a success only if the API itself says "pool not found"; a gateway, a proxy or
a mistyped endpoint must never report a clean sweep.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass, field
from datetime import UTC
from email.utils import parsedate_to_datetime
from enum import Enum, StrEnum, auto
from typing import TYPE_CHECKING, Any, Final

import msgspec

if TYPE_CHECKING:
    from datetime import datetime

POOL_NOT_FOUND: Final = "ModelArts.50015001"
_GATEWAY: Final = ("APIG.", "APIGW.")
_CODE_LIMIT = 64
_MESSAGE_LIMIT = 300
_UNPRINTABLE = re.compile(
    r"[\x00-\x1f\x7f-\x9f"  # controls
    r"\u2028\u2029"  # line and paragraph separators
    r"\u202a-\u202e\u2066-\u2069"  # reorder the line on a screen
    r"\ud800-\udfff]+"  # half a character, which no encoding takes
)


class Body(StrEnum):
    """What an answer's body is."""

    EMPTY = "empty"
    OBJECT = "a JSON object"
    HTML = "an HTML page"
    OTHER = "no JSON object"


class Failure(StrEnum):
    """Why there is no answer."""

    CONNECT = "connect"
    TIMEOUT = "timeout"
    RESET = "reset"
    TLS = "tls"
    OVERSIZED = "oversized"
    INVALID = "invalid_answer"


@dataclass(frozen=True, slots=True)
class Answer:
    """What came back of one call.

    Attributes:
        method: the HTTP method of the call.
        status: the HTTP status; None: there was no answer, and `failure` says why.
        body: what the body was.
        error_code, error_msg: the API's own words, bounded and printable; empty if none.
        request_id: the cloud's id of the request; empty if none.
        retry_after_s: the header Retry-After in seconds from its arrival; None if none.
        failure: why there is no answer; None if there is one.
        detail: what the HTTP library says about a failure.
        duration_s: seconds from sending to the end.
        received_ms: the end, in ms since the epoch.
    """

    method: str
    status: int | None
    body: Body = Body.EMPTY
    error_code: str = ""
    error_msg: str = ""
    request_id: str = ""
    retry_after_s: float | None = None
    failure: Failure | None = None
    detail: str = ""
    duration_s: float = 0.0
    received_ms: int = 0


class VerdictKind(Enum):
    """What is to be done."""

    ACCEPTED = auto()
    ALREADY_DELETED = auto()
    FAILED = auto()
    RETRY = auto()
    RENEW = auto()


@dataclass(frozen=True, slots=True)
class Verdict:
    """What an answer to a DELETE means.

    Attributes:
        kind: what is to be done.
        reason: why, in one clear sentence.
        retry_after_s: how long the cloud asks to wait; None: it does not.
        throttled: whether the rate was too high.
    """

    kind: VerdictKind
    reason: str
    retry_after_s: float | None = None
    throttled: bool = False


class ApiError(RuntimeError):
    """A read that failed; its text is one sentence.

    Attributes:
        answer: what came back.
        verdict: what that means.
    """

    def __init__(self, what: str, answer: Answer, verdict: Verdict) -> None:
        super().__init__(f"{what}: {verdict.reason}.")
        self.answer = answer
        self.verdict = verdict

    @property
    def temporary(self) -> bool:
        """Whether it may succeed later."""
        return self.verdict.kind is VerdictKind.RETRY


def classify(answer: Answer) -> Verdict:
    """Weigh an answer to a DELETE.

    Args:
        answer: what came back.

    Returns:
        The verdict; its reason is never empty.

    Source: the API document, DELETE; RFC 9110 section 15 for statuses that it does not mention.
    """
    if answer.status is None:
        return _no_answer(answer)
    match answer.status:
        case 200 | 202 | 204 if answer.body is Body.EMPTY or _is_plain_object(answer):
            return Verdict(VerdictKind.ACCEPTED, "the cloud accepted the deletion")
        case 404 if answer.body is Body.OBJECT and answer.error_code == POOL_NOT_FOUND:
            return Verdict(VerdictKind.ALREADY_DELETED, "the cloud says: pool not found")
        case 401:
            return Verdict(VerdictKind.RENEW, _said(answer, "the credentials were refused"))
        case 409:
            return Verdict(VerdictKind.RETRY, _said(answer, "the pool is busy"))
        case 429:
            reason = _said(answer, "throttled")
            return Verdict(VerdictKind.RETRY, reason, answer.retry_after_s, throttled=True)
        case 408 | 425:
            return Verdict(VerdictKind.RETRY, _said(answer, "the call came too late or too early"))
        case status if 500 <= status <= 599:
            reason = _said(answer, "the cloud has a fault")
            return Verdict(VerdictKind.RETRY, reason, answer.retry_after_s)
        case _:
            return Verdict(VerdictKind.FAILED, _said(answer, _why_not(answer)))


def _is_plain_object(answer: Answer) -> bool:
    """Whether the body can be a pool. Some gateways say 200 to what they refuse."""
    return answer.body is Body.OBJECT and not answer.error_code and not answer.error_msg


def _no_answer(answer: Answer) -> Verdict:
    failure = answer.failure or Failure.INVALID
    what = {
        Failure.CONNECT: "no connection to the API",
        Failure.TIMEOUT: "no answer in time",
        Failure.RESET: "the connection was lost before the answer",
        Failure.TLS: "the API's TLS certificate was not accepted: check the endpoint, or a proxy",
        Failure.OVERSIZED: "the answer is larger than any the API gives: check the endpoint",
        Failure.INVALID: "the answer is not HTTP as it should be",
    }[failure]
    detail = f" ({answer.detail})" if answer.detail else ""
    kind = VerdictKind.FAILED if failure is Failure.TLS else VerdictKind.RETRY
    return Verdict(kind, what + detail)


def _why_not(answer: Answer) -> str:
    """The likely cause of an answer that no deletion should get."""
    status = answer.status or 0
    if 200 <= status <= 299:
        if answer.error_code or answer.error_msg:
            return "an error, whatever the status says: check the endpoint, or a proxy in between"
        if answer.body in {Body.EMPTY, Body.OBJECT}:
            return "a status that the API does not give: check the endpoint, or a proxy in between"
        return (
            f"the answer's body is {answer.body}, not the API's: a proxy or a login page in between"
        )
    if 300 <= status <= 399:
        return "the API does not redirect: check the endpoint, or a proxy in between"
    if status == 404:
        if answer.error_code.startswith(_GATEWAY):
            return "the gateway knows no such API: check the endpoint and its region"
        if answer.error_code:
            return "not the API's «pool not found»: check the endpoint and the project"
        return f"the body is {answer.body}, not the API's: check the endpoint, or a proxy"
    if status == 403:
        return "forbidden: check the permissions and that the credentials are for this project"
    return "the cloud refused"


def _said(answer: Answer, what: str) -> str:
    words = " ".join(word for word in (answer.error_code, answer.error_msg) if word)
    return f"HTTP {answer.status}: {what}" + (f" ({words})" if words else "")


def printable(text: Any, limit: int = _MESSAGE_LIMIT) -> str:
    """Text from outside, made fit for a log or a table: bounded, on one line; empty if no text."""
    if not isinstance(text, str):
        return ""
    return _UNPRINTABLE.sub(" ", text[: 2 * limit]).strip()[:limit].strip()


@dataclass(frozen=True, slots=True)
class ErrorBody:
    """What a body says of an error; texts are bounded and printable, empty if missing.

    Attributes:
        document: the object as parsed, if it is one.
    """

    body: Body
    error_code: str = ""
    error_msg: str = ""
    request_id: str = ""
    document: dict[str, Any] | None = field(default=None, repr=False, compare=False)


def parse_error_body(raw: bytes) -> ErrorBody:
    """Read a body as far as it says something about an error.

    Args:
        raw: the body, whatever it is.

    Source: the API document, errors: `error_code`, `error_msg`, and the gateway's `request_id`.
    """
    text = raw.strip()
    if not text:
        return ErrorBody(Body.EMPTY)
    if text.startswith(b"<"):
        return ErrorBody(Body.HTML)
    # Two codes in one object would be whichever the reader likes; counting is cheaper than looking.
    hook = _unrepeated if text.count(b'"error_code"') > 1 else None
    try:
        document = json.loads(text, object_pairs_hook=hook)
    except (ValueError, RecursionError):
        return ErrorBody(Body.OTHER)
    if not isinstance(document, dict):
        return ErrorBody(Body.OTHER)
    return ErrorBody(
        Body.OBJECT,
        _code(document.get("error_code")),
        printable(document.get("error_msg")),
        printable(document.get("request_id"), _CODE_LIMIT),
        document,
    )


def _unrepeated(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    document = dict(pairs)
    if len(document) < len(pairs):
        raise ValueError("a key is there twice")
    return document


class _Fields(msgspec.Struct):
    error_code: Any = None
    error_msg: Any = None
    request_id: Any = None


_fields = msgspec.json.Decoder(_Fields)
_USUAL = 4_096


def parse_accepted_body(raw: bytes) -> ErrorBody:
    """Read the body of a success as far as it says something about an error: not the document.

    Args:
        raw: the body, whatever it is.
    """
    try:
        # What is skipped is not looked at closely, so it must be short, and text.
        is_usual = len(raw) <= _USUAL and raw.count(b'"error_code"') <= 1
        fields = _fields.decode(raw.decode() if is_usual else b"")
    except (msgspec.DecodeError, RecursionError, UnicodeDecodeError):
        return parse_error_body(raw)
    return ErrorBody(
        Body.OBJECT,
        _code(fields.error_code),
        printable(fields.error_msg),
        printable(fields.request_id, _CODE_LIMIT),
    )


def _code(value: Any) -> str:
    """An error code. What had to be made printable is in quotes, so that it equals no code."""
    code = printable(value, _CODE_LIMIT)
    return code if not code or code == value else f"«{code}»"


def parse_retry_after(text: str | None, now: datetime) -> float | None:
    """The header Retry-After.

    Args:
        text: its value: seconds, or an HTTP date, in UTC whether it says so or not.
        now: an aware time.

    Returns:
        Seconds from now, never negative; None if there is none or it is unreadable.

    Source: RFC 9110 section 10.2.3.
    """
    text = (text or "").strip()
    if re.fullmatch(r"[0-9]{1,300}", text):  # longer ones are not finite as a float
        return float(text)
    try:
        moment = parsedate_to_datetime(text)
        wait_s = ((moment if moment.tzinfo else moment.replace(tzinfo=UTC)) - now).total_seconds()
    except (TypeError, ValueError, OverflowError):
        return None
    return max(0.0, wait_s)
