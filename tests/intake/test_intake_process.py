"""The intake as a process: how it starts, what it says of itself, how it ends."""

from __future__ import annotations

import contextlib
import http.client
import http.server
import ipaddress
import json
import signal
import socket
import ssl
import subprocess
import sys
import threading
import urllib.request
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Any

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from scheduler.intake.process import IntakeProcess
from scheduler.intake.requests import Requests
from scheduler.notices import signature
from tests.intake.conftest import Intake, Place, asks
from tests.sweep.conftest import eventually
from tests.worker.conftest import Process
from worker.settings import Settings, SettingsError
from worker.yaml_source import YamlError

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from tests.sweep.conftest import Project


@pytest.fixture(scope="module")
def intake(place: Place) -> Iterator[Intake]:
    running = place.intake()
    yield running.ready()
    running.kill()


# What it cannot start with


def settings(place: Place, **changes: Any) -> Settings:
    given: dict[str, Any] = {
        "endpoint": place.sandbox.url,
        "token": place.sandbox.token,
        "redis_url": place.server.url,
        "clients_file": place.clients_file,
        "intake_port": 0,
    }
    return Settings(**given | changes)


def refusal(given: Settings) -> str:
    """Why a process does not start with these settings."""
    with pytest.raises((SettingsError, YamlError)) as error:
        IntakeProcess(given).start()
    return str(error.value)


def test_it_needs_clients(place: Place, tmp_path: Path) -> None:
    assert refusal(settings(place, clients_file=None)) == (
        "POOLSWEEP_CLIENTS_FILE: not set; accepted: the path of a file of clients"
    )
    missing = tmp_path / "none.yaml"
    assert f"{missing}: it cannot be read" in refusal(settings(place, clients_file=missing))
    empty = tmp_path / "empty.yaml"
    empty.write_text("clients: {}")
    assert f"{empty}:1: clients" in refusal(settings(place, clients_file=empty))


def test_it_needs_a_way_to_every_project_of_a_client(place: Place) -> None:
    first = place.sandbox.running.config.project_ids[0]
    said = refusal(settings(place, endpoint=None))
    assert f"clients.ci: project {first}: POOLSWEEP_ENDPOINT: not set" in said
    said = refusal(settings(place, token=None))
    assert f"clients.ci: project {first}: no credentials are set" in said


def test_it_is_not_open_to_other_machines_in_the_clear(place: Place) -> None:
    said = refusal(settings(place, intake_host="0.0.0.0"))
    assert said.startswith("POOLSWEEP_INTAKE_HOST: '0.0.0.0' is not this machine alone")
    assert "POOLSWEEP_INTAKE_TLS_CERT" in said
    assert "POOLSWEEP_INSECURE_HTTP=true" in said


def test_it_needs_a_certificate_and_its_key(place: Place, tmp_path: Path) -> None:
    cert, key = certificate(tmp_path)
    for one in ({"intake_tls_cert": cert}, {"intake_tls_key": key}):
        assert "only one of them is set" in refusal(settings(place, **one))
    for wrong in (
        {"intake_tls_cert": tmp_path / "none", "intake_tls_key": key},
        {"intake_tls_cert": key, "intake_tls_key": key},
        {"intake_tls_cert": cert, "intake_tls_key": certificate(tmp_path, "other")[1]},
        {"intake_tls_cert": cert, "intake_tls_key": certificate(tmp_path, "x", b"secret")[1]},
    ):
        said = refusal(settings(place, **wrong))
        assert "cannot be used" in said
        assert "accepted: a certificate chain and its key, PEM, not encrypted" in said


@pytest.mark.parametrize("plain", [False, True])
def test_an_address_that_is_taken_is_told_in_one_sentence(place: Place, plain: bool) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        if plain:
            command = [sys.executable, "-m", "celery", "-A", "scheduler.intake.app", "worker"]
            env = place.environment(INTAKE_PORT=port)
            process = Process(command, place.folder / "plain.log", env=env)
        else:
            process = place.process("intake", "--port", port)
        assert Intake(process).ended() == 2
    assert process.text.startswith("poolsweep: POOLSWEEP_INTAKE_HOST, POOLSWEEP_INTAKE_PORT: ")
    assert f"127.0.0.1:{port} cannot be listened on" in process.text
    assert process.text.count("\n") == 1


# How it serves


def test_it_is_alive_before_it_has_a_broker_and_ready_afterwards(own_place: Place) -> None:
    own_place.server.kill()
    intake = own_place.intake()
    assert intake.get("/healthz") == (200, {"status": "ok"})
    status, problem = intake.get("/readyz")
    assert (status, problem["type"]) == (503, "urn:poolsweep:problem:not-ready")
    assert "the broker was not reached yet" in problem["detail"]
    assert "Redis does not answer" in problem["detail"]
    own_place.server.start()
    intake.ready()
    own_place.server.kill()
    eventually(lambda: not intake.is_ready())
    assert intake.get("/healthz")[0] == 200
    assert intake.stop() == 0


def test_without_a_broker_it_can_be_stopped(own_place: Place) -> None:
    own_place.server.kill()
    intake = own_place.intake()
    eventually(lambda: "Trying again" in intake.process.text)
    assert intake.stop() == 0


def test_it_serves_with_tls(place: Place, tmp_path: Path) -> None:
    cert, key = certificate(tmp_path)
    intake = place.intake(INTAKE_TLS_CERT=str(cert), INTAKE_TLS_KEY=str(key))
    url = intake.url
    assert url.startswith("https://127.0.0.1:")
    context = ssl.create_default_context(cafile=str(cert))
    with urllib.request.urlopen(url + "/healthz", context=context, timeout=20) as answer:  # noqa: S310
        assert answer.status == 200
    eventually(lambda: 'ready."' in intake.process.text)
    assert intake.stop() == 0


def test_changed_clients_are_taken_up_and_a_bad_file_is_not(
    place: Place, intake: Intake, project: Project
) -> None:
    body = asks(project, *project.add())
    place.allow(ci={}, new={})
    head = {"Authorization": f"Bearer {place.tokens['new']}"}
    eventually(lambda: intake.call("/v1/runs", body, **head)[0] == 202)
    place.clients_file.write_text("clients: {new: {projects: []}}")
    (rejected,) = eventually(lambda: intake.process.events("clients_rejected"))
    assert "clients.new.projects" in rejected["reason"]
    assert intake.is_ready()
    assert intake.call("/v1/runs", body, **head)[0] == 202
    place.allow(ci={})
    eventually(lambda: intake.call("/v1/runs", body, **head)[0] == 401)


def test_the_end_of_a_run_is_told_where_its_request_says(
    place: Place, intake: Intake, project: Project, tmp_path: Path
) -> None:
    secret = tmp_path / "secret"
    secret.write_text("of-the-webhook")
    with receiving() as (port, received):
        hooks = {"hosts": [f"127.0.0.1:{port}"], "secret": {"file": str(secret)}}
        place.allow(ci={"webhooks": hooks | {"allow_private": True}})
        body = asks(project, *project.add(), webhook=f"http://127.0.0.1:{port}/ends")
        head = {"Authorization": f"Bearer {place.tokens['ci']}"}
        eventually(lambda: intake.call("/v1/runs", body, **head)[0] == 202)
        run = place.run_in(project)
        path, headers, told = eventually(lambda: received[:1])[0]
    assert path == "/ends"
    assert run.run_id.encode() in told
    assert "of-the-webhook" not in str(headers)
    signed = headers["X-Poolsweep-Signature"]
    at = int(signed.partition(",")[0].removeprefix("t="))
    assert signed == signature("of-the-webhook", told, at)
    place.allow(ci={})


# How it ends


def test_a_request_under_way_is_ended_before_the_process_ends(
    place: Place, project: Project
) -> None:
    intake = place.intake().ready()
    body = json.dumps(asks(project, *project.add())).encode()
    host = intake.url.removeprefix("http://")
    connection = http.client.HTTPConnection(host, timeout=30)
    connection.putrequest("POST", "/v1/runs")
    for name, value in {
        "Authorization": f"Bearer {place.tokens['ci']}",
        "Content-Type": "application/json",
        "Content-Length": str(len(body)),
    }.items():
        connection.putheader(name, value)
    connection.endheaders(body[:10])
    intake.process.send(signal.SIGTERM)
    eventually(lambda: intake.process.events("draining"))
    connection.send(body[10:])
    with contextlib.closing(connection):
        answer = connection.getresponse()
        run_id = json.loads(answer.read())["run_id"]
    assert answer.status == 202
    assert intake.ended() == 0
    assert run_id in place.runs(project)


def test_it_ends_with_the_process_that_started_it(place: Place) -> None:
    process = subprocess.Popen(
        [sys.executable, "-m", "scheduler.cli", "intake", "--exit-with-stdin"],
        stdin=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env={**place.environment()},
    )
    _, said = process.communicate(timeout=60)  # closes its standard input
    assert process.returncode == 0, said


# What it says of the requests


def test_requests_that_wait_and_messages_that_were_refused_are_listed(
    own_place: Place, project: Project
) -> None:
    place = own_place
    assert place.run("requests") == "No request waits to be planned.\n"
    assert place.run("requests", "--rejected") == "No message was refused.\n"
    place.allow(ci={}, gone={})
    intake = place.intake(ENDPOINT="http://127.0.0.1:9").ready()
    refused = place.xadd(request='{"a\x1b[31m": 1}', client="ci")
    place.refusal(refused)
    place.send(request=asks(project, *project.add()), client="ci")
    (run_id,) = eventually(lambda: list(place.runs(project)))
    eventually(lambda: place.ask(lambda redis: Requests(redis).waiting())[0].trouble)
    (waiting,) = json.loads(place.run("requests", "--json"))
    assert waiting["trouble"]
    assert {name: waiting[name] for name in ("run_id", "client", "way", "projects")} == {
        "run_id": run_id,
        "client": "ci",
        "way": "celery",
        "projects": [project.project],
    }
    assert 0 <= waiting["age_s"] < 60
    table = place.run("requests")
    assert run_id in table
    assert project.project in table
    (rejected,) = json.loads(place.run("requests", "--rejected", "--json"))
    assert rejected["message_id"] == refused
    assert (rejected["way"], rejected["client"]) == ("stream", "ci")
    assert json.loads(rejected["content"])["request"] == '{"a\x1b[31m": 1}'
    table = place.run("requests", "--rejected", "--limit", "1")
    assert refused in table
    assert "\x1b" not in table
    assert intake.stop() == 0


# Helpers


def certificate(
    folder: Path, name: str = "own", password: bytes | None = None
) -> tuple[Path, Path]:
    """A certificate for this machine, which is its own authority, and its key."""
    key = ec.generate_private_key(ec.SECP256R1())
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "127.0.0.1")])
    now = datetime.now(UTC)
    made = (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(subject)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - timedelta(days=1))
        .not_valid_after(now + timedelta(days=1))
        .add_extension(
            x509.SubjectAlternativeName([x509.IPAddress(ipaddress.ip_address("127.0.0.1"))]), False
        )
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .sign(key, hashes.SHA256())
    )
    paths = folder / f"{name}.crt", folder / f"{name}.key"
    paths[0].write_bytes(made.public_bytes(serialization.Encoding.PEM))
    paths[1].write_bytes(
        key.private_bytes(
            serialization.Encoding.PEM,
            serialization.PrivateFormat.PKCS8,
            serialization.BestAvailableEncryption(password)
            if password
            else serialization.NoEncryption(),
        )
    )
    return paths


@contextlib.contextmanager
def receiving() -> Iterator[tuple[int, list[tuple[str, dict[str, str], bytes]]]]:
    """A server that is told things: its port, and what it was told."""
    received: list[tuple[str, dict[str, str], bytes]] = []

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["Content-Length"]))
            received.append((self.path, dict(self.headers), body))
            self.send_response(204)
            self.end_headers()

        def log_message(self, *_: Any) -> None:
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield server.server_address[1], received
        finally:
            server.shutdown()
            thread.join()
