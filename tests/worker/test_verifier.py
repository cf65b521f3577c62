"""An accepted job is `deleted` only when its pool is really gone, and is not accepted for ever."""

from __future__ import annotations

import asyncio
import contextlib
from typing import TYPE_CHECKING, Any

import pytest
from aiohttp import web
from hypothesis import given
from hypothesis import strategies as st
from pydantic import SecretStr

from sandbox.fleet import Behaviour
from tests.conftest import until
from tests.worker.conftest import Project, Runs, is_list, refused, settings_for
from worker.cancellation import cancel
from worker.ledger import Attempt, Job, JobState, Move
from worker.limiter import Limiter
from worker.modelarts import Pool
from worker.modelarts_client import make_client
from worker.projects import Directory
from worker.recorder import Recorder
from worker.verifier import Verifier, overdue

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable

    from redis.asyncio import Redis

    from tests.worker.conftest import Cloud, RedisServer

HOUR = 3_600.0
CALL = Attempt(at_ms=1, duration_ms=1, status=200, code="", request_id="r")


class Scene:
    """A run whose jobs were accepted, and a look at them when a test asks for one."""

    def __init__(self, cloud: Cloud, redis: Redis, server: RedisServer) -> None:
        self.cloud = cloud
        self.redis = redis
        self.url = server.url
        self.runs = Runs(redis, settings_for(cloud, server.url))
        self.run_id = ""

    async def accept(self, *projects: Project) -> None:
        """Have the cloud accept the deletion of all pools."""
        jobs = [job for project in projects for job in project.jobs()]
        self.run_id = await self.runs.make(jobs, feed=False)
        ledger = self.runs.ledger
        await ledger.claim(self.run_id, range(len(jobs)), owner="me", lease_s=60)
        for project in projects:
            for name in project.pools:
                assert self.cloud.sandbox.cloud.delete(project.project_id, name).status == 200
        accepted = [
            Move(number, JobState.LEASED, JobState.ACCEPTED, "me", CALL, "accepted")
            for number in range(len(jobs))
        ]
        assert all(await ledger.record(self.run_id, accepted))

    @contextlib.asynccontextmanager
    async def verifier(self, deadline_s: float, **credentials: object) -> AsyncIterator[Verifier]:
        settings = settings_for(self.cloud, self.url, **credentials)
        async with make_client(Directory.of(settings), self.redis, self.cloud.url) as client:
            yield Verifier(
                client=client,
                limiter=Limiter(self.redis, endpoint=self.cloud.url, rate=500, burst=25),
                ledger=self.runs.ledger,
                recorder=Recorder(self.runs.ledger),
                deadline_s=deadline_s,
            )

    async def look(self, deadline_s: float = HOUR, **credentials: object) -> list[Job]:
        async with self.verifier(deadline_s, **credentials) as verifier:
            await verifier.verify([await self.runs.ledger.run(self.run_id)])
        return await self.runs.jobs(self.run_id)


@pytest.fixture
def scene(cloud: Cloud, redis: Redis, server: RedisServer) -> Scene:
    return Scene(cloud, redis, server)


def states(jobs: list[Job]) -> set[JobState]:
    return {job.state for job in jobs}


async def test_a_job_is_deleted_when_its_pool_is_gone_and_not_before(
    cloud: Cloud, scene: Scene
) -> None:
    project = cloud.project(5)
    await scene.accept(project)
    first, *others = project.pools.values()
    for pool in others:
        pool.gone_at = float("inf")
    first.gone_at = 0
    jobs = await scene.look()
    assert [job.state for job in jobs] == [JobState.DELETED] + [JobState.ACCEPTED] * 4
    assert jobs[0].reason == "the pool is gone"
    for pool in others:
        pool.gone_at = 0
    assert states(await scene.look()) == {JobState.DELETED}
    assert project.lists() == 2  # one list answers for all


async def test_a_pool_that_only_the_list_misses_is_not_taken_for_gone(
    cloud: Cloud, scene: Scene
) -> None:
    project = cloud.project(3, stuck=3)
    await scene.accept(project)
    cloud.gateway = lambda r: web.json_response({"items": []}) if is_list(r) else None
    assert states(await scene.look()) == {JobState.ACCEPTED}
    jobs = await scene.look(deadline_s=0)
    assert states(jobs) == {JobState.FAILED}
    assert "its phase is Deleting" in jobs[0].reason


async def test_past_the_deadline_a_job_fails_with_the_phase_of_its_pool(
    cloud: Cloud, scene: Scene
) -> None:
    project = cloud.project(2, stuck=2)
    await scene.accept(project)
    stuck, _ = project.pools.values()
    stuck.change("status", {"phase": "Error", "message": "a node cannot be released"})
    assert states(await scene.look()) == {JobState.ACCEPTED}
    jobs = await scene.look(deadline_s=0)
    assert states(jobs) == {JobState.FAILED}
    assert jobs[0].reason.endswith("its phase is Error (a node cannot be released)")
    assert jobs[1].reason.endswith("its phase is Deleting (no message)")


UNSURE: dict[str, Callable[[], web.Response]] = {
    "a fault": lambda: refused(503, "ModelArts.50000002", "busy"),
    "a gateway that knows no such API": lambda: refused(404, "APIG.0101", "no such API"),
    "a page": lambda: web.Response(status=404, text="<html>not here</html>"),
    "another 404": lambda: refused(404, "ModelArts.50019999", "no such thing"),
    "a login page": lambda: web.Response(text="<html>log in</html>"),
    "forbidden": lambda: refused(403, "ModelArts.50010001", "no access to this project"),
    "not signed in": lambda: refused(401, "APIG.0301", "who are you"),
}


@pytest.mark.parametrize("name", UNSURE)
@pytest.mark.parametrize("where", ["list", "pool", "both"])
async def test_an_answer_that_does_not_say_so_never_makes_a_job_deleted(
    cloud: Cloud, scene: Scene, name: str, where: str
) -> None:
    project = cloud.project(2, stuck=2)
    await scene.accept(project)

    def answer(request: web.Request) -> web.Response | None:
        if where == "both" or is_list(request) == (where == "list"):
            return UNSURE[name]()
        return web.json_response({"items": []}) if is_list(request) else None

    cloud.gateway = answer
    assert states(await scene.look()) == {JobState.ACCEPTED}
    jobs = await scene.look(deadline_s=0)
    assert states(jobs) == {JobState.FAILED}
    for job in jobs:
        assert "not seen to be gone" in job.reason
        assert ("its phase is Deleting" in job.reason) == (where == "list")


async def test_a_list_that_fails_at_the_deadline_does_not_fail_pools_that_are_gone(
    cloud: Cloud, scene: Scene
) -> None:
    project = cloud.project(3)
    await scene.accept(project)
    for pool in project.pools.values():
        pool.gone_at = 0
    cloud.gateway = lambda r: refused(500, "ModelArts.50000001") if is_list(r) else None
    before = len(cloud.reads)
    assert states(await scene.look()) == {JobState.ACCEPTED}
    assert len(cloud.reads) == before + 1  # before the deadline there is time to ask again
    assert states(await scene.look(deadline_s=0)) == {JobState.DELETED}


async def test_a_forbidden_project_keeps_no_other_from_its_end(cloud: Cloud, scene: Scene) -> None:
    forbidden, other = cloud.project(2), cloud.project(2)
    await scene.accept(forbidden, other)
    for pool in other.pools.values():
        pool.gone_at = 0
    del cloud.sandbox.cloud.projects[forbidden.project_id]
    jobs = await scene.look()
    assert [job.state for job in jobs] == [JobState.ACCEPTED] * 2 + [JobState.DELETED] * 2
    jobs = await scene.look(deadline_s=0)
    assert [job.state for job in jobs] == [JobState.FAILED] * 2 + [JobState.DELETED] * 2
    assert "no access to this project" in jobs[0].reason


async def test_when_signing_in_fails_jobs_wait_and_fail_at_the_deadline(
    cloud: Cloud, scene: Scene
) -> None:
    await scene.accept(cloud.project(2, stuck=2))
    wrong: dict[str, Any] = {
        "token": None,
        "iam_endpoint": cloud.url,
        "iam_user": "sandbox-user",
        "iam_password": SecretStr("a wrong password"),
        "iam_domain": "sandbox-domain",
    }
    assert states(await scene.look(**wrong)) == {JobState.ACCEPTED}
    jobs = await scene.look(deadline_s=0, **wrong)
    assert states(jobs) == {JobState.FAILED}
    assert "Signing in failed" in jobs[0].reason


async def test_a_throttled_project_holds_up_no_other(cloud: Cloud, scene: Scene) -> None:
    throttled, other = cloud.project(2), cloud.project(2)
    await scene.accept(throttled, other)
    for pool in [*throttled.pools.values(), *other.pools.values()]:
        pool.gone_at = float("inf")

    def throttle(request: web.Request) -> web.Response | None:
        if request.match_info.get("project") == throttled.project_id:
            return refused(429, "APIG.0308", "slow down", Retry_After="60")
        return None

    cloud.gateway = throttle
    run = await scene.runs.ledger.run(scene.run_id)
    async with scene.verifier(HOUR) as verifier:
        await verifier.verify([run])
        for pool in other.pools.values():
            pool.gone_at = 0
        looks: list[asyncio.Task[None]] = []

        async def others_end() -> bool:
            looks.append(asyncio.create_task(verifier.verify([run])))
            return (await scene.runs.ledger.run(scene.run_id)).counts[JobState.DELETED] == 2

        await until(others_end)
        assert any(not look.done() for look in looks)  # until the minute is over
        await cancel(*looks)
    lists = [project for project, what in cloud.reads if what == "list"]
    assert lists.count(throttled.project_id) == 1


async def test_two_verifiers_at_once_do_no_harm(cloud: Cloud, scene: Scene) -> None:
    project = cloud.project(20)
    await scene.accept(project)
    for pool in project.pools.values():
        pool.gone_at = 0
    await asyncio.gather(scene.look(), scene.look())
    assert await scene.runs.check(scene.run_id, cloud, project) == {JobState.DELETED: 20}


async def test_a_list_of_thousands_answers_for_the_few_that_are_asked_for(
    cloud: Cloud, scene: Scene
) -> None:
    project = cloud.project(20, stuck=10)
    await scene.accept(project)
    asked = dict(project.pools)
    project.add(3_000)
    for pool in asked.values():
        if pool.member.behaviour is not Behaviour.STUCK:
            pool.gone_at = 0
    before = len(cloud.reads)
    jobs = await scene.look()
    assert [job.state for job in jobs] == [JobState.ACCEPTED] * 10 + [JobState.DELETED] * 10
    assert len(cloud.reads) - before == 1 + 10


@given(
    seconds=st.floats(0, 7 * 86_400),
    phase=st.text("aÄ-", max_size=20),
    message=st.text("aÄ-", max_size=50),
)
def test_what_is_said_of_an_overdue_pool_names_its_phase(
    seconds: float, phase: str, message: str
) -> None:
    document = {"metadata": {"name": "pool"}, "status": {"phase": phase, "message": message}}
    words = overdue(Pool.parse(document), "", seconds)
    assert f"its phase is {phase or 'unknown'} ({message or 'no message'})" in words
    assert overdue(None, "why not", seconds).endswith(": why not")
