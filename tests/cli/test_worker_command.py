"""`poolsweep worker` and `poolsweep sandbox`: they serve until they are stopped, and then leave."""

from __future__ import annotations

import json
import os
import subprocess
from typing import TYPE_CHECKING

import pytest

from tests.cli.conftest import POOLSWEEP, Cloud, User, eventually
from worker.ledger import JobState

if TYPE_CHECKING:
    from pathlib import Path


@pytest.fixture
def dora(tmp_path: Path, cloud: Cloud) -> User:
    """A user of the cloud with a state directory of her own."""
    return User(tmp_path, cloud.settings)


def test_what_is_left_for_later_outlives_the_command_and_is_done_by_a_worker(
    dora: User, cloud: Cloud
) -> None:
    pool = next(
        name
        for name, state in cloud.pools().items()
        if (state["category"], state["behaviour"]) == ("expired", "normal")
    )
    detached = dora.run("delete", "--project", cloud.project, pool, "--yes", "--detach")
    assert detached.code == 0
    run_id = detached.lines[-1]
    assert f"Started the embedded Redis in {dora.state_dir}" in detached.err
    assert "`poolsweep worker`" in detached.err
    assert dora.processes() == [], "the embedded Redis ended with its last user"
    assert cloud.pools()[pool]["deletes"] == 0

    worker = dora.start("worker")
    eventually((dora.state_dir / "redis" / "redis.sock").exists)
    eventually(lambda: dora.runs()[run_id].ended)
    assert dora.runs()[run_id].counts[JobState.DELETED] == 1
    assert not cloud.pools()[pool]["there"]
    joined = dora.run("runs")
    assert f"Joined the embedded Redis in {dora.state_dir}" in joined.err
    worker.interrupt(group=True)
    ended = worker.end()
    assert ended.code == 0, ended.err
    assert "Traceback" not in ended.err
    for line in ended.err.splitlines():
        assert json.loads(line)["event"], "no terminal: its log is lines of JSON"
    assert dora.processes() == []
    assert dora.jobs(run_id)[pool].state is JobState.DELETED


def test_a_worker_that_is_stopped_while_it_starts_leaves_nothing(dora: User) -> None:
    worker = dora.start("worker")
    eventually(lambda: dora.children("redis-server"))
    worker.interrupt(group=False)
    ended = worker.end()
    assert ended.code == 0
    assert "Traceback" not in ended.err
    eventually(lambda: not dora.processes())


def test_a_worker_ends_with_its_standard_input_when_it_is_asked_to(dora: User) -> None:
    reading, writing = os.pipe()
    environment = dora.environment()
    with subprocess.Popen(
        [POOLSWEEP, "worker", "--exit-with-stdin"],
        env=environment,
        stdin=reading,
        stderr=subprocess.DEVNULL,
    ) as worker:
        os.close(reading)
        eventually(lambda: dora.children("redis-server"))
        os.close(writing)
        assert worker.wait(30) == 0
    eventually(lambda: not dora.processes())


def test_a_sandbox_says_where_it_is_and_how_to_get_in(user: User) -> None:
    sandbox = user.start("sandbox", "--pools", "10")
    assert sandbox.stdout
    said = json.loads(sandbox.stdout.readline())
    settings = {"ENDPOINT": said["url"], "AK": said["ak"], "SK": said["sk"]}
    absent = "auto-pool-os-86c13962597848eeb29c5861153a391f"
    preview = user.run("delete", "--project", said["project_ids"][0], absent, **settings)
    assert preview.code == 0, preview.err
    assert f"{absent}: not in the project" in preview.out
    sandbox.interrupt(group=True)
    ended = sandbox.end()
    assert (ended.code, ended.err) == (0, "")


def test_a_sandbox_on_a_port_that_is_taken_is_told_in_a_sentence(user: User, cloud: Cloud) -> None:
    port = cloud.url.rpartition(":")[2]
    ended = user.run("sandbox", "--port", port)
    assert ended.code == 2
    (sentence,) = ended.err.splitlines()
    for words in ("--port", port, "accepted"):
        assert words in sentence
