"""What each answer of the API means, over every status and any body."""

from __future__ import annotations

import json
import unicodedata
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from tests.modelarts.pool_documents import HALVES_TOO, json_values
from worker.modelarts import Answer, Body, Failure, Verdict, VerdictKind, classify
from worker.modelarts.answers import (
    ErrorBody,
    parse_accepted_body,
    parse_error_body,
    parse_retry_after,
    printable,
)

NOT_FOUND = "ModelArts.50015001"
EVERY_STATUS = range(100, 600)
LONGEST_REASON = 600
NOW = datetime(2026, 1, 2, 3, 4, 5, tzinfo=UTC)

patient = settings(deadline=None)


def body(code: Any, message: Any = "pool not found") -> bytes:
    return json.dumps({"error_code": code, "error_msg": message}).encode()


def verdict(status: int, raw: bytes, retry_after_s: float | None = None) -> Verdict:
    """What an answer to a DELETE means, from its bytes on."""
    return weigh(status, parse_error_body(raw), retry_after_s)


def weigh(status: int, said: ErrorBody, retry_after_s: float | None = None) -> Verdict:
    return classify(
        Answer(
            method="DELETE",
            status=status,
            body=said.body,
            error_code=said.error_code,
            error_msg=said.error_msg,
            request_id=said.request_id,
            retry_after_s=retry_after_s,
        )
    )


def said_object(raw: bytes) -> dict[str, Any] | None:
    """The JSON object that a body is, by the plainest of readings."""
    try:
        document = json.loads(raw.strip())
    except (ValueError, RecursionError):
        return None
    return document if isinstance(document, dict) else None


def assert_presentable(text: str) -> None:
    """One line, not empty, bounded, and nothing in it that a terminal or a file chokes on."""
    assert text.strip()
    assert len(text) <= LONGEST_REASON
    assert text.splitlines() == [text]
    if not text.isprintable():
        assert not {unicodedata.category(char) for char in text} & {"Cc", "Cs", "Zl", "Zp"}


# The table, by example

FAILED, RETRY, RENEW = VerdictKind.FAILED, VerdictKind.RETRY, VerdictKind.RENEW
ACCEPTED, ALREADY_DELETED = VerdictKind.ACCEPTED, VerdictKind.ALREADY_DELETED
POOL = b'{"kind": "Pool", "metadata": {"name": "p"}, "status": {"phase": "Running"}}'
HTML = b"<!DOCTYPE html><html><body>404 Not Found</body></html>"
GATEWAY = body("APIG.0101", "The API does not exist or has not been published")


@pytest.mark.parametrize(
    ("status", "raw", "kind", "words"),
    [
        (200, POOL, ACCEPTED, "accepted"),
        (200, b"{}", ACCEPTED, "accepted"),
        (202, b"", ACCEPTED, "accepted"),
        (204, b"", ACCEPTED, "accepted"),
        (204, b" \r\n", ACCEPTED, "accepted"),
        (200, HTML, FAILED, "proxy or a login page"),
        (200, b"OK", FAILED, "proxy or a login page"),
        (200, b"[]", FAILED, "proxy or a login page"),
        (200, b"null", FAILED, "proxy or a login page"),
        (200, body("APIG.0301", "Incorrect IAM authentication"), FAILED, "APIG.0301"),
        (200, b'{"error_msg": "no"}', FAILED, "an error, whatever the status says"),
        (201, POOL, FAILED, "a status that the API does not give"),
        (206, b"", FAILED, "a status that the API does not give"),
        (301, b"", FAILED, "does not redirect: check the endpoint"),
        (302, HTML, FAILED, "does not redirect: check the endpoint"),
        (304, b"", FAILED, "does not redirect: check the endpoint"),
        (404, body(NOT_FOUND), ALREADY_DELETED, "pool not found"),
        (404, b'\xef\xbb\xbf{"error_code": "ModelArts.50015001"}', ALREADY_DELETED, "not found"),
        (404, GATEWAY, FAILED, "the gateway knows no such API: check the endpoint"),
        (404, body("APIGW.0101"), FAILED, "the gateway knows no such API: check the endpoint"),
        (404, body("ModelArts.50015002"), FAILED, "check the endpoint and the project"),
        (404, body("modelarts.50015001"), FAILED, "check the endpoint and the project"),
        (404, body(NOT_FOUND + "0"), FAILED, "check the endpoint and the project"),
        (404, body(NOT_FOUND + " "), FAILED, "check the endpoint and the project"),
        (404, body(NOT_FOUND + "\n" * 200 + "no"), FAILED, "check the endpoint and the project"),
        (404, body([NOT_FOUND]), FAILED, "check the endpoint"),
        (404, body(None), FAILED, "check the endpoint"),
        (404, b"", FAILED, "the body is empty, not the API's: check the endpoint"),
        (404, b"{}", FAILED, "check the endpoint"),
        (404, b"[" + body(NOT_FOUND) + b"]", FAILED, "check the endpoint"),
        (404, b'"ModelArts.50015001"', FAILED, "check the endpoint"),
        (404, b"ModelArts.50015001 pool not found", FAILED, "check the endpoint"),
        (404, b"<p>" + body(NOT_FOUND) + b"</p>", FAILED, "an HTML page, not the API's"),
        (404, body(NOT_FOUND)[:-1], FAILED, "check the endpoint"),
        (410, body(NOT_FOUND), FAILED, "refused"),
        (500, body(NOT_FOUND), RETRY, "the cloud has a fault"),
        (401, body("APIG.0307", "The token must be updated"), RENEW, "APIG.0307 The token must"),
        (401, HTML, RENEW, "credentials"),
        (403, body("ModelArts.0003", "No permission"), FAILED, "ModelArts.0003 No permission"),
        (403, b"", FAILED, "check the permissions"),
        (400, body("ModelArts.0104", "Bad request"), FAILED, "ModelArts.0104 Bad request"),
        (405, b"", FAILED, "HTTP 405"),
        (408, b"", RETRY, "HTTP 408"),
        (409, body("ModelArts.50015004", "scaling"), RETRY, "busy (ModelArts.50015004 scaling)"),
        (425, b"", RETRY, "HTTP 425"),
        (429, body("APIG.0308", "Throttled"), RETRY, "throttled (APIG.0308 Throttled)"),
        (500, b"", RETRY, "HTTP 500"),
        (502, HTML, RETRY, "HTTP 502"),
        (503, b"", RETRY, "HTTP 503"),
        (504, b"", RETRY, "HTTP 504"),
        (599, b"", RETRY, "HTTP 599"),
        (100, b"", FAILED, "HTTP 100"),
        (999, b"", FAILED, "HTTP 999"),
    ],
)
def test_an_answer_means(status: int, raw: bytes, kind: VerdictKind, words: str) -> None:
    found = verdict(status, raw)
    assert (found.kind, found.throttled) == (kind, status == 429)
    assert words in found.reason
    assert_presentable(found.reason)


# The table, over everything

objects_with_code = st.builds(
    body,
    st.sampled_from([NOT_FOUND, NOT_FOUND.upper(), NOT_FOUND + " ", "APIG.0101", "APIGW.0301", ""])
    | st.text(HALVES_TOO, max_size=80)
    | json_values(),
    st.text(HALVES_TOO, max_size=400) | json_values(),
)
bodies = (
    st.binary(max_size=40)
    | st.sampled_from([b"", b" \t\r\n", HTML, POOL, GATEWAY, b"{", b"\xff\xfe", b"\x00"])
    | json_values(HALVES_TOO).map(lambda value: json.dumps(value).encode())
    | objects_with_code
    | objects_with_code.map(lambda raw: raw[:-1])
    | objects_with_code.map(lambda raw: raw.replace(b'"error', b'"\xff\xfe', 1))
    | objects_with_code.map(lambda raw: raw.decode().encode("utf-16"))
)


def expected_kinds(raw: bytes) -> dict[int, VerdictKind]:
    """The table."""
    document = said_object(raw)
    words = [document.get("error_code"), document.get("error_msg")] if document is not None else []
    says_error = any(isinstance(word, str) and printable(word) for word in words)
    kinds = dict.fromkeys(EVERY_STATUS, FAILED)
    if not raw.strip() or (document is not None and not says_error):
        kinds |= dict.fromkeys((200, 202, 204), ACCEPTED)
    if document is not None and document.get("error_code") == NOT_FOUND:
        kinds[404] = ALREADY_DELETED
    kinds[401] = RENEW
    return kinds | dict.fromkeys((408, 409, 425, 429, *range(500, 600)), RETRY)


@patient
@given(bodies)
@example(b"[" * 100_000)
@example(b'{"a":' * 50_000)
@example(b'{"error_code": ' + b"9" * 5_000 + b"}")
@example(b'{"error_code": "\xff"}')
@example(b'{"error_code": "\\ud800", "error_msg": "\\u202e\\u0000\\u2028\\n"}')
@example(body("E" * 10_000, "m\n" * 10_000))
@example(body(NOT_FOUND + "\x00"))
@example(body("\u2028" + NOT_FOUND))
@example(body("\x1f"))
def test_every_status_with_any_body_means_what_the_table_says(raw: bytes) -> None:
    said = parse_error_body(raw)
    for status, kind in expected_kinds(raw).items():
        found = weigh(status, said)
        assert found.kind is kind, status
        assert found.throttled is (status == 429)
        assert found.retry_after_s is None
        assert_presentable(found.reason)


@patient
@given(bodies)
def test_a_404_that_is_no_success_names_its_likely_cause(raw: bytes) -> None:
    found = verdict(404, raw)
    assert found.kind is ALREADY_DELETED or "check the endpoint" in found.reason


@patient
@given(st.floats(0, 1e12))
def test_a_wait_that_the_cloud_asks_for_is_passed_on(wait_s: float) -> None:
    for status in (429, 500, 502, 503, 504):
        assert verdict(status, b"", wait_s).retry_after_s == wait_s
    for status in (200, 404, 400, 401, 403):
        assert verdict(status, b"", wait_s).retry_after_s is None


@patient
@given(st.sampled_from(Failure), st.text(HALVES_TOO))
def test_no_answer_is_retried_unless_the_certificate_is_wrong(failure: Failure, text: str) -> None:
    found = classify(Answer("DELETE", None, failure=failure, detail=printable(text)))
    assert found.kind is (FAILED if failure is Failure.TLS else RETRY)
    assert not found.throttled
    assert_presentable(found.reason)
    assert printable(text) in found.reason


def test_no_answer_without_a_failure_is_retried() -> None:
    assert classify(Answer("DELETE", None)).kind is RETRY


def test_a_body_that_names_success_is_none_without_its_status() -> None:
    # An answer that was cut off after its status has no status here, and is no success.
    answer = Answer("DELETE", None, Body.OBJECT, NOT_FOUND, failure=Failure.RESET)
    assert classify(answer).kind is RETRY


# Texts from outside


@patient
@given(st.text(HALVES_TOO, max_size=1_000), st.integers(1, 300))
def test_printable_text_is_one_bounded_line(text: str, limit: int) -> None:
    found = printable(text, limit)
    assert len(found) <= limit
    assert found == found.strip()
    if found:
        assert_presentable(found)
    assert printable(found, limit) == found


@pytest.mark.parametrize("value", [None, 7, True, b"bytes", ["text"], {"a": "b"}])
def test_what_is_no_text_is_printed_as_none(value: Any) -> None:
    assert printable(value) == ""


def test_printable_text_keeps_the_words() -> None:
    assert (
        printable("  Bad\r\nrequest: «pool» übel 池\x1b[31m ") == "Bad request: «pool» übel 池 [31m"
    )
    assert printable("safe\u202eevil\u2066") == "safe evil"
    assert printable("one\u2028two\u2029three\x85four\ud800") == "one two three four"


@patient
@given(bodies)
def test_what_an_error_body_says_is_bounded_and_printable(raw: bytes) -> None:
    said = parse_error_body(raw)
    for text, limit in ((said.error_code, 66), (said.error_msg, 300), (said.request_id, 64)):
        assert len(text) <= limit
        if text:
            assert_presentable(text)
    assert said.body is Body.OBJECT or not (said.error_code or said.error_msg or said.request_id)


fields = st.dictionaries(
    st.sampled_from(["error_code", "error_msg", "request_id", "kind"]), json_values(HALVES_TOO)
)


@patient
@given(st.binary() | (fields | json_values(HALVES_TOO)).map(lambda each: json.dumps(each).encode()))
@example(b"")
@example(b"<html>")
@example(b"[" * 100_000)
def test_of_a_success_as_much_is_read_as_of_an_error(raw: bytes) -> None:
    assert parse_accepted_body(raw) == parse_error_body(raw)


@pytest.mark.parametrize(
    "text",
    [
        '{"error_code": "APIG.0101", "error_code": "%s"}',
        '{"error_code": "%s", "error_msg": "no", "error_code": "APIG.0101"}',
        '{"a": {"error_code": 1, "error_code": 2}, "error_code": "%s"}',
    ],
)
def test_two_codes_in_one_object_are_no_code(text: str) -> None:
    found = verdict(404, (text % NOT_FOUND).encode())
    assert found.kind is VerdictKind.FAILED


def test_the_code_of_a_detail_is_not_in_the_way() -> None:
    raw = json.dumps({"details": [{"error_code": "x"}], "error_code": NOT_FOUND}).encode()
    assert verdict(404, raw).kind is VerdictKind.ALREADY_DELETED


def test_the_gateways_request_id_is_read() -> None:
    raw = b'{"error_code": "APIG.0101", "error_msg": "m", "request_id": "abc\\n123"}'
    assert parse_error_body(raw).request_id == "abc 123"


# Retry-After


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        ("0", 0),
        ("120", 120),
        (" 120 ", 120),
        ("0120", 120),
        ("99999999999", 99_999_999_999),
        ("Fri, 02 Jan 2026 03:05:05 GMT", 60),
        ("Fri, 02 Jan 2026 03:05:05 +0000", 60),
        ("Fri, 02 Jan 2026 04:05:05 +0100", 60),
        ("Fri, 02 Jan 2026 03:05:05 -0000", 60),
        ("Fri, 02 Jan 2026 03:05:05", 60),
        ("Friday, 02-Jan-26 03:05:05 GMT", 60),
        ("Fri Jan  2 03:05:05 2026", 60),
        ("Fri, 02 Jan 2026 03:03:05 GMT", 0),
        ("Thu, 01 Jan 1970 00:00:00 GMT", 0),
        ("-5", None),
        ("+5", None),
        ("1.5", None),
        ("1e3", None),
        ("٣", None),
        ("soon", None),
        ("", None),
        (None, None),
        ("9" * 5_000, None),
        ("Fri, 99 Jan 2026 03:05:05 GMT", None),
        ("Fri, 02 Jan 2026 25:61:61 GMT", None),
        ("Fri, 02 Jan 99999 03:05:05 GMT", None),
        ("Fri, 02 Jan 2026 03:05:05 +9999", None),
    ],
)
def test_retry_after_is(text: str | None, seconds: float | None) -> None:
    assert parse_retry_after(text, NOW) == seconds


@patient
@given(st.integers(-10_000_000, 10_000_000))
def test_retry_after_as_a_date_is_the_seconds_until_then(seconds: int) -> None:
    text = format_datetime(NOW + timedelta(seconds=seconds), usegmt=True)
    assert parse_retry_after(text, NOW) == max(0, seconds)
    assert parse_retry_after(text.removesuffix(" GMT"), NOW) == max(0, seconds)


words = st.sampled_from(
    ["Fri", ",", " ", "02", "Jan", "2026", "03:05:05", "GMT", "+0100", "-9999", "0", "99", ":", "-"]
)


@patient
@given(st.text(HALVES_TOO, max_size=40) | st.lists(words | st.text(max_size=3)).map("".join))
def test_retry_after_never_raises_and_is_never_negative(text: str) -> None:
    found = parse_retry_after(text, NOW)
    assert found is None or 0 <= found < float("inf")
