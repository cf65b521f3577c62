"""`poolsweep delete`: previewed, then carried out by whichever worker there is."""

from __future__ import annotations

import re
import signal
import socket
from typing import TYPE_CHECKING

import psutil
import pytest

from tests.cli.conftest import CONTROL, ESCAPE, Cloud, Command, User, eventually
from worker import embedded_redis
from worker.ledger import JobState
from worker.reconciler import live_workers

if TYPE_CHECKING:
    from collections.abc import Iterator

ABSENT = "auto-pool-os-86c13962597848eeb29c5861153a391f"


@pytest.fixture(scope="module")
def bob(tmp_path_factory: pytest.TempPathFactory, cloud: Cloud) -> Iterator[User]:
    """A user whose embedded Redis is kept running, so that each command only joins it."""
    user = User(tmp_path_factory.mktemp("state"), cloud.settings)
    with embedded_redis.join(user.state_dir):
        yield user


class Pools:
    """The cloud's pools by what they are an example of, each given out once."""

    def __init__(self, cloud: Cloud) -> None:
        self._state = cloud.pools()

    def take(self, category: str, behaviour: str = "normal") -> str:
        for name, pool in self._state.items():
            if (pool["category"], pool["behaviour"]) == (category, behaviour):
                del self._state[name]
                return name
        raise AssertionError(f"the cloud has no more {behaviour} {category} pools")


@pytest.fixture(scope="module")
def pools(cloud: Cloud) -> Pools:
    return Pools(cloud)


def family(cloud: Cloud) -> tuple[str, list[str]]:
    """A physical pool and its logical sub-pools, none of them deleted yet."""
    documents = cloud.documents()
    for name, pool in cloud.pools().items():
        if pool["category"] == "parent" and pool["there"] and not pool["accepted"]:
            children = [
                child
                for child, document in documents.items()
                if document["status"].get("parent") == name
            ]
            if len(children) == 2:
                return name, children
    raise AssertionError("the cloud has no more physical pools with sub-pools")


def jobs_in(user: User, run_id: str, state: JobState) -> int:
    return user.runs()[run_id].counts[state]


def delete_one_that_never_ends(user: User, cloud: Cloud, pool: str) -> tuple[Command, str]:
    """A command that waits for a pool which the cloud has accepted and never deletes."""
    before = set(user.runs())
    command = user.start("delete", "--project", cloud.project, pool, "--yes")
    (run_id,) = eventually(lambda: set(user.runs()) - before)
    eventually(lambda: jobs_in(user, run_id, JobState.ACCEPTED) == 1)
    return command, run_id


def test_a_preview_shows_each_pool_and_why_some_must_stay(
    bob: User, cloud: Cloud, pools: Pools
) -> None:
    deletable = pools.take("current")
    deleting = pools.take("untagged")
    cloud.change(deleting, phase="Deleting")
    parent, children = family(cloud)
    kept = {
        pools.take("prepaid"): "prepaid",
        pools.take("prepaid_nodes"): "prepaid nodes",
        pools.take("frozen"): "frozen",
        pools.take("creating"): "creating",
        deleting: "deleting",
        parent: "sub-pools",
    }
    known = cloud.documents()
    asked = [deletable, *kept, children[0], ABSENT]
    ended = bob.run("delete", "--project", cloud.project, *asked)
    assert ended.code == 0, ended.err
    assert not CONTROL.search(ended.out)
    assert ended.err == f"Joined the embedded Redis in {bob.state_dir}\n"
    rows = {name: [x for x in ended.lines if f" {name} " in x] for name in [deletable, *kept]}
    for name, lines in rows.items():
        (line,) = lines
        document = known[name]
        assert document["metadata"]["labels"]["os.modelarts/name"] in line
        assert document["status"]["phase"] in line
        (nodes,) = document["spec"]["resources"]
        assert f"{nodes['count']} x {nodes['flavor']}" in line
        assert re.search(r" \d+ (d|h|min|s) ", line), "its age"
        assert "team=" in line
        assert ("prepaid" if kept.get(name) == "prepaid" else "postpaid") in line
        if name == deletable:
            assert " delete " in line
            assert "expires-at=" in line
        else:
            assert " keep " in line
            assert kept[name] in line.lower()
    assert f"{ABSENT}: not in the project" in ended.out
    assert "2 to delete, 6 to keep, 1 not there" in ended.out
    assert "nothing was deleted" in ended.lines[-1]
    assert cloud.deletes() == []
    assert bob.runs() == {}


def test_a_preview_fits_a_terminal_of_80_columns(bob: User, cloud: Cloud) -> None:
    parent, children = family(cloud)
    asked = [*children, parent, ABSENT]
    ended = bob.run_on_terminal(
        "delete", "--project", cloud.project, *asked, columns=80, answer="no\n"
    )
    assert ended.code == 3
    assert "Stopped: nothing was deleted." in ended.out
    lines = ESCAPE.sub("", ended.out).splitlines()
    assert max(map(len, lines)) <= 80
    for pool in asked:
        assert sum(pool in line for line in lines) == 1
    assert "3 to delete, 0 to keep, 1 not there" in " ".join(lines)


def test_pools_are_deleted_by_a_worker_for_the_time_of_the_run(
    bob: User, cloud: Cloud, pools: Pools
) -> None:
    parent, children = family(cloud)
    doomed = pools.take("expired", "doomed")
    flaky = pools.take("expired", "flaky")
    before = set(bob.runs())
    asked = [parent, *children, doomed, flaky, ABSENT, flaky]
    ended = bob.run("delete", "--project", cloud.project, *asked, "--yes", "--reason", "the test's")
    assert ended.code == 1, "one of the pools cannot be deleted"
    assert not CONTROL.search(ended.err)
    (run_id,) = set(bob.runs()) - before
    assert "No worker is running: started one" in ended.err
    assert f"Run {run_id}: 6 of 6 jobs ended after " in ended.err.splitlines()[-1]
    run, jobs = bob.runs()[run_id], bob.jobs(run_id)
    assert (run.state, run.reason) == ("finished", "the test's")
    assert {pool: job.state for pool, job in jobs.items()} == {
        **dict.fromkeys([parent, *children, flaky], "deleted"),
        doomed: "failed",
        ABSENT: "already_deleted",
    }
    calls = cloud.deletes()
    assert calls.index(parent) > max(calls.index(child) for child in children)
    assert f"1 failed: {jobs[doomed].reason}" in ended.lines
    assert f"    {doomed}" in ended.lines
    assert f"Look again with: poolsweep results {run_id}" in ended.lines
    there = {name for name, pool in cloud.pools().items() if pool["there"]}
    assert there & set(asked) == {doomed}
    assert [each for each in bob.processes() if each.name() != "redis-server"] == []


def test_a_pool_that_is_refused_makes_no_run_and_is_told_by_the_exit_code(
    bob: User, cloud: Cloud, pools: Pools
) -> None:
    before = set(bob.runs())
    ended = bob.run("delete", "--project", cloud.project, pools.take("protected"), "--yes")
    assert ended.code == 3
    assert ended.lines[-1] == "Nothing to delete."
    assert set(bob.runs()) == before


def test_an_interrupted_command_takes_its_worker_along_and_says_what_becomes_of_the_run(
    bob: User, cloud: Cloud, pools: Pools
) -> None:
    pool = pools.take("expired", "stuck")
    command, run_id = delete_one_that_never_ends(bob, cloud, pool)
    command.interrupt(group=True)
    ended = command.end()
    assert ended.code == 130
    assert "Traceback" not in ended.err
    assert f"run {run_id} waits" in ended.err
    assert "`poolsweep worker`" in ended.err
    assert f"poolsweep watch {run_id}" in ended.err
    assert f"poolsweep cancel {run_id}" in ended.err
    assert [each for each in bob.processes() if each.name() != "redis-server"] == []
    run = bob.runs()[run_id]
    assert (run.state, run.counts[JobState.ACCEPTED]) == ("running", 1)


def test_a_run_that_waits_goes_on_with_the_next_worker_and_without_the_command(
    bob: User, cloud: Cloud, pools: Pools
) -> None:
    waiting = [run_id for run_id, run in bob.runs().items() if not run.ended]
    assert waiting, "left by the interrupted command"
    worker = bob.start("worker")
    eventually(lambda: bob.ask(lambda redis: live_workers(redis, cloud.url)) == 1)
    command, run_id = delete_one_that_never_ends(bob, cloud, pools.take("expired", "stuck"))
    command.interrupt(group=False)
    ended = command.end()
    assert ended.code == 130
    assert "started one" not in ended.err
    assert f"Run {run_id} goes on" in ended.err
    assert worker.poll() is None
    for pool, state in cloud.pools().items():
        if state["accepted"]:
            cloud.vanish(pool)
    eventually(lambda: all(jobs_in(bob, each, JobState.DELETED) for each in [*waiting, run_id]))
    worker.interrupt(group=True)
    assert worker.end().code == 0


def test_whoever_joins_a_run_that_nobody_executes_starts_a_worker_for_its_time(
    bob: User, cloud: Cloud, pools: Pools
) -> None:
    pool = pools.take("expired")
    left = bob.run("delete", "--project", cloud.project, pool, "--yes", "--detach")
    assert left.code == 0, left.err
    (run_id,) = left.lines
    assert "No worker is running for this endpoint" in left.err
    assert pool not in cloud.deletes()
    joined = bob.run("watch", run_id)
    assert joined.code == 0, joined.err
    assert "No worker is running: started one" in joined.err
    assert {name: job.state for name, job in bob.jobs(run_id).items()} == {pool: "deleted"}
    assert [each for each in bob.processes() if each.name() != "redis-server"] == []


def test_a_worker_that_dies_is_told_and_its_run_waits(
    bob: User, cloud: Cloud, pools: Pools
) -> None:
    command, run_id = delete_one_that_never_ends(bob, cloud, pools.take("expired", "stuck"))
    (worker,) = psutil.Process(command.pid).children()
    worker.kill()
    ended = command.end()
    assert ended.code == 2
    assert ended.err.splitlines()[-1].startswith("poolsweep: The worker has ended by itself")
    assert "worker.log" in ended.err
    assert not bob.runs()[run_id].ended


@pytest.fixture
def silent() -> Iterator[str]:
    """An API that takes calls and answers none."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield f"http://127.0.0.1:{server.getsockname()[1]}"


@pytest.fixture
def waiting(user: User, cloud: Cloud, silent: str) -> Command:
    """A command that has started the embedded Redis and waits for the API."""
    command = User(user.state_dir, cloud.settings).start(
        "delete", "--project", cloud.project, ABSENT, "--yes", ENDPOINT=silent
    )
    assert command.stderr
    assert command.stderr.readline().startswith("Started the embedded Redis")
    eventually(lambda: psutil.Process(command.pid).net_connections("tcp"))
    return command


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_command_that_is_stopped_before_it_has_begun_makes_no_run(
    number: signal.Signals, waiting: Command, user: User
) -> None:
    waiting.send_signal(number)
    ended = waiting.end()
    assert (ended.code, ended.out, ended.err) == (130, "", "")
    assert user.processes() == []
    assert user.runs() == {}


def test_an_embedded_redis_that_outlives_a_killed_command_is_joined_and_stopped_by_the_next(
    waiting: Command, user: User
) -> None:
    waiting.kill()
    waiting.end()
    (redis,) = user.processes()
    assert redis.name() == "redis-server"
    told = user.run("runs")
    assert (told.code, told.out) == (0, "No runs yet.\n")
    assert told.err.startswith("Joined the embedded Redis")
    assert user.processes() == []


def test_a_redis_that_is_configured_is_used_and_none_is_started(
    user: User, redis_url: str, cloud: Cloud, pools: Pools
) -> None:
    carol = User(user.state_dir, {**cloud.settings, "REDIS_URL": redis_url})
    ended = carol.run(
        "delete", "--project", cloud.project, pools.take("expired"), "--yes", "--detach"
    )
    assert ended.code == 0
    (run_id,) = ended.lines
    assert run_id in carol.runs()
    told = ended.err.splitlines()[-1]
    assert "No worker is running for this endpoint" in told
    assert "`poolsweep worker`" in told
    files = [each for each in user.state_dir.rglob("*") if each.is_file()]
    assert files == [user.state_dir / "logs/commands.log"]
