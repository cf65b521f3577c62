"""How the HTTP API is served: what is bounded and answered below the routes, on each connection."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

from aiohttp import web

from scheduler.intake import problems
from scheduler.intake.http import HEADERS, Bounds

if TYPE_CHECKING:
    from aiohttp.web_request import BaseRequest

LINGER_S = 2.0
"""A client that still sends a body which was refused gets this long to read why."""
SHUTDOWN_S = 10.0


def make_runner(
    app: web.Application, *, bounds: Bounds | None = None, shutdown_s: float = SHUTDOWN_S
) -> web.AppRunner:
    """A runner that serves the API; set it up and give it a site.

    Args:
        app: the API.
        bounds: what it spends on anybody.
        shutdown_s: seconds that the requests under way get when it is cleaned up.
    """
    return _Runner(app, bounds or Bounds(), shutdown_timeout=shutdown_s)


class _Runner(web.AppRunner):
    def __init__(self, app: web.Application, bounds: Bounds, *, shutdown_timeout: float) -> None:
        super().__init__(app, shutdown_timeout=shutdown_timeout)
        self._bounds = bounds

    async def _make_server(self) -> web.Server:
        # The only seam that aiohttp has for connections of another class.
        plain = await super()._make_server()
        return _Server(plain, self._bounds)


class _Server(web.Server):
    def __init__(self, plain: web.Server, bounds: Bounds) -> None:
        super().__init__(plain.request_handler, request_factory=plain.request_factory)
        self._bounds = bounds

    def __call__(self) -> web.RequestHandler:
        """A new connection's handler."""
        return _Connection(self, self._bounds)


class _Connection(web.RequestHandler):
    """A connection. What aiohttp would answer as text or HTML is a problem here."""

    __slots__ = ("_answer_s",)

    def __init__(self, server: web.Server, bounds: Bounds) -> None:
        super().__init__(
            server,
            loop=asyncio.get_running_loop(),
            # From the connection's beginning too: a head that trickles in is cut off by it.
            keepalive_timeout=bounds.idle_s,
            lingering_time=LINGER_S,
            # A small body that unpacks to a large one is refused by its head, and not unpacked.
            auto_decompress=False,
            access_log=None,  # type: ignore[arg-type]
        )
        self._answer_s = bounds.answer_s

    def handle_error(
        self,
        request: BaseRequest,
        status: int = 500,
        exc: BaseException | None = None,
        message: str | None = None,
    ) -> web.StreamResponse:
        """What is not HTTP, or failed outside the routes. What was sent, perhaps a token, is
        neither repeated nor logged."""
        if request.writer.output_size > 0:
            raise ConnectionError("an answer has begun already")
        if status >= 500:
            self.logger.error("request_crashed: %s", type(exc).__name__)
        problem = problems.unreadable() if status < 500 else problems.crashed()
        response = _hardened(problem)
        response.force_close()
        return response

    async def finish_response(
        self, request: BaseRequest, resp: web.StreamResponse, start_time: float | None
    ) -> tuple[web.StreamResponse, bool]:
        """Send what is left of an answer; a client that does not take it is dropped."""
        if isinstance(resp, web.HTTPException) and (problem := problems.problem_of(resp)):
            resp = _hardened(problem)
        try:
            async with asyncio.timeout(self._answer_s):
                return await super().finish_response(request, resp, start_time)
        except TimeoutError:
            if request.transport is not None:
                request.transport.abort()
            return resp, True


def _hardened(problem: problems.Problem) -> web.Response:
    response = problem.response()
    response.headers.update(HEADERS)
    return response
