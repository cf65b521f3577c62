"""Workers give up a run that its maker left half made; a request's run is its planner's."""

from __future__ import annotations

import asyncio
from datetime import UTC, datetime
from typing import TYPE_CHECKING

from tests.conftest import until
from tests.worker.conftest import Cloud, RedisServer, settings_for, worker_here
from worker.ledger import Ledger, NewRun, RunState, Source, keys, new_run_id

if TYPE_CHECKING:
    from redis.asyncio import Redis


async def test_only_a_run_that_nobody_else_answers_for_is_given_up(
    cloud: Cloud, redis: Redis, server: RedisServer
) -> None:
    settings = settings_for(cloud, server.url)
    ledger = Ledger(redis)
    made = {}
    for source in (Source.CLI, Source.INTAKE):
        made[source] = run_id = new_run_id(datetime.now(UTC))
        assert await ledger.create(NewRun(run_id, source, cloud.url), maker="dead")
        await redis.hincrby(keys.run(run_id), "planned_ms", -3_600_000)
    young = new_run_id(datetime.now(UTC))
    assert await ledger.create(NewRun(young, Source.CLI, cloud.url), maker="at it")

    async def given_up() -> bool:
        return (await ledger.run(made[Source.CLI])).state is RunState.ABORTED

    async with worker_here(settings) as worker:
        await asyncio.to_thread(worker.reconcile)
        await until(given_up)
    assert (await ledger.run(made[Source.INTAKE])).state is RunState.CREATING
    assert (await ledger.run(young)).state is RunState.CREATING
