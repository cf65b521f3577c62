"""From accepted requests to runs: plan, brakes, run.

Any number of processes may do this. Each request is leased; whoever dies leaves it to another when
the lease ends, and the run's maker sees to it that two never make one run between them.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections import Counter
from dataclasses import replace
from datetime import UTC, datetime
from functools import partial
from typing import TYPE_CHECKING

import structlog
from redis.exceptions import RedisError

from scheduler.brakes import held
from scheduler.dispatch import dispatch
from scheduler.intake.desk import may_not, order_of
from scheduler.intake.requests import Filed
from scheduler.intake.webhooks import webhook_channel
from scheduler.marks import Vetoes
from scheduler.selection import matching, named
from worker.cancellation import cancel
from worker.ledger import HALF_MADE_S, RunNotFoundError, RunState, Source
from worker.modelarts import ApiError, AuthError
from worker.settings import SettingsError

if TYPE_CHECKING:
    from collections.abc import Callable

    from scheduler.intake.clients import Client, Clients
    from scheduler.intake.request import Target
    from scheduler.intake.requests import Requests, Waiting
    from scheduler.outbox import RunWatch
    from scheduler.planner import Plan, Planner
    from scheduler.policy import Brakes
    from scheduler.sweep import Office
    from worker.feed import Feed

AT_ONCE = 20
"""Requests that one process plans at once."""
MOST_OF_A_PROJECT = 5
"""Of these, the requests of one project."""
BUSY_WAIT_S = 1.0
LOOK_S = 0.2
SWEEP_S = 60.0
"""Time between two looks for runs whose request is lost."""
MOST_TRIES = 5
"""A request whose planner died so often, or failed in a way that nobody foresaw, is given up."""
SHORTEST_WAIT_S = 2.0
LONGEST_WAIT_S = 60.0
UNDECIDED_S = 300.0
"""So long after it was accepted a request waits for what cannot be read of some pools."""
STOP_S = 10.0

log = structlog.get_logger(__name__)


class NotPlannedError(Exception):
    """A request cannot be planned; the text says why, in one line.

    Attributes:
        temporary: whether it may be possible later.
    """

    def __init__(self, reason: str, *, temporary: bool = False) -> None:
        self.temporary = temporary
        super().__init__(reason)


class Planning:
    """Plans the requests that wait.

    Args:
        office: the connections.
        requests: the requests.
        clients: the clients as they are now.
        watch: told of the runs whose end is to be told.
    """

    def __init__(
        self,
        office: Office,
        requests: Requests,
        clients: Callable[[], Clients],
        watch: RunWatch,
    ) -> None:
        self._office = office
        self._requests = requests
        self._clients = clients
        self._watch = watch
        self._lease_s = office.directory.settings.lease_s
        self._tasks: dict[str, asyncio.Task[None]] = {}
        self._busy: Counter[str] = Counter()
        self._planners: dict[str, Planner] = {}
        self._making = asyncio.Lock()
        self._feeds: dict[str, Feed] = {}
        self._stopping = asyncio.Event()

    def stop(self) -> None:
        """Take nothing new."""
        self._stopping.set()

    async def run(self) -> None:
        """Go on until stopped, or cancelled. What has begun is ended, unless that takes long."""
        swept_at = float("-inf")
        loop = asyncio.get_running_loop()
        async with contextlib.AsyncExitStack() as stack:
            self._planners.clear()
            try:
                while not self._stopping.is_set():
                    try:
                        await self._begin_what_is_due(stack)
                        if loop.time() - swept_at > SWEEP_S:
                            swept_at = loop.time()
                            await self._give_up_what_has_no_request()
                    except RedisError as error:
                        log.warning("redis_unreachable", reason=str(error))
                    with contextlib.suppress(TimeoutError):
                        await asyncio.wait_for(self._stopping.wait(), LOOK_S)
                if self._tasks:
                    await asyncio.wait(self._tasks.values(), timeout=STOP_S)
            finally:
                await cancel(*self._tasks.values())

    async def _begin_what_is_due(self, stack: contextlib.AsyncExitStack) -> None:
        while (room := AT_ONCE - len(self._tasks)) and not self._stopping.is_set():
            taken = await self._requests.take(lease_s=self._lease_s, limit=room)
            for waiting in taken:
                # One whose lease ran out while this very process was at it is let be.
                if waiting.run_id in self._tasks:
                    continue
                filed = _filed(waiting)
                projects = [] if filed is None else filed.request.projects
                if any(self._busy[project_id] >= MOST_OF_A_PROJECT for project_id in projects):
                    # One that is slow or paused must leave room for the others'.
                    await self._requests.retry(waiting.run_id, wait_s=BUSY_WAIT_S, trouble="")
                    continue
                task = asyncio.create_task(self._attend(waiting, filed, stack))
                self._tasks[waiting.run_id] = task
                self._busy.update(projects)
                task.add_done_callback(partial(self._ended, waiting.run_id, projects))
            if len(taken) < room:
                return

    def _ended(self, run_id: str, projects: list[str], _: asyncio.Task[None]) -> None:
        del self._tasks[run_id]
        self._busy.subtract(projects)

    async def _give_up_what_has_no_request(self) -> None:
        """End runs that wait to be planned, and whose request Redis has lost."""
        ledger = self._office.ledger
        for endpoint in self._office.directory.endpoints:
            for run in await ledger.active(endpoint):
                waits = run.state in {RunState.QUEUED, RunState.CREATING}
                if run.source != Source.INTAKE or not waits:
                    continue
                if not await self._requests.waits(run.run_id):
                    reason = "its request is not there any more; none of it was executed"
                    if await ledger.abort(run.run_id, reason, min_age_s=HALF_MADE_S):
                        log.error("request_lost", run_id=run.run_id)

    async def _attend(
        self, waiting: Waiting, filed: Filed | None, stack: contextlib.AsyncExitStack
    ) -> None:
        event = log.bind(run_id=waiting.run_id)
        keeper = asyncio.create_task(self._keep(waiting.run_id))
        try:
            await self._bring_to_an_end(waiting, filed, stack)
        except RedisError as error:
            event.warning("redis_unreachable", reason=str(error))
            await self._hand_back(waiting)
        except RunNotFoundError:
            event.warning("request_left_to_another")
        except asyncio.CancelledError:
            await self._hand_back(waiting)
            raise
        except Exception:
            # It is tried again when the lease ends, and given up after a few times.
            event.exception("planning_crashed")
        finally:
            await cancel(keeper)

    async def _hand_back(self, waiting: Waiting) -> None:
        """Have it planned again soon, and not counted as one that kills who plans it."""
        with contextlib.suppress(RedisError):
            await self._requests.retry(waiting.run_id, wait_s=SHORTEST_WAIT_S, trouble="")

    async def _keep(self, run_id: str) -> None:
        while True:
            await asyncio.sleep(self._lease_s / 3)
            with contextlib.suppress(RedisError):
                await self._requests.renew(run_id, lease_s=self._lease_s)

    async def _bring_to_an_end(
        self, waiting: Waiting, filed: Filed | None, stack: contextlib.AsyncExitStack
    ) -> None:
        """Plan a request and start its run, or end the run with the reason; or wait for later."""
        run_id = waiting.run_id
        event = log.bind(run_id=run_id)
        try:
            if waiting.tried > MOST_TRIES:
                raise NotPlannedError(f"given up: its planning was begun {MOST_TRIES} times")
            if filed is None:
                raise NotPlannedError("its record cannot be read by this version")
            state = await self._plan(filed, stack)
        except NotPlannedError as error:
            if error.temporary and filed is not None:
                wait_s = await self._wait_s(filed)
                event.warning("request_not_planned_yet", reason=str(error), wait_s=round(wait_s))
                await self._requests.retry(run_id, wait_s=wait_s, trouble=str(error))
                return
            await self._office.ledger.abort(run_id, str(error))
            event.error("request_given_up", reason=str(error))
        else:
            event.info("request_planned", state=str(state))
        await self._requests.done(run_id)

    async def _wait_s(self, filed: Filed) -> float:
        """Longer the longer it waits already."""
        age_s = await self._age_s(filed)
        return min(LONGEST_WAIT_S, max(SHORTEST_WAIT_S, age_s / 4))

    async def _age_s(self, filed: Filed) -> float:
        return (await self._office.ledger.now_ms() - filed.accepted_ms) / 1000

    async def _plan(self, filed: Filed, stack: contextlib.AsyncExitStack) -> RunState:
        """Returns the state of the run.

        Raises:
            NotPlannedError: not now, or never.
            RunNotFoundError: another is at it.
            RedisError: Redis does not answer.
        """
        ledger, request = self._office.ledger, filed.request
        order = order_of(filed)
        if request.webhook is not None:
            # First of all: whatever becomes of the run, its end is told.
            channel = webhook_channel(filed.client, request.webhook)
            await self._watch.watch(filed.run_id, [channel])
        await ledger.queue(order.new_run(filed.run_id, request.projects))
        run = await ledger.run(filed.run_id)
        cut_off = run.state is RunState.ABORTED and not run.cancelled_ms
        if run.state is RunState.RUNNING or (run.ended and not cut_off):
            return run.state
        age_s = await self._age_s(filed)
        config = self._office.directory.settings
        if age_s > (limit_s := config.plan_max_age_s):
            raise NotPlannedError(
                f"it waited for {age_s / 3600:.1f} h to be planned, longer than "
                f"POOLSWEEP_PLAN_MAX_AGE_S={limit_s:g} allows"
            )
        client = self._allowed(filed)
        now = datetime.now(UTC)
        try:
            for project_id in request.projects:
                if (endpoint := self._office.endpoint(project_id)) != filed.endpoint:
                    raise NotPlannedError(
                        f"project {project_id} is at {endpoint} now, and was at {filed.endpoint} "
                        "when the request was accepted: ask again"
                    )
            planner = await self._planner(filed.endpoint, stack)
            plans = [
                await self._plan_target(filed.endpoint, planner, target, client, now)
                for target in request.targets
            ]
        except (ApiError, AuthError) as error:
            raise NotPlannedError(str(error), temporary=error.temporary) from None
        except SettingsError as error:
            raise NotPlannedError(str(error)) from None
        # Nobody sees what a request's plan keeps, as somebody who types a command does, and no
        # next night tries again: it waits for a while, and then goes on without them.
        unread = [why for plan in plans for why in plan.unread.values()]
        if unread and age_s < min(UNDECIDED_S, config.max_retry_s, limit_s / 2):
            raise NotPlannedError(
                f"{len(unread)} pools cannot be decided about yet: {unread[0]}", temporary=True
            )
        # Planning takes its time, in which a client may have been taken off the list.
        client = self._allowed(filed)
        brakes = _brakes(client, filed)
        brake = held(
            brakes,
            {plan.project_id: (len(plan.deletions), plan.pools) for plan in plans},
            now=datetime.now(UTC),
            zone=client.zone,
        )
        made = await dispatch(
            plans,
            replace(order, brakes=brakes),
            ledger=ledger,
            feed=self._feed(filed.endpoint),
            brake=brake,
        )
        return made.state

    def _allowed(self, filed: Filed) -> Client:
        """The client of a request, if it may still ask for it."""
        client = self._clients().by_name(filed.client)
        if client is None:
            raise NotPlannedError(f"client {filed.client} is known no longer")
        if faults := may_not(filed.request, client):
            raise NotPlannedError(faults[0].detail)
        return client

    async def _plan_target(
        self, endpoint: str, planner: Planner, target: Target, client: Client, now: datetime
    ) -> Plan:
        project_id = target.project_id
        vetoes = await Vetoes(self._office.redis, endpoint).of(project_id, now)
        if target.selector is None:
            pools = list(dict.fromkeys(target.pools or ()))
            return await planner.plan(project_id, named(pools), now, vetoes=vetoes, named=pools)
        rules = matching(
            target.selector, allow_busy=client.allow_busy, allow_shared=client.allow_shared
        )
        return await planner.plan(project_id, rules, now, vetoes=vetoes)

    async def _planner(self, endpoint: str, stack: contextlib.AsyncExitStack) -> Planner:
        async with self._making:
            if endpoint not in self._planners:
                max_age_s = self._office.directory.settings.precondition_max_age_s
                planner = self._office.planner(endpoint, listing_max_age_s=max_age_s)
                self._planners[endpoint] = await stack.enter_async_context(planner)
        return self._planners[endpoint]

    def _feed(self, endpoint: str) -> Feed:
        if endpoint not in self._feeds:
            self._feeds[endpoint] = self._office.feed(endpoint)
        return self._feeds[endpoint]


def _filed(waiting: Waiting) -> Filed | None:
    """The request; None: an earlier or later version wrote what this one does not understand."""
    try:
        return Filed.parse(waiting.run_id, waiting.record)
    except ValueError:
        return None


def _brakes(client: Client, filed: Filed) -> Brakes:
    """A client's brakes, as they hold for a request: pure.

    A share of the project's pools says something where a selector may find too many; whoever names
    each pool is held by it only if the client's brakes say so.
    """
    by_name = all(target.selector is None for target in filed.request.targets)
    if by_name and "max_percent" not in client.brakes.model_fields_set:
        return client.brakes.model_copy(update={"max_percent": 100.0})
    return client.brakes
