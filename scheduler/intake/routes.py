"""What is around every route: its answer or the problem that it ended with, and a line of the log.

The HTTP API and the review page have it in common.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING, ClassVar

import structlog
from aiohttp import web

from scheduler.intake import problems, reading
from worker.modelarts.answers import printable

if TYPE_CHECKING:
    from collections.abc import Collection

    from scheduler.intake.problems import Problem

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]

log = structlog.get_logger(__name__)


class Routes:
    """Routes, each of which may end with any error.

    Attributes:
        quiet: the patterns of the routes that are asked all the time and told of only to who looks
            closely.
    """

    quiet: ClassVar[Collection[str]]

    @web.middleware
    async def answer(self, request: web.Request, handler: Handler) -> web.StreamResponse:
        """Has a route's answer, or the problem that it ended with, and logs it."""
        clock = asyncio.get_running_loop().time
        began = clock()
        problem = None
        try:
            reading.check_head(request)
            response = await self._routed(request, handler)
        except Exception as error:
            if isinstance(error, ConnectionError) and has_left(request):
                raise
            problem = self._problem(error)
            if problem is None:
                log.exception("request_crashed", **self._about(request))
                problem = problems.crashed()
            response = self._refusal(problem)
        duration_s = clock() - began
        self._answered(request, response, duration_s)
        event = log.bind(
            method=printable(request.method, 20),
            route=route_of(request),
            status=response.status,
            duration_ms=round(duration_s * 1000),
            **self._about(request),
        )
        quiet = route_of(request) in self.quiet
        if problem is not None:
            tell = event.debug if quiet else event.warning
            tell("request_refused", problem=problem.kind.name, detail=problem.detail)
        else:
            tell = event.debug if quiet else event.info
            tell("http_request")
        return response

    # What differs

    async def _routed(self, request: web.Request, handler: Handler) -> web.StreamResponse:
        return await handler(request)

    def _problem(self, error: Exception) -> Problem | None:
        """What an error means to who asked; None: nobody foresaw it."""
        return problems.problem_of(error)

    def _refusal(self, problem: Problem) -> web.Response:
        return problem.response()

    def _about(self, request: web.Request) -> dict[str, str]:
        """What is logged of a request besides what its answer says."""
        raise NotImplementedError

    def _answered(
        self, request: web.Request, response: web.StreamResponse, duration_s: float
    ) -> None:
        """Count an answer."""


def has_left(request: web.Request) -> bool:
    """Whether nobody waits for the answer any more."""
    return request.transport is None or request.transport.is_closing()


def route_of(request: web.Request) -> str:
    """The route's pattern: paths may hold anything, even a token that somebody put there."""
    resource = request.match_info.route.resource
    return resource.canonical if resource is not None else ""
