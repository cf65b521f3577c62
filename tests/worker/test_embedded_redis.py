"""The embedded Redis: shared, started once, stopped by the last to leave, and never doubled."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import stat
import subprocess
import sys
from typing import TYPE_CHECKING, Any

import psutil
import pytest
import redis
from kombu.connection import Connection

from tests.worker.conftest import ROOT, Cloud, Runs, environment, settings_for
from worker import embedded_redis
from worker.embedded_redis import EmbeddedRedisError
from worker.ledger import JobState
from worker.settings import Settings

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from tests.worker.conftest import Workers

MEMBER = """
import json, sys
from pathlib import Path
import redis
from worker import embedded_redis

with embedded_redis.join(Path(sys.argv[1])) as server:
    pid = redis.Redis.from_url(server.url).info("server")["process_id"]
    print(json.dumps({"started": server.started, "server": pid}), flush=True)
    sys.stdin.readline()
"""


class Member:
    """A process that uses the embedded server of a directory until told to leave."""

    def __init__(self, state_dir: Path) -> None:
        self._popen = subprocess.Popen(
            [sys.executable, "-c", MEMBER, str(state_dir)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            cwd=ROOT,
        )

    def joined(self) -> dict[str, Any]:
        assert self._popen.stdout
        answer: dict[str, Any] = json.loads(self._popen.stdout.readline())
        return answer

    def leave(self) -> None:
        self._popen.communicate("\n", timeout=60)
        assert self._popen.returncode == 0

    def kill(self) -> None:
        self._popen.kill()
        self._popen.communicate()


@pytest.fixture
def members(tmp_path: Path) -> Iterator[list[Member]]:
    """Those that a test has join; none of them, and no server, is left behind."""
    started: list[Member] = []
    yield started
    for member in started:
        member.kill()
    with embedded_redis.join(tmp_path):
        pass


def lives(pid: int) -> bool:
    with contextlib.suppress(psutil.NoSuchProcess):
        return bool(psutil.Process(pid).status() != psutil.STATUS_ZOMBIE)
    return False


def servers_in(state_dir: Path) -> list[int]:
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            if process.name().startswith("redis-server") and process.cwd() == str(
                state_dir / "redis"
            ):
                found.append(process.pid)
    return found


def test_the_last_to_leave_stops_it_and_what_it_holds_stays(
    tmp_path: Path, members: list[Member]
) -> None:
    members.append(first := Member(tmp_path))
    answer = first.joined()
    assert answer["started"]
    members.append(second := Member(tmp_path))
    assert second.joined() == {"started": False, "server": answer["server"]}
    client = redis.Redis.from_url(embedded_redis.url(tmp_path), decode_responses=True)
    client.set("kept", "yes")
    first.leave()
    assert client.get("kept") == "yes"
    second.leave()
    assert not lives(answer["server"])
    with embedded_redis.join(tmp_path) as again:
        assert again.started
        assert redis.Redis.from_url(again.url, decode_responses=True).get("kept") == "yes"


def test_of_many_that_come_at_once_one_starts_it(tmp_path: Path, members: list[Member]) -> None:
    members += [Member(tmp_path) for _ in range(5)]
    answers = [member.joined() for member in members]
    assert [answer["started"] for answer in answers].count(True) == 1
    assert len({answer["server"] for answer in answers}) == 1
    assert servers_in(tmp_path) == [answers[0]["server"]]
    for member in members:
        member.leave()
    assert not lives(answers[0]["server"])


def test_a_server_that_was_killed_is_started_again_with_what_it_held(tmp_path: Path) -> None:
    with embedded_redis.join(tmp_path) as server:
        client = redis.Redis.from_url(server.url, decode_responses=True)
        client.set("kept", "yes")
        pid = client.info("server")["process_id"]
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        assert (tmp_path / "redis" / "redis.sock").exists()  # it could not clean up
        with embedded_redis.join(tmp_path) as again:
            assert again.started
            assert redis.Redis.from_url(again.url, decode_responses=True).get("kept") == "yes"
        assert client.ping()  # the outer user is still there
    assert not servers_in(tmp_path)


def test_a_user_that_was_killed_does_not_keep_it_running(
    tmp_path: Path, members: list[Member]
) -> None:
    members.append(Member(tmp_path))
    pid = members[0].joined()["server"]
    members[0].kill()
    assert lives(pid)
    with embedded_redis.join(tmp_path) as server:
        assert not server.started
    assert not lives(pid)


async def test_a_server_that_takes_its_time_is_not_taken_for_dead(
    tmp_path: Path, members: list[Member]
) -> None:
    members.append(Member(tmp_path))
    pid = members[0].joined()["server"]
    os.kill(pid, signal.SIGSTOP)
    try:
        members.append(Member(tmp_path))
        second = asyncio.create_task(asyncio.to_thread(members[1].joined))
        # Longer than it waits for one answer.
        await asyncio.wait({second}, timeout=2 * embedded_redis.PING_TIMEOUT_S)
        assert not second.done()
    finally:
        os.kill(pid, signal.SIGCONT)
    assert await second == {"started": False, "server": pid}
    assert servers_in(tmp_path) == [pid]


def test_a_forked_child_does_not_leave_in_its_parents_name(tmp_path: Path) -> None:
    with embedded_redis.join(tmp_path) as server:
        client = redis.Redis.from_url(server.url)
        membership = contextlib.ExitStack()
        membership.enter_context(embedded_redis.join(tmp_path))
        child = os.fork()
        if child == 0:
            try:
                membership.close()
            finally:
                os._exit(0)
        os.waitpid(child, 0)
        membership.close()
        assert client.ping()


def test_only_its_user_can_reach_it(tmp_path: Path) -> None:
    state_dir = tmp_path / "new" / "state"
    with embedded_redis.join(state_dir):
        assert stat.S_IMODE((state_dir / "redis").stat().st_mode) == 0o700
        assert stat.S_IMODE((state_dir / "redis" / "redis.sock").stat().st_mode) == 0o700


def test_it_can_lie_in_a_directory_of_any_name(tmp_path: Path) -> None:
    settings = Settings(state_dir=tmp_path / "a b%20c?d#e'f\"é\\")
    with embedded_redis.join(settings.state_dir) as server:
        assert server.url == settings.redis_location
        assert redis.Redis.from_url(server.url).ping()
        with Connection(settings.broker_location) as broker:  # type: ignore[no-untyped-call]
            assert broker.default_channel.client.ping()


def test_a_directory_that_cannot_be_used_is_named(tmp_path: Path) -> None:
    occupied = tmp_path / "file"
    occupied.touch()
    long = tmp_path / ("x" * 100)
    for state_dir, why in ((occupied, "cannot be used: "), (long, "too long for a unix socket")):
        with pytest.raises(EmbeddedRedisError) as caught, embedded_redis.join(state_dir):
            pass
        assert str(caught.value).startswith(f"POOLSWEEP_STATE_DIR: {str(state_dir)!r} ")
        assert why in str(caught.value)
        assert "; accepted: " in str(caught.value)


def test_a_server_that_does_not_start_leaves_nothing_behind(tmp_path: Path) -> None:
    (tmp_path / "redis").mkdir()
    (tmp_path / "redis" / "appendonly.aof").write_text("this is no append-only file\n" * 50)
    with pytest.raises(EmbeddedRedisError) as caught, embedded_redis.join(tmp_path):
        pass
    assert str(tmp_path / "redis" / "redis.log") in str(caught.value)
    assert not servers_in(tmp_path)


async def test_a_worker_without_a_configured_redis_brings_its_own(
    cloud: Cloud, tmp_path: Path, workers: Workers
) -> None:
    project = cloud.project(10)
    state_dir = tmp_path / "state"
    with embedded_redis.join(state_dir) as server:
        client = redis.asyncio.Redis.from_url(server.url, decode_responses=True)
        settings = settings_for(cloud, server.url, redis_url=None, state_dir=state_dir)
        runs = Runs(client, settings)
        run_id = await runs.make(project.jobs(), verify=False)
        worker = workers.start(environment(settings))
        await workers.ready(worker)
        await runs.ended(run_id)
        assert await runs.check(run_id, cloud, project) == {JobState.ACCEPTED: 10}
        await client.aclose()
        (pid,) = servers_in(state_dir)
    assert lives(pid)  # the worker uses it still
    worker.send(signal.SIGTERM)
    assert await worker.ended() == 0
    assert not lives(pid)
