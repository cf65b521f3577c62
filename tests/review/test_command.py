"""`poolsweep review`: it serves until it is stopped, and is not opened to strangers."""

from __future__ import annotations

import json
import re
import socket
import urllib.request
from pathlib import Path

import pytest
from redis.asyncio import Redis

from scheduler.intake import clients
from scheduler.review.bars import SIGNS
from scheduler.review.web import freed, overview, run_page
from scheduler.review.web.app import Parts, make_app
from scheduler.review.web.pages import words
from scheduler.review.web.serving import Audience
from tests.cli.conftest import User, one_sentence
from tests.intake.api import PROJECTS
from worker.ledger import Ledger
from worker.limiter import AIM, Quota
from worker.settings import Settings, SettingsError

DOCUMENT = (Path(__file__).parents[2] / "docs" / "review.md").read_text()
PRICES = Path(__file__).parents[2] / "examples" / "prices.yaml"
PICTURES = Path(__file__).parents[2] / "docs" / "screenshots"


@pytest.fixture
def clients_path(tmp_path: Path) -> Path:
    entry = {"tokens": [clients.new_token()[1]], "projects": [PROJECTS[0]]}
    path = tmp_path / "clients.yaml"
    path.write_text(json.dumps({"clients": {"ci": entry}}))
    return path


def test_it_serves_until_it_is_stopped_and_leaves_nothing(tmp_path: Path, redis_url: str) -> None:
    user = User(tmp_path, {"REDIS_URL": redis_url, "REVIEW_PORT": "0"})
    command = user.start("review", "--prices", str(PRICES))
    assert command.stdout is not None
    line = command.stdout.readline()
    assert line.startswith("The review page is at http://127.0.0.1:")
    url = line.split()[-1]
    with urllib.request.urlopen(url, timeout=20) as answer:  # noqa: S310 - it begins as just seen
        assert "<h1>Overview</h1>" in answer.read().decode()
    command.terminate()
    ended = command.end()
    assert ended.code == 0
    assert "Traceback" not in ended.err
    logged = [json.loads(line) for line in ended.err.splitlines()]
    assert [each["route"] for each in logged if each["event"] == "http_request"] == ["/"]


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost", "::1"])
def test_without_a_clients_file_it_is_for_this_machine(host: str) -> None:
    assert Audience(Settings(), host).watch is None


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.0.2.1", "example.com", "", "127.0.0.1 "])
def test_it_is_not_opened_to_others_without_a_clients_file(host: str) -> None:
    with pytest.raises(SettingsError, match=r"nobody would have to sign in; accepted: 127\.0"):
        Audience(Settings(), host)
    with pytest.raises(SettingsError, match="nobody would have to sign in"):
        Audience(Settings(insecure_http=True), host)


def test_tokens_are_not_sent_in_the_clear_unless_that_is_said(clients_path: Path) -> None:
    with pytest.raises(SettingsError, match="tokens would be sent in the clear"):
        Audience(Settings(clients_file=clients_path), "0.0.0.0")
    open_to_all = Settings(clients_file=clients_path, insecure_http=True)
    for host in ("0.0.0.0", "127.0.0.1"):
        found = Audience(open_to_all, host).clients
        assert found is not None
        assert found.by_name("ci") is not None


def test_a_port_in_use_is_told_of_by_its_number(tmp_path: Path, redis_url: str) -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = str(other.getsockname()[1])
        user = User(
            tmp_path, {"REDIS_URL": redis_url, "REVIEW_HOST": "localhost", "REVIEW_PORT": "0"}
        )
        ended = user.run("review", "--port", port)
    assert ended.code == 2
    sentence = one_sentence(ended)
    assert f"localhost:{port} cannot be listened on" in sentence
    assert "accepted: an address of this machine with a port that is free" in sentence


def test_a_price_file_that_is_none_is_told_of_before_anything_is_served(
    tmp_path: Path, redis_url: str
) -> None:
    path = tmp_path / "prices.yaml"
    path.write_text("currency: EUR\n")
    user = User(tmp_path, {"REDIS_URL": redis_url, "REVIEW_PORT": "0"})
    ended = user.run("review", "--prices", str(path))
    assert ended.code == 2
    assert "per_node_hour" in one_sentence(ended)
    assert ended.out == ""


# docs/review.md


def test_the_document_tells_of_every_page_and_every_sign(redis_url: str) -> None:
    told = DOCUMENT.partition("| page |")[2].partition("\n\n")[0]
    paths = set(re.findall(r"^\| `(\S+)` \|", told, re.MULTILINE))
    parts = Parts(
        redis=(redis := Redis.from_url(redis_url)),
        ledger=Ledger(redis),
        clients=None,
        quota=lambda _: Quota(1, 1),
    )
    there = {
        resource.canonical.replace("{run_id}", "RUN").replace("{number}", "N")
        for resource in make_app(parts).router.resources()
    }
    assert paths == there - {"/static/{name}"}
    signs = DOCUMENT.partition("| sign | outcome |")[2].partition("\n\n")[0]
    assert dict(re.findall(r"^\| (\S) \| (.+) \|$", signs, re.MULTILINE)) == {
        sign: words(state) for state, sign in SIGNS.items()
    }


def test_the_bounds_that_the_document_tells_are_those_there_are() -> None:
    text = " ".join(DOCUMENT.split())
    for sentence in (
        f"{run_page.JOBS} jobs are on a page",
        f"failures are grouped over the first {run_page.FAILURES:,}",
        f"looks at {run_page.SCAN:,} jobs at a time",
        f"Up to {freed.AT_ONCE:,} pools are added up for the page",
        f"latest {overview.SCAN} runs",
        f"more than {overview.MOST_MARKS:,}",
        f"of the last {overview.DAYS} days",
        f"{AIM:.0%}".replace("%", " %") + " of the limit",
    ):
        assert sentence in text


def test_the_pictures_are_small_and_all_there() -> None:
    named = set(re.findall(r"\(screenshots/(\S+\.png)\)", DOCUMENT))
    there = {path.name: path.stat().st_size for path in PICTURES.iterdir()}
    assert named <= there.keys()
    schemes, pages = ("light", "dark"), ("overview", "run", "job")
    assert set(there) == {f"{page}-{scheme}.png" for page in pages for scheme in schemes}
    assert max(there.values()) < 150_000
