"""A policy carried out in one project: plan, grace, brakes, run.

What a sweep needs is put together in an `Office`: the connections of one process.
"""

from __future__ import annotations

import contextlib
import hashlib
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import TYPE_CHECKING

from scheduler import marks
from scheduler.brakes import held_by
from scheduler.dispatch import Order, dispatch
from scheduler.idleness import Idleness
from scheduler.planner import LONGEST_S, TRIES, Plan, Planner
from scheduler.selection import rules_of
from worker.broker import make_app, sender
from worker.feed import Feed
from worker.modelarts_client import make_client, make_limiter
from worker.retry import RetryPolicy

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Sequence
    from datetime import timedelta

    from redis.asyncio import Redis

    from scheduler.marks import Mark
    from scheduler.policy import Policy
    from scheduler.selection import Rules
    from worker.ledger import Ledger, Run, Source
    from worker.projects import Directory


@dataclass(frozen=True, slots=True)
class Office:
    """The connections of one process.

    Attributes:
        directory: how each project is reached.
        redis: a connection that decodes responses.
        ledger: where runs are recorded.
    """

    directory: Directory
    redis: Redis
    ledger: Ledger

    @contextlib.asynccontextmanager
    async def planner(
        self, endpoint: str, *, listing_max_age_s: float = 0
    ) -> AsyncIterator[Planner]:
        """What plans over the projects of an endpoint.

        Args:
            endpoint: the base URL of the API.
            listing_max_age_s: for how long several plans share one listing of a project.

        Raises:
            SettingsError: credentials are missing or not usable.
        """
        limiter = make_limiter(self.directory, self.redis, endpoint)
        async with make_client(self.directory, self.redis, endpoint) as client:
            config = self.directory.settings
            yield Planner(
                client,
                limiter,
                Idleness(self.redis, endpoint),
                retry=RetryPolicy(TRIES, LONGEST_S, config.backoff_base_s, config.backoff_cap_s),
                listing_max_age_s=listing_max_age_s,
            )

    def feed(self, endpoint: str) -> Feed:
        """What sends the batches of runs at an endpoint."""
        settings = self.directory.settings
        app = make_app(settings, [endpoint])
        return Feed(self.ledger, sender(app, endpoint), settings)

    def endpoint(self, project_id: str) -> str:
        """The base URL of a project's API."""
        return self.directory.endpoint(project_id).url


@dataclass(frozen=True, slots=True)
class Swept:
    """What came of a sweep in one project.

    Attributes:
        run: the run; it may be braked, or have no jobs.
        plan: what was decided, the grace taken into account.
        marked: the pools that were marked just now.
        waiting: those that were marked before and are not due yet.
    """

    run: Run
    plan: Plan
    marked: tuple[Mark, ...] = ()
    waiting: tuple[Mark, ...] = ()


async def plan_project(
    office: Office,
    project_id: str,
    rules: Rules,
    now: datetime,
    *,
    named: Sequence[str] | None = None,
) -> Plan:
    """Plan over a project. Writes nothing to the cloud.

    Args:
        office: the connections.
        project_id: the project.
        rules: what is weighed.
        now: an aware time.
        named: the ids of the only pools to be in the plan; None: all.

    Raises:
        ApiError, AuthError: the pools cannot be listed.
        SettingsError: the project cannot be reached as configured.
    """
    endpoint = office.endpoint(project_id)
    vetoes = await marks.Vetoes(office.redis, endpoint).of(project_id, now)
    async with office.planner(endpoint) as planner:
        return await planner.plan(project_id, rules, now, vetoes=vetoes, named=named)


async def plan_policy(office: Office, policy: Policy, project_id: str, now: datetime) -> Plan:
    """Plan what a policy would do in a project; see `plan_project`."""
    return await plan_project(office, project_id, rules_of(policy), now)


async def carry_out(
    office: Office,
    name: str,
    policy: Policy,
    plan: Plan,
    *,
    source: Source,
    requester: str,
    run_id: str | None = None,
) -> Swept:
    """Do what a plan says, as far as the grace and the brakes of its policy let it.

    Args:
        office: the connections.
        name, policy: the policy.
        plan: its plan over one project.
        source: which of the ways in it came by.
        requester: who asked.
        run_id: the run's id, so that doing it twice makes one run; None: a new one.

    Raises:
        RedisError: the ledger cannot be reached.
    """
    fresh: tuple[Mark, ...] = ()
    waiting: tuple[Mark, ...] = ()
    if policy.grace is not None:
        plan, fresh, waiting = await _after_grace(office, name, policy.grace, plan)
    brake = held_by(
        policy.brakes,
        deletions=len(plan.deletions),
        pools=plan.pools,
        now=datetime.now(UTC),
        zone=policy.zone,
    )
    order = Order(
        endpoint=plan.endpoint,
        source=source,
        requester=requester,
        reason=policy.description,
        policy=name,
        brakes=policy.brakes,
        alone=True,
        run_id=run_id,
    )
    feed = office.feed(plan.endpoint)
    run = await dispatch([plan], order, ledger=office.ledger, feed=feed, brake=brake)
    return Swept(run, plan, fresh, waiting)


async def _after_grace(
    office: Office, policy: str, grace: timedelta, plan: Plan
) -> tuple[Plan, tuple[Mark, ...], tuple[Mark, ...]]:
    """Mark what is new, lift what no longer matches, and leave what is due in the plan."""
    store = marks.Marks(office.redis, plan.endpoint)
    weighed = marks.weigh(
        plan.deletions,
        await store.of(plan.project_id, policy),
        project_id=plan.project_id,
        policy=policy,
        grace=grace,
        now=datetime.now(UTC),
    )
    await store.put(weighed.fresh)
    await store.lift(plan.project_id, policy, weighed.lifted)
    due = {mark.pool_id: mark.due_at for mark in (*weighed.fresh, *weighed.waiting)}
    remaining = plan.only(
        weighed.due, lambda pool: f"marked, and due at {due[pool.pool_id]:%Y-%m-%dT%H:%MZ}"
    )
    return remaining, weighed.fresh, weighed.waiting


def night_run_id(policy: str, project_id: str, night: datetime) -> str:
    """The id of the run of a policy in a project in one night: the same however often it is asked.

    Args:
        policy: the policy's name.
        project_id: the project.
        night: when it was due; an aware time.
    """
    text = f"{policy}\n{project_id}\n{night.astimezone(UTC).isoformat()}"
    digest = hashlib.sha256(text.encode()).hexdigest()[:10]
    return f"{night.astimezone(UTC):%Y%m%d-%H%M%S}-{digest}"
