"""Reports read out of Redis: a pool that two runs called for counts once, wherever it is told."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING

import pytest

from scheduler.review.gathering import CALLING_MS, RUNS_AT_ONCE, report_of_run, report_since
from scheduler.review.web.freed import FreedByRun
from worker.ledger import Attempt, JobState, Ledger, Move, NewJob, NewRun, Source, keys, new_run_id

if TYPE_CHECKING:
    from redis.asyncio import Redis

    from scheduler.review.report import Freed
    from worker.ledger import Run

ENDPOINT, PROJECT, CPU = "https://modelarts.example.com", "a" * 32, "modelarts.vm.cpu.4ud"
DAY_MS = 86_400_000


class Book:
    """Runs whose calls were accepted when a test says."""

    def __init__(self, redis: Redis) -> None:
        self.redis = redis
        self.ledger = Ledger(redis)

    async def run(self, *pools: str, made_ago_ms: int = 0, accepted_at_ms: int, nodes: int) -> str:
        """A run that goes on, and has deleted pools by calls that were accepted then."""
        ledger, run_id = self.ledger, new_run_id(datetime.now(UTC))
        await ledger.create(NewRun(run_id, Source.CLI, ENDPOINT, projects=(PROJECT,)))
        jobs = [
            NewJob(PROJECT, pool, created="c", nodes={CPU: nodes}) for pool in (*pools, "other")
        ]
        await ledger.add(run_id, jobs)
        assert await ledger.start(run_id, len(jobs))
        await ledger.claim(run_id, range(len(pools)), owner="me", lease_s=600)
        call = Attempt(accepted_at_ms, 40, 200, "", "")
        for source, target in (
            (JobState.LEASED, JobState.ACCEPTED),
            (JobState.ACCEPTED, JobState.DELETED),
        ):
            first = source is JobState.LEASED
            owner, attempt = ("me", call) if first else ("", None)
            moves = [Move(n, source, target, owner, attempt) for n in range(len(pools))]
            assert all(await ledger.record(run_id, moves))
        made_ms = await ledger.now_ms() - made_ago_ms
        await self.redis.hset(
            keys.run(run_id), mapping={"created_ms": made_ms, "started_ms": made_ms}
        )
        await self.redis.zadd(keys.INDEX, {run_id: made_ms})
        return run_id

    async def freed(self, run_id: str) -> tuple[int, int]:
        """The pools and nodes that a run's report, and its page, say it has freed."""
        found = (await report_of_run(self.redis, self.ledger, run_id, None)).freed
        by_page = await self.freed_by_page(await self.ledger.run(run_id))
        assert by_page == found
        return found.pools, found.nodes.get(CPU, 0)

    async def freed_by_page(self, run: Run) -> Freed | None:
        """What a run's page says it has freed."""
        return await FreedByRun(self.redis, self.ledger, None).of(run)

    async def sent_for(self, run_id: str) -> int:
        """The bytes that Redis sends for that page."""
        run, sent = await self.ledger.run(run_id), []
        for _ in range(2):
            sent.append(int((await self.redis.info("stats"))["total_net_output_bytes"]))
            await self.freed_by_page(run)
        return sent[1] - sent[0]

    async def freed_since(self, days: float) -> tuple[int, int]:
        """The pools and nodes that the runs of the last days have freed."""
        found = await report_since(self.redis, self.ledger, timedelta(days=days), None)
        return found.freed.pools, found.freed.nodes.get(CPU, 0)


@pytest.fixture
def book(redis_client: Redis) -> Book:
    return Book(redis_client)


async def test_of_two_runs_the_one_whose_call_was_accepted_first_has_freed_a_pool(
    book: Book,
) -> None:
    later = await book.run("one", "both", accepted_at_ms=2_000, nodes=2)
    sooner = await book.run("both", "two", accepted_at_ms=1_000, nodes=10)
    assert await book.freed(later) == (1, 2)
    assert await book.freed(sooner) == (2, 20)
    assert await book.freed_since(1) == (3, 22)


async def test_what_a_run_before_the_time_freed_is_not_of_the_time(book: Book) -> None:
    await book.run("both", "one", made_ago_ms=DAY_MS + 60_000, accepted_at_ms=1_000, nodes=10)
    await book.run("both", "two", accepted_at_ms=2_000, nodes=2)
    assert await book.freed_since(1) == (1, 2)
    assert await book.freed_since(2) == (3, 22)


async def test_runs_that_cannot_call_any_more_are_not_read(book: Book) -> None:
    await book.run("both", made_ago_ms=2 * CALLING_MS, accepted_at_ms=1_000, nodes=10)
    new = await book.run("both", accepted_at_ms=2_000, nodes=2)
    assert await book.freed(new) == (1, 2)


async def test_runs_made_after_a_run_had_ended_are_not_read(book: Book) -> None:
    ended = await book.run("both", made_ago_ms=DAY_MS, accepted_at_ms=1_000, nodes=2)
    finished_ms = await book.ledger.now_ms() - DAY_MS // 2
    await book.redis.hset(keys.run(ended), mapping={"finished_ms": finished_ms})
    before = await book.sent_for(ended)
    for _ in range(20):
        await book.run("both", accepted_at_ms=2_000, nodes=2)
    assert await book.sent_for(ended) < before + 200
    during = await book.run("both", made_ago_ms=DAY_MS // 2 + 60_000, accepted_at_ms=1, nodes=2)
    assert await book.freed(ended) == (0, 0)
    assert await book.freed(during) == (1, 2)


async def test_of_a_run_that_freed_no_pool_no_other_is_read(book: Book) -> None:
    run_id = await book.run(accepted_at_ms=1_000, nodes=2)
    before = await book.sent_for(run_id)
    for _ in range(20):
        await book.run("both", accepted_at_ms=2_000, nodes=2)
    assert await book.sent_for(run_id) < before + 200
    assert await book.freed(run_id) == (0, 0)


async def test_runs_in_between_that_cannot_be_read_hide_no_rival(book: Book) -> None:
    await book.run("both", made_ago_ms=120_000, accepted_at_ms=1_000, nodes=10)
    before_ms = await book.ledger.now_ms() - 60_000
    aged_out = [f"gone-{n}" for n in range(2 * RUNS_AT_ONCE)]
    await book.redis.zadd(keys.INDEX, dict.fromkeys(aged_out, before_ms))
    run_id = await book.run("both", "one", accepted_at_ms=2_000, nodes=2)
    assert await book.freed(run_id) == (1, 2)


async def test_a_rival_that_a_newer_version_made_is_left_alone(book: Book) -> None:
    newer = await book.run("both", accepted_at_ms=1_000, nodes=10)
    run_id = await book.run("both", accepted_at_ms=2_000, nodes=2)
    await book.redis.hset(keys.run(newer), "schema", 99)
    assert await book.freed(run_id) == (1, 2)
    assert await book.freed_since(1) == (1, 2)
