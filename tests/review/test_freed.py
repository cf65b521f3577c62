"""What a run freed, on its page: nodes by flavor, and money."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from functools import partial
from itertools import chain
from typing import TYPE_CHECKING

import pytest
from aiohttp import ClientSession
from structlog.testing import capture_logs

from scheduler.prices import Prices
from scheduler.review.web.freed import AT_ONCE, FreedByRun
from tests.conftest import until
from tests.review.site import Site, new_jobs, serving
from tests.review.test_pages import page, sent_by_redis
from worker.ledger import JobState, NewJob, RunState, keys

if TYPE_CHECKING:
    from collections.abc import Mapping

    from redis.asyncio import Redis

    from worker.ledger import Run

PRICES = Prices(currency="EUR", per_node_hour={"modelarts.bm.*": 20, "modelarts.vm.*": 0.5})
GPU = "modelarts.bm.gpu.8"
CPU = "modelarts.vm.cpu.4ud"
OTHER = "modelarts.kat.2"
TABLE = "Nodes that were freed, by flavor Flavor Nodes"


def jobs_with(*nodes: dict[str, int] | None) -> list[NewJob]:
    return list(chain.from_iterable(new_jobs(1, nodes=each) for each in nodes))


async def test_the_page_of_a_run_tells_the_nodes_and_the_money_of_the_pools_that_are_gone(
    redis_client: Redis,
) -> None:
    async with serving(redis_client, prices=PRICES) as site, ClientSession(site.url) as session:
        nodes = [{GPU: 2}, {GPU: 1, CPU: 4}, {OTHER: 3}, None, {GPU: 100}, {GPU: 100}, {GPU: 100}]
        run_id = await site.run(jobs_with(*nodes))
        await site.end(run_id, [JobState.DELETED] * 4 + [JobState.FAILED, JobState.SKIPPED])
        said = (await page(session, f"/runs/{run_id}")).said
        for sentence in (
            "What it freed Pools 4 by now Node-hours a day 240 Money 1,488.00 EUR a day",
            f"{TABLE} {GPU} 3 {OTHER} 3 {CPU} 4",
            "The nodes of 1 of the freed pools are not recorded.",
            f"Not in the money, for want of a price: {OTHER} .",
        ):
            assert sentence in said
        await site.end(run_id, [JobState.DELETED], first=6)
        said = (await page(session, f"/runs/{run_id}")).said
        assert "Pools 5 Node-hours a day 2,640 Money 49,488.00 EUR a day" in said


async def test_without_prices_and_without_nodes_no_more_is_told_than_is_known(
    site: Site, session: ClientSession
) -> None:
    run_id = await site.run(jobs_with({GPU: 2}))
    assert "What it freed Pools 0 by now" in (await page(session, f"/runs/{run_id}")).said
    await site.end(run_id, [JobState.DELETED])
    said = (await page(session, f"/runs/{run_id}")).said
    assert f"Pools 1 Node-hours a day 48 {TABLE} {GPU} 2" in said
    assert "Money" not in said
    old = await site.run(jobs_with(None, None))
    await site.end(old, [JobState.DELETED] * 2)
    said = (await page(session, f"/runs/{old}")).said
    assert "Pools 2 The nodes of 2 of the freed pools are not recorded." in said
    assert "Node-hours" not in said


@pytest.mark.parametrize(("verify", "pools"), [(True, 1), (False, 2)])
async def test_an_accepted_deletion_frees_where_the_run_does_not_look_again(
    site: Site, session: ClientSession, verify: bool, pools: int
) -> None:
    run_id = await site.run(jobs_with({GPU: 1}, {GPU: 1}, None), verify=verify)
    await site.end(run_id, [JobState.DELETED, JobState.ACCEPTED])
    said = (await page(session, f"/runs/{run_id}")).said
    assert f"Pools {pools} by now Node-hours a day {24 * pools}" in said


async def test_a_run_that_was_never_started_freed_nothing_to_tell_of(
    site: Site, session: ClientSession
) -> None:
    run_id = await site.run(jobs_with({GPU: 1}))
    await site.redis.hdel(keys.run(run_id), "started_ms")
    assert "What it freed" not in (await page(session, f"/runs/{run_id}")).said


async def test_a_large_run_is_added_up_once_and_when_it_has_ended(
    site: Site, session: ClientSession
) -> None:
    count = AT_ONCE + 1
    run_id = await site.run(new_jobs(count + 1, nodes={GPU: 2}))
    for first in range(0, count, 1_000):
        ended = min(1_000, count - first)
        await site.end(run_id, [JobState.DELETED] * ended, first=first)
    path = f"/runs/{run_id}"
    before = await sent_by_redis(site.redis)
    said = (await page(session, path)).said
    a_page = await sent_by_redis(site.redis) - before
    all_jobs = count * int(await site.redis.hstrlen(keys.jobs(run_id), "0"))
    assert "Pools 5,001 by now Their nodes are added up when the run has ended." in said
    assert a_page < all_jobs / 10

    await site.end(run_id, [JobState.FAILED], first=count)
    assert "Their nodes are being added up" in (await page(session, path)).said

    async def added_up() -> bool:
        return "Node-hours" in (await page(session, path)).said

    await until(added_up)
    before = await sent_by_redis(site.redis)
    said = (await page(session, path)).said
    assert f"Pools 5,001 Node-hours a day 240,048 {TABLE} {GPU} 10,002" in said
    assert await sent_by_redis(site.redis) - before < all_jobs / 10


async def large(site: Site) -> Run:
    """A run with two jobs that counts as large."""
    run_id = await site.run(jobs_with({GPU: 1}, {GPU: 1}))
    await site.end(run_id, [JobState.DELETED] * 2)
    run = await site.ledger.run(run_id)
    return replace(run, counts={**run.counts, JobState.DELETED: AT_ONCE + 1})


async def test_what_could_not_be_added_up_is_tried_again_by_the_next_who_asks(site: Site) -> None:
    run, freed = await large(site), FreedByRun(site.redis, site.ledger, None)
    jobs, aside = keys.jobs(run.run_id), "aside"
    await site.redis.rename(jobs, aside)
    await site.redis.set(jobs, "what nobody can read as jobs")
    with capture_logs() as logs:
        assert await freed.of(run) is None

        async def is_told() -> bool:
            return bool(logs)

        await until(is_told)
    (told,) = logs
    assert told["event"] == "redis_unreachable"
    assert "WRONGTYPE" in told["reason"]
    await site.redis.rename(aside, jobs)
    found = await until(lambda: freed.of(run))
    assert found
    assert found.nodes == {GPU: 2}


class Unknown(Prices):
    """Prices with a defect."""

    def per_day(self, nodes: Mapping[str, int]) -> tuple[float, list[str]]:
        raise LookupError(str(nodes))


async def test_a_defect_in_the_background_is_told_and_the_next_who_asks_begins_anew(
    site: Site,
) -> None:
    run = await large(site)
    freed = FreedByRun(site.redis, site.ledger, Unknown(**PRICES.model_dump()))
    with capture_logs() as logs:
        for asked in (1, 2):
            assert await freed.of(run) is None

            async def is_told(times: int = asked) -> bool:
                return len(logs) == times

            await until(is_told)
    assert {(told["event"], told["run_id"]) for told in logs} == {
        ("freed_not_added_up", run.run_id)
    }


async def test_one_large_run_is_added_up_after_the_other(site: Site) -> None:
    first, second = await large(site), await large(site)
    freed = FreedByRun(site.redis, site.ledger, None)
    assert await freed.of(first) is None
    assert await freed.of(second) is None
    for run in (first, second):
        found = await until(partial(freed.of, run))
        assert found
        assert found.pools == 2


def goes_on() -> bool:
    return any("_in_background" in repr(task) for task in asyncio.all_tasks())


async def test_nothing_is_begun_in_the_background_before_a_large_run_has_ended(site: Site) -> None:
    run, freed = await large(site), FreedByRun(site.redis, site.ledger, None)
    assert await freed.of(replace(run, state=RunState.RUNNING)) is None
    assert not goes_on()
    assert await freed.of(run) is None
    assert goes_on()
    await freed.close()


async def test_nothing_is_added_up_any_more_when_the_page_is_closed(site: Site) -> None:
    run, freed = await large(site), FreedByRun(site.redis, site.ledger, None)
    assert await freed.of(run) is None
    await freed.close()
    assert not goes_on()
    await FreedByRun(site.redis, site.ledger, None).close()
