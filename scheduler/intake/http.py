"""The intake's HTTP API: routes, who may use them, and what they answer."""

from __future__ import annotations

import asyncio
import json
import re
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, Final

from aiohttp import web

from scheduler.intake import openapi, problems, reading
from scheduler.intake.events import Streams
from scheduler.intake.problems import ProblemError, retry_after
from scheduler.intake.request import Way
from scheduler.intake.routes import Routes, route_of
from scheduler.metrics import REQUEST_S, REQUESTS
from scheduler.review.records import job_record, run_record
from worker.cancellation import cancel
from worker.health import Health, Readiness, answers
from worker.ledger import RunNotFoundError, RunState
from worker.settings import settings

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable, Sequence

    from prometheus_client import Metric

    from scheduler.intake.clients import Client, Clients
    from scheduler.intake.desk import Desk
    from scheduler.intake.messages import Permits
    from scheduler.intake.routes import Handler
    from worker.ledger import Ledger, Run

HEADERS: Final = {
    "Server": "poolsweep",
    "X-Content-Type-Options": "nosniff",
    "Cache-Control": "no-store",
}
"""What every answer says besides."""


@dataclass(frozen=True, slots=True)
class Bounds:
    """What the API spends on anybody.

    Attributes:
        body_s: seconds in which a request's body must be there.
        answer_s: seconds in which the record of runs must answer, and a client take what it is
            sent.
        idle_s: seconds in which a connection must bring a request's head.
        heartbeat_s: seconds after which a stream of events says something.
        streams: streams open at once.
        streams_of_a_client: those of one client.
    """

    body_s: float = 20
    answer_s: float = 30
    idle_s: float = 30
    heartbeat_s: float = 15
    streams: int = 500
    streams_of_a_client: int = 20


@dataclass(frozen=True, slots=True)
class Parts:
    """What the API is made of.

    Attributes:
        desk: takes requests in.
        ledger: where runs are seen.
        clients: the clients as they are now.
        limiter: how often each may ask, by its name.
        missing: what the process lacks to take requests, a sentence for each; empty: nothing.
        bounds: what it spends.
    """

    desk: Desk
    ledger: Ledger
    clients: Callable[[], Clients]
    limiter: Permits
    missing: Callable[[], Awaitable[Sequence[str]]]
    bounds: Bounds = Bounds()


@dataclass(slots=True)
class _Note:
    """What is logged of a request besides what its answer says."""

    client: str = ""
    run_id: str = ""


_NOTE: Final = web.RequestKey("note", _Note)


def make_app(parts: Parts) -> web.Application:
    """The API. Serve it with `scheduler.intake.serving.make_runner`.

    Args:
        parts: what it is made of.
    """
    api = _Api(parts)
    app = web.Application(middlewares=[api.answer])
    app.on_response_prepare.append(_harden)
    app.on_shutdown.append(api.streams.close)
    app.cleanup_ctx.append(api.serve_health)
    run = "/v1/runs/{run_id}"
    for method, path, handler in (
        ("POST", "/v1/runs", api.create),
        ("GET", run, api.show),
        ("GET", run + "/jobs", api.jobs),
        ("POST", run + "/cancel", api.cancel),
        ("GET", run + "/events", api.events),
        ("GET", "/v1/openapi.json", api.describe),
        ("GET", "/healthz", api.is_alive),
        ("GET", "/readyz", api.is_ready),
    ):
        app.router.add_route(method, path, handler, expect_handler=reading.expect_later)
    return app


class _Api(Routes):
    quiet = ("/healthz", "/readyz")  # that the process is not ready is said once, when it changes

    def __init__(self, parts: Parts) -> None:
        self._parts = parts
        self._bounds = parts.bounds
        self.streams = Streams(parts.ledger, _record, parts.bounds)
        self._readiness = Readiness(self._missing)

    async def serve_health(self, _: web.Application) -> AsyncIterator[None]:
        """Says how the process is, on a port of its own: what it counts is not for its clients."""
        health = Health(
            settings(),
            "intake",
            redis_answers=self._redis_answers,
            missing=lambda _: self._missing(),
            found=_nothing,
            readiness=self._readiness,
        )
        serving = asyncio.create_task(health.run())
        yield
        await cancel(serving)

    # Around every route

    async def _routed(self, request: web.Request, handler: Handler) -> web.StreamResponse:
        request[_NOTE] = _Note()
        return await handler(request)

    def _about(self, request: web.Request) -> dict[str, str]:
        return asdict(request.get(_NOTE) or _Note())

    def _answered(
        self, request: web.Request, response: web.StreamResponse, duration_s: float
    ) -> None:
        route = route_of(request) or "none"
        REQUESTS.labels(route, str(response.status)).inc()
        if response.content_type != "text/event-stream":
            REQUEST_S.labels(route).observe(duration_s)

    def _client(self, request: web.Request) -> Client:
        """Who asks.

        Raises:
            ProblemError: nobody who may.
        """
        client = self._parts.clients().authenticate(reading.token_of(request))
        if client is None:
            raise reading.unauthenticated("the token is not known, or is no longer", given=True)
        request[_NOTE].client = client.name
        if Way.HTTP not in client.ways:
            raise ProblemError(
                problems.FORBIDDEN, f"client {client.name} may not send requests by {Way.HTTP}"
            )
        return client

    async def _count(self, client: Client) -> None:
        """Counts a request against its client's rate.

        Raises:
            ProblemError: it must wait.
        """
        wait_s = await self._parts.limiter.try_permit(client.name)
        if wait_s > 0:
            raise ProblemError(
                problems.TOO_MANY,
                f"client {client.name} may ask {client.rate_limit:g} times a second",
                headers=retry_after(wait_s),
            )

    async def _own_run(self, request: web.Request, client: Client) -> Run:
        """The client's run that the path names.

        Raises:
            RunNotFoundError: there is none; another's is not told from one that is not there.
        """
        run_id = request.match_info["run_id"]
        if not re.fullmatch(openapi.RUN_ID, run_id, re.ASCII):
            raise RunNotFoundError(run_id)
        request[_NOTE].run_id = run_id
        run = await self._parts.ledger.run(run_id)
        if run.client != client.name:
            raise RunNotFoundError(run_id)
        return run

    # The routes

    async def create(self, request: web.Request) -> web.Response:
        client = self._client(request)
        reading.query_of(request)
        key = reading.idempotency_key(request)
        reading.check_body_form(request)
        async with asyncio.timeout(self._bounds.answer_s):
            await self._count(client)
        wanted = reading.read(await reading.body_of(request, self._bounds.body_s))
        async with asyncio.timeout(self._bounds.answer_s):
            run_id = await self._parts.desk.accept(wanted, client, Way.HTTP, key=key)
        request[_NOTE].run_id = run_id
        url = f"/v1/runs/{run_id}"
        # The same again for the same key: not how far the run is by now.
        body = {"run_id": run_id, "url": url, "state": RunState.QUEUED}
        return _json(body, status=202, headers={"Location": url})

    async def show(self, request: web.Request) -> web.Response:
        client = self._client(request)
        reading.query_of(request)
        async with asyncio.timeout(self._bounds.answer_s):
            return _json(_record(await self._own_run(request, client)))

    async def jobs(self, request: web.Request) -> web.Response:
        client = self._client(request)
        query = reading.query_of(request, "outcome", "limit", "cursor")
        outcome = reading.outcome_of(query.get("outcome"))
        limit = reading.number("limit", query.get("limit", str(openapi.JOBS)), 1, openapi.MOST_JOBS)
        offset = reading.offset_of(query.get("cursor"))
        async with asyncio.timeout(self._bounds.answer_s):
            run = await self._own_run(request, client)
            # While they are being written down they may yet be written anew.
            made = run.state not in {RunState.QUEUED, RunState.CREATING}
            ledger = self._parts.ledger
            found = (
                await ledger.jobs(run.run_id, outcome=outcome, offset=offset, limit=limit + 1)
                if made
                else []
            )
        body: dict[str, Any] = {"jobs": [job_record(job) for job in found[:limit]]}
        if len(found) > limit:
            only = f"outcome={outcome}&" if outcome else ""
            body["next"] = f"/v1/runs/{run.run_id}/jobs?{only}limit={limit}&cursor={offset + limit}"
        return _json(body)

    async def cancel(self, request: web.Request) -> web.Response:
        client = self._client(request)
        reading.query_of(request)
        async with asyncio.timeout(self._bounds.answer_s):
            await self._count(client)
            run = await self._own_run(request, client)
            cancelled = await self._parts.ledger.cancel(run.run_id)
            run = await self._parts.ledger.run(run.run_id)
        if not cancelled:
            raise ProblemError(problems.RUN_ENDED, f"run {run.run_id} is {run.state}")
        return _json(_record(run), status=202)

    async def events(self, request: web.Request) -> web.StreamResponse:
        client = self._client(request)
        reading.query_of(request)
        async with asyncio.timeout(self._bounds.answer_s):
            run = await self._own_run(request, client)
        token, seen = reading.token_of(request), self._parts.clients()

        def welcome() -> bool:
            nonlocal seen
            if (clients := self._parts.clients()) is not seen:
                now = clients.authenticate(token)
                if now is None or now.name != client.name or Way.HTTP not in now.ways:
                    return False
                seen = clients
            return True

        return await self.streams.answer(request, run, name=client.name, welcome=welcome)

    async def describe(self, request: web.Request) -> web.Response:
        reading.query_of(request)
        return _json(openapi.document())

    async def is_alive(self, request: web.Request) -> web.Response:
        reading.query_of(request)
        return _json({"status": "ok"})

    async def is_ready(self, request: web.Request) -> web.Response:
        reading.query_of(request)
        if missing := await self._readiness.look():
            headers = retry_after(problems.RETRY_S)
            raise ProblemError(problems.NOT_READY, "; ".join(missing), headers=headers)
        return _json({"status": "ok"})

    async def _missing(self) -> Sequence[str]:
        try:
            async with asyncio.timeout(self._bounds.answer_s):
                return await self._parts.missing()
        except TimeoutError:
            return [f"what it needs was not there within {self._bounds.answer_s:g} s"]

    async def _redis_answers(self) -> bool:
        return await answers(self._parts.ledger.now_ms)


# What it is answered


def _record(run: Run) -> dict[str, Any]:
    url = f"/v1/runs/{run.run_id}"
    return {
        **run_record(run),
        "links": {
            "self": url,
            "jobs": f"{url}/jobs",
            "events": f"{url}/events",
            "cancel": None if run.ended else f"{url}/cancel",
        },
    }


def _json(
    body: dict[str, Any], *, status: int = 200, headers: dict[str, str] | None = None
) -> web.Response:
    return web.Response(
        status=status,
        body=json.dumps(body).encode(),
        content_type="application/json",
        headers=headers,
    )


async def _nothing(_: bool) -> list[Metric]:
    """An intake tells what it counts: what is in the ledger, others tell."""
    return []


async def _harden(_: web.Request, response: web.StreamResponse) -> None:
    response.headers.update(HEADERS)
