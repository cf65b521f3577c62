"""From an accepted request to its run, whatever the cloud, brakes or a death make of it."""

from __future__ import annotations

import asyncio
import contextlib
import json
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

import pytest
from pydantic import SecretStr
from structlog.testing import capture_logs

from sandbox.config import SandboxConfig
from sandbox.fleet import Behaviour, Category
from sandbox.server import RunningSandbox, running_sandbox
from scheduler.intake import clients as clients_file
from scheduler.intake.desk import Desk, NotAllowedError
from scheduler.intake.planning import MOST_TRIES, Planning
from scheduler.intake.request import RequestError, Way, validate
from scheduler.intake.requests import KeyReusedError, Requests
from scheduler.intake.webhooks import ROOM
from scheduler.marks import Veto, Vetoes
from scheduler.outbox import Outbox, RunWatch
from scheduler.selection import named
from scheduler.sweep import Office
from tests.conftest import until
from tests.sweep.conftest import FUTURE, PAST, document
from worker.cancellation import cancel
from worker.ledger import JobState, Ledger, Run, RunState, keys
from worker.projects import Directory, Project
from worker.settings import Settings

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from redis.asyncio import Redis

    from scheduler.intake.clients import Clients

CI = {"ways": ["celery"], "brakes": {"max_deletions": 5, "max_percent": 100}}


class Hall:
    """An intake without doors: requests go to the desk by hand."""

    def __init__(self, running: RunningSandbox, redis: Redis) -> None:
        self.running = running
        self.redis = redis
        self.project = running.project_id
        self.settings = Settings(
            endpoint=running.url,
            token=SecretStr(running.config.token),
            rate_limit=0,
            lease_s=1,
            total_timeout_s=1,
            backoff_base_s=0.01,
        )
        directory = Directory(self.settings, {})
        self.ledger = Ledger(redis)
        self.requests = Requests(redis)
        self.desk = Desk(self.requests, self.ledger, directory)
        self.office = Office(directory, redis, self.ledger)
        self.watch = RunWatch(redis, Outbox(redis, room=ROOM), room=ROOM)
        self.allow(ci=CI)

    def allow(self, **clients: dict[str, Any]) -> None:
        """Write the clients' file anew."""
        entries = {name: {"projects": [self.project], **each} for name, each in clients.items()}
        self.clients: Clients = clients_file.parse(json.dumps({"clients": entries}))

    def faults(self, **faults: float) -> None:
        """What goes wrong from now on."""
        server = self.running.server
        server.faults = server.faults.model_copy(update=faults)

    async def asked_for_nodes(self, times: int) -> None:
        """Wait until nodes were asked for so often."""

        async def asked() -> bool:
            calls = [call for call in self.running.server.calls if call.path.endswith("/nodes")]
            return len(calls) >= times

        await until(asked)

    def add(self, *, there: bool = True, **given: Any) -> str:
        """Put a pool there. Returns its id."""
        given.setdefault("tags", {"expires-at": PAST})
        raw = document(**given)
        if there:
            cloud = self.running.cloud
            cloud.add(self.project, raw, Category.UNTAGGED, Behaviour.NORMAL)
        return str(raw["metadata"]["name"])

    async def ask(
        self, *pools: str, selector: Any = None, key: str | None = None, **changes: Any
    ) -> str:
        """Send a request. Returns the run's id."""
        target: dict[str, Any] = {"project_id": self.project}
        target |= {"selector": selector} if selector else {"pools": list(pools)}
        client = self.clients.by_name("ci")
        assert client is not None
        request = validate({"targets": [target], **changes})
        return await self.desk.accept(request, client, Way.CELERY, key=key)

    @contextlib.asynccontextmanager
    async def planning(self) -> AsyncIterator[Planning]:
        planning = Planning(self.office, self.requests, lambda: self.clients, self.watch)
        task = asyncio.create_task(planning.run())
        try:
            yield planning
        finally:
            planning.stop()
            await asyncio.wait({task}, timeout=5)
            await cancel(task)

    async def planned(self, run_id: str) -> Run:
        """The run, as soon as it is planned."""

        async def done() -> bool:
            return not await self.requests.waiting()

        await until(done)
        return await self.ledger.run(run_id)

    async def jobs(self, run_id: str) -> dict[str, str]:
        """Why each pool was chosen."""
        return {job.pool_name: job.chosen for job in await self.ledger.jobs(run_id)}

    async def kept(self, run_id: str) -> dict[str, str]:
        """Why each pool was kept."""
        return {pool.pool_name: pool.reason for pool in await self.ledger.kept(run_id)}


@pytest.fixture
async def hall(redis_client: Redis) -> AsyncIterator[Hall]:
    async with running_sandbox(SandboxConfig(pools=0, delete_seconds=0.1)) as running:
        yield Hall(running, redis_client)


async def test_an_accepted_request_is_seen_as_a_run_at_once(hall: Hall) -> None:
    run_id = await hall.ask(hall.add(), reason="end of project", requester="jo")
    run = await hall.ledger.run(run_id)
    assert (run.state, run.source, run.client) == (RunState.QUEUED, "intake", "ci")
    assert (run.requester, run.reason) == ("jo", "end of project")
    assert run.projects == (hall.project,)


async def test_named_pools_become_jobs_and_protected_ones_stay(hall: Hall) -> None:
    going, protected, absent = hall.add(), hall.add(tags={"poolsweep/protect": "yes"}), "x" * 40
    other = hall.add()
    async with hall.planning():
        run = await hall.planned(await hall.ask(going, protected, absent, going))
    assert (run.state, run.total) == (RunState.RUNNING, 2)
    chosen = await hall.jobs(run.run_id)
    assert set(chosen) == {going, absent}
    assert "it was not there" in chosen[absent]
    kept = await hall.kept(run.run_id)
    assert set(kept) == {protected}
    assert other not in {*chosen, *kept}


async def test_a_selector_finds_what_a_policy_with_it_would(hall: Hall) -> None:
    due, later = hall.add(), hall.add(tags={"expires-at": FUTURE})
    async with hall.planning():
        run = await hall.planned(await hall.ask(selector={"expired": {}}))
    assert (run.state, run.total) == (RunState.RUNNING, 1)
    assert set(await hall.jobs(run.run_id)) == {due}
    assert set(await hall.kept(run.run_id)) == {later}
    assert json.loads(run.selector) == {hall.project: {"expired": {}}}


async def test_vetoes_hold_for_requests_too(hall: Hall) -> None:
    pool = hall.add()
    await Vetoes(hall.redis, hall.running.url).put(Veto(hall.project, pool, None, "jo", "mine"))
    async with hall.planning():
        run = await hall.planned(await hall.ask(pool))
    assert (run.state, run.total) == (RunState.FINISHED, 0)
    assert "jo" in (await hall.kept(run.run_id))[pool]


async def test_a_dry_run_is_planned_and_no_more(hall: Hall) -> None:
    pools = [hall.add() for _ in range(3)]
    async with hall.planning():
        run = await hall.planned(await hall.ask(*pools, dry_run=True))
    assert (run.state, run.total, run.ended) == (RunState.PLANNED, 3, True)
    assert set(await hall.jobs(run.run_id)) == set(pools)
    jobs = await hall.ledger.jobs(run.run_id)
    assert {job.state for job in jobs} == {JobState.PENDING}


async def test_a_clients_brakes_hold_its_requests(hall: Hall) -> None:
    pools = [hall.add() for _ in range(6)]
    async with hall.planning():
        named = await hall.planned(await hall.ask(*pools))
        found = await hall.planned(await hall.ask(selector={"expired": {}}))
        dry = await hall.planned(await hall.ask(*pools, dry_run=True))
    for run in (named, found):
        assert run.state is RunState.BRAKED
        assert "max_deletions=5" in run.note
    assert "a brake would hold it: 6 deletions" in dry.note


@pytest.mark.parametrize(
    ("brakes", "by_name", "state"),
    [
        ({}, True, RunState.RUNNING),
        ({}, False, RunState.BRAKED),
        ({"max_percent": 50}, True, RunState.BRAKED),
    ],
)
async def test_a_share_of_the_pools_holds_selectors_and_names_only_if_it_is_said(
    hall: Hall, brakes: dict[str, Any], by_name: bool, state: RunState
) -> None:
    hall.allow(ci={"ways": ["celery"], "brakes": brakes})
    pools = [hall.add() for _ in range(3)]
    asked: dict[str, Any] = {} if by_name else {"selector": {"expired": {}}}
    async with hall.planning():
        run = await hall.planned(await hall.ask(*pools, **asked))
    assert run.state is state


async def test_brakes_midway_are_the_clients_too(hall: Hall) -> None:
    hall.allow(ci={**CI, "brakes": {"max_failures": 3, "max_failure_percent": 7}})
    async with hall.planning():
        run = await hall.planned(await hall.ask(hall.add()))
    bounds = await hall.redis.hmget(keys.run(run.run_id), "max_failures", "max_failure_percent")
    assert [float(each) for each in bounds if each] == [3, 7]


async def test_a_client_asks_only_for_what_it_may(hall: Hall) -> None:
    hall.allow(ci={"tokens": ["a" * 64]}, other={**CI, "projects": ["another"]})
    with pytest.raises(NotAllowedError, match="may not send requests by celery"):
        await hall.ask(hall.add())
    hall.allow(ci={**CI, "projects": ["another"]})
    with pytest.raises(NotAllowedError, match=f"nothing in project {hall.project}") as caught:
        await hall.ask(hall.add(), webhook="https://evil.example.com")
    assert [fault.pointer for fault in caught.value.faults] == [
        "/targets/0/project_id",
        "/webhook",
    ]
    assert await hall.requests.waiting() == []
    assert await hall.ledger.runs() == []


async def test_what_a_client_may_no_longer_is_not_done(hall: Hall) -> None:
    taken_away, gone = await hall.ask(hall.add()), await hall.ask(hall.add())
    hall.allow(ci={**CI, "projects": ["another"]})
    async with hall.planning():
        assert "may delete nothing" in (await hall.planned(taken_away)).note
    hall.allow(other=CI)
    run = await hall.ledger.run(gone)
    assert (run.state, run.total) == (RunState.ABORTED, 0)


async def test_projects_at_two_endpoints_are_two_requests(hall: Hall) -> None:
    elsewhere = {"id": "elsewhere", "endpoint": "https://modelarts.example.com"}
    directory = Directory(hall.settings, {"e": Project.model_validate(elsewhere)})
    hall.allow(ci={**CI, "projects": [hall.project, "elsewhere"]})
    client = hall.clients.by_name("ci")
    assert client is not None
    pools = ["p" * 36]
    targets = [{"project_id": each, "pools": pools} for each in (hall.project, "elsewhere")]
    desk = Desk(hall.requests, hall.ledger, directory)
    with pytest.raises(RequestError, match="different endpoints"):
        await desk.accept(validate({"targets": targets}), client, Way.CELERY)


async def test_a_request_waits_for_a_cloud_that_does_not_answer(hall: Hall) -> None:
    hall.running.server.faults = hall.running.server.faults.model_copy(update={"rate_5xx": 1.0})
    run_id = await hall.ask(hall.add())

    async def tried() -> bool:
        return bool((await hall.requests.waiting())[0].trouble)

    async with hall.planning():
        await until(tried)
        assert (await hall.ledger.run(run_id)).state is RunState.QUEUED
        hall.running.server.faults = hall.running.server.faults.model_copy(update={"rate_5xx": 0.0})
        assert (await hall.planned(run_id)).state is RunState.RUNNING


@pytest.mark.parametrize("fault", ["rate_5xx", "rate_429", "reset_rate", "hang_rate"])
async def test_what_cannot_be_read_in_passing_is_read_again(hall: Hall, fault: str) -> None:
    pool = hall.add()
    hall.faults(latency_ms=300)
    run_id = await hall.ask(pool)
    with capture_logs() as logs:
        async with hall.planning():
            await hall.asked_for_nodes(1)
            hall.faults(**{fault: 1.0})
            await hall.asked_for_nodes(2)
            hall.faults(**{fault: 0.0})
            run = await hall.planned(run_id)
    assert (run.state, await hall.kept(run_id)) == (RunState.RUNNING, {})
    assert set(await hall.jobs(run_id)) == {pool}
    assert "request_not_planned_yet" not in {log["event"] for log in logs}


async def test_a_request_waits_for_what_cannot_be_read_yet(hall: Hall) -> None:
    pool = hall.add()
    hall.faults(latency_ms=300)
    run_id = await hall.ask(pool)

    async def troubled() -> bool:
        (waiting,) = await hall.requests.waiting()
        return "1 pools cannot be decided about yet: listing the nodes" in waiting.trouble

    async with hall.planning():
        await hall.asked_for_nodes(1)
        hall.faults(rate_5xx=1.0, latency_ms=0)
        await until(troubled)
        assert (await hall.ledger.run(run_id)).state is RunState.QUEUED
        hall.faults(rate_5xx=0.0)
        run = await hall.planned(run_id)
    assert (run.state, await hall.kept(run_id)) == (RunState.RUNNING, {})
    assert set(await hall.jobs(run_id)) == {pool}


async def test_a_request_that_waited_long_goes_on_without_what_cannot_be_read(hall: Hall) -> None:
    hurried = hall.settings.model_copy(update={"max_retry_s": 0.001})
    hall.office = Office(Directory(hurried, {}), hall.redis, hall.ledger)
    pool, absent = hall.add(), "x" * 40
    hall.faults(latency_ms=300)
    run_id = await hall.ask(pool, absent)
    async with hall.planning():
        await hall.asked_for_nodes(1)
        hall.faults(rate_5xx=1.0)
        run = await hall.planned(run_id)
    assert (run.state, set(await hall.jobs(run_id))) == (RunState.RUNNING, {absent})
    assert "injected fault" in (await hall.kept(run_id))[pool]


async def test_what_the_cloud_will_not_tell_keeps_its_pool_at_once(hall: Hall) -> None:
    pool = hall.add()
    hall.faults(latency_ms=300)
    run_id = await hall.ask(pool)
    async with hall.planning():
        await hall.asked_for_nodes(1)
        del hall.running.cloud.projects[hall.project]
        run = await hall.planned(run_id)
    assert (run.state, run.total) == (RunState.FINISHED, 0)
    assert "HTTP 403" in (await hall.kept(run_id))[pool]


async def test_a_request_that_the_cloud_refuses_ends_with_its_words(hall: Hall) -> None:
    hall.running.server.cloud.projects.clear()
    wrong = hall.settings.model_copy(update={"token": SecretStr("wrong")})
    hall.office = Office(Directory(wrong, {}), hall.redis, hall.ledger)
    async with hall.planning():
        run = await hall.planned(await hall.ask("p" * 36))
    assert (run.state, run.total) == (RunState.ABORTED, 0)
    assert "401" in run.note


async def test_a_request_that_waited_too_long_is_not_carried_out(hall: Hall) -> None:
    run_id = await hall.ask(hall.add())
    hurried = hall.settings.model_copy(update={"plan_max_age_s": 0.001})
    hall.office = Office(Directory(hurried, {}), hall.redis, hall.ledger)
    async with hall.planning():
        run = await hall.planned(run_id)
    assert run.state is RunState.ABORTED
    assert "POOLSWEEP_PLAN_MAX_AGE_S" in run.note


async def test_a_cancelled_request_is_not_carried_out(hall: Hall) -> None:
    run_id = await hall.ask(hall.add())
    assert await hall.ledger.cancel(run_id)
    async with hall.planning():
        run = await hall.planned(run_id)
    assert (run.state, run.total) == (RunState.ABORTED, 0)
    assert "cancelled" in run.note


async def test_a_planner_that_dies_leaves_its_requests_to_another(hall: Hall) -> None:
    run_id = await hall.ask(hall.add())
    (waiting,) = await hall.requests.take(lease_s=0.05, limit=1)
    # It died halfway through the making.
    run = await hall.ledger.run(run_id)
    assert waiting.run_id == run.run_id
    async with hall.planning():
        assert (await hall.planned(run_id)).state is RunState.RUNNING


async def test_a_request_whose_planners_die_is_given_up(hall: Hall) -> None:
    run_id = await hall.ask(hall.add())

    async def took() -> bool:
        return bool(await hall.requests.take(lease_s=0.001, limit=1))

    for _ in range(MOST_TRIES):
        await until(took)
    async with hall.planning():
        run = await hall.planned(run_id)
    assert run.state is RunState.ABORTED
    assert "given up" in run.note


async def test_a_run_that_was_given_up_in_the_making_is_made_anew(hall: Hall) -> None:
    run_id = await hall.ask(hall.add())
    # As a worker of an earlier version does with what its maker has left half made.
    assert await hall.ledger.abort(run_id, "its maker stopped")
    async with hall.planning():
        run = await hall.planned(run_id)
    assert (run.state, run.total, run.note) == (RunState.RUNNING, 1, "")


async def test_a_run_whose_request_is_lost_ends(hall: Hall) -> None:
    lost, waits = await hall.ask(hall.add()), await hall.ask(hall.add())
    await hall.requests.done(lost)
    await hall.requests.retry(waits, wait_s=60, trouble="")
    for run_id in (lost, waits):
        await hall.redis.hincrby(keys.run(run_id), "planned_ms", -3_600_000)

    async def ended() -> bool:
        return (await hall.ledger.run(lost)).ended

    async with hall.planning():
        await until(ended)
    run = await hall.ledger.run(lost)
    assert (run.state, "its request is not there any more" in run.note) == (RunState.ABORTED, True)
    assert (await hall.ledger.run(waits)).state is RunState.QUEUED


async def test_a_project_that_moved_since_is_not_swept(hall: Hall) -> None:
    run_id = await hall.ask(hall.add())
    moved = Project.model_validate(
        {"id": hall.project, "endpoint": "https://modelarts.example.com"}
    )
    hall.office = Office(Directory(hall.settings, {"p": moved}), hall.redis, hall.ledger)
    async with hall.planning():
        run = await hall.planned(run_id)
    assert (run.state, run.total) == (RunState.ABORTED, 0)
    assert "https://modelarts.example.com now" in run.note


async def test_a_slow_project_leaves_room_for_the_others(hall: Hall) -> None:
    hall.allow(ci={**CI, "projects": [hall.project, "other"]})
    hall.running.cloud.projects["other"] = {}
    for _ in range(30):
        await hall.ask(hall.add())
    # The listing of the one project waits for its turn, which does not come.
    busy = hall.settings.model_copy(update={"rate_limit": 1})
    slow = Project.model_validate({"id": hall.project, "rate_limit": 0.2})
    hall.office = Office(Directory(busy, {"slow": slow}), hall.redis, hall.ledger)
    async with hall.office.planner(hall.running.url) as planner:
        await planner.plan(hall.project, named([]), datetime.now(UTC))  # takes the turn
    client = hall.clients.by_name("ci")
    assert client is not None
    request = validate({"targets": [{"project_id": "other", "pools": ["p" * 36]}]})
    run_id = await hall.desk.accept(request, client, Way.CELERY)

    async def planned() -> bool:
        return (await hall.ledger.run(run_id)).state is not RunState.QUEUED

    async with hall.planning():
        await until(planned)
        assert len(await hall.requests.waiting()) >= 25


async def test_a_record_of_another_version_is_given_up_and_blocks_nobody(hall: Hall) -> None:
    old, good = await hall.ask(hall.add()), await hall.ask(hall.add())
    await hall.redis.hset(keys.REQUESTS, old, '["ci", "by pigeon", "", 0, {}]')
    async with hall.planning():
        assert (await hall.planned(good)).state is RunState.RUNNING
    run = await hall.ledger.run(old)
    assert (run.state, "cannot be read" in run.note) == (RunState.ABORTED, True)


async def test_many_requests_of_one_project_share_a_listing(hall: Hall) -> None:
    pools = [hall.add() for _ in range(30)]
    run_ids = [await hall.ask(pool) for pool in pools]
    async with hall.planning():
        await hall.planned(run_ids[0])
    states = {(await hall.ledger.run(run_id)).state for run_id in run_ids}
    assert states == {RunState.RUNNING}
    listings = [
        call
        for call in hall.running.server.calls
        if call.method == "GET" and call.path.endswith(f"/{hall.project}/pools")
    ]
    assert len(listings) == 1


async def test_a_planned_request_planned_again_changes_nothing(hall: Hall) -> None:
    run_id = await hall.ask(hall.add())
    record = (await hall.requests.waiting())[0].record
    async with hall.planning():
        before = await hall.planned(run_id)
        # Its planner died between the start and its end.
        await hall.redis.hset(keys.REQUESTS, run_id, record)
        await hall.redis.zadd(keys.REQUESTS_DUE, {run_id: 0})
        assert await hall.planned(run_id) == before


async def test_a_key_makes_one_run_of_requests_that_race(hall: Hall) -> None:
    pool = hall.add()
    run_ids = await asyncio.gather(*(hall.ask(pool, key="k") for _ in range(20)))
    assert len(set(run_ids)) == 1
    with pytest.raises(KeyReusedError):
        await hall.ask(pool, key="k", reason="another")
    assert len(await hall.ledger.runs()) == 1


async def test_a_key_whose_runs_records_have_aged_out_brings_no_run_back(hall: Hall) -> None:
    pool = hall.add()
    run_id = await hall.ask(pool, key="k")
    async with hall.planning():
        await hall.planned(run_id)
    await hall.redis.delete(*keys.of_run(run_id))
    assert await hall.ask(pool, key="k") == run_id
    assert not await hall.redis.exists(keys.run(run_id))


async def test_a_request_whose_acceptance_was_cut_short_is_seen_when_it_is_repeated(
    hall: Hall,
) -> None:
    pool = hall.add()
    run_id = await hall.ask(pool, key="k")
    await hall.redis.delete(*keys.of_run(run_id))  # it died before the run was there
    assert await hall.ask(pool, key="k") == run_id
    assert (await hall.ledger.run(run_id)).state is RunState.QUEUED


async def test_the_end_of_a_run_is_watched_before_it_starts(hall: Hall) -> None:
    rules = {"hosts": ["hooks.example.com"]}
    hall.allow(ci={**CI, "webhooks": rules})
    run_id = await hall.ask(hall.add(), webhook="https://hooks.example.com/done")
    async with hall.planning():
        await hall.planned(run_id)
    assert await hall.redis.hexists(keys.watched(ROOM), run_id)
