"""The `poolsweep` command as its user meets it: as a process, with a state directory of its own."""

from __future__ import annotations

import asyncio
import fcntl
import json
import os
import pty
import re
import signal
import struct
import subprocess
import sys
import tempfile
import termios
import time
import urllib.request
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import psutil
import pytest
from redis.asyncio import Redis

from scheduler import children
from tests import nursery
from worker import embedded_redis
from worker.ledger import Job, Ledger, Run

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Iterator

T = TypeVar("T")

POOLSWEEP = str(Path(sys.executable).with_name("poolsweep"))
CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f]")
QUESTION = b"to stop."
ESCAPE = re.compile(r"\x1b(?:\[[0-?]*[ -/]*[@-~]|\][^\x07]*\x07|.)")


def eventually(condition: Callable[[], T], *, within_s: float = 30) -> T:
    """Ask again and again until the answer is truthy; fail if it takes too long."""
    deadline = time.monotonic() + within_s
    while not (answer := condition()):
        assert time.monotonic() < deadline, "it never came to that"
        time.sleep(0.02)
    return answer


@dataclass(frozen=True)
class Ended:
    """A command that has ended."""

    code: int
    out: str
    err: str

    @property
    def lines(self) -> list[str]:
        return self.out.splitlines()


class Command(subprocess.Popen[str]):
    """A command that runs, in a process group of its own as a shell would start it."""

    def __init__(self, arguments: tuple[str, ...], environment: dict[str, str], **given: Any):
        streams: dict[str, Any] = {
            "stdin": subprocess.DEVNULL,
            "stdout": subprocess.PIPE,
            "stderr": subprocess.PIPE,
        }
        super().__init__(
            [POOLSWEEP, *arguments],
            env=environment,
            text=True,
            start_new_session=True,
            **(streams | given),
        )

    def end(self, *, within_s: float = 60) -> Ended:
        """What it came to, by itself."""
        try:
            out, err = self.communicate(timeout=within_s)
        except subprocess.TimeoutExpired:
            self.kill()
            raise
        return Ended(self.returncode, out or "", err or "")

    def interrupt(self, *, group: bool) -> None:
        """Ctrl-C reaches the whole foreground group; a supervisor signals just the process."""
        if group:
            os.killpg(self.pid, signal.SIGINT)
        else:
            self.send_signal(signal.SIGINT)


@dataclass(frozen=True)
class User:
    """Somebody with a state directory, and settings in the environment."""

    state_dir: Path
    settings: dict[str, str] = field(default_factory=dict)

    def environment(self, **settings: str) -> dict[str, str]:
        """The variables of the user's processes."""
        kept = {
            name: value
            for name, value in os.environ.items()
            if not name.startswith("POOLSWEEP_") and name not in {"COLUMNS", "LINES", "FORCE_COLOR"}
        }
        ours = {"STATE_DIR": str(self.state_dir), **self.settings, **settings}
        return {**kept, **{f"POOLSWEEP_{name}": value for name, value in ours.items()}}

    def start(self, *arguments: str, **settings: str) -> Command:
        """Start a command."""
        return Command(arguments, self.environment(**settings))

    def run(self, *arguments: str, **settings: str) -> Ended:
        """Run a command to its end."""
        return Ended(*nursery.run(arguments, self.environment(**settings)))

    def run_with(self, text: str, *arguments: str, **settings: str) -> Ended:
        """Run a command to its end with a text as its standard input."""
        with tempfile.TemporaryFile("w+") as file:
            file.write(text)
            file.seek(0)
            return Ended(*nursery.run(arguments, self.environment(**settings), file))

    def run_on_terminal(
        self,
        *arguments: str,
        columns: int = 200,
        interrupt_at: str = "",
        answer: str | None = None,
        **settings: str,
    ) -> Ended:
        """Run a command on a terminal; what it writes there is its output.

        It gets a Ctrl-C as soon as it has written certain words, if these are given; and an answer,
        if one is given, as soon as it asks.
        """
        leader, follower = pty.openpty()
        fcntl.ioctl(follower, termios.TIOCSWINSZ, struct.pack("HHHH", 40, columns, 0, 0))
        environment = self.environment(**settings) | {"TERM": "xterm-256color"}
        command = Command(arguments, environment, stdin=follower, stdout=follower, stderr=follower)
        os.close(follower)
        written = b""
        while True:
            try:
                written += os.read(leader, 65_536)
            except OSError:  # all of the terminal's users have closed it
                break
            if interrupt_at and interrupt_at.encode() in written:
                command.interrupt(group=True)
                interrupt_at = ""
            if answer is not None and QUESTION in written:
                os.write(leader, answer.encode())
                answer = None
        os.close(leader)
        return Ended(command.wait(60), written.decode(), "")

    def results(self, run_id: str) -> dict[str, Any]:
        """A run and its jobs, as the command itself tells."""
        ended = self.run("results", run_id, "--json")
        assert ended.code == 0, ended.err
        found: dict[str, Any] = json.loads(ended.out)
        return found

    def processes(self) -> list[psutil.Process]:
        """The processes started for this state directory that are not zombies."""
        return [process for process in psutil.process_iter() if self._is_ours(process)]

    def children(self, words: str) -> list[psutil.Process]:
        """Those whose command line holds the words."""
        found = []
        for process in self.processes():
            try:
                if words in " ".join(process.cmdline()):
                    found.append(process)
            except psutil.Error:
                continue
        return found

    def _is_ours(self, process: psutil.Process) -> bool:
        try:
            if process.environ().get("POOLSWEEP_STATE_DIR") == str(self.state_dir):
                return True
            # redis-server writes its title over its environment.
            return Path(process.cwd()).is_relative_to(self.state_dir)
        except (psutil.Error, OSError):
            return False

    def ask(self, question: Callable[[Redis], Awaitable[T]]) -> T:
        """Ask the user's Redis, joining the embedded one if none is configured."""

        async def asked(url: str) -> T:
            async with Redis.from_url(url, decode_responses=True) as redis:
                return await question(redis)

        if url := self.settings.get("REDIS_URL"):
            return asyncio.run(asked(url))
        with embedded_redis.join(self.state_dir) as server:
            return asyncio.run(asked(server.url))

    def runs(self) -> dict[str, Run]:
        """The runs by id."""
        return {run.run_id: run for run in self.ask(lambda redis: Ledger(redis).runs())}

    def jobs(self, run_id: str) -> dict[str, Job]:
        """A run's jobs by the ids of their pools."""
        jobs = self.ask(lambda redis: Ledger(redis).jobs(run_id))
        return {job.pool_name: job for job in jobs}


@dataclass(frozen=True)
class Cloud:
    """A sandbox in a process of its own."""

    url: str
    project: str
    settings: dict[str, str]
    token: str

    def pools(self) -> dict[str, dict[str, Any]]:
        """What each pool is an example of, by id."""
        found: dict[str, dict[str, Any]] = self._call("GET", "/_sandbox/state")
        return found

    def documents(self) -> dict[str, dict[str, Any]]:
        """The pools as the API shows them, by id."""
        items = self._call("GET", f"/v2/{self.project}/pools")["items"]
        return {item["metadata"]["name"]: item for item in items}

    def deletes(self) -> list[str]:
        """The ids of the pools that DELETE calls were made for."""
        journal = self._call("GET", "/_sandbox/calls")
        return [pool for _, method, _, pool, _ in journal if method == "DELETE"]

    def change(self, pool: str, **change: Any) -> None:
        """Change a pool from outside."""
        self._call("POST", f"/_sandbox/pools/{self.project}/{pool}", change)

    def vanish(self, pool: str) -> None:
        """Somebody else's deletion of a pool comes to its end."""
        self._call("DELETE", f"/_sandbox/pools/{self.project}/{pool}")

    def _call(self, method: str, path: str, body: Any = None) -> Any:
        request = urllib.request.Request(  # noqa: S310 - a loopback address
            self.url + path,
            method=method,
            data=None if body is None else json.dumps(body).encode(),
            headers={"X-Auth-Token": self.token, "Content-Type": "application/json"},
        )
        with urllib.request.urlopen(request, timeout=20) as answer:  # noqa: S310
            return json.loads(answer.read())


@pytest.fixture(scope="module")
def cloud(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cloud]:
    """A cloud with pools of every kind, some of which fail or never end."""
    log = tmp_path_factory.mktemp("cloud") / "sandbox.log"
    options = ["--pools", "300", "--delete-seconds", "0.2", "--doomed", "0.05", "--stuck", "0.05"]
    with children.sandbox([*options, "--flaky", "0.05"], log) as said:
        settings = {
            "ENDPOINT": said["url"],
            "AK": said["ak"],
            "SK": said["sk"],
            "RATE_LIMIT": "200",
            "VERIFY_INTERVAL_S": "1",
            "PRECONDITION_MAX_AGE_S": "1",
            "BACKOFF_BASE_S": "0.1",
        }
        yield Cloud(said["url"], said["project_ids"][0], settings, said["token"])


@pytest.fixture
def user(tmp_path: Path) -> User:
    """A new user."""
    return User(tmp_path)


def one_sentence(ended: Ended) -> str:
    """The sentence that a command which cannot do what is asked ends with."""
    lines = [line for line in ended.err.splitlines() if "the embedded Redis in" not in line]
    assert len(lines) == 1, ended.err
    assert lines[0].startswith("poolsweep: ")
    assert not CONTROL.search(ended.err)
    return lines[0]
