"""The scheduler as its user meets it: processes that are killed, paused, and told to stop."""

from __future__ import annotations

import asyncio
import json
import re
import signal
from datetime import UTC, datetime, timedelta
from itertools import pairwise
from typing import TYPE_CHECKING

import psutil

from scheduler.almanac import NightState
from tests.conftest import until
from tests.nightly.conftest import BEAT, POOLSWEEP, QUIET_BEAT, last_night, policy
from worker import embedded_redis
from worker.ledger import keys

if TYPE_CHECKING:
    from pathlib import Path

    import pytest

    from scheduler.almanac import Night
    from tests.nightly.conftest import Stage
    from tests.worker.conftest import Process, Project

EVERY_SECOND = "* * * * * *"


def gapless(nights: list[Night], seconds: int) -> bool:
    """Whether each night is there, once and in order."""
    step = timedelta(seconds=seconds)
    return all(later.at - earlier.at == step for earlier, later in pairwise(nights))


async def done_once(stage: Stage, project: Project) -> list[Night]:
    """The past nights, each of which has one run."""
    past = [night for night in await stage.past("night") if night.state is NightState.DONE]
    runs = await stage.runs()
    ids = [night.runs[project.project_id] for night in past]
    assert len(set(ids)) == len(ids)
    # A run whose night is not on record yet may have been made.
    assert {run.run_id for run in runs[: len(ids)]} == set(ids)
    assert len(runs) - len(ids) <= 1
    return past


async def ends(process: Process, number: signal.Signals = signal.SIGTERM) -> None:
    """It ends in order, and nothing of it stays."""
    children = psutil.Process(process.pid).children(recursive=True)
    process.send(number)
    assert await process.ended() == 0, process.text
    assert not [each for each in children if each.is_running()]
    assert "Traceback" not in process.text


def speaks_json(process: Process) -> None:
    """Its log is JSON to the last line, and there is nothing else."""
    assert process.events()
    assert process.output == ""


async def test_nights_run_are_executed_and_listed(stage: Stage) -> None:
    project = stage.project(pools=3)
    stage.write({"night": policy("research", schedule=EVERY_SECOND)})
    worker, scheduler = stage.worker(), stage.scheduler()

    async def gone() -> bool:
        return not project.there()

    await until(gone, within_s=40)
    await stage.past_when("night", 3)
    (code, output, _), listed = await asyncio.gather(stage.schedule(), stage.listed())
    await ends(scheduler)
    await ends(worker)
    speaks_json(scheduler)
    assert gapless(await stage.past("night"), 1)
    past = await done_once(stage, project)
    # Each pool was called for once, however many nights there were.
    assert len(stage.cloud.deletes) == len({pool for pool, _ in stage.cloud.deletes}) == 3

    (row,) = listed["policies"]
    assert row["policy"] == "night"
    assert datetime.fromisoformat(row["next"]) > past[0].at
    assert listed["leader"]["path"] == str(stage.path)
    assert listed["rejected"] == ""
    told = [night for night in row["past"] if night["state"] == "done"]
    assert all(night["runs"][0]["project_id"] == project.project_id for night in told)
    assert code == 0
    assert re.search(r"next\s+2\d\d\d-", output)
    assert f"done  {past[1].at:%Y-%m-%dT%H:%M:%S}" in output
    assert past[1].runs[project.project_id] in output


async def test_leaders_are_paused_and_killed_and_no_night_is_lost_or_run_twice(
    stage: Stage,
) -> None:
    project = stage.project()
    stage.write({"night": policy("research", schedule=EVERY_SECOND)})
    # However they were started, they are the same.
    both = stage.scheduler(), stage.start(QUIET_BEAT, beat(stage))
    await stage.past_when("night", 2)
    first = await stage.leader(*both)
    (second,) = set(both) - {first}
    await stage.logged(second, "scheduler_stands_by")

    first.send(signal.SIGSTOP)
    await stage.leader(second)  # the lead has run out
    await more_nights(stage)
    stood_by = len(first.events("scheduler_stands_by"))
    first.send(signal.SIGCONT)
    await stage.logged(first, "scheduler_stands_by", stood_by + 1)
    await more_nights(stage)
    assert await stage.leader(*both) is second

    second.kill()
    await stage.leader(first)
    await more_nights(stage)
    await ends(first)
    assert gapless(await stage.past("night"), 1)
    await done_once(stage, project)


async def more_nights(stage: Stage) -> None:
    """Another one is carried out."""
    done = sum(night.state is NightState.DONE for night in await stage.past("night"))
    await stage.past_when("night", done + 1)


def beat(stage: Stage) -> dict[str, str]:
    return {"POOLSWEEP_POLICIES_FILE": str(stage.path)}


async def test_a_leader_killed_in_the_middle_of_a_night_leaves_it_to_the_next(stage: Stage) -> None:
    project = stage.project(pools=4)
    at, schedule = last_night(timedelta(minutes=2))
    stage.write({"night": policy("research", schedule=schedule)})
    await stage.last_was("night", at - timedelta(days=1), by=f"{schedule} UTC")
    stage.cloud.latency(60_000)
    first, second = stage.scheduler(), stage.scheduler()

    async def planning() -> bool:
        return project.lists() > 0

    await until(planning)
    (row,) = (await stage.listed())["policies"]
    assert [night["state"] for night in row["past"]] == ["started"]
    leader = await stage.leader(first, second)
    leader.kill()
    await stage.redis.delete(keys.SCHEDULER)  # as if its lead had run out
    stage.cloud.latency(50)
    other = second if leader is first else first
    (resumed,) = await stage.logged(other, "night_resumed")
    assert resumed["policy"] == "night"
    (night,) = await stage.past_when("night", 1)
    await ends(other)
    assert night.at == at
    await done_once(stage, project)
    (run,) = await stage.runs()
    assert run.total == 4


async def test_the_file_changes_and_nobody_restarts_anything(stage: Stage) -> None:
    stage.project()
    stage.write({"night": policy("research", schedule=EVERY_SECOND)})
    scheduler = stage.scheduler()
    await stage.past_when("night", 1)

    good = stage.path.read_text()
    stage.write_text(good.replace("* * * * * *", "0 25 * * *"))
    (rejected,) = await stage.logged(scheduler, "policies_rejected")
    assert rejected["level"] == "error"
    assert any("schedule" in reason for reason in rejected["reasons"])
    done = len(await stage.past("night"))
    (code, output, _), listed = await asyncio.gather(stage.schedule(), stage.listed())
    assert code == 0
    assert "rejected" in output
    assert "0 25 * * *" in output
    assert re.search(r"next\s+2\d\d\d-", output)
    assert "0 25 * * *" in listed["leader"]["rejected"]
    assert [row["policy"] for row in listed["policies"]] == ["night"]
    await stage.past_when("night", done + 2)  # by the ones before

    stage.write_text(good.replace('"night"', '"other"'))
    await stage.past_when("other", 1)
    said = await stage.almanac.said()
    assert said is not None
    assert said["rejected"] == ""
    await ends(scheduler)
    (read,) = scheduler.events("policies_read")
    assert read["policies"] == ["other"]
    speaks_json(scheduler)
    assert gapless(await stage.past("night"), 1)


async def test_redis_goes_and_comes_back_and_goes_for_good(stage: Stage) -> None:
    project = stage.project()
    stage.write({"night": policy("research", schedule=EVERY_SECOND)})
    scheduler = stage.scheduler()
    await stage.past_when("night", 2)
    before = await stage.past("night")
    stage.server.kill()
    stage.server.start()
    found = await stage.past_when("night", len(before) + 3)
    assert found[: len(before)] == before
    assert gapless(found, 1)
    await done_once(stage, project)
    stage.server.kill()
    await ends(scheduler)


async def test_a_failing_sweep_is_logged_and_listed_with_its_reason(stage: Stage) -> None:
    stage.project()
    stage.write({"night": policy("research", schedule=EVERY_SECOND)})
    secret = "a-token-that-nobody-may-see"
    scheduler = stage.scheduler(POOLSWEEP_TOKEN=secret)
    await stage.past_when("night", 2, NightState.FAILED)
    (failed, *_) = await stage.logged(scheduler, "sweep_failed")
    assert (failed["level"], failed["policy"], failed["project"]) == ("error", "night", "research")
    assert "Incorrect IAM authentication" in failed["reason"]
    _, output, _ = await stage.schedule()
    await ends(scheduler)
    assert re.search(r"failed  \S+  research: .*Incorrect IAM authentication", output)
    held = [
        *[await stage.redis.hgetall(key) async for key in stage.redis.scan_iter(_type="hash")],
        *[await stage.redis.lrange(key, 0, 9) async for key in stage.redis.scan_iter(_type="list")],
    ]
    assert "Incorrect IAM authentication" in json.dumps(held)
    assert secret not in json.dumps(held) + scheduler.text + output


async def test_the_embedded_redis_goes_with_the_last_scheduler(
    stage: Stage, tmp_path_factory: pytest.TempPathFactory
) -> None:
    state = tmp_path_factory.mktemp("state")
    stage.project()
    stage.write({"night": policy("research", schedule=EVERY_SECOND)})
    own = {"POOLSWEEP_REDIS_URL": "", "POOLSWEEP_STATE_DIR": str(state)}
    first = stage.scheduler(**own)
    await stage.logged(first, "night_done")
    second = stage.scheduler(**own)
    await stage.logged(second, "scheduler_stands_by")
    servers = servers_in(state)
    assert len(servers) == 1
    await ends_without_its_server(first)
    await stage.logged(second, "night_done")
    assert servers_in(state) == servers
    await ends(second, signal.SIGINT)
    assert servers_in(state) == []
    speaks_json(first)
    with embedded_redis.join(state):
        pass  # what it held is in good order


async def ends_without_its_server(process: Process) -> None:
    """The one that started the server leaves it to others."""
    process.send(signal.SIGTERM)
    assert await process.ended() == 0


def servers_in(state: Path) -> list[int]:
    """The redis-servers of a state directory."""
    found = []
    for process in psutil.process_iter():
        try:
            if "redis-server" in process.name() and process.cwd() == str(state / "redis"):
                found.append(process.pid)
        except psutil.Error:
            continue
    return found


async def test_one_that_is_told_to_stop_hands_over_at_once_and_leaves_nothing_behind(
    stage: Stage, tmp_path_factory: pytest.TempPathFactory
) -> None:
    stage.project()
    stage.write({"night": policy("research")})
    directory = tmp_path_factory.mktemp("beat")
    # Celery's own command, two in one directory: no pid file and no schedule file to fight for.
    both = [stage.start(BEAT, beat(stage), cwd=directory) for _ in range(2)]
    leader = await stage.leader(*both)
    (other,) = set(both) - {leader}
    await stage.logged(other, "scheduler_stands_by")
    await ends(leader)
    # There is no lead that has to run out.
    holder = await stage.redis.get(keys.SCHEDULER)
    assert holder is None or f":{other.pid}:" in holder
    await stage.leader(other)
    await ends(other, signal.SIGINT)
    assert list(directory.iterdir()) == []


async def test_a_bad_file_is_told_whole_and_nothing_is_started(
    stage: Stage, tmp_path_factory: pytest.TempPathFactory
) -> None:
    state = tmp_path_factory.mktemp("state")
    stage.project()
    stage.write({"one": policy("nobody"), "two": policy("research", timezone="Mars/Olympus")})
    own = {"POOLSWEEP_REDIS_URL": "", "POOLSWEEP_STATE_DIR": str(state)}
    both = stage.scheduler(**own), stage.start(QUIET_BEAT, own | beat(stage))
    for process in both:
        assert await process.ended() == 2
        said = process.text.splitlines()
        assert len(said) == 2, said
        assert said[0].startswith("poolsweep: ")
        assert "nobody" in said[0]
        assert "Mars/Olympus" in said[1]
        assert process.output == ""
    assert list(state.iterdir()) == []


async def test_what_cannot_work_is_told_in_a_sentence(stage: Stage) -> None:
    stage.project()
    stage.write({"night": policy("research")})
    command = [*POOLSWEEP, "scheduler"]
    started = [
        (words, stage.start(given, {**beat(stage), variable: value}))
        for given, variable, value, words in (
            (command, "POOLSWEEP_POLICIES_FILE", "", "POOLSWEEP_POLICIES_FILE"),
            (QUIET_BEAT, "POOLSWEEP_POLICIES_FILE", "", "POOLSWEEP_POLICIES_FILE"),
            (command, "POOLSWEEP_POLICIES_FILE", "/no/such/policies.yaml", "/no/such/"),
            (command, "POOLSWEEP_TOKEN", "", "POOLSWEEP_TOKEN"),
            (QUIET_BEAT, "POOLSWEEP_LOG_LEVEL", "loud", "POOLSWEEP_LOG_LEVEL"),
        )
    ]
    for words, process in started:
        assert await process.ended() == 2
        (said,) = process.text.splitlines()
        assert said.startswith("poolsweep: ")
        assert words in said
        assert process.output == ""


async def test_without_a_scheduler_the_nights_to_come_are_listed_all_the_same(stage: Stage) -> None:
    stage.project()
    stage.write({"night": policy("research"), "by-hand": policy("research", schedule=None)})
    (code, output, _), listed = await asyncio.gather(stage.schedule(), stage.listed())
    assert code == 0
    assert "poolsweep scheduler" in output
    assert listed["leader"] is None
    (row,) = listed["policies"]
    assert (row["policy"], row["past"]) == ("night", [])
    at = datetime.fromisoformat(row["next"])
    assert (at.hour, at.minute) == (2, 0)
    assert timedelta() < at - datetime.now(UTC) <= timedelta(days=1)
    stage.write_text("policies: [")
    code, output, errors = await stage.schedule("--json")
    assert (code, output) == (2, "")
    assert errors.startswith("poolsweep: ")
