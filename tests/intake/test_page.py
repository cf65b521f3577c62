"""docs/intake.md: its worked example of HTTP, done as a reader would, and its tables."""

from __future__ import annotations

import hashlib
import hmac
import json
import re
import time
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from scheduler import children
from scheduler.intake import clients
from scheduler.intake.http import Bounds
from scheduler.intake.problems import KINDS
from scheduler.intake.request import Request, Target, read_request
from scheduler.notices import Notice, message
from scheduler.policy import Occasion
from tests.cli.conftest import eventually
from tests.test_docs import KNOWN_KEY, Reader
from worker.ledger import JobState, RunState

if TYPE_CHECKING:
    import subprocess
    from collections.abc import Iterator

PAGE = (Path(__file__).parents[2] / "docs" / "intake.md").read_text()


def section(heading: str) -> str:
    """What stands below a heading, up to the next."""
    return PAGE.partition(f"\n## {heading}\n")[2].partition("\n## ")[0]


def blocks(text: str, kind: str) -> list[str]:
    return re.findall(rf"^```{kind}\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)


def told_in(text: str, first: str) -> set[str]:
    """The names in the first column of the table that begins with this heading."""
    table = text.partition(f"\n| {first} |")[2].partition("\n\n")[0]
    return {
        name
        for line in table.splitlines()[2:]
        for name in re.findall(r"`(\w+)`", line.split("|")[1])
    }


@pytest.fixture
def reader(tmp_path: Path) -> Iterator[Reader]:
    with children.sandbox(["--pools", "60", "--delete-seconds", "0.3"], tmp_path / "sb") as cloud:
        yield Reader(tmp_path, cloud)


def url_of(reader: Reader) -> str | None:
    """Where the intake serves, once its log says so."""
    for line in (reader.folder / "log").read_text().splitlines():
        if line.startswith("{") and (event := json.loads(line))["event"] == "intake_ready":
            return str(event["url"])
    return None


def stop(process: subprocess.Popen[bytes]) -> None:
    process.terminate()
    try:
        assert process.wait(60) == 0
    finally:
        process.kill()


@pytest.mark.timeout(180)
def test_the_worked_example_by_http_works(reader: Reader) -> None:
    for name, value in KNOWN_KEY.items():
        assert reader.environment[f"POOLSWEEP_{name.upper()}"] == value
        assert value in PAGE
    token, digest = re.findall(r"\s(pst_\S+|[0-9a-f]{64})\s", reader.does("poolsweep token"))
    (written,) = blocks(section("A place to try it in"), "yaml")
    (reader.folder / "clients.yaml").write_text(written.replace("0" * 64, digest))
    reader.environment |= {
        "POOLSWEEP_CLIENTS_FILE": "clients.yaml",
        "POOLSWEEP_INTAKE_PORT": "0",
        "POOLSWEEP_LOG_FORMAT": "json",
    }
    intake = reader.starts("poolsweep intake")
    worker = reader.starts("poolsweep worker")
    try:
        reader.environment |= {"INTAKE": eventually(lambda: url_of(reader)) or "", "TOKEN": token}
        (program,) = blocks(section("By HTTP"), "python")
        (reader.folder / "ask.py").write_text(program)
        said = [
            reader.does("set -e\n" + text)
            for text in blocks(section("By HTTP"), "sh")
            if "export TOKEN=pst_" not in text
        ]
        assert len(said) == 3
        assert [re.findall(r"^event: end$", each, re.MULTILINE) for each in said] == [
            ["event: end"],
            ["event: end"],
            [],
        ]
        planned = json.loads((reader.folder / "planned.json").read_text())["jobs"]
        ended = json.loads((reader.folder / "run.json").read_text())
        assert (len(planned), ended["total"]) == (4, 4)
        assert (ended["state"], ended["counts"]) == ("finished", {"deleted": 4})
        assert ended["reason"] == "team moved"
        run_id = said[-1].strip()
        eventually(lambda: json.loads(reader.does("poolsweep runs --json"))[0]["done"])
        assert json.loads(reader.does(f"poolsweep results {run_id} --json"))["run"]["counts"] == {
            "deleted": 1
        }
        again = "set -e\n" + blocks(section("By HTTP"), "sh")[2].partition("\ncurl")[0]
        reader.does(again)
        accepted = json.loads((reader.folder / "accepted.json").read_text())
        assert accepted["run_id"] == ended["run_id"], "the same key, the same run"
    finally:
        stop(intake)
        stop(worker)


def test_the_request_that_is_shown_is_one() -> None:
    (shown,) = blocks(section("What is asked for"), "json")
    request = read_request(shown)
    assert request.dry_run
    assert request.targets[0].selector is not None


def test_the_check_of_a_signature_tells_genuine_from_forged() -> None:
    (check,) = blocks(section("Webhooks"), "python")
    notice = Notice("1", Occasion.FINISHED, "", "", "", "", {})
    sent = message(notice, "json", secret="shared", now_s=int(time.time()))
    signed = re.fullmatch(r"t=([0-9]+),v1=([0-9a-f]+)", sent.headers["X-Poolsweep-Signature"])
    assert signed
    given = {"secret": b"shared", "t": signed[1].encode(), "v1": signed[2]}
    for body, is_genuine in ((sent.body, True), (sent.body + b" ", False)):
        found = {"hmac": hmac, "hashlib": hashlib, "time": time, "body": body, **given}
        exec(check, found)  # noqa: S102
        assert found["genuine"] is is_genuine


def test_every_field_of_a_request_is_told_of() -> None:
    fields = {*Request.model_fields, *Target.model_fields} - {"project_id"}
    assert told_in(section("What is asked for"), "field") == fields


def test_every_field_of_a_client_is_told_of() -> None:
    told = told_in(section("Who may ask: the clients' file"), "field")
    assert told == set(clients.Client.model_fields) - {"name"}


def test_every_state_and_outcome_is_told_of() -> None:
    text = section("What is asked for")
    assert told_in(text, "state") == set(map(str, RunState))
    after = text.partition("The run's `note`")[2]
    assert {each for each in JobState if f"`{each}`" not in after} == set()


def test_every_problem_is_told_of_with_its_status() -> None:
    rows = re.findall(r"^\| ([0-9]{3}) \| `([a-z-]+)` \|", section("By HTTP"), re.MULTILINE)
    assert {(int(status), name) for status, name in rows} == {
        (kind.status, kind.name) for kind in KINDS
    }
    bounds = Bounds()
    assert f"send the body within {bounds.body_s:g} s" in PAGE
    assert f"a client may have {bounds.streams_of_a_client} streams open" in PAGE
