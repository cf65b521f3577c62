"""The scheduler's steps, against a real Redis and the sandbox; time is what the almanac says."""

from __future__ import annotations

import asyncio
import json
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING

import pytest

from scheduler.almanac import NightState
from scheduler.rota import NOT_BEGUN, NOT_ENDED, TAKEN_AWAY
from scheduler.sweep import night_run_id
from tests.conftest import until
from tests.nightly.conftest import BY, last_night, policy, steps
from tests.worker.conftest import is_list, refused
from worker.ledger import NewJob, NewRun, RunState, Source, keys

if TYPE_CHECKING:
    from collections.abc import Awaitable

    from aiohttp import web

    from tests.nightly.conftest import Stage
    from tests.worker.conftest import Project

DAY = timedelta(days=1)


async def ended(stage: Stage, name: str = "night") -> bool:
    last = await stage.almanac.last(name)
    return last is not None and last.state in {NightState.DONE, NightState.FAILED}


async def one_due(stage: Stage, ago: timedelta = timedelta(minutes=2), **more: object) -> datetime:
    """A policy of which one night is due; it was last run the day before."""
    at, schedule = last_night(ago)
    stage.write({"night": policy(*stage.projects, schedule=schedule, **more)})
    await stage.last_was("night", at - DAY, by=f"{schedule} UTC")
    return at


class Gate:
    """Holds up every listing of pools until it is opened."""

    def __init__(self, stage: Stage) -> None:
        self.opened, self.arrived = asyncio.Event(), asyncio.Event()
        stage.cloud.gateway = self._answer

    def _answer(self, request: web.Request) -> Awaitable[web.Response | None] | None:
        return self._wait() if is_list(request) else None

    async def _wait(self) -> web.Response | None:
        self.arrived.set()
        await self.opened.wait()
        return None

    async def reached(self) -> bool:
        return self.arrived.is_set()


async def test_a_night_that_is_due_runs_once_in_each_project(stage: Stage) -> None:
    made = [stage.project("research", 3), stage.project("production", 0)]
    at = await one_due(stage)
    async with stage.rota() as rota:
        await steps(rota, lambda: ended(stage))
        for _ in range(5):
            await rota.step()
    (night,) = await stage.past("night")
    ids = {each.project_id: night_run_id("night", each.project_id, at) for each in made}
    assert (night.at, night.state, night.runs, night.note) == (at, NightState.DONE, ids, "")
    runs = await stage.runs()
    assert {run.run_id for run in runs} == set(ids.values())
    assert {(run.source, run.policy, run.requester) for run in runs} == {
        (Source.SCHEDULE, "night", "policy night")
    }
    assert sorted(run.total for run in runs) == [0, 3]
    assert [each.lists() for each in made] == [1, 1]


async def test_a_brand_new_policy_runs_no_past_nights(stage: Stage) -> None:
    stage.project()
    _, schedule = last_night(timedelta(minutes=1))
    stage.write({"night": policy("research", schedule=schedule)})
    async with stage.rota() as rota:
        for _ in range(5):
            await rota.step()
        last = await stage.almanac.last("night")
    assert last is not None
    assert last.state is NightState.WATCHED
    assert await stage.runs() == []
    assert await stage.past("night") == []


async def test_a_policy_without_a_schedule_is_not_run(stage: Stage) -> None:
    stage.project()
    stage.write({"night": policy("research", schedule=None)})
    async with stage.rota() as rota:
        for _ in range(3):
            await rota.step()
    assert await stage.almanac.policies() == set()


async def test_a_night_missed_within_the_window_is_made_up_for_once(stage: Stage) -> None:
    stage.project()
    at = await one_due(stage, timedelta(hours=2), catch_up="3h")
    async with stage.rota() as rota:
        await steps(rota, lambda: ended(stage))
        for _ in range(3):
            await rota.step()
    assert [night.at for night in await stage.past("night")] == [at]
    assert len(await stage.runs()) == 1


async def test_a_night_missed_beyond_the_window_is_recorded_and_not_run(stage: Stage) -> None:
    project = stage.project()
    at = await one_due(stage, timedelta(hours=2), catch_up="1h")
    async with stage.rota() as rota:
        await steps(rota, lambda: stage.past("night"))
        for _ in range(3):
            await rota.step()
    (night,) = await stage.past("night")
    assert (night.at, night.state, night.note) == (at, NightState.MISSED, NOT_BEGUN)
    assert await stage.runs() == []
    assert project.lists() == 0


async def test_of_several_missed_nights_the_last_is_made_up_for(stage: Stage) -> None:
    stage.project()
    at, schedule = last_night(timedelta(minutes=2))
    stage.write({"night": policy("research", schedule=schedule)})
    await stage.last_was("night", at - 4 * DAY, by=f"{schedule} UTC")
    async with stage.rota() as rota:
        await steps(rota, lambda: ended(stage))
    past = [(night.at, night.state) for night in await stage.past("night")]
    missed = [(at - days * DAY, NightState.MISSED) for days in (3, 2, 1)]
    assert past == [*missed, (at, NightState.DONE)]


async def test_a_night_begun_by_one_that_died_is_gone_on_with(stage: Stage) -> None:
    stage.project()
    at, schedule = last_night(timedelta(minutes=2))
    stage.write({"night": policy("research", schedule=schedule)})
    await stage.last_was("night", at, NightState.STARTED, f"{schedule} UTC")
    async with stage.rota() as rota:
        await steps(rota, lambda: ended(stage))
    assert [(night.at, night.state) for night in await stage.past("night")] == [
        (at, NightState.DONE)
    ]
    assert len(await stage.runs()) == 1


async def test_a_night_begun_and_found_too_late_is_recorded_as_missed(stage: Stage) -> None:
    stage.project()
    at, schedule = last_night(timedelta(hours=2))
    stage.write({"night": policy("research", schedule=schedule, catch_up="1h")})
    await stage.last_was("night", at, NightState.STARTED, f"{schedule} UTC")
    async with stage.rota() as rota:
        await steps(rota, lambda: stage.past("night"))
        for _ in range(3):
            await rota.step()
    (night,) = await stage.past("night")
    assert (night.at, night.state, night.note) == (at, NightState.MISSED, NOT_ENDED)
    assert await stage.runs() == []


async def test_a_schedule_that_is_changed_runs_no_nights_from_before(stage: Stage) -> None:
    project = stage.project()
    at = await one_due(stage)
    await stage.last_was("night", at - DAY, by=BY)  # it went by another schedule until now
    async with stage.rota() as rota:
        for _ in range(5):
            await rota.step()
        last = await stage.almanac.last("night")
    assert last is not None
    assert last.state is NightState.WATCHED
    assert last.at > at
    assert await stage.past("night") == []
    assert project.lists() == 0


async def test_a_policy_that_was_away_comes_back_as_a_new_one(stage: Stage) -> None:
    project = stage.project()
    at = await one_due(stage)
    own = stage.path.read_text()
    stage.write({"other": policy("research")})
    async with stage.rota() as rota:
        await rota.step()
    assert await stage.almanac.policies() == {"other"}
    stage.write_text(own)
    async with stage.rota() as rota:
        for _ in range(3):
            await rota.step()
        last = await stage.almanac.last("night")
    assert last is not None
    assert (last.state, last.at > at) == (NightState.WATCHED, True)
    assert project.lists() == 0


async def test_a_policy_taken_away_after_its_leader_died_has_its_night_on_record(
    stage: Stage,
) -> None:
    stage.project()
    at = datetime(2026, 1, 1, 2, tzinfo=UTC)
    stage.write({"other": policy("research")})
    await stage.last_was("night", at, NightState.STARTED)
    async with stage.rota() as rota:
        await rota.step()
    (night,) = await stage.past("night")
    assert (night.at, night.state, night.note) == (at, NightState.MISSED, TAKEN_AWAY)
    assert await stage.almanac.policies() == {"other"}


async def test_a_policy_taken_away_during_its_night_carries_the_night_out(stage: Stage) -> None:
    project = stage.project("research", 2)
    await one_due(stage)
    gate = Gate(stage)
    async with stage.rota() as rota:
        await steps(rota, gate.reached)
        del stage.projects["research"]
        stage.project("elsewhere")
        stage.write({"renamed": policy("elsewhere")})

        async def taken_up() -> bool:
            return "renamed" in await stage.almanac.policies()

        await steps(rota, taken_up)
        gate.opened.set()
        (night,) = await steps(rota, lambda: stage.past("night"))

        async def forgotten() -> bool:
            return await stage.almanac.policies() == {"renamed"}

        await steps(rota, forgotten)
    assert night.state is NightState.DONE
    assert list(night.runs) == [project.project_id]
    (run,) = await stage.runs()
    assert run.total == 2


async def test_the_next_leader_goes_on_and_the_last_one_lets_go(stage: Stage) -> None:
    project = stage.project("research", 2)
    at = await one_due(stage)
    gate = Gate(stage)
    async with stage.rota() as first, stage.rota() as second:
        await steps(first, gate.reached)
        await stage.redis.delete(keys.SCHEDULER)  # as if the first were not heard of for long
        await second.step()
        # It wakes in the middle of planning, and only then sees that it leads no more.
        gate.opened.set()
        await steps(second, lambda: ended(stage))
        await first.step()
        await first.step()
    assert [night.at for night in await stage.past("night")] == [at]
    (run,) = await stage.runs()
    assert (run.run_id, run.total) == (night_run_id("night", project.project_id, at), 2)


@pytest.mark.parametrize("given_up", [False, True])
async def test_a_half_made_run_is_made_anew_by_the_same_id(stage: Stage, given_up: bool) -> None:
    project = stage.project("research", 2)
    at, schedule = last_night(timedelta(minutes=2))
    stage.write({"night": policy("research", schedule=schedule)})
    await stage.last_was("night", at, NightState.STARTED, f"{schedule} UTC")
    run_id = night_run_id("night", project.project_id, at)
    endpoint = stage.settings.api_endpoint.url
    assert await stage.ledger.create(NewRun(run_id, Source.SCHEDULE, endpoint), maker="dead")
    await stage.ledger.add(run_id, [NewJob(project.project_id, "half-made")], maker="dead")
    if given_up:  # by the workers, after ten minutes
        assert await stage.ledger.abort(run_id, "its maker stopped")
    async with stage.rota() as rota:
        await steps(rota, lambda: ended(stage))
    (run,) = await stage.runs()
    assert (run.run_id, run.state, run.total, run.note) == (run_id, RunState.RUNNING, 2, "")
    assert "half-made" not in {job.pool_name for job in await stage.ledger.jobs(run_id)}
    assert await stage.redis.ttl(keys.run(run_id)) == -1, "nothing that goes on is forgotten"
    (night,) = await stage.past("night")
    assert night.runs == {project.project_id: run_id}


async def test_a_closed_rota_leaves_its_night_to_the_next(stage: Stage) -> None:
    stage.project("research", 2)
    at = await one_due(stage)
    gate = Gate(stage)
    async with stage.rota() as first:
        await steps(first, gate.reached)
    assert await stage.redis.get(keys.SCHEDULER) is None
    assert await stage.almanac.said() is None
    gate.opened.set()
    async with stage.rota() as second:
        await steps(second, lambda: ended(stage))
    assert [night.at for night in await stage.past("night")] == [at]
    assert len(await stage.runs()) == 1


async def test_one_stands_by_and_touches_nothing(stage: Stage) -> None:
    project = stage.project()
    await one_due(stage)
    await stage.redis.set(keys.SCHEDULER, "another")
    async with stage.rota() as rota:
        for _ in range(5):
            await rota.step()
    assert await stage.redis.get(keys.SCHEDULER) == "another"
    assert project.lists() == 0


@pytest.mark.parametrize("pools", [0, 2])
async def test_a_project_that_fails_is_on_record_and_the_others_are_swept(
    stage: Stage, pools: int
) -> None:
    bad, good = stage.project("research", pools), stage.project("production", pools)
    await one_due(stage)

    def gateway(request: web.Request) -> web.Response | None:
        if bad.project_id in request.path:
            return refused(403, "ModelArts.50010001", "no access to this project")
        return None

    stage.cloud.gateway = gateway
    async with stage.rota() as rota:
        await steps(rota, lambda: ended(stage))
    (night,) = await stage.past("night")
    assert night.state is NightState.FAILED
    assert night.note.startswith("research: ")
    assert "no access to this project" in night.note
    assert list(night.runs) == [good.project_id]


async def test_an_api_that_nobody_reaches_is_a_reason_too(stage: Stage) -> None:
    stage.project()
    stage.projects["research"] |= {"endpoint": "http://127.0.0.1:9"}
    await one_due(stage)
    async with stage.rota() as rota:
        await steps(rota, lambda: ended(stage))
    (night,) = await stage.past("night")
    assert (night.state, night.runs) == (NightState.FAILED, {})
    assert night.note.startswith("research: ")
    assert "connect" in night.note


async def test_the_night_after_a_failed_one_tries_anew(stage: Stage) -> None:
    stage.project()
    stage.write({"night": policy("research", schedule="* * * * * *")})
    stage.cloud.gateway = lambda _: refused(401, "APIG.0301", "Incorrect IAM authentication")

    async def failed() -> bool:
        return [night.state for night in await stage.past("night")][:1] == [NightState.FAILED]

    async with stage.rota() as rota:
        await steps(rota, failed)
        stage.cloud.gateway = lambda _: None
        await steps(rota, lambda: good_night(stage))


async def good_night(stage: Stage) -> bool:
    return NightState.DONE in {night.state for night in await stage.past("night")}


async def test_one_policy_whose_record_cannot_be_read_does_not_stop_the_others(
    stage: Stage,
) -> None:
    stage.project()
    await one_due(stage)
    both = json.loads(stage.path.read_text())
    stage.write({"a-broken-one": policy("research"), **both["policies"]})
    await stage.redis.hset(keys.NIGHTS, "a-broken-one", "what is this?")
    async with stage.rota() as rota:
        await steps(rota, lambda: ended(stage))
    assert len(await stage.runs()) == 1


async def test_a_brake_is_on_record(stage: Stage) -> None:
    stage.project("research", 3)
    await one_due(stage, brakes={"max_deletions": 2})
    async with stage.rota() as rota:
        await steps(rota, lambda: ended(stage))
    (night,) = await stage.past("night")
    assert night.state is NightState.DONE
    assert night.note.startswith("research: braked: ")
    (run,) = await stage.runs()
    assert run.state is RunState.BRAKED


async def test_projects_in_a_new_file_are_reached_as_it_says(
    stage: Stage, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RIGHT_TOKEN", stage.cloud.sandbox.config.token)
    monkeypatch.setenv("WRONG_TOKEN", "no-such-token")
    project = stage.project()
    sign_in(stage, project, "WRONG_TOKEN")
    async with stage.rota() as rota:
        await steps(rota, lambda: stage.past("night"))
        assert not await good_night(stage)
        sign_in(stage, project, "RIGHT_TOKEN")
        await steps(rota, lambda: good_night(stage))


def sign_in(stage: Stage, project: Project, variable: str) -> None:
    stage.projects["research"] = {
        "id": project.project_id,
        "credentials": {"token": {"env": variable}},
    }
    stage.write({"night": policy("research", schedule="* * * * * *")})


async def test_a_restarted_redis_is_waited_for_and_nothing_is_done_twice(stage: Stage) -> None:
    project = stage.project("research", 2)
    at = await one_due(stage)
    gate = Gate(stage)
    async with stage.rota() as rota:
        await steps(rota, gate.reached)
        stage.server.kill()
        gate.opened.set()
        step = asyncio.create_task(rota.step())
        await asyncio.wait({step}, timeout=0.3)
        stage.server.start()
        await step
        await steps(rota, lambda: ended(stage))
    assert [night.at for night in await stage.past("night")] == [at]
    assert [run.projects for run in await stage.runs()] == [(project.project_id,)]


async def test_a_policy_whose_night_goes_on_long_misses_those_meanwhile(stage: Stage) -> None:
    stage.project()
    stage.write({"night": policy("research", schedule="* * * * * *")})
    gate = Gate(stage)
    async with stage.rota() as rota:
        await steps(rota, gate.reached)
        begun = await stage.almanac.last("night")
        assert begun is not None
        later = begun.at + timedelta(seconds=3)

        async def is_later() -> bool:
            return datetime.now(UTC) > later

        await until(is_later)
        gate.opened.set()
        await steps(rota, lambda: two_done(stage))
    past = await stage.past("night")
    times = [night.at for night in past]
    assert times == [begun.at + timedelta(seconds=n) for n in range(len(times))]
    assert {night.note for night in past if night.state is NightState.MISSED} == {NOT_BEGUN}


async def two_done(stage: Stage) -> bool:
    return sum(night.state is NightState.DONE for night in await stage.past("night")) >= 2
