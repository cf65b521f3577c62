"""The review page, served on this machine for the tests, and runs for it to show."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import TYPE_CHECKING

from aiohttp import web

from scheduler.intake.serving import make_runner
from scheduler.review.web.app import BOUNDS, Parts, make_app
from tests.intake.api import ENDPOINT, PROJECTS
from worker.ledger import (
    Attempt,
    JobState,
    Kept,
    Ledger,
    Move,
    NewJob,
    NewRun,
    Source,
    new_run_id,
)
from worker.limiter import Quota

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Iterable, Sequence

    from redis.asyncio import Redis

    from scheduler.intake.clients import Clients
    from scheduler.intake.http import Bounds
    from scheduler.prices import Prices

SCRIPT = "<script>alert(1)</script>"


def pool_name(number: int) -> str:
    return f"pool-{number:032d}"


def new_jobs(
    count: int, *, project: str = PROJECTS[0], nodes: dict[str, int] | None = None
) -> Iterable[NewJob]:
    return (
        NewJob(
            project,
            pool_name(number),
            display_name=f"team-{number}",
            created="2026-03-01T03:10:40Z",
            fingerprint="f" * 64,
            chosen="older than 30 d and idle",
            nodes=nodes,
        )
        for number in range(count)
    )


@dataclass(frozen=True)
class Site:
    """A page that is served, and what is behind it."""

    url: str
    redis: Redis
    ledger: Ledger

    async def run(
        self,
        jobs: Iterable[NewJob],
        *,
        projects: Sequence[str] = PROJECTS[:1],
        kept: Sequence[Kept] = (),
        **more: object,
    ) -> str:
        """Make a run, as the planning does, and let the workers at it."""
        run_id = new_run_id(datetime.now(UTC))
        given: dict[str, object] = {"requester": "jo", "reason": "no use", **more}
        run = NewRun(run_id, Source.CLI, ENDPOINT, projects=tuple(projects), **given)  # type: ignore[arg-type]
        await self.ledger.create(run)
        total = await self.ledger.add(run_id, jobs)
        await self.ledger.keep(run_id, kept)
        assert await self.ledger.start(run_id, total)
        return run_id

    async def end(
        self,
        run_id: str,
        states: Sequence[JobState],
        *,
        first: int = 0,
        status: int = 200,
        code: str = "",
        reason: str = "",
    ) -> None:
        """Have the next jobs of a run end so, each with one call, as a worker does."""
        numbers = range(first, first + len(states))
        claimed = await self.ledger.claim(run_id, list(numbers), owner="test", lease_s=60)
        assert len(claimed) == len(states)
        now_ms = await self.ledger.now_ms()
        attempt = Attempt(now_ms, 123, status, code, "req-7")
        moves = [
            Move(
                number,
                JobState.LEASED,
                state,
                owner="test",
                attempt=attempt,
                reason=reason or f"was {state}",
            )
            for number, state in zip(numbers, states, strict=True)
        ]
        assert all(await self.ledger.record(run_id, moves))


@contextlib.asynccontextmanager
async def serving(
    redis: Redis,
    *,
    clients: Callable[[], Clients] | None = None,
    prices: Prices | None = None,
    bounds: Bounds = BOUNDS,
) -> AsyncIterator[Site]:
    """Serve the page on a free port."""
    ledger = Ledger(redis)
    parts = Parts(
        redis=redis,
        ledger=ledger,
        clients=clients,
        quota=lambda _: Quota(10, 1),
        endpoints=(ENDPOINT,),
        prices=prices,
        bounds=bounds,
    )
    runner = make_runner(make_app(parts), shutdown_s=1)
    await runner.setup()
    try:
        await web.TCPSite(runner, "127.0.0.1", 0).start()
        port = runner.addresses[0][1]
        yield Site(f"http://127.0.0.1:{port}", redis, ledger)
    finally:
        await runner.cleanup()
