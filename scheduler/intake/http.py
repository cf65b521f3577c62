"""The intake's HTTP API: routes, who may use them, and what they answer."""

from __future__ import annotations

import asyncio
import json
import re
from collections import Counter
from contextlib import aclosing, contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final, Protocol

import structlog
from aiohttp import web

from scheduler.intake import events, openapi, problems
from scheduler.intake.desk import LONGEST_KEY
from scheduler.intake.problems import ProblemError, problem_of, retry_after
from scheduler.intake.request import LARGEST, RequestError, Way, read_request
from scheduler.review.records import job_record, run_record
from worker.ledger import JobState, RunNotFoundError, RunState
from worker.modelarts.answers import printable

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Iterator, Sequence

    from scheduler.intake.clients import Client, Clients
    from scheduler.intake.desk import Desk
    from scheduler.intake.request import Request
    from worker.ledger import Ledger, Run

    Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]

_BEARER = re.compile(r"(?i:bearer) +([!-~]+)")
_CHALLENGE: Final = 'Bearer realm="poolsweep"'
_JSON = re.compile(r'(?i)application/json(?:\s*;\s*charset="?utf-8"?)?\s*')
HEADERS: Final = {
    "Server": "poolsweep",
    "X-Content-Type-Options": "nosniff",
    "Cache-Control": "no-store",
}
"""What every answer says besides."""
_PROBES: Final = ("/healthz", "/readyz")
log = structlog.get_logger(__name__)


class Permits(Protocol):
    """Who may ask how often; `worker.limiter.Limiter` is one."""

    async def try_permit(self, project_id: str, /) -> float:
        """0 if a client may ask now, which is counted; else the seconds until it may."""


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
    app.on_shutdown.append(api.close)
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
        app.router.add_route(method, path, handler, expect_handler=_expect_later)
    return app


class _Api:
    def __init__(self, parts: Parts) -> None:
        self._parts = parts
        self._bounds = parts.bounds
        self._lookout = events.Lookout(parts.ledger)
        self._streams: Counter[str] = Counter()

    async def close(self, _: web.Application) -> None:
        self._lookout.close()

    # Around every route

    @web.middleware
    async def answer(self, request: web.Request, handler: Handler) -> web.StreamResponse:
        """Has a route's answer, or the problem that it ended with, and logs it."""
        note = request[_NOTE] = _Note()
        clock = asyncio.get_running_loop().time
        began = clock()
        problem = None
        try:
            _check_head(request)
            response = await handler(request)
        except Exception as error:
            if isinstance(error, ConnectionError) and _has_left(request):
                raise
            problem = problem_of(error)
            if problem is None:
                log.exception("request_crashed", client=note.client, run_id=note.run_id)
                problem = problems.crashed()
            response = problem.response()
        event = log.bind(
            client=note.client,
            method=printable(request.method, 20),
            route=_route(request),
            run_id=note.run_id,
            status=response.status,
            duration_ms=round((clock() - began) * 1000),
        )
        if problem is not None:
            event.warning("request_refused", problem=problem.kind.name, detail=problem.detail)
        elif _route(request) in _PROBES:
            event.debug("http_request")
        else:
            event.info("http_request")
        return response

    def _client(self, request: web.Request) -> Client:
        """Who asks.

        Raises:
            ProblemError: nobody who may.
        """
        client = self._parts.clients().authenticate(_token(request))
        if client is None:
            raise _unauthenticated("the token is not known, or is no longer", given=True)
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
        _query(request)
        key = _idempotency_key(request)
        _check_body_form(request)
        async with asyncio.timeout(self._bounds.answer_s):
            await self._count(client)
        wanted = _read(await _body(request, self._bounds.body_s))
        async with asyncio.timeout(self._bounds.answer_s):
            run_id = await self._parts.desk.accept(wanted, client, Way.HTTP, key=key)
        request[_NOTE].run_id = run_id
        url = f"/v1/runs/{run_id}"
        # The same again for the same key: not how far the run is by now.
        body = {"run_id": run_id, "url": url, "state": RunState.QUEUED}
        return _json(body, status=202, headers={"Location": url})

    async def show(self, request: web.Request) -> web.Response:
        client = self._client(request)
        _query(request)
        async with asyncio.timeout(self._bounds.answer_s):
            return _json(_record(await self._own_run(request, client)))

    async def jobs(self, request: web.Request) -> web.Response:
        client = self._client(request)
        query = _query(request, "outcome", "limit", "cursor")
        outcome = _outcome(query.get("outcome"))
        limit = _number("limit", query.get("limit", str(openapi.JOBS)), 1, openapi.MOST_JOBS)
        offset = _offset(query.get("cursor"))
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
        _query(request)
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
        _query(request)
        known = request.headers.get("Last-Event-ID", "")
        async with asyncio.timeout(self._bounds.answer_s):
            run = await self._own_run(request, client)
        if run.ended and known == events.id_of(run):
            return web.Response(status=204)  # what tells an EventSource to ask no more
        with self._a_stream(client):
            response = web.StreamResponse(
                headers={"Content-Type": "text/event-stream", "X-Accel-Buffering": "no"}
            )
            await response.prepare(request)
            try:
                await self._watch(request, response, run, known)
            except Exception as error:
                if not isinstance(error, ConnectionError | TimeoutError):
                    log.exception("request_crashed", client=client.name, run_id=run.run_id)
                # An answer that has begun can only be broken off. Most often the client has left,
                # or does not read: what waits for it is dropped with the connection.
                if request.transport is not None:
                    request.transport.abort()
        return response

    async def describe(self, request: web.Request) -> web.Response:
        _query(request)
        return _json(openapi.document())

    async def is_alive(self, request: web.Request) -> web.Response:
        _query(request)
        return _json({"status": "ok"})

    async def is_ready(self, request: web.Request) -> web.Response:
        _query(request)
        try:
            async with asyncio.timeout(self._bounds.answer_s):
                missing = await self._parts.missing()
        except TimeoutError:
            missing = [f"what it needs was not there within {self._bounds.answer_s:g} s"]
        if missing:
            headers = retry_after(problems.RETRY_S)
            raise ProblemError(problems.NOT_READY, "; ".join(missing), headers=headers)
        return _json({"status": "ok"})

    # Streams

    @contextmanager
    def _a_stream(self, client: Client) -> Iterator[None]:
        """One of the streams that may be open at once.

        Raises:
            ProblemError: there are too many.
        """
        headers = retry_after(self._bounds.heartbeat_s)
        if self._streams[client.name] >= self._bounds.streams_of_a_client:
            detail = f"client {client.name} has {self._streams[client.name]} streams open"
            raise ProblemError(problems.TOO_MANY_STREAMS, detail, headers=headers)
        if self._streams.total() >= self._bounds.streams:
            detail = "no more streams can be opened here for the moment"
            raise ProblemError(problems.UNAVAILABLE, detail, headers=headers)
        self._streams[client.name] += 1
        try:
            yield
        finally:
            self._streams[client.name] -= 1
            if not self._streams[client.name]:
                del self._streams[client.name]

    async def _watch(
        self, request: web.Request, response: web.StreamResponse, run: Run, known: str
    ) -> None:
        token, name = _token(request), request[_NOTE].client
        seen = self._parts.clients()

        def welcome() -> bool:
            nonlocal seen
            if _has_left(request):
                return False
            clients = self._parts.clients()
            if clients is not seen:
                client = clients.authenticate(token)
                if client is None or client.name != name or Way.HTTP not in client.ways:
                    return False
                seen = clients
            return True

        async with self._lookout.watch(run) as view:
            stream = events.stream(
                view,
                _record,
                known=known,
                heartbeat_s=self._bounds.heartbeat_s,
                welcome=welcome,
            )
            async with aclosing(stream):
                async for chunk in stream:
                    async with asyncio.timeout(self._bounds.answer_s):
                        await response.write(chunk)


# What a request says


def _check_head(request: web.Request) -> None:
    hosts = request.headers.getall("Host", [])
    if len(hosts) > 1 or (not hosts and request.version >= (1, 1)):
        raise ProblemError(problems.BAD_REQUEST, "Host: exactly one is accepted (RFC 9112)")


async def _expect_later(_: web.Request) -> None:
    """Says nothing yet to `Expect`: a body that is refused by its head need not be sent."""


def _token(request: web.Request) -> str:
    given = request.headers.getall("Authorization", [])
    match = _BEARER.fullmatch(given[0]) if len(given) == 1 else None
    if match is None:
        raise _unauthenticated("accepted: one header `Authorization: Bearer <token>`", given=False)
    return match[1]


def _unauthenticated(detail: str, *, given: bool) -> ProblemError:
    # RFC 6750 section 3.1: the error is named only to those who tried.
    challenge = _CHALLENGE + (', error="invalid_token"' if given else "")
    headers = {"WWW-Authenticate": challenge}
    return ProblemError(problems.UNAUTHENTICATED, detail, headers=headers)


def _query(request: web.Request, *names: str) -> dict[str, str]:
    """The query's parameters: those that are accepted, each once."""
    found: dict[str, str] = {}
    for name, value in request.query.items():
        shown = printable(name, 40)
        if name not in names:
            accepted = ", ".join(names) or "none"
            raise ProblemError(
                problems.BAD_REQUEST, f"the parameter {shown!r} is not known; accepted: {accepted}"
            )
        if name in found:
            raise ProblemError(problems.BAD_REQUEST, f"the parameter {shown!r} is there twice")
        found[name] = value
    return found


def _number(name: str, text: str, least: int, most: int) -> int:
    if not re.fullmatch(r"[0-9]{1,9}", text, re.ASCII) or not least <= int(text) <= most:
        raise ProblemError(
            problems.BAD_REQUEST,
            f"{name}: {printable(text, 40)!r} is not accepted: a number from {least} to {most}",
        )
    return int(text)


def _outcome(text: str | None) -> JobState | None:
    if text is None:
        return None
    if text not in set(JobState):
        raise ProblemError(
            problems.BAD_REQUEST,
            f"outcome: {printable(text, 40)!r} is not accepted: one of {', '.join(JobState)}",
        )
    return JobState(text)


def _offset(cursor: str | None) -> int:
    if cursor is None:
        return 0
    if not re.fullmatch(openapi.CURSOR, cursor, re.ASCII):
        raise ProblemError(
            problems.BAD_REQUEST,
            f"cursor: {printable(cursor, 40)!r} is not accepted: what `next` of a page says",
        )
    return int(cursor)


def _idempotency_key(request: web.Request) -> str | None:
    given = request.headers.getall("Idempotency-Key", [])
    if not given:
        return None
    if len(given) > 1 or not re.fullmatch(openapi.KEY, given[0], re.ASCII):
        raise ProblemError(
            problems.BAD_REQUEST,
            f"Idempotency-Key: accepted: one of 1 to {LONGEST_KEY} visible ASCII characters",
        )
    return given[0]


def _check_body_form(request: web.Request) -> None:
    """By the head alone.

    Raises:
        ProblemError: the body is not of a form that is accepted.
    """
    if not _JSON.fullmatch(request.headers.get("Content-Type", "")):
        raise ProblemError(problems.UNSUPPORTED, "Content-Type: accepted: application/json")
    if "Content-Encoding" in request.headers:
        raise ProblemError(problems.UNSUPPORTED, "Content-Encoding: none is accepted")
    if (request.content_length or 0) > LARGEST:
        raise _too_large()
    expected = request.headers.getall("Expect", [])
    if expected and [each.lower() for each in expected] != ["100-continue"]:
        raise ProblemError(problems.EXPECTATION, "accepted: Expect: 100-continue, or none")


async def _body(request: web.Request, within_s: float) -> bytes:
    """A request's body, as far as it is bounded.

    Raises:
        ProblemError: it is too large or too slow, or no JSON.
    """
    if "Expect" in request.headers and request.version >= (1, 1):
        await request.writer.write(b"HTTP/1.1 100 Continue\r\n\r\n")
        request.writer.output_size = 0  # what was said so far is no part of the answer
    body = bytearray()
    try:
        async with asyncio.timeout(within_s):
            async for chunk in request.content.iter_any():
                body += chunk
                if len(body) > LARGEST:
                    raise _too_large()
    except TimeoutError:
        raise ProblemError(
            problems.TOO_SLOW,
            f"the body was not there within {within_s:g} s",
            headers={"Connection": "close"},
        ) from None
    except web.RequestPayloadError:
        raise ProblemError(problems.BAD_REQUEST, "the body ended early, or is not framed") from None
    return bytes(body)


def _read(body: bytes) -> Request:
    """What a body asks for.

    Raises:
        ProblemError: it is not JSON.
        RequestError: it is, but asks for nothing that can be done.
    """
    text = None
    try:
        text = body.decode()
        return read_request(text)
    except UnicodeDecodeError:
        pass
    except RequestError:
        if _is_json(text or ""):
            raise
    raise ProblemError(problems.BAD_REQUEST, "the body is not JSON (RFC 8259) in UTF-8")


def _is_json(text: str) -> bool:
    try:
        json.loads(text)
    except (ValueError, RecursionError):
        return False
    return True


def _too_large() -> ProblemError:
    return ProblemError(problems.TOO_LARGE, f"no more than {LARGEST} bytes are accepted")


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


def _has_left(request: web.Request) -> bool:
    return request.transport is None or request.transport.is_closing()


def _route(request: web.Request) -> str:
    """The route's pattern: paths may hold anything, even a token that somebody put there."""
    resource = request.match_info.route.resource
    return resource.canonical if resource is not None else ""


async def _harden(_: web.Request, response: web.StreamResponse) -> None:
    response.headers.update(HEADERS)
