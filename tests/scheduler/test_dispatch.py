"""From plans to a run: what becomes of it, and in which order its jobs come."""

from __future__ import annotations

import asyncio
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

import pytest
from pydantic import SecretStr
from structlog.testing import capture_logs

from scheduler.dispatch import Order, dispatch, jobs_of
from scheduler.planner import Plan
from scheduler.selection import Decision
from tests.conftest import until
from tests.sweep.conftest import document
from worker.feed import Feed
from worker.ledger import JobState, Ledger, RunState, Source
from worker.modelarts import Pool
from worker.settings import Settings

if TYPE_CHECKING:
    from collections.abc import MutableMapping

    from redis.asyncio import Redis

ENDPOINT = "https://modelarts.example.com"
NOW = datetime(2026, 1, 2, tzinfo=UTC)


def plan(project_id: str, going: int, *, staying: int = 0, **changes: Any) -> Plan:
    decisions = [Decision(Pool.parse(document()), True, "expired") for _ in range(going)]
    decisions += [Decision(Pool.parse(document()), False, "protected") for _ in range(staying)]
    return Plan(project_id, ENDPOINT, decisions, NOW, len(decisions), **changes)


def order(**changes: Any) -> Order:
    return Order(ENDPOINT, Source.INTAKE, "somebody", **changes)


class Broker:
    """Takes batches, and remembers which."""

    def __init__(self) -> None:
        self.batches: list[tuple[str, list[int]]] = []

    async def __call__(self, run_id: str, numbers: list[int]) -> None:
        self.batches.append((run_id, numbers))


@pytest.fixture
def ledger(redis_client: Redis) -> Ledger:
    return Ledger(redis_client)


@pytest.fixture
def broker() -> Broker:
    return Broker()


@pytest.fixture
def feed(ledger: Ledger, broker: Broker) -> Feed:
    return Feed(ledger, broker, Settings(redis_url=SecretStr("redis://unused")))


def test_projects_take_turns_and_each_keeps_its_order() -> None:
    plans = [plan("a", 3), plan("b", 1, absent=["gone-1", "gone-2"]), plan("c", 0)]
    jobs = list(jobs_of(plans))
    assert [job.project_id for job in jobs] == ["a", "b", "a", "b", "a", "b"]
    for each in plans:
        wanted = [decision.pool.pool_id for decision in each.deletions] + list(each.absent)
        assert [job.pool_name for job in jobs if job.project_id == each.project_id] == wanted


def test_the_worker_is_to_look_at_nodes_that_the_plan_did_not() -> None:
    inside = Decision(Pool.parse(document(parent="physical")), True, "asked for")
    later = plan("a", 1, nodes_later=True, absent=["gone"])
    jobs = list(
        jobs_of([Plan("a", ENDPOINT, [*later.decisions, inside], NOW, 2, ["gone"], 0, True)])
    )
    assert [job.check_nodes for job in jobs] == [True, False, False]
    assert not any(job.check_nodes for job in jobs_of([plan("a", 2)]))


async def test_a_run_starts_whole_and_its_first_batch_is_sent(
    ledger: Ledger, feed: Feed, broker: Broker
) -> None:
    run = await dispatch([plan("a", 2, staying=1)], order(), ledger=ledger, feed=feed)
    assert (run.state, run.total, run.projects) == (RunState.RUNNING, 2, ("a",))
    assert broker.batches == [(run.run_id, [0, 1])]
    assert [kept.reason for kept in await ledger.kept(run.run_id)] == ["protected"]


async def test_a_dry_run_shows_what_would_go_and_sends_nothing(
    ledger: Ledger, feed: Feed, broker: Broker
) -> None:
    wanted = order(dry_run=True, alone=True)
    run = await dispatch([plan("a", 2, staying=1)], wanted, ledger=ledger, feed=feed)
    assert (run.state, run.total, run.done, run.ended) == (RunState.PLANNED, 2, 0, True)
    assert [job.chosen for job in await ledger.jobs(run.run_id)] == ["expired"] * 2
    assert len(await ledger.kept(run.run_id)) == 1
    assert broker.batches == []
    # It holds no project: another may have it.
    assert await ledger.hold_project(ENDPOINT, "a", "other") is None
    held = await dispatch([plan("a", 2)], wanted, ledger=ledger, feed=feed, brake="too many")
    assert (held.state, held.total) == (RunState.PLANNED, 2)
    assert held.note.endswith("a brake would hold it: too many")


async def test_the_same_order_again_is_the_same_run(
    ledger: Ledger, feed: Feed, broker: Broker
) -> None:
    first = await dispatch([plan("a", 2)], order(run_id="r"), ledger=ledger, feed=feed)
    again = await dispatch([plan("a", 5)], order(run_id="r"), ledger=ledger, feed=feed)
    assert (first.run_id, again.run_id, again.total) == ("r", "r", 2)
    assert len(broker.batches) == 1


async def test_a_run_that_was_cancelled_in_the_making_is_told_as_it_is(
    ledger: Ledger, feed: Feed, broker: Broker
) -> None:
    making = plan("a", 1_500)  # more than are written down at once
    task = asyncio.create_task(dispatch([making], order(run_id="r"), ledger=ledger, feed=feed))

    async def begun() -> bool:
        return bool(await ledger.jobs("r", limit=1))

    await until(begun)
    assert await ledger.cancel("r")
    made = await task
    run = await ledger.run("r")
    assert (made.run_id, run.cancelled_ms > 0) == ("r", True)
    assert run.state is RunState.ABORTED or run.counts[JobState.CANCELLED] == 1_500


async def test_a_run_that_was_cancelled_while_it_waited_is_not_made(
    ledger: Ledger, feed: Feed, broker: Broker
) -> None:
    wanted = order(run_id="r")
    assert await ledger.queue(wanted.new_run("r", ["a"]))
    assert await ledger.cancel("r")
    run = await dispatch([plan("a", 2)], wanted, ledger=ledger, feed=feed)
    assert (run.state, run.total, broker.batches) == (RunState.ABORTED, 0, [])


# What is logged of it


def told(logs: list[MutableMapping[str, Any]]) -> list[tuple[str, str, str]]:
    return [
        (each["event"], each["project_id"], each["reason"])
        for each in logs
        if each["event"] != "run_made"
    ]


@pytest.mark.parametrize(
    ("changes", "brake", "state", "note"),
    [
        ({}, None, "running", ""),
        ({}, "too many", "braked", "too many"),
        ({"dry_run": True}, None, "planned", "a dry run: nothing was deleted"),
    ],
)
async def test_each_decision_of_a_run_is_a_line_and_so_is_the_run(
    ledger: Ledger, feed: Feed, changes: dict[str, Any], brake: str | None, state: str, note: str
) -> None:
    plans = [plan("a", 2, staying=1), plan("b", 0, absent=["gone"])]
    wanted = order(reason="no use", policy="nightly", client="ci", **changes)
    with capture_logs() as logs:
        run = await dispatch(plans, wanted, ledger=ledger, feed=feed, brake=brake)
    assert told(logs) == [
        ("pool_chosen", "a", "expired"),
        ("pool_chosen", "a", "expired"),
        ("pool_kept", "a", "protected"),
        ("pool_chosen", "b", "asked for by name; it was not there"),
    ]
    assert {each["run_id"] for each in logs} == {run.run_id}
    assert {each["log_level"] for each in logs} == {"info"}
    made = logs[-1]
    assert (made["event"], made["state"], made["note"]) == ("run_made", state, note)
    assert (made["source"], made["policy"], made["client"]) == ("intake", "nightly", "ci")
    assert (made["requester"], made["reason"]) == ("somebody", "no use")


async def test_who_finds_the_run_made_already_tells_nothing_of_other_decisions(
    ledger: Ledger, feed: Feed
) -> None:
    with capture_logs() as logs:
        for going in (2, 5):
            await dispatch([plan("a", going)], order(run_id="r"), ledger=ledger, feed=feed)
    assert [each["event"] for each in logs] == ["pool_chosen", "pool_chosen", "run_made"]


async def test_a_run_that_was_cancelled_in_the_making_is_logged_as_it_is(
    ledger: Ledger, feed: Feed
) -> None:
    class Cancelled(Ledger):
        """A ledger in which somebody cancels a run just before it is started."""

        async def start(self, run_id: str, total: int, *, maker: str = "") -> bool:
            assert await self.cancel(run_id)
            return await super().start(run_id, total, maker=maker)

    with capture_logs() as logs:
        run = await dispatch([plan("a", 1)], order(), ledger=Cancelled(ledger._redis), feed=feed)
    assert run.state is RunState.ABORTED
    assert (logs[-1]["event"], logs[-1]["state"]) == ("run_made", "aborted")
