"""The `poolsweep sandbox` command as a process."""

from __future__ import annotations

import contextlib
import json
import os
import pty
import re
import select
import signal
import socket
import subprocess
import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from aiohttp import ClientSession
from pydantic import SecretStr

from sandbox.config import SandboxConfig
from sandbox.fleet import generate
from scheduler import children
from tests.api.servers import POOL, PROJECT, calling
from tests.conftest import until
from worker.modelarts import AccessKey, Answer, ApiError, Failure, Token, VerdictKind, classify

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

COMMAND = [str(Path(sys.executable).with_name("poolsweep")), "sandbox"]
MODULE = [sys.executable, "-m", "sandbox"]
"""The same command by itself, which starts faster."""
TIMEOUT_S = 30


@contextlib.contextmanager
def started(*command: str) -> Iterator[tuple[subprocess.Popen[str], dict[str, Any]]]:
    """The process and what it says when it is ready."""
    with subprocess.Popen(
        command,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        try:
            assert process.stdout is not None
            yield process, json.loads(process.stdout.readline())
        finally:
            process.kill()


async def state(url: str) -> dict[str, dict[str, Any]]:
    """What the sandbox says of its pools."""
    async with ClientSession() as session, session.get(f"{url}/_sandbox/state") as response:
        found: dict[str, dict[str, Any]] = await response.json()
        return found


# Starting and stopping


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
async def test_it_says_where_it_serves_lets_in_whom_it_names_and_stops_in_order(
    number: signal.Signals,
) -> None:
    with started(*COMMAND, "--pools", "12", "--projects", "2") as (process, ready):
        assert (ready["event"], ready["pid"]) == ("sandbox_ready", process.pid)
        assert ready["url"].startswith("http://127.0.0.1:")
        assert ready["project_ids"][0] == PROJECT
        assert len(ready["project_ids"]) == 2
        key = AccessKey(SecretStr(ready["ak"]), SecretStr(ready["sk"]))
        for credentials in (key, Token(SecretStr(ready["token"]))):
            async with calling(ready["url"], credentials) as client:
                listings = [await client.list_pools(project) for project in ready["project_ids"]]
                assert sum(len(listing.pools) for listing in listings) == 12
        process.send_signal(number)
        assert process.wait(TIMEOUT_S) == 0
        assert process.stderr is not None
        assert process.stderr.read() == ""


async def test_it_stops_in_order_in_the_middle_of_a_call() -> None:
    with started(*MODULE, "--hang-rate", "1") as (process, ready):

        async def called() -> bool:
            url = f"{ready['url']}/_sandbox/calls"
            async with ClientSession() as session, session.get(url) as response:
                return bool(await response.json())

        host, _, port = ready["url"].removeprefix("http://").partition(":")
        with socket.create_connection((host, int(port))) as connection:
            connection.sendall(b"GET / HTTP/1.1\r\nHost: x\r\n\r\n")
            await until(called)
            process.terminate()
            assert process.wait(TIMEOUT_S) == 0
            assert connection.recv(1) == b""
        assert process.stderr is not None
        assert "Traceback" not in process.stderr.read()


def test_it_ends_with_its_standard_input_if_told_to() -> None:
    with started(*MODULE, "--exit-with-stdin") as (process, _):
        assert process.stdin is not None
        process.stdin.write("not the end yet\n")
        process.stdin.flush()
        assert process.poll() is None
        process.stdin.close()
        assert process.wait(TIMEOUT_S) == 0


def test_an_input_that_has_ended_already_ends_it_at_once() -> None:
    with Path(os.devnull).open() as nothing:
        done = subprocess.run(
            [*MODULE, "--exit-with-stdin"],
            stdin=nothing,
            capture_output=True,
            text=True,
            timeout=TIMEOUT_S,
            check=False,
        )
    assert (done.returncode, done.stderr) == (0, "")


def test_on_a_terminal_it_says_what_to_export() -> None:
    ours, theirs = pty.openpty()
    with subprocess.Popen(
        MODULE, stdout=theirs, env={**os.environ, "COLUMNS": "120", "TERM": "dumb"}
    ) as process:
        os.close(theirs)
        try:
            text = b""
            while b"POOLSWEEP_SK=" not in text:
                assert select.select([ours], [], [], TIMEOUT_S)[0], text
                text += os.read(ours, 4096)
        finally:
            process.terminate()
            process.wait(TIMEOUT_S)
            os.close(ours)
    assert re.search(rb"Simulated ModelArts API at http://127\.0\.0\.1:\d+", text)
    assert re.search(rb"export POOLSWEEP_ENDPOINT=http://127\.0\.0\.1:\d+\s", text)
    assert b"export POOLSWEEP_AK=SANDBOXACCESSKEY POOLSWEEP_SK=sandbox-secret-key" in text


# What it refuses


def refused(*arguments: str) -> str:
    """The sentence with which it ends."""
    done = subprocess.run(
        [*COMMAND, *arguments],
        capture_output=True,
        text=True,
        timeout=TIMEOUT_S,
        check=False,
    )
    assert (done.returncode, done.stdout) == (2, "")
    assert "Traceback" not in done.stderr
    return done.stderr


def test_a_port_in_use_is_one_sentence() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        sentence = refused("--port", str(port))
    assert sentence == (
        f"poolsweep: --port: {port} cannot be used: Address already in use; "
        "accepted: a free one, or 0.\n"
    )


def test_shares_that_are_more_than_everything_are_one_sentence() -> None:
    assert refused("--gone", "0.7", "--flaky", "0.6") == (
        "poolsweep: gone 0.7, flaky 0.6 are more than all; "
        "accepted: shares of at most 1 together.\n"
    )


def test_a_value_that_is_no_number_of_seconds_is_one_sentence_that_names_it() -> None:
    assert refused("--delete-seconds", "inf") == (
        "poolsweep: --delete-seconds: 'inf' is not accepted: input should be a finite number.\n"
    )


# Its flags, each shown by our client


def is_throttled(answer: Answer) -> bool:
    return (answer.status, answer.retry_after_s) == (429, 1)


FLAGS: dict[str, Callable[[Answer], bool]] = {
    "--rate-429 1": is_throttled,
    "--rate-5xx 1": lambda answer: answer.status in {500, 502, 503},
    "--latency-ms 150": lambda answer: answer.status == 404 and answer.duration_s >= 0.15,
    "--reset-rate 1": lambda answer: answer.failure is Failure.RESET,
    "--hang-rate 1": lambda answer: answer.failure is Failure.TIMEOUT,
    "--no-auth": lambda answer: answer.status == 404,
}


@pytest.mark.parametrize("flag", FLAGS)
async def test_a_flag_does_to_calls_what_it_says(flag: str, tmp_path: Path) -> None:
    with children.sandbox(["--pools", "1", *flag.split()], tmp_path / "log") as ready:
        credentials = Token(SecretStr("wrong")) if flag == "--no-auth" else None
        timeout_s = 0.3 if "hang" in flag else 20
        async with calling(ready["url"], credentials, total_timeout_s=timeout_s) as client:
            answer = await client.delete_pool(PROJECT, POOL)
    assert FLAGS[flag](answer)


async def test_the_quota_flags_let_so_many_calls_pass(tmp_path: Path) -> None:
    arguments = ["--pools", "0", "--quota", "0.001", "--quota-burst", "2"]
    with children.sandbox(arguments, tmp_path / "log") as ready:
        async with calling(ready["url"]) as client:
            answers = [await client.delete_pool(PROJECT, POOL) for _ in range(6)]
            with pytest.raises(ApiError, match="HTTP 429"):
                await client.list_pools(PROJECT)
    assert [answer.status for answer in answers] == [404, 404, 404, 429, 429, 429]
    assert all(is_throttled(answer) for answer in answers[3:])


async def test_the_flags_of_the_fleet_make_the_pools_that_they_say(tmp_path: Path) -> None:
    shares = {"gone": 0.1, "throttled": 0.2, "flaky": 0.2, "doomed": 0.1, "stuck": 0.2}
    arguments = [text for name, share in shares.items() for text in (f"--{name}", f"{share}")]
    arguments += ["--pools", "600", "--projects", "3", "--delete-seconds", "0"]
    arguments += ["--seed", "4"]
    with children.sandbox(arguments, tmp_path / "log") as ready:
        pools = await state(ready["url"])
        config = SandboxConfig(pools=600, projects=3, seed=4, **shares)
        fleet = {member.name: member for member in generate(config, datetime.now(UTC))}
        assert {name: pool["behaviour"] for name, pool in pools.items()} == {
            name: member.behaviour for name, member in fleet.items()
        }
        deletable = [
            (name, pool)
            for name, pool in pools.items()
            if pool["category"] in {"expired", "tagged"}
        ]
        wanted = {"gone": VerdictKind.ALREADY_DELETED, "throttled": VerdictKind.RETRY}
        wanted |= {"flaky": VerdictKind.RETRY, "doomed": VerdictKind.FAILED}
        async with calling(ready["url"]) as client:
            for name, pool in deletable:
                kind = classify(await client.delete_pool(pool["project_id"], name)).kind
                assert kind is wanted.get(pool["behaviour"], VerdictKind.ACCEPTED)
        after = await state(ready["url"])
    assert {pool["project_id"] for pool in pools.values()} == set(ready["project_ids"])
    for behaviour, share in shares.items():
        found = sum(pool["behaviour"] == behaviour for _, pool in deletable)
        assert 0.5 < found / (share * len(deletable)) < 1.6
    there = {
        pool["behaviour"]
        for name, pool in after.items()
        if name in dict(deletable)
        if pool["accepted"] and pool["there"]
    }
    assert there == {"stuck"}


async def test_the_life_of_tokens_is_as_long_as_the_flag_says(tmp_path: Path) -> None:
    user = {"name": "sandbox-user", "password": "sandbox-password"}
    user_of_domain = {**user, "domain": {"name": "sandbox-domain"}}
    identity = {"methods": ["password"], "password": {"user": user_of_domain}}
    request = {"auth": {"identity": identity, "scope": {"project": {"id": PROJECT}}}}
    with children.sandbox(["--token-seconds", "1"], tmp_path / "log") as ready:
        async with ClientSession() as session:
            url = f"{ready['url']}/v3/auth/tokens"
            async with session.post(url, json=request) as response:
                token = response.headers["X-Subject-Token"]
                assert response.status == 201
            async with calling(ready["url"], Token(SecretStr(token))) as client:
                assert (await client.delete_pool(PROJECT, POOL)).status == 404

                async def ended() -> bool:
                    return (await client.delete_pool(PROJECT, POOL)).status == 401

                await until(ended)
