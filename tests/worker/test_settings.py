"""Settings: what is not accepted is named in a sentence, and a worker does not start with it."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

import pytest
from hypothesis import given
from hypothesis import strategies as st
from kombu.connection import Connection
from pydantic import SecretStr
from redis import ConnectionPool

from worker.modelarts import AccessKey, IamUser, Token
from worker.settings import ENV_PREFIX, Settings, SettingsError, load_settings

if TYPE_CHECKING:
    from pathlib import Path

    from tests.worker.conftest import Workers

BAD = [
    ("IN_FLIGHT", "zero", "valid integer"),
    ("IN_FLIGHT", "0", "greater than or equal to 1"),
    ("IN_FLIGHT", "5001", "less than or equal to 5000"),
    ("IN_FLIGHT", "1.5", "valid integer"),
    ("BATCH_SIZE", "-1", "greater than or equal to 1"),
    ("BATCH_SIZE", "1001", "less than or equal to 1000"),
    ("BATCH_MAX_S", "0", "greater than 0"),
    ("BATCH_MAX_S", "nan", "finite number"),
    ("WORKER_BATCHES", "65", "less than or equal to 64"),
    ("LEASE_S", "0.5", "greater than or equal to 1"),
    ("RESEND_S", "1e9", "less than or equal to 3600"),
    ("SHUTDOWN_S", "-3", "greater than 0"),
    ("VISIBILITY_TIMEOUT_S", "soon", "valid number"),
    ("RATE_LIMIT", "-1", "greater than or equal to 0"),
    ("RATE_LIMIT", "inf", "finite number"),
    ("RATE_LIMIT", "0.1", "0 (no limit), or 0.2 calls a second or more"),
    ("RATE_BURST", "0", "greater than or equal to 1"),
    ("MAX_ATTEMPTS", "0", "greater than or equal to 1"),
    ("MAX_RETRY_S", "604801", "less than or equal to 604800"),
    ("BACKOFF_BASE_S", "0", "greater than 0"),
    ("BACKOFF_CAP_S", "x", "valid number"),
    ("INLINE_WAIT_S", "31", "less than or equal to 30"),
    ("PRECONDITION_MAX_AGE_S", "0.1", "greater than or equal to 1"),
    ("VERIFY_INTERVAL_S", "0", "greater than 0"),
    ("VERIFY_DEADLINE_S", "x", "valid number"),
    ("RETENTION_DAYS", "4000", "less than or equal to 3650"),
    ("CONNECT_TIMEOUT_S", "0", "greater than 0"),
    ("TOTAL_TIMEOUT_S", "-inf", "finite number"),
    ("LOG_LEVEL", "loud", "'debug', 'info', 'warning' or 'error'"),
    ("LOG_FORMAT", "xml", "'auto', 'json' or 'console'"),
    ("INSECURE_HTTP", "perhaps", "valid boolean"),
    ("REQUEST_TYPE", "a b", "pattern"),
    ("USER_ID", "a\nb", "pattern"),
]


@pytest.fixture(autouse=True)
def _nothing_set(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in os.environ:
        if name.startswith(ENV_PREFIX):
            monkeypatch.delenv(name)


@pytest.mark.parametrize(("name", "value", "accepted"), BAD, ids=[f"{n}={v!r}" for n, v, _ in BAD])
def test_a_value_that_is_not_accepted_is_named_with_what_is(
    monkeypatch: pytest.MonkeyPatch, name: str, value: str, accepted: str
) -> None:
    monkeypatch.setenv(ENV_PREFIX + name, value)
    with pytest.raises(SettingsError) as caught:
        load_settings()
    sentence = str(caught.value)
    assert sentence.startswith(f"{ENV_PREFIX}{name}: {value!r} is not accepted: ")
    assert accepted in sentence
    assert "\n" not in sentence


def test_without_variables_all_is_at_its_default() -> None:
    assert load_settings() == Settings()
    assert Settings().redis_location.startswith("unix:///")


def test_every_bad_value_is_told_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in (("IN_FLIGHT", "x"), ("LEASE_S", "y"), ("LOG_LEVEL", "z")):
        monkeypatch.setenv(ENV_PREFIX + name, value)
    with pytest.raises(SettingsError) as caught:
        load_settings()
    for words in ("IN_FLIGHT: 'x'", "LEASE_S: 'y'", "LOG_LEVEL: 'z'"):
        assert ENV_PREFIX + words in str(caught.value)


def test_an_empty_variable_counts_as_not_set(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("REDIS_URL", "TOKEN", "IN_FLIGHT", "RATE_BURST"):
        monkeypatch.setenv(ENV_PREFIX + name, "")
    assert load_settings() == Settings()


BAD_URLS = [
    "s3cret",
    "http://:s3cret@redis.example.com",
    "redis://",
    "redis:///0",
    "redis://:s3cret@[::1",
    "redis://:s3cret@host:port/0",
    "redis://:s3cret@host:70000/0",
    "redis://:s3cret@host/first",
    "redis://:s3cret@host/0/1",
    "redis://:s3cret@host/0?no_such_option=1",
    "unix://",
    "unix:///?password=s3cret",
]


@pytest.mark.parametrize("url", BAD_URLS)
def test_what_is_no_redis_url_is_refused_without_repeating_it(
    monkeypatch: pytest.MonkeyPatch, url: str
) -> None:
    monkeypatch.setenv("POOLSWEEP_REDIS_URL", url)
    with pytest.raises(SettingsError) as caught:
        load_settings()
    assert str(caught.value) == (
        "POOLSWEEP_REDIS_URL: what is set is not the URL of a Redis server; "
        "accepted: redis://host:port/db, rediss://host:port/db or unix:///path"
    )


@given(
    scheme=st.sampled_from(["redis", "rediss"]),
    port=st.none() | st.integers(1, 65_535),
    database=st.none() | st.integers(0, 15),
    password=st.none() | st.text("abc%40", min_size=1, max_size=8).filter(lambda t: "%" not in t),
)
def test_the_ledger_and_the_broker_use_the_same_server(
    scheme: str, port: int | None, database: int | None, password: str | None
) -> None:
    at = f":{password}@" if password else ""
    host = "redis.example.com" + (f":{port}" if port else "")
    url = f"{scheme}://{at}{host}" + ("" if database is None else f"/{database}")
    settings = Settings(redis_url=SecretStr(url))
    ledgers = ConnectionPool.from_url(settings.redis_location).connection_kwargs
    brokers = Connection(settings.broker_location)  # type: ignore[no-untyped-call]
    assert ledgers["host"] == brokers.hostname
    assert ledgers.get("port", 6379) == (brokers.port or 6379)
    assert ledgers.get("password") == brokers.password
    assert int(ledgers.get("db", 0)) == int((brokers.virtual_host or "0").strip("/") or 0)


def test_times_that_do_not_fit_together_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("POOLSWEEP_BATCH_MAX_S", "1700")
    monkeypatch.setenv("POOLSWEEP_SHUTDOWN_S", "200")
    with pytest.raises(SettingsError) as caught:
        load_settings()
    assert str(caught.value) == (
        "POOLSWEEP_VISIBILITY_TIMEOUT_S: 3600 is too short; accepted: at least twice "
        "POOLSWEEP_BATCH_MAX_S and POOLSWEEP_SHUTDOWN_S together (3800)"
    )


# Signing in, and the endpoint


def test_there_is_exactly_one_way_to_sign_in() -> None:
    secret = SecretStr("s3cret")
    iam = {
        "iam_endpoint": "https://iam.example.com",
        "iam_user": "user",
        "iam_password": secret,
        "iam_domain": "domain",
    }
    assert isinstance(Settings(token=secret).credentials, Token)
    assert isinstance(Settings(ak=secret, sk=secret).credentials, AccessKey)
    assert isinstance(Settings(**iam).credentials, IamUser)  # type: ignore[arg-type]
    for incomplete in ({}, {"ak": secret}, {"iam_user": "user"}, {"token": secret, "ak": secret}):
        with pytest.raises(SettingsError) as caught:
            _ = Settings(**incomplete).credentials
        assert "accepted: " in str(caught.value)
        assert "s3cret" not in str(caught.value)


@pytest.mark.parametrize(
    ("endpoint", "why"),
    [
        (None, "not set"),
        ("modelarts.example.com", "'modelarts.example.com' is not a URL with a scheme"),
        ("http://modelarts.example.com", "is not encrypted"),
        ("https://modelarts.example.com/v2", "has more than a scheme"),
        ("https://user:s3cret@modelarts.example.com", "credentials"),
    ],
)
def test_an_endpoint_that_is_none_is_named(endpoint: str | None, why: str) -> None:
    with pytest.raises(SettingsError) as caught:
        _ = Settings(endpoint=endpoint).api_endpoint
    assert str(caught.value).startswith("POOLSWEEP_ENDPOINT: ")
    assert why in str(caught.value)
    assert "accepted: https://" in str(caught.value)
    assert "s3cret" not in str(caught.value)


@given(
    rate=st.just(0.0) | st.floats(0.2, 100_000),
    batch=st.integers(1, 1_000),
)
def test_the_window_holds_two_batches_and_the_burst_a_call(rate: float, batch: int) -> None:
    settings = Settings(rate_limit=rate, batch_size=batch)
    assert 2 * batch <= settings.window(1) <= settings.window(7)
    assert 1 <= settings.burst <= 1 + rate / 100


# A worker does not start with what it cannot use


@pytest.fixture
def usable(tmp_path: Path) -> dict[str, str]:
    return {
        "POOLSWEEP_ENDPOINT": "http://127.0.0.1:9",
        "POOLSWEEP_TOKEN": "s3cret-token",
        "POOLSWEEP_STATE_DIR": str(tmp_path / "state"),
    }


async def test_a_worker_says_in_one_line_why_it_does_not_start(
    workers: Workers, usable: dict[str, str]
) -> None:
    cases = [
        (False, "IN_FLIGHT", "many", "POOLSWEEP_IN_FLIGHT: 'many' is not accepted"),
        (True, "IN_FLIGHT", "many", "POOLSWEEP_IN_FLIGHT: 'many' is not accepted"),
        (True, "TOKEN", "", "no credentials are set; accepted: "),
        (True, "STATE_DIR", "/dev/null/x", "POOLSWEEP_STATE_DIR: '/dev/null/x' cannot be used"),
    ]
    started = [
        workers.start({**usable, ENV_PREFIX + name: value}, plain=plain)
        for plain, name, value, _ in cases
    ]
    for worker, (*_, words) in zip(started, cases, strict=True):
        assert await worker.ended() == 2
        (line,) = [line for line in worker.text.splitlines() if not line.startswith("{")]
        assert words in line
        assert "Traceback" not in worker.text
        assert "s3cret" not in worker.text
