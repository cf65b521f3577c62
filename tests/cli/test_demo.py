"""`poolsweep demo`: everything once, told clearly, and nothing left behind however it ends."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

import psutil
import pytest

from tests.cli.conftest import CONTROL, ESCAPE, Command, Ended, User, eventually
from worker.ledger import JobState

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

SMALL = ("demo", "--pools", "40", "--seed", "14")
"""A few pools, none of which takes until the deadline."""


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[User, Command]]:
    """The demo as `make demo` starts it; the tests of interrupts run meanwhile."""
    # Settings for a real cloud must neither reach the demo nor the demo's worker.
    settings = {
        "ENDPOINT": "https://modelarts.example.com",
        "TOKEN": "a-real-token",
        "IAM_USER": "a-real-user",
        "RATE_LIMIT": "0.5",
    }
    user = User(tmp_path_factory.mktemp("whole"), settings)
    command = user.start("demo")
    yield user, command
    command.kill()
    command.wait()


@pytest.fixture
def demo(user: User, whole: tuple[User, Command]) -> Iterator[Command]:
    """A small demo."""
    command = user.start(*SMALL)
    yield command
    command.kill()
    command.wait()


def loading(_: User, command: Command) -> bool:
    """The program is still being loaded: nothing of it has run."""
    files = {each.path for each in psutil.Process(command.pid).memory_maps()}
    return any("pydantic_core" in path for path in files)


def sandbox_starts(user: User, _: Command) -> bool:
    """The simulated cloud has been started and has not said that it is ready."""
    return bool(user.children("-m sandbox"))


def worker_starts(user: User, _: Command) -> bool:
    """The worker has been started, and is not at work yet."""
    return bool(user.children("scheduler.cli worker"))


def run_goes_on(_: User, command: Command) -> bool:
    """Jobs are being executed."""
    assert command.stderr
    return command.stderr.readline().startswith("Run ")


@pytest.mark.parametrize(
    ("moment", "group"),
    [
        (loading, True),
        (loading, False),
        (sandbox_starts, False),
        (worker_starts, True),
        (run_goes_on, True),
        (run_goes_on, False),
    ],
)
def test_ctrl_c_ends_it_in_order_at_any_moment(
    moment: Callable[[User, Command], bool], group: bool, user: User, demo: Command
) -> None:
    eventually(lambda: moment(user, demo))
    demo.interrupt(group=group)
    ended = demo.end()
    assert user.processes() == []
    assert "Traceback" not in ended.err
    assert ended.code == 130
    if moment is run_goes_on:
        (run_id,) = re.findall(r"poolsweep results (\S+)", ended.err)
        run = user.runs()[run_id]
        assert run.state == "finished", "no cloud is left to go on with"
        assert run.counts[JobState.CANCELLED] > 0


def test_killed_outright_it_takes_its_children_along_and_the_next_command_finds_its_run(
    user: User, demo: Command
) -> None:
    eventually(lambda: run_goes_on(user, demo))
    demo.kill()
    demo.end()
    # They end with their standard input. The worker stops the embedded Redis as its last user; had
    # it not joined yet, the Redis would stay for the next command to join, and to stop.
    eventually(lambda: not user.children("-m sandbox"))
    eventually(lambda: not user.children("scheduler.cli worker"))
    braked, run = sorted(user.runs().values(), key=lambda each: each.total)
    assert (braked.state, braked.total) == ("braked", 0)
    assert run.total > 0
    assert user.processes() == []


@pytest.fixture(scope="module")
def terminal_user(tmp_path_factory: pytest.TempPathFactory) -> User:
    return User(tmp_path_factory.mktemp("terminal"))


@pytest.fixture(scope="module")
def on_terminal(terminal_user: User) -> Ended:
    """A small demo on a terminal, with a Ctrl-C when it stops what it has started."""
    return terminal_user.run_on_terminal(*SMALL, columns=80, interrupt_at="Look again with")


def test_on_a_terminal_of_80_columns_the_progress_is_two_lines_that_fit(on_terminal: Ended) -> None:
    ended = on_terminal
    lines = [line for line in re.split(r"[\r\n]+", ESCAPE.sub("", ended.out)) if line.strip()]
    assert max(map(len, lines)) <= 80
    bars = [number for number, line in enumerate(lines) if re.match(r"Run \S+ ━", line)]
    assert len(bars) > 5, "it is redrawn while the run goes on"
    for number in bars:
        pattern = r"Run \S{26} [━╸╺ ]+ +\d+% \S+/s \d:\d\d:\d\d(, [\d:-]+ left)? ?"
        assert re.fullmatch(pattern, lines[number])
    assert re.fullmatch(r"(\d+ [a-z_]+(, )?)+", lines[bars[-1] + 1].strip())
    assert "100%" in lines[bars[-1]]


def test_ctrl_c_when_the_results_are_shown_leaves_nothing_either(
    on_terminal: Ended, terminal_user: User
) -> None:
    assert on_terminal.code == 130
    assert "Traceback" not in on_terminal.out
    assert terminal_user.processes() == []
    run = max(terminal_user.runs().values(), key=lambda each: each.total)
    assert run.state == "finished"


@pytest.fixture(scope="module")
def ended(whole: tuple[User, Command]) -> Ended:
    return whole[1].end()


@pytest.fixture(scope="module")
def document(whole: tuple[User, Command], ended: Ended) -> dict[str, Any]:
    user, _ = whole
    run = max(user.runs().values(), key=lambda each: each.total)
    return user.results(run.run_id)


def test_it_sweeps_hundreds_of_pools_of_every_kind(
    whole: tuple[User, Command], ended: Ended, document: dict[str, Any]
) -> None:
    assert ended.code == 0, ended.err
    assert whole[0].processes() == []
    run, jobs = document["run"], document["jobs"]
    assert run["state"] == "finished"
    assert run["counts"]["deleted"] >= 300
    assert run["counts"]["already_deleted"] >= 1
    statuses = [[attempt["status"] for attempt in job["attempts"]] for job in jobs]
    outcomes = [job["outcome"] for job in jobs]
    ways = list(zip(statuses, outcomes, strict=True))
    assert any(429 in each and outcome == "deleted" for each, outcome in ways), "throttled"
    assert any(max(each[0], 0) >= 500 and o == "deleted" for each, o in ways if each), "flaky"
    assert any(each and each[-1] == 403 and o == "failed" for each, o in ways), "for good"
    assert "protected" in ended.out
    assert "frozen" in ended.out


def test_a_pool_with_sub_pools_waits_for_them_and_is_deleted(document: dict[str, Any]) -> None:
    waited = [job for job in document["jobs"] if "sub-pools" in job["reason"]]
    assert waited == [], "none gave up waiting"


def test_every_failure_is_shown_with_its_reason_and_how_to_look_again(
    ended: Ended, document: dict[str, Any]
) -> None:
    run_id = document["run"]["run_id"]
    failed = [job for job in document["jobs"] if job["outcome"] == "failed"]
    assert failed
    shown: dict[str, str] = {}
    reason = ""
    for line in ended.lines:
        if match := re.fullmatch(r"\d+ failed: (.*)", line):
            reason = match[1]
        elif reason and line.startswith("    "):
            shown[line.strip()] = reason
    assert shown == {job["pool_name"]: job["reason"] for job in failed}
    assert f"Look again with: poolsweep results {run_id}" in ended.lines
    assert f"Only failures:   poolsweep results {run_id} --outcome failed" in ended.lines


def test_without_a_terminal_its_progress_is_a_few_plain_lines(ended: Ended) -> None:
    assert not CONTROL.search(ended.out + ended.err)
    redis, begun, done = ended.err.splitlines()
    assert redis.startswith("Started the embedded Redis in ")
    assert re.fullmatch(r"Run \S+: \d+ jobs", begun)
    assert re.fullmatch(r"Run \S+: (\d+) of \1 jobs ended after \d+ s: .*deleted.*", done)
