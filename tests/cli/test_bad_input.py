"""Bad input: one sentence that names the field, its value and what is accepted; exit code 2.

What cannot be reached is exit code 4.
"""

from __future__ import annotations

import http.server
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import pytest
import typer

from scheduler.cli.commands import COMMANDS, EXAMPLES, app
from scheduler.cli.outcome import EXIT_UNREACHABLE, EXIT_USAGE
from tests.cli.conftest import Cloud, Ended, User, one_sentence
from worker import embedded_redis

if TYPE_CHECKING:
    from collections.abc import Iterator

PROJECT = "0123456789abcdef0123456789abcdef"
POOL = "auto-pool-os-86c13962597848eeb29c5861153a391f"
DELETE = ("delete", "--project", PROJECT, POOL)
YES = (*DELETE, "--yes")
SELECT = ("delete", "--project", PROJECT, "--yes")
OTHER = "fedcba9876543210fedcba9876543210"
SECRET = "hunter2-hunter2"


@dataclass(frozen=True)
class Case:
    """A request that cannot be met, and what the sentence must say."""

    arguments: tuple[str, ...]
    words: tuple[str, ...]
    settings: dict[str, str | None] = field(default_factory=dict)
    code: int = EXIT_USAGE


CASES = {
    "no pools": Case(("delete", "--project", PROJECT), ("POOL", "--from", "delete --help")),
    "a pool in no project": Case(("delete", POOL), (f"'{POOL}'", "no project", "--project")),
    "a pool in one of two projects": Case(
        ("delete", POOL, "--project", PROJECT, "--project", OTHER),
        (f"'{POOL}'", "no project", "one --project"),
    ),
    "a pool in another project": Case(
        (*DELETE, f"{OTHER}/{POOL}"), (OTHER, "not among those of --project")
    ),
    "pools that are named and selected": Case(
        (*DELETE, "--expired"), ("POOL", "--from", "accepted", "selector")
    ),
    "a selector in no project": Case(("delete", "--expired"), ("--project", "accepted")),
    "a project that is not one": Case(
        ("delete", "--project", "a/b", "--expired"), ("--project", "'a/b'", "accepted")
    ),
    "an age that is none": Case(
        (*SELECT, "--older-than", "1M"), ("--older-than", "'1M'", "accepted", "7d")
    ),
    "a tag without a key": Case((*SELECT, "--tag", "=dev"), ("--tag", "'=dev'", "accepted")),
    "a name without letters": Case((*SELECT, "--name", ""), ("--name", "''", "accepted")),
    "an idle time that is none": Case((*SELECT, "--idle", "2"), ("--idle", "'2'", "accepted")),
    "a matcher that is not one": Case(
        (*SELECT, "--match", "{newer_than: 3d}"), ("--match:1", "exactly one of all, any")
    ),
    "a matcher that is no YAML": Case((*SELECT, "--match", "{"), ("--match:1", "not YAML")),
    "a matcher with a wrong value": Case(
        (*SELECT, "--match", "{older_than: soon}"), ("--match:1", "older_than", "'soon'")
    ),
    "a share that is none": Case(
        (*SELECT, "--expired", "--max-percent", "nan"), ("--max-percent", "'nan'", "accepted")
    ),
    "a share out of range": Case(
        (*SELECT, "--expired", "--max-failure-percent", "101"), ("--max-failure-percent", "'101'")
    ),
    "a list that is not there": Case(
        (*SELECT, "--from", "no-such-list.txt"), ("--from", "no-such-list.txt", "accepted")
    ),
    "a list that is a directory": Case((*SELECT, "--from", "/"), ("--from", "accepted")),
    "a list in a form that is none": Case(
        (*SELECT, "--from", "-", "--format", "xml"), ("--format", "'xml'", "'lines'", "'json'")
    ),
    "a run to watch that is not there": Case(
        ("watch", "20260101-000000-abcdefabcd"), ("'20260101-000000-abc",)
    ),
    "a run to retry that is not there": Case(
        ("retry", "20260101-000000-abcdefabcd"), ("'20260101-000000-abc",)
    ),
    "an unknown option": Case((*YES, "--force"), ("--force", "delete --help")),
    "an unknown command": Case(("purge",), ("'purge'", "--help")),
    "an unknown outcome": Case(
        ("results", "r", "--outcome", "gone"),
        ("--outcome", "'gone'", "'deleted'", "'failed'", "'skipped'"),
    ),
    "two formats": Case(("results", "r", "--json", "--csv"), ("--json", "--csv", "accepted")),
    "a number out of range": Case(("runs", "--limit", "0"), ("--limit", "'0'", "equal to 1")),
    "a pool name that is not one": Case(
        ("delete", "--project", PROJECT, POOL, "Train_Pool", "--yes"),
        ("'Train_Pool'", "accepted", "36 to 63"),
    ),
    "a project of somebody else": Case(
        ("delete", "--project", "f" * 32, POOL, "--yes"),
        ("HTTP 403", "no access to this project"),
    ),
    "an unknown run": Case(("results", "20260101-000000-abcdefabcd"), ("'20260101-000000-abc",)),
    "a setting out of range": Case(
        YES, ("POOLSWEEP_RATE_LIMIT", "'-1'", "greater than or equal to 0"), {"RATE_LIMIT": "-1"}
    ),
    "a Redis URL that is not one": Case(
        ("runs",),
        ("POOLSWEEP_REDIS_URL", "accepted", "redis://host:port/db"),
        {"REDIS_URL": f"http://:{SECRET}@127.0.0.1/"},
    ),
    "a Redis that is not there": Case(
        YES,
        ("POOLSWEEP_REDIS_URL", "127.0.0.1:1", "accepted"),
        {"REDIS_URL": f"redis://:{SECRET}@127.0.0.1:1/0"},
        code=EXIT_UNREACHABLE,
    ),
    "a worker's Redis that is not there": Case(
        ("worker",),
        ("POOLSWEEP_REDIS_URL", "127.0.0.1:1", "accepted"),
        {"REDIS_URL": f"redis://:{SECRET}@127.0.0.1:1/0"},
        code=EXIT_UNREACHABLE,
    ),
    "a Redis that refuses the password": Case(
        YES,
        ("POOLSWEEP_REDIS_URL", "password", "accepted"),
        {"REDIS_URL": f"{{redis}}?username=poolsweep&password={SECRET}"},
    ),
    "no endpoint": Case(YES, ("POOLSWEEP_ENDPOINT", "not set", "accepted"), {"ENDPOINT": None}),
    "a worker's endpoint without encryption": Case(
        ("worker",),
        ("POOLSWEEP_ENDPOINT", "'http://modelarts.example.com'", "accepted"),
        {"ENDPOINT": "http://modelarts.example.com"},
    ),
    "an API that is not there": Case(
        YES,
        ("listing the pools", "no connection"),
        {"ENDPOINT": "http://127.0.0.1:1"},
        code=EXIT_UNREACHABLE,
    ),
    "a web page instead of the API": Case(
        YES, ("listing the pools", "HTML"), {"ENDPOINT": "{page}"}
    ),
    "a wrong secret key": Case(YES, ("refused",), {"SK": SECRET}),
    "a worker without credentials": Case(
        ("worker",), ("credentials", "accepted"), {"AK": None, "SK": None}
    ),
    "a state directory that is a file": Case(
        ("runs",), ("POOLSWEEP_STATE_DIR", "accepted"), {"STATE_DIR": __file__}
    ),
    "a demo's state directory that is a file": Case(
        ("demo",), ("POOLSWEEP_STATE_DIR", "accepted"), {"STATE_DIR": __file__}
    ),
}


class _Page(http.server.BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        body = b"<html>Sign in to the guest network</html>"
        self.send_response(200)
        self.send_header("Content-Type", "text/html")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture(scope="module")
def page() -> Iterator[str]:
    """A web server that is not the API."""
    with http.server.HTTPServer(("127.0.0.1", 0), _Page) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()
        thread.join()


@pytest.fixture(scope="module")
def somebody(tmp_path_factory: pytest.TempPathFactory, cloud: Cloud) -> Iterator[User]:
    """A user whose every other setting is right."""
    somebody = User(tmp_path_factory.mktemp("state"), cloud.settings)
    with embedded_redis.join(somebody.state_dir):
        yield somebody


@pytest.fixture(scope="module")
def endings(somebody: User, page: str) -> dict[str, Ended]:
    """What every case came to; side by side, since each is mostly a program that loads."""
    places = {"{redis}": embedded_redis.url(somebody.state_dir), "{page}": page}

    def run(case: Case) -> Ended:
        settings = {**somebody.settings, **case.settings}
        for place, value in places.items():
            settings = {
                name: text and text.replace(place, value) for name, text in settings.items()
            }
        given = {name: text for name, text in settings.items() if text is not None}
        return User(somebody.state_dir, given).run(*case.arguments)

    with ThreadPoolExecutor(3) as threads:
        return dict(zip(CASES, threads.map(run, CASES.values()), strict=True))


@pytest.mark.parametrize("name", CASES)
def test_it_is_told_in_one_sentence(name: str, endings: dict[str, Ended]) -> None:
    ended = endings[name]
    sentence = one_sentence(ended)
    assert ended.code == CASES[name].code, sentence
    for words in CASES[name].words:
        assert words in sentence
    assert ended.out == ""
    assert SECRET not in ended.err


def test_nothing_of_it_left_a_run_a_call_or_a_process(
    endings: dict[str, Ended], somebody: User, cloud: Cloud
) -> None:
    assert len(endings) == len(CASES)
    assert somebody.runs() == {}
    assert cloud.deletes() == []
    assert [each for each in somebody.processes() if each.name() != "redis-server"] == []


def test_the_version_is_told(user: User) -> None:
    ended = user.run("--version")
    assert (ended.code, ended.err) == (0, "")
    program, version = ended.out.split()
    assert program == "poolsweep"
    assert version[0].isdigit()


def test_without_a_command_the_help_is_shown(user: User) -> None:
    ended = user.run()
    assert ended.code == 2
    for command in ("delete", "results", "runs", "watch", "retry", "worker", "sandbox", "demo"):
        assert command in ended.out
    assert ended.err == ""


@pytest.mark.parametrize("name", COMMANDS)
def test_the_help_of_a_command_has_examples_that_its_options_allow(name: str) -> None:
    with typer.Context(typer.main.get_command(app)) as context:
        command = typer.main.get_command(app).get_command(context, name)  # type: ignore[attr-defined]
    assert command.help
    options = {option for each in command.params for option in each.opts}
    for example in EXAMPLES.get(name, ()):
        words = example.split()
        assert words[:2] == ["poolsweep", name]
        assert {word for word in words if word.startswith("--")} <= options
        assert example in command.epilog
