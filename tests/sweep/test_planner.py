"""The planner asks only for what it needs, and keeps what it cannot be sure of."""

from __future__ import annotations

import asyncio
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Any

import pytest
from pydantic import SecretStr

from sandbox.config import SandboxConfig
from sandbox.fleet import Behaviour, Category
from sandbox.server import RunningSandbox, running_sandbox
from scheduler import policy
from scheduler.planner import AT_ONCE, TRIES
from scheduler.selection import matching
from scheduler.sweep import Office, plan_policy
from tests.conftest import until
from tests.sweep.conftest import FUTURE, PAST, document
from worker.ledger import Ledger
from worker.projects import Directory, Project
from worker.settings import Settings

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable

    from redis.asyncio import Redis

    from sandbox.cloud import SandboxPool
    from scheduler.planner import Plan

BUSY = {"type": "train", "status": "Running", "name": "job-1", "createTime": 1}
ENDED = {
    "type": "train",
    "status": "Completed",
    "name": "job-0",
    "createTime": 1_700_000_000_000,
    "runningDuration": 60,
}


class Desk:
    """Plans policies over the only project of a sandbox."""

    def __init__(self, running: RunningSandbox, redis: Redis) -> None:
        self.running = running
        settings = Settings(
            endpoint=running.url,
            token=SecretStr(running.config.token),
            rate_limit=0,
            backoff_base_s=0.01,
        )
        self.office = Office(Directory(settings, {}), redis, Ledger(redis))

    @property
    def pools(self) -> dict[str, SandboxPool]:
        """The project's pools."""
        return self.running.cloud.projects[self.running.project_id]

    def add(self, category: Category = Category.UNTAGGED, **given: Any) -> str:
        """Put a pool there that has expired, unless its tags say otherwise."""
        given.setdefault("tags", {"expires-at": PAST})
        cloud = self.running.cloud
        pool = cloud.add(self.running.project_id, document(**given), category, Behaviour.NORMAL)
        return pool.member.name

    def runs(self, pool: str, *workloads: dict[str, Any]) -> None:
        """What runs, or ran, in a pool."""
        self.pools[pool].workloads = list(workloads)

    def uses(self, pool: str, **usage: float) -> None:
        """How much a pool uses of what."""
        self.pools[pool].usage = usage

    def faults(self, **faults: float) -> None:
        """What goes wrong from now on."""
        server = self.running.server
        server.faults = server.faults.model_copy(update=faults)

    async def plan(self, text: str, *, at: datetime | None = None) -> Plan:
        """Plan what a policy would do, from the lines that make it one."""
        lines = "\n".join(f"    {line}" for line in text.strip().splitlines())
        file = policy.parse(
            f"projects:\n  lab: {{id: {self.running.project_id}}}\n"
            f"policies:\n  it:\n    projects: [lab]\n{lines}\n"
        )
        now = at or datetime.now(UTC)
        return await plan_policy(self.office, file.policies["it"], self.running.project_id, now)

    async def decisions(self, text: str, *, at: datetime | None = None) -> dict[str, str]:
        """By pool: empty if it goes, else why it stays."""
        plan = await self.plan(text, at=at)
        return {row.pool.pool_id: "" if row.delete else row.reason for row in plan.decisions}

    def asked(self, kind: str) -> list[str]:
        """The pools that a fact was asked for, one name for each call."""
        return [call.pool for call in self.running.server.calls if f"/{kind}" in call.path]


@pytest.fixture
async def desk(redis_client: Redis) -> AsyncIterator[Desk]:
    async with running_sandbox(SandboxConfig(pools=0)) as running:
        yield Desk(running, redis_client)


EXPIRED = "match: {expired: {}}"


async def test_a_project_whose_reads_wait_holds_up_no_other(redis_client: Redis) -> None:
    async with running_sandbox(SandboxConfig(pools=0, projects=2)) as running:
        slow, quick = running.cloud.projects
        for project_id, count in ((slow, AT_ONCE + 10), (quick, 1)):
            for _ in range(count):
                tags = document(tags={"expires-at": PAST})
                running.cloud.add(project_id, tags, Category.UNTAGGED, Behaviour.NORMAL)
        token = SecretStr(running.config.token)
        settings = Settings(endpoint=running.url, token=token, rate_limit=0)
        own = {"slow": Project(id=slow, rate_limit=0.2, rate_burst=2)}
        office = Office(Directory(settings, own), redis_client, Ledger(redis_client))
        text = f"projects: {{it: {{id: {quick}}}}}\npolicies: {{it: {{projects: [it], {EXPIRED}}}}}"
        rules = matching(policy.parse(text).policies["it"].match)
        async with office.planner(running.url) as planner:
            now = datetime.now(UTC)
            waiting = asyncio.create_task(planner.plan(slow, rules, now))
            await until(lambda: _has_begun(running, slow))
            async with asyncio.timeout(15):
                plan = await planner.plan(quick, rules, now)
            assert [row.delete for row in plan.decisions] == [True]
            assert not waiting.done()
            waiting.cancel()


async def _has_begun(running: RunningSandbox, project_id: str) -> bool:
    return any(call.pool for call in running.server.calls if project_id in call.path)


async def test_facts_are_asked_for_only_where_cheaper_matchers_let_a_pool_through(
    desk: Desk,
) -> None:
    idle, busy, prepaid, hot = desk.add(), desk.add(), desk.add(Category.PREPAID_NODES), desk.add()
    desk.add(tags={"expires-at": FUTURE})
    desk.add(tags={})
    desk.add(billing="1")
    desk.runs(busy, BUSY)
    desk.uses(hot, gpuUtil=99.0)
    text = """
match:
  all:
    - utilisation: {of: gpu, below: 10, over: 1h}
    - expired: {}
"""
    found = await desk.decisions(text)
    assert [name for name, why in found.items() if not why] == [idle]
    # Each further fact is asked for only where the one before has not decided.
    assert set(desk.asked("monitor")) == {idle, busy, prepaid, hot}
    assert set(desk.asked("workloads")) == {idle, busy, prepaid}
    assert set(desk.asked("nodes")) == {idle, prepaid}
    for kind in ("nodes", "workloads", "monitor"):
        assert len(desk.asked(kind)) == len(set(desk.asked(kind))), f"{kind}: once for each pool"
    assert {call.method for call in desk.running.server.calls} == {"GET"}


async def test_a_policy_without_candidates_reads_nothing_but_the_list(desk: Desk) -> None:
    desk.add(tags={"expires-at": FUTURE})
    desk.add(tags={})
    await desk.decisions(EXPIRED)
    assert len(desk.running.server.calls) == 1


async def test_busy_pools_stay_unless_the_policy_allows_them(desk: Desk) -> None:
    busy, queued, done = desk.add(), desk.add(), desk.add()
    desk.runs(busy, ENDED, BUSY)
    desk.runs(queued, BUSY | {"status": "Queue", "name": "job-2"})
    desk.runs(done, ENDED)
    found = await desk.decisions(EXPIRED)
    assert found[done] == ""
    assert "in use by" in found[busy]
    assert "job-1" in found[busy]
    assert "job-2" in found[queued]
    asked = len(desk.asked("workloads"))
    allowed = await desk.decisions(f"{EXPIRED}\nallow_busy: true")
    assert set(allowed.values()) == {""}
    assert len(desk.asked("workloads")) == asked, "what is allowed is not asked for"


async def test_a_workload_on_a_later_page_keeps_a_pool(desk: Desk) -> None:
    full = desk.add()
    desk.runs(full, *[ENDED] * 1_100, BUSY | {"name": "the-last"})
    found = await desk.decisions(EXPIRED)
    assert "the-last" in found[full]
    assert len(desk.asked("workloads")) == 3


async def test_prepaid_nodes_keep_a_pool_that_is_paid_per_use(desk: Desk) -> None:
    pool = desk.add(Category.PREPAID_NODES)
    found = await desk.decisions(EXPIRED)
    assert found[pool] == "it has prepaid nodes: unsubscribe these first"


@pytest.mark.parametrize(
    "workloads",
    [
        [{"type": "train", "status": "Pondering", "name": "odd"}],
        [{"type": "train", "name": "without-status"}],
        ["no object"],
    ],
)
async def test_workloads_that_cannot_be_read_keep_a_pool(desk: Desk, workloads: list[Any]) -> None:
    pool, plain = desk.add(), desk.add()
    desk.runs(pool, *workloads)
    found = await desk.decisions(EXPIRED)
    assert found[pool] != ""
    assert found[plain] == ""


async def planned_while(
    desk: Desk, kind: str, change: Callable[[], None], text: str = EXPIRED
) -> dict[str, str]:
    """The decisions of a plan, something having changed while a fact was on its way."""
    desk.faults(latency_ms=300)
    planning = asyncio.create_task(desk.decisions(text))

    async def is_asked() -> bool:
        return bool(desk.asked(kind))

    await until(is_asked)
    change()
    return await planning


@pytest.mark.parametrize("kind", ["nodes", "workloads"])
async def test_a_pool_that_goes_while_it_is_planned_stays_out_of_the_plan(
    desk: Desk, kind: str
) -> None:
    gone, plain = desk.add(), desk.add()

    def vanish() -> None:
        desk.pools[gone].vanished = True

    found = await planned_while(desk, kind, vanish)
    assert found == {plain: "", gone: f"its {kind} cannot be read: the pool is gone by now"}


@pytest.mark.parametrize(
    ("kind", "text"),
    [
        ("nodes", "match: {expired: {}}"),
        ("workloads", "match: {expired: {}}"),
        ("monitor", "match: {utilisation: {of: gpu, below: 10}}"),
    ],
)
async def test_a_fact_that_is_refused_again_and_again_keeps_its_pool(
    desk: Desk, kind: str, text: str
) -> None:
    pool = desk.add()
    found = await planned_while(desk, kind, lambda: desk.faults(rate_5xx=1.0), text)
    assert "cannot be read: " in found[pool]
    assert "injected fault" in found[pool]
    assert desk.asked(kind) == [pool] * TRIES


IDLE = """
match:
  all:
    - expired: {}
    - idle: 2d
"""


async def test_a_pool_is_idle_when_it_was_seen_so_from_one_plan_to_another(desk: Desk) -> None:
    quiet, used, remade = desk.add(), desk.add(), desk.add()
    now = datetime.now(UTC)
    first = await desk.decisions(IDLE, at=now)
    assert all(first.values()), "nobody knows yet since when they are idle"
    day = timedelta(days=1)
    desk.runs(used, BUSY)
    assert all((await desk.decisions(IDLE, at=now + day)).values())
    desk.runs(used)
    desk.pools[remade].change("metadata", {"creationTimestamp": "2024-06-01T00:00:00Z"})
    found = await desk.decisions(IDLE, at=now + 2 * day)
    assert found[quiet] == ""
    assert found[used], "it was in use in between"
    assert found[remade], "it is another pool by the same name"
    found = await desk.decisions(IDLE, at=now + 4 * day)
    assert set(found.values()) == {""}


async def test_utilisation_is_that_of_the_policys_window(desk: Desk) -> None:
    low, high = desk.add(), desk.add()
    desk.uses(low, gpuUtil=4.0, npuUtil=0.0)
    desk.uses(high, gpuUtil=40.0, npuUtil=0.0)
    found = await desk.decisions("match: {utilisation: {of: gpu, below: 5, over: 6h}}")
    assert found[low] == ""
    assert found[high]
    calls = [call.path for call in desk.running.server.calls if "/monitor" in call.path]
    assert all("360" in path for path in calls), "the minutes of six hours"


async def test_pools_that_cannot_be_understood_count_and_stay(desk: Desk) -> None:
    plain = desk.add()
    odd = document()
    odd["metadata"]["annotations"] = "none"
    odd["status"] = []
    desk.running.cloud.add(desk.running.project_id, odd)
    plan = await desk.plan(EXPIRED)
    assert [row.pool.pool_id for row in plan.deletions] == [plain]
    assert plan.pools == 2
