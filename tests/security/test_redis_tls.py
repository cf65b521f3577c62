"""Redis behind TLS: both the ledger and the broker know whom they speak to, or do not speak."""

from __future__ import annotations

import ssl
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

import pytest
import redis
from hypothesis import given
from hypothesis import strategies as st
from kombu.connection import Connection
from kombu.exceptions import OperationalError
from pydantic import SecretStr

from scheduler.cli.errors import UnreachableError
from scheduler.cli.session import connected
from scheduler.intake import broker as of_the_intake
from tests.security.authority import Authority, door
from worker import broker as of_the_workers
from worker.settings import Settings, SettingsError, load_settings

if TYPE_CHECKING:
    from pathlib import Path

    from celery import Celery

    from tests.security.conftest import Scene


def apps(settings: Settings) -> list[Celery]:
    """All that speaks to the broker."""
    return [
        of_the_workers.make_app(settings, ["https://modelarts.example.com"]),
        of_the_intake.make_app(settings),
    ]


async def test_ledger_and_broker_are_reached_by_whoever_has_the_certificates(scene: Scene) -> None:
    settings = scene.redis_settings()
    async with connected(settings) as client:
        assert await client.ping()
    for app in apps(settings):
        with app.connection_for_write() as connection:
            connection.ensure_connection(max_retries=1)


def without_the_authority(scene: Scene) -> dict[str, Any]:
    return {"redis_ca_cert": None}


def without_a_certificate(scene: Scene) -> dict[str, Any]:
    return {"redis_client_cert": None, "redis_client_key": None}


def by_another_name(scene: Scene) -> dict[str, Any]:
    # The certificate is for localhost.
    return {"redis_url": SecretStr(scene.redis_url.replace("localhost", "127.0.0.1"))}


@pytest.mark.parametrize("wrong", [without_the_authority, without_a_certificate, by_another_name])
async def test_nobody_else_is_let_in_or_trusted(scene: Scene, wrong: Any) -> None:
    settings = scene.redis_settings(**wrong(scene))
    with pytest.raises(UnreachableError) as caught:
        async with connected(settings):
            pass
    assert str(caught.value).startswith("POOLSWEEP_REDIS_URL: the server cannot be used: ")
    assert scene.secrets.redis_password not in str(caught.value)
    for app in apps(settings):
        with app.connection_for_write() as connection, pytest.raises(OperationalError):
            connection.ensure_connection(max_retries=1, interval_start=0)


async def test_a_stranger_with_a_certificate_of_its_own_gets_no_password(
    scene: Scene, tmp_path: Path
) -> None:
    """Its door leads to the same Redis: only the certificate tells that it is another's."""
    stranger = Authority(tmp_path)
    with door(scene.redis.socket, stranger, "localhost") as port:
        url = scene.redis_url.replace(f":{scene.port}", f":{port}")
        settings = scene.redis_settings(redis_url=SecretStr(url))
        with pytest.raises(UnreachableError, match="CERTIFICATE_VERIFY_FAILED"):
            async with connected(settings):
                pass
        for app in apps(settings):
            with app.connection_for_write() as connection, pytest.raises(OperationalError):
                connection.ensure_connection(max_retries=1, interval_start=0)


# What is set


TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=12)


@given(
    scheme=st.sampled_from(["redis", "rediss", "unix"]),
    user=TEXT,
    password=TEXT.filter(bool),
    in_query=st.booleans(),
    database=st.none() | st.integers(0, 15),
)
def test_the_broker_reads_every_name_and_password_as_the_ledger_does(
    scheme: str, user: str, password: str, in_query: bool, database: int | None
) -> None:
    at, query = f"{quote(user, safe='')}:{quote(password, safe=';')}@", {}
    if in_query:
        at, query = "", {"username": user, "password": password}
    if scheme == "unix" and database is not None:
        query["db"] = str(database)
    url = f"{scheme}://{at}" + ("/run/a b;c.sock" if scheme == "unix" else "redis.example.com:7")
    if scheme != "unix" and database is not None:
        url += f"/{database}"
    url += "?" * bool(query) + "&".join(f"{name}={quote(v, safe='')}" for name, v in query.items())
    settings = Settings(redis_url=SecretStr(url))
    ledgers = redis.ConnectionPool.from_url(settings.redis_location).connection_kwargs
    with Connection(settings.broker_location) as connection:  # type: ignore[no-untyped-call]
        brokers = of_the_connection(connection)
    for name in ("username", "password", "path"):
        assert (brokers.get(name) or "") == (ledgers.get(name) or "")
    assert int(brokers["db"]) == ledgers.get("db", 0)
    assert (brokers.get("host"), brokers.get("port")) == (ledgers.get("host"), ledgers.get("port"))


def of_the_connection(connection: Connection) -> dict[str, Any]:
    """How kombu connects, without doing it."""
    transport = connection.get_transport_cls()  # type: ignore[no-untyped-call]
    channel = type("Channel", (transport.Channel,), {"__init__": _nothing})()
    channel.connection = type("Transport", (), {"client": connection, "default_port": 6379})
    found: dict[str, Any] = channel._connparams()
    return found


def _nothing(_: Any) -> None:
    """Kombu's own would connect."""


@given(password=TEXT, host=st.sampled_from(["redis.example.com", "127.0.0.1", "[::1]"]))
def test_a_server_with_tls_is_never_taken_on_trust(password: str, host: str) -> None:
    url = f"rediss://:{quote(password, safe='')}@{host}/0"
    settings = Settings(redis_url=SecretStr(url))
    ledgers = redis.ConnectionPool.from_url(settings.redis_location).make_connection()
    assert isinstance(ledgers, redis.SSLConnection)
    assert ledgers.cert_reqs == ssl.CERT_REQUIRED
    assert ledgers.check_hostname
    brokers = Connection(settings.broker_location).ssl  # type: ignore[no-untyped-call]
    assert brokers == {"ssl_cert_reqs": ssl.CERT_REQUIRED, "ssl_check_hostname": True}


@pytest.mark.parametrize(
    "option", ["ssl_cert_reqs=none", "ssl_check_hostname=false", "ssl_ca_certs=/tmp/ca.pem"]
)
def test_no_url_switches_the_check_off(monkeypatch: pytest.MonkeyPatch, option: str) -> None:
    monkeypatch.setenv("POOLSWEEP_REDIS_URL", f"rediss://:hunter2@redis.example.com/0?{option}")
    with pytest.raises(SettingsError) as caught:
        load_settings()
    assert str(caught.value) == (
        "POOLSWEEP_REDIS_URL: what is set has options of TLS in it; accepted: a rediss:// URL "
        "without, and POOLSWEEP_REDIS_CA_CERT, POOLSWEEP_REDIS_CLIENT_CERT and "
        "POOLSWEEP_REDIS_CLIENT_KEY besides"
    )


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Certificates, and what is none."""
    folder = tmp_path_factory.mktemp("certificates")
    authority = Authority(folder)
    authority.issue("client")
    authority.issue("other")
    (folder / "text").write_text("no certificate")
    return folder


@pytest.mark.parametrize(
    ("url", "given_files", "sentence"),
    [
        (
            "redis://redis.example.com",
            {"CA_CERT": "ca.pem"},
            "POOLSWEEP_REDIS_CA_CERT: set for a Redis that is not called with TLS; accepted: only ",
        ),
        (
            "",
            {"CLIENT_CERT": "client.pem", "CLIENT_KEY": "client.key"},
            "POOLSWEEP_REDIS_CLIENT_CERT, POOLSWEEP_REDIS_CLIENT_KEY: set for a Redis that is not",
        ),
        (
            "rediss://redis.example.com",
            {"CLIENT_KEY": "client.key"},
            "POOLSWEEP_REDIS_CLIENT_CERT, POOLSWEEP_REDIS_CLIENT_KEY: only one of them is set; ",
        ),
        (
            "rediss://redis.example.com",
            {"CA_CERT": "nowhere"},
            "cannot be used: No such file or directory; accepted: certificates, PEM",
        ),
        ("rediss://redis.example.com", {"CA_CERT": "text"}, "accepted: certificates, PEM"),
        (
            "rediss://redis.example.com",
            {"CLIENT_CERT": "client.pem", "CLIENT_KEY": "other.key"},
            "accepted: a certificate chain and its key, PEM, not encrypted",
        ),
    ],
)
def test_certificates_that_cannot_be_used_are_told_in_a_sentence(
    monkeypatch: pytest.MonkeyPatch,
    files: Path,
    url: str,
    given_files: dict[str, str],
    sentence: str,
) -> None:
    monkeypatch.setenv("POOLSWEEP_REDIS_URL", url)
    for name, file in given_files.items():
        monkeypatch.setenv(f"POOLSWEEP_REDIS_{name}", str(files / file))
    with pytest.raises(SettingsError) as caught:
        load_settings()
    assert sentence in str(caught.value)
    assert str(caught.value).startswith("POOLSWEEP_REDIS_C")
    assert "\n" not in str(caught.value)
