"""Server-sent events: a run's progress, told to those who watch it.

All who watch one run in this process share one look at it. A watcher is only ever told of the run
as it is now, so one that reads slowly skips what it missed and holds no memory.

Source: HTML standard, section "Server-sent events".
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import json
from collections import Counter
from typing import TYPE_CHECKING, Any

import structlog
from aiohttp import web
from redis.exceptions import RedisError

from scheduler.intake import problems
from scheduler.intake.problems import ProblemError, retry_after
from scheduler.intake.routes import has_left
from worker.cancellation import cancel
from worker.ledger import RunNotFoundError, SchemaError

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, AsyncIterator, Callable, Iterator

    from scheduler.intake.http import Bounds
    from worker.ledger import Ledger, Run

LOOK_S = 0.5
GLANCE_S = 1.0
"""A stream that is to end for another reason than its run's end does so within this time."""
RECONNECT_MS = 2_000
OPENING = f"retry: {RECONNECT_MS}\n\n".encode()
HEARTBEAT = b": the run is as it was\n\n"

log = structlog.get_logger(__name__)


class View:
    """A run as it was seen last.

    Args:
        run: the run.

    Attributes:
        run: the run; None: it is in the ledger no longer.
        over: whether nothing more will be seen.
        watchers: how many watch.
    """

    def __init__(self, run: Run) -> None:
        self.run: Run | None = run
        self.over = False
        self.watchers = 0
        self._changed = asyncio.Event()

    def show(self, run: Run | None) -> None:
        """Tell the watchers of the run as it is now."""
        if run != self.run:
            self.run = run
            self.wake()

    def end(self) -> None:
        """Tell the watchers that there is no more to see."""
        self.over = True
        self.wake()

    def wake(self) -> None:
        """Have every watcher look."""
        changed, self._changed = self._changed, asyncio.Event()
        changed.set()

    async def wait(self, timeout_s: float) -> None:
        """Until there is something new, or so many seconds have passed."""
        changed = self._changed
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(timeout_s):
                await changed.wait()


class Lookout:
    """Looks at the runs that are watched, each twice a second at most.

    Args:
        ledger: where the runs are.
    """

    def __init__(self, ledger: Ledger) -> None:
        self._ledger = ledger
        self._views: dict[str, tuple[View, asyncio.Task[None]]] = {}
        self._closed = False

    @contextlib.asynccontextmanager
    async def watch(self, run: Run) -> AsyncIterator[View]:
        """A view of a run for the time of the `with` block.

        Args:
            run: the run, as the caller has just seen it.
        """
        if run.run_id not in self._views:
            view = View(run)
            self._views[run.run_id] = view, asyncio.create_task(self._look(view, run.run_id))
        view, task = self._views[run.run_id]
        view.watchers += 1
        try:
            yield view
        finally:
            view.watchers -= 1
            if not view.watchers:
                del self._views[run.run_id]
                await cancel(task)

    def close(self) -> None:
        """End every stream at once, also those that are about to begin."""
        self._closed = True
        for view, _ in self._views.values():
            view.end()

    async def _look(self, view: View, run_id: str) -> None:
        while not (self._closed or view.run is None or view.run.ended):
            await asyncio.sleep(LOOK_S)
            try:
                view.show(await self._ledger.run(run_id))
            except SchemaError:
                break  # it is a newer version's by now, or damaged; who asks again is told so
            except RunNotFoundError:
                view.show(None)
            except RedisError:
                continue  # what was seen last holds until it answers again
        view.end()


async def stream(
    view: View,
    record: Callable[[Run], dict[str, Any]],
    *,
    known: str,
    heartbeat_s: float,
    welcome: Callable[[], bool],
) -> AsyncGenerator[bytes, None]:
    """The events of one watcher, until the run has ended or the watcher is no longer welcome.

    Args:
        view: the run.
        record: a run's fields for JSON.
        known: the id of the event that the watcher had last; empty: none. It is not told again.
        heartbeat_s: seconds after which something is sent though there is nothing new.
        welcome: whether the watcher may still watch; asked every second.
    """
    clock = asyncio.get_running_loop().time
    yield OPENING
    spoke = clock()
    while welcome() and view.run is not None:
        run = view.run
        if (event_id := id_of(run)) != known:
            known = event_id
            name = "end" if run.ended else "progress"
            data = json.dumps(record(run))
            yield f"event: {name}\nid: {event_id}\ndata: {data}\n\n".encode()
            spoke = clock()
        elif clock() - spoke >= heartbeat_s:
            yield HEARTBEAT
            spoke = clock()
        if run.ended:
            return
        if view.run is run:  # else more has happened while the watcher was told
            if view.over:
                return
            await view.wait(GLANCE_S)


class Streams:
    """The streams that are open, which are so many at the most.

    Args:
        ledger: where the runs are.
        record: a run's fields for JSON.
        bounds: what is spent on anybody.
    """

    def __init__(
        self, ledger: Ledger, record: Callable[[Run], dict[str, Any]], bounds: Bounds
    ) -> None:
        self._lookout = Lookout(ledger)
        self._record = record
        self._bounds = bounds
        self._open: Counter[str] = Counter()

    async def close(self, _: web.Application) -> None:
        """End all at once, and those that are about to begin: when the process is to stop."""
        self._lookout.close()

    async def answer(
        self, request: web.Request, run: Run, *, name: str, welcome: Callable[[], bool]
    ) -> web.StreamResponse:
        """Tell somebody of a run until it has ended, or they have left.

        Args:
            request: what they asked.
            run: the run, as it has just been read.
            name: whose stream it is.
            welcome: whether they may still watch; asked every second.

        Raises:
            ProblemError: too many streams are open.
        """
        known = request.headers.get("Last-Event-ID", "")
        if run.ended and known == id_of(run):
            return web.Response(status=204)  # what tells an EventSource to ask no more
        with self._one_more(name):
            response = web.StreamResponse(
                headers={"Content-Type": "text/event-stream", "X-Accel-Buffering": "no"}
            )
            await response.prepare(request)
            try:
                async with self._lookout.watch(run) as view:
                    events = stream(
                        view,
                        self._record,
                        known=known,
                        heartbeat_s=self._bounds.heartbeat_s,
                        welcome=lambda: not has_left(request) and welcome(),
                    )
                    async with contextlib.aclosing(events):
                        async for event in events:
                            async with asyncio.timeout(self._bounds.answer_s):
                                await response.write(event)
            except Exception as error:
                if not isinstance(error, ConnectionError | TimeoutError):
                    log.exception("request_crashed", client=name, run_id=run.run_id)
                # An answer that has begun can only be broken off. Most often they have left, or do
                # not read: what waits for them is dropped with the connection.
                if request.transport is not None:
                    request.transport.abort()
        return response

    @contextlib.contextmanager
    def _one_more(self, name: str) -> Iterator[None]:
        headers = retry_after(self._bounds.heartbeat_s)
        if self._open[name] >= (most := self._bounds.streams_of_a_client):
            detail = f"{most} streams are open already; close one to open another"
            raise ProblemError(problems.TOO_MANY_STREAMS, detail, headers=headers)
        if self._open.total() >= self._bounds.streams:
            detail = "no more streams can be opened here for the moment"
            raise ProblemError(problems.UNAVAILABLE, detail, headers=headers)
        self._open[name] += 1
        try:
            yield
        finally:
            self._open[name] -= 1
            if not self._open[name]:
                del self._open[name]


def id_of(run: Run) -> str:
    """The id of the event that tells of a run as it is: the same in every process. Pure."""
    return hashlib.sha256(repr(run).encode()).hexdigest()[:16]
