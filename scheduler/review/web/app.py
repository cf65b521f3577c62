"""The review page: `GET` and `HEAD` alone, without cookies, and nothing from another host."""

from __future__ import annotations

import asyncio
import re
from dataclasses import dataclass, replace
from importlib.resources import files
from typing import TYPE_CHECKING, Any, Final

from aiohttp import web
from redis.exceptions import RedisError

from scheduler.intake import openapi, problems, reading
from scheduler.intake.events import Streams
from scheduler.intake.http import Bounds
from scheduler.intake.problems import ProblemError
from scheduler.intake.routes import Routes, route_of
from scheduler.review.credit import pools
from scheduler.review.sections import money
from scheduler.review.web import overview, pages, run_page
from scheduler.review.web.access import Viewer, admit
from scheduler.review.web.freed import FreedByRun
from worker.ledger import RunNotFoundError, RunState, SchemaError

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from redis.asyncio import Redis

    from scheduler.intake.clients import Clients
    from scheduler.intake.problems import Problem
    from scheduler.intake.routes import Handler
    from scheduler.prices import Prices
    from worker.ledger import Job, Ledger, Run
    from worker.limiter import Quota

HEADERS: Final = {
    "Server": "poolsweep",
    "Cache-Control": "no-store",
    "Content-Security-Policy": (
        "default-src 'none'; style-src 'self'; script-src 'self'; img-src 'self' data:; "
        "connect-src 'self'; frame-ancestors 'none'; base-uri 'none'; form-action 'self'"
    ),
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
}
"""What every answer says besides."""
BOUNDS: Final = Bounds(answer_s=10)
LONGEST_QUERY: Final = 200
UNREADABLE: Final = problems.Kind("run-unreadable", 500, "The run cannot be read")
"""A newer version made it, or its record is damaged: asking again changes nothing."""
_TYPES: Final = {
    "style.css": "text/css",
    "live.js": "text/javascript",
    "icon.svg": "image/svg+xml",
}
_NUMBER = re.compile(r"0|[1-9][0-9]{0,7}")


@dataclass(frozen=True, slots=True)
class Parts:
    """What the page is made of.

    Attributes:
        redis: a connection that decodes responses.
        ledger: the runs in it.
        clients: the clients as they are now; None: the page is for this machine alone.
        quota: a project's rate limit.
        endpoints: those that are configured.
        prices: what nodes cost; None: not known.
        bounds: what it spends on anybody.
    """

    redis: Redis
    ledger: Ledger
    clients: Callable[[], Clients] | None
    quota: Callable[[str], Quota]
    endpoints: Sequence[str] = ()
    prices: Prices | None = None
    bounds: Bounds = BOUNDS


_VIEWER: Final = web.RequestKey("viewer", Viewer)


def make_app(parts: Parts) -> web.Application:
    """The page. Serve it with `scheduler.intake.serving.make_runner`.

    Args:
        parts: what it is made of.
    """
    site = _Site(parts)
    app = web.Application(middlewares=[site.answer])
    app.on_response_prepare.append(_harden)
    app.on_shutdown.append(site.streams.close)
    app.on_cleanup.append(site.stop)
    run = "/runs/{run_id}"
    for path, handler in (
        ("/", site.overview),
        ("/runs", site.runs),
        (run, site.run),
        (run + "/kept", site.kept),
        (run + "/jobs/{number}", site.job),
        ("/static/{name}", site.static),
        ("/healthz", site.is_alive),
    ):
        app.router.add_get(path, handler, expect_handler=reading.expect_later)
    app.router.add_get(
        run + "/events", site.events, allow_head=False, expect_handler=reading.expect_later
    )
    return app


class _Site(Routes):
    quiet = ("/static/{name}", "/healthz")  # they tell nothing of anybody's, so anybody may ask

    def __init__(self, parts: Parts) -> None:
        self._parts = parts
        self._bounds = parts.bounds
        self.streams = Streams(parts.ledger, _progress, parts.bounds)
        self._freed = FreedByRun(parts.redis, parts.ledger, parts.prices)
        folder = files("scheduler.review.web") / "static"
        self._static = {name: (folder / name).read_bytes() for name in _TYPES}

    async def stop(self, _: web.Application) -> None:
        await self._freed.close()

    # Around every route

    async def _routed(self, request: web.Request, handler: Handler) -> web.StreamResponse:
        if route_of(request) not in self.quiet:
            request[_VIEWER] = self._admit(request)
        return await handler(request)

    def _problem(self, error: Exception) -> Problem | None:
        match error:
            case SchemaError():
                return problems.Problem(UNREADABLE, str(error))
            case RunNotFoundError():
                detail = "there is no such run any more, or it is about projects that are not yours"
                return problems.Problem(problems.NOT_FOUND, detail)
            case RedisError() | TimeoutError():
                problem = super()._problem(error)
                detail = "the record of runs does not answer; load the page again in a moment"
                return None if problem is None else replace(problem, detail=detail)
            case web.HTTPNotFound():
                return problems.Problem(problems.NOT_FOUND, "there is no page at this address")
            case _:
                return super()._problem(error)

    def _refusal(self, problem: Problem) -> web.Response:
        return _html(
            "problem.html",
            status=problem.kind.status,
            headers=problem.headers,
            title=problem.kind.title,
            problem=problem,
        )

    def _about(self, request: web.Request) -> dict[str, str]:
        viewer = request.get(_VIEWER)
        return {"client": "" if viewer is None else viewer.name}

    def _admit(self, request: web.Request) -> Viewer:
        clients = self._parts.clients
        return admit(request, None if clients is None else clients())

    async def _run(self, request: web.Request) -> Run:
        """The run that the path names.

        Raises:
            RunNotFoundError: there is none; one that the viewer does not see is not told from it.
        """
        run_id = request.match_info["run_id"]
        if not re.fullmatch(openapi.RUN_ID, run_id, re.ASCII):
            raise RunNotFoundError(run_id)
        run = await self._parts.ledger.run(run_id)
        if not request[_VIEWER].sees_run(run):
            raise RunNotFoundError(run_id)
        return run

    # The routes

    async def overview(self, request: web.Request) -> web.Response:
        reading.query_of(request)
        parts = self._parts
        async with asyncio.timeout(self._bounds.answer_s):
            seen = await overview.overview(
                parts.redis,
                parts.ledger,
                request[_VIEWER],
                quota=parts.quota,
                endpoints=parts.endpoints,
            )
        values: dict[str, Any] = {"seen": seen, "scan": overview.SCAN}
        return _html("overview.html", title="Overview", viewer=request[_VIEWER], **values)

    async def runs(self, request: web.Request) -> web.Response:
        cursor = reading.offset_of(reading.query_of(request, "cursor").get("cursor"))
        parts = self._parts
        async with asyncio.timeout(self._bounds.answer_s):
            page = await overview.runs_page(
                parts.redis, parts.ledger, request[_VIEWER], cursor=cursor
            )
        return _html("runs.html", title="Runs", page=page, cursor=cursor)

    async def run(self, request: web.Request) -> web.Response:
        query = reading.query_of(request, "outcome", "q", "cursor")
        outcome = reading.outcome_of(query.get("outcome") or None)
        words = query.get("q", "").strip()
        if len(words) > LONGEST_QUERY:
            raise ProblemError(
                problems.BAD_REQUEST, f"q: too long; accepted: {LONGEST_QUERY} characters at most"
            )
        cursor = reading.offset_of(query.get("cursor"))
        ledger, redis = self._parts.ledger, self._parts.redis
        async with asyncio.timeout(self._bounds.answer_s):
            run = await self._run(request)
            page = await run_page.jobs_page(
                ledger, run, outcome=outcome, query=words, cursor=cursor
            )
            failures, looked_at = await run_page.failures(ledger, run)
            freed = await self._freed.of(run)
            kept, kept_total = await run_page.kept_page(redis, ledger, run.run_id, 0)
        return _html(
            "run.html",
            title=f"Run {run.run_id}",
            run=run,
            page=page,
            outcome=outcome,
            query=words,
            cursor=cursor,
            size=run_page.JOBS,
            scan=run_page.SCAN,
            failures=failures,
            failures_looked_at=looked_at,
            freed=freed,
            freed_pools=pools(run) if freed is None else freed.pools,
            money=None if freed is None else money(freed),
            kept=kept[:10],
            kept_total=kept_total,
        )

    async def kept(self, request: web.Request) -> web.Response:
        cursor = reading.offset_of(reading.query_of(request, "cursor").get("cursor"))
        async with asyncio.timeout(self._bounds.answer_s):
            run = await self._run(request)
            kept, total = await run_page.kept_page(
                self._parts.redis, self._parts.ledger, run.run_id, cursor
            )
        return _html(
            "kept.html",
            title=f"Kept by run {run.run_id}",
            run=run,
            kept=kept,
            total=total,
            cursor=cursor,
            size=run_page.KEPT,
        )

    async def job(self, request: web.Request) -> web.Response:
        reading.query_of(request)
        async with asyncio.timeout(self._bounds.answer_s):
            run = await self._run(request)
            job = await self._job(run, request.match_info["number"])
        return _html("job.html", title=f"Job {job.job_id}", run=run, job=job)

    async def _job(self, run: Run, number: str) -> Job:
        if _NUMBER.fullmatch(number) and run.state not in {RunState.QUEUED, RunState.CREATING}:
            for job in await self._parts.ledger.jobs(run.run_id, offset=int(number), limit=1):
                return job
        raise ProblemError(problems.NOT_FOUND, "the run has no job with this number")

    async def events(self, request: web.Request) -> web.StreamResponse:
        reading.query_of(request)
        async with asyncio.timeout(self._bounds.answer_s):
            run = await self._run(request)

        def welcome() -> bool:
            try:
                return self._admit(request).sees_run(run)
            except ProblemError:
                return False

        return await self.streams.answer(request, run, name=request[_VIEWER].name, welcome=welcome)

    async def static(self, request: web.Request) -> web.Response:
        name = request.match_info["name"]
        if name not in self._static:
            raise web.HTTPNotFound
        return web.Response(body=self._static[name], content_type=_TYPES[name], charset="utf-8")

    async def is_alive(self, _: web.Request) -> web.Response:
        return web.Response(text="ok\n")


def _progress(run: Run) -> dict[str, Any]:
    """What of a run changes while it is looked at."""
    return {
        "state": run.state,
        "badge": pages.run_state(run),
        "total": run.total,
        "done": run.done,
        "counts": dict(run.counts),
    }


def _html(template: str, *, status: int = 200, headers: Any = None, **values: Any) -> web.Response:
    return web.Response(
        status=status,
        text=pages.render(template, **values),
        content_type="text/html",
        headers=headers,
    )


async def _harden(_: web.Request, response: web.StreamResponse) -> None:
    response.headers.update(HEADERS)
