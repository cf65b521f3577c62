"""The review page: `GET` and `HEAD` alone, without cookies, and nothing from another host."""

from __future__ import annotations

import asyncio
import re
from collections import Counter
from contextlib import aclosing, contextmanager
from dataclasses import dataclass
from importlib.resources import files
from typing import TYPE_CHECKING, Any, Final

import structlog
from aiohttp import web

from scheduler.intake import events, openapi, problems, reading
from scheduler.intake.http import Bounds
from scheduler.intake.problems import ProblemError, problem_of, retry_after
from scheduler.review.sections import money
from scheduler.review.web import overview, pages, run_page
from scheduler.review.web.access import Viewer, admit
from scheduler.review.web.freed import FreedByRun, pools
from worker.ledger import RunNotFoundError, RunState, SchemaError
from worker.modelarts.answers import printable

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Iterator, Sequence

    from redis.asyncio import Redis

    from scheduler.intake.clients import Clients
    from scheduler.intake.problems import Problem
    from scheduler.prices import Prices
    from worker.ledger import Job, Ledger, Run
    from worker.limiter import Quota

    Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]

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
_TYPES: Final = {
    "style.css": "text/css",
    "live.js": "text/javascript",
    "icon.svg": "image/svg+xml",
}
_NUMBER = re.compile(r"0|[1-9][0-9]{0,7}")

log = structlog.get_logger(__name__)


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
    app.on_shutdown.append(site.close)
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


class _Site:
    def __init__(self, parts: Parts) -> None:
        self._parts = parts
        self._bounds = parts.bounds
        self._lookout = events.Lookout(parts.ledger)
        self._freed = FreedByRun(parts.ledger, parts.prices)
        self._streams: Counter[str] = Counter()
        folder = files("scheduler.review.web") / "static"
        self._static = {name: (folder / name).read_bytes() for name in _TYPES}

    async def close(self, _: web.Application) -> None:
        self._lookout.close()

    async def stop(self, _: web.Application) -> None:
        await self._freed.close()

    # Around every route

    @web.middleware
    async def answer(self, request: web.Request, handler: Handler) -> web.StreamResponse:
        """Has a route's answer, or a page with the problem that it ended with, and logs it."""
        clock = asyncio.get_running_loop().time
        began = clock()
        problem = None
        try:
            reading.check_head(request)
            if not _is_public(request):
                request[_VIEWER] = self._admit(request)
            response = await handler(request)
        except Exception as error:
            if isinstance(error, ConnectionError) and _has_left(request):
                raise
            problem = _problem(error)
            if problem is None:
                log.exception("request_crashed")
                problem = problems.crashed()
            response = _html(
                "problem.html",
                status=problem.kind.status,
                headers=problem.headers,
                title=problem.kind.title,
                problem=problem,
            )
        event = log.bind(
            client=_name(request),
            method=printable(request.method, 20),
            route=_route(request),
            status=response.status,
            duration_ms=round((clock() - began) * 1000),
        )
        if problem is not None:
            event.warning("request_refused", problem=problem.kind.name, detail=problem.detail)
        elif _is_public(request):
            event.debug("http_request")
        else:
            event.info("http_request")
        return response

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
            scan=run_page.SCAN,
            failures=failures,
            failures_looked_at=looked_at,
            freed=freed,
            freed_pools=pools(run),
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
        after = cursor + run_page.KEPT
        return _html(
            "kept.html",
            title=f"Kept by run {run.run_id}",
            run=run,
            kept=kept,
            total=total,
            cursor=cursor,
            next=after if after < total else None,
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
        known = request.headers.get("Last-Event-ID", "")
        async with asyncio.timeout(self._bounds.answer_s):
            run = await self._run(request)
        if run.ended and known == events.id_of(run):
            return web.Response(status=204)  # what tells an EventSource to ask no more
        with self._a_stream(request[_VIEWER].name):
            response = web.StreamResponse(
                headers={"Content-Type": "text/event-stream", "X-Accel-Buffering": "no"}
            )
            await response.prepare(request)
            try:
                await self._watch(request, response, run, known)
            except Exception as error:
                if not isinstance(error, ConnectionError | TimeoutError):
                    log.exception("request_crashed", run_id=run.run_id)
                # An answer that has begun can only be broken off.
                if request.transport is not None:
                    request.transport.abort()
        return response

    async def static(self, request: web.Request) -> web.Response:
        name = request.match_info["name"]
        if name not in self._static:
            raise web.HTTPNotFound
        return web.Response(body=self._static[name], content_type=_TYPES[name], charset="utf-8")

    async def is_alive(self, _: web.Request) -> web.Response:
        return web.Response(text="ok\n")

    # Streams

    @contextmanager
    def _a_stream(self, name: str) -> Iterator[None]:
        """One of the streams that may be open at once.

        Raises:
            ProblemError: there are too many.
        """
        if (
            self._streams[name] >= self._bounds.streams_of_a_client
            or self._streams.total() >= self._bounds.streams
        ):
            raise ProblemError(
                problems.TOO_MANY_STREAMS,
                "no more runs can be watched at once; reload the page to see how far it is",
                headers=retry_after(self._bounds.heartbeat_s),
            )
        self._streams[name] += 1
        try:
            yield
        finally:
            self._streams[name] -= 1
            if not self._streams[name]:
                del self._streams[name]

    async def _watch(
        self, request: web.Request, response: web.StreamResponse, run: Run, known: str
    ) -> None:
        def welcome() -> bool:
            if _has_left(request):
                return False
            try:
                return self._admit(request).sees_run(run)
            except ProblemError:
                return False

        async with self._lookout.watch(run) as view:
            stream = events.stream(
                view,
                _progress,
                known=known,
                heartbeat_s=self._bounds.heartbeat_s,
                welcome=welcome,
            )
            async with aclosing(stream):
                async for chunk in stream:
                    async with asyncio.timeout(self._bounds.answer_s):
                        await response.write(chunk)


def _progress(run: Run) -> dict[str, Any]:
    """What of a run changes while it is looked at."""
    return {"state": run.state, "total": run.total, "done": run.done, "counts": dict(run.counts)}


def _problem(error: Exception) -> Problem | None:
    """The problem that an error means to somebody at a browser."""
    match error:
        case SchemaError():
            return problems.Problem(problems.UNAVAILABLE, str(error))
        case RunNotFoundError():
            detail = "there is no such run any more, or it is about projects that are not yours"
            return problems.Problem(problems.NOT_FOUND, detail)
        case web.HTTPNotFound():
            return problems.Problem(problems.NOT_FOUND, "there is no page at this address")
        case _:
            return problem_of(error)


def _html(template: str, *, status: int = 200, headers: Any = None, **values: Any) -> web.Response:
    return web.Response(
        status=status,
        text=pages.render(template, **values),
        content_type="text/html",
        headers=headers,
    )


def _is_public(request: web.Request) -> bool:
    """Whether nothing of anybody's is told."""
    return _route(request) in {"/static/{name}", "/healthz"}


def _name(request: web.Request) -> str:
    viewer = request.get(_VIEWER)
    return "" if viewer is None else viewer.name


def _has_left(request: web.Request) -> bool:
    return request.transport is None or request.transport.is_closing()


def _route(request: web.Request) -> str:
    """The route's pattern: paths may hold anything."""
    resource = request.match_info.route.resource
    return resource.canonical if resource is not None else ""


async def _harden(_: web.Request, response: web.StreamResponse) -> None:
    response.headers.update(HEADERS)
