"""From a project and rules to a plan: reads the cloud, writes nothing to it."""

from __future__ import annotations

import asyncio
from collections import defaultdict
from dataclasses import dataclass, field, replace
from functools import partial
from typing import TYPE_CHECKING, Any, TypeVar

from scheduler.facts import Fact, Facts
from scheduler.listings import Listings
from scheduler.selection import Decision, Rules, select, with_relatives
from worker.modelarts import ApiError, VerdictKind
from worker.modelarts.activity import parse_usage, period_for
from worker.retry import GiveUp, RetryPolicy, backoff_s, decide

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Mapping, Sequence
    from datetime import datetime, timedelta

    from scheduler.idleness import Idleness
    from scheduler.marks import Veto
    from worker.limiter import Limiter
    from worker.modelarts import Pool
    from worker.modelarts.client import ModelArtsClient

T = TypeVar("T")

AT_ONCE = 20
"""Reads of single pools under way at once."""
TRIES = 4
LONGEST_S = 60.0
"""A read of a single pool is made so often, and not again when it was tried for so long."""


@dataclass(frozen=True, slots=True)
class Plan:
    """What is to become of a project's pools.

    Attributes:
        project_id: the project.
        endpoint: the base URL of its API.
        decisions: one for each pool looked at.
        at: when its pools were listed.
        pools: how many pools the project has.
        absent: ids that were asked for by name and that the project does not have.
        unreadable: how many pools the cloud showed that could not be understood; they stay.
        nodes_later: whether nobody has looked yet how the nodes are paid for; the worker does.
        unread: why what decides about a pool could not be read, where that may be otherwise in a
            while, by pool id; it stays.
    """

    project_id: str
    endpoint: str
    decisions: Sequence[Decision]
    at: datetime
    pools: int
    absent: Sequence[str] = ()
    unreadable: int = 0
    nodes_later: bool = False
    unread: Mapping[str, str] = field(default_factory=dict)

    @property
    def deletions(self) -> list[Decision]:
        """The pools to delete, sub-pools before their parents."""
        return [decision for decision in self.decisions if decision.delete]

    @property
    def refusals(self) -> list[Decision]:
        """The pools to keep."""
        return [decision for decision in self.decisions if not decision.delete]

    def only(self, decisions: Sequence[Decision], why_not: Callable[[Pool], str]) -> Plan:
        """The plan with only some of its deletions; the others are kept.

        Args:
            decisions: those that remain.
            why_not: why a pool of the others does not.
        """
        remain = {decision.pool.pool_id for decision in decisions}
        return replace(
            self,
            decisions=[
                decision
                if not decision.delete or decision.pool.pool_id in remain
                else replace(
                    decision, delete=False, reason=f"{why_not(decision.pool)}: {decision.reason}"
                )
                for decision in self.decisions
            ],
        )


class Planner:
    """Plans over the projects of one endpoint.

    Args:
        client: the API.
        limiter: reads count as calls too.
        idleness: remembers since when pools are idle; None: nothing is remembered.
        retry: when a read of a single pool is made again.
        listing_max_age_s: for how long several plans share one listing of a project; 0: each
            lists anew.
    """

    def __init__(
        self,
        client: ModelArtsClient,
        limiter: Limiter,
        idleness: Idleness | None,
        *,
        retry: RetryPolicy,
        listing_max_age_s: float = 0,
    ) -> None:
        self._client = client
        self._limiter = limiter
        self._idleness = idleness
        self._retry = retry
        self._listings = Listings(client, limiter, max_age_s=listing_max_age_s)
        # Each project has its own places, so that one that is throttled leaves the others theirs.
        self._places = defaultdict[str, asyncio.Semaphore](lambda: asyncio.Semaphore(AT_ONCE))

    async def plan(
        self,
        project_id: str,
        rules: Rules,
        now: datetime,
        *,
        vetoes: Mapping[str, Veto] | None = None,
        named: Sequence[str] | None = None,
    ) -> Plan:
        """Decide about all pools of a project, or about those that are named.

        Args:
            project_id: the project.
            rules: what is weighed.
            now: an aware time.
            vetoes: what somebody keeps, by pool id.
            named: the ids of the only pools to be in the plan; None: all.

        Raises:
            ApiError, AuthError: the pools cannot be listed.
        """
        listing = await self._listings.of(project_id)
        pools = listing.pools
        if named is not None:
            pools = with_relatives(pools, frozenset(named))
        facts = [Facts(pool) for pool in pools]
        place = {there.pool.pool_id: number for number, there in enumerate(facts)}
        decisions = select(facts, rules, now, vetoes)
        unread: dict[str, str] = {}
        # Each round reads what is missing, so there are no more rounds than kinds of facts.
        while any(decision.needs for decision in decisions):
            read = [
                self._read(project_id, facts[place[decision.pool.pool_id]], fact, now, rules.window)
                for decision in decisions
                for fact in sorted(decision.needs)
            ]
            for pool_id, changes, why_unread in await _all(read):
                if why_unread:
                    unread[pool_id] = why_unread
                there = facts[place[pool_id]]
                unreadable = {**there.unreadable, **changes.pop("unreadable", {})}
                facts[place[pool_id]] = replace(there, **changes, unreadable=unreadable)
            decisions = select(facts, rules, now, vetoes)
        absent: list[str] = []
        if named is not None:
            wanted = set(named)
            decisions = [each for each in decisions if each.pool.pool_id in wanted]
            absent = [pool_id for pool_id in named if pool_id not in place]
        return Plan(
            project_id=project_id,
            endpoint=self._client.endpoint,
            decisions=decisions,
            at=now,
            pools=len(listing.pools) + len(listing.unreadable),
            absent=absent,
            unreadable=len(listing.unreadable),
            nodes_later=rules.nodes_later,
            unread=unread,
        )

    async def _read(
        self, project_id: str, facts: Facts, fact: Fact, now: datetime, window: timedelta
    ) -> tuple[str, dict[str, Any], str]:
        """Returns the pool's id, what is known of it besides, and why it may yet be known."""
        pool_id = facts.pool.pool_id
        read: dict[Fact, Callable[[str, str], Awaitable[Any]]] = {
            Fact.NODES: self._client.list_nodes,
            Fact.WORKLOADS: self._client.list_workloads,
            Fact.USAGE: partial(self._usage, window),
        }
        try:
            found = await self._insist(project_id, lambda: read[fact](project_id, pool_id))
        except ApiError as error:
            gone = error.verdict.kind is VerdictKind.ALREADY_DELETED
            why = "the pool is gone by now" if gone else str(error)
            return pool_id, {"unreadable": {fact: why}}, why if error.temporary else ""
        changes = {str(fact): found}
        if fact is Fact.WORKLOADS and self._idleness is not None:
            changes["idle_since"] = await self._idleness.seen(project_id, facts.pool, found, now)
        return pool_id, changes, ""

    async def _insist(self, project_id: str, read: Callable[[], Awaitable[T]]) -> T:
        """What a read tells. One that fails in passing is made again a few times.

        Raises:
            ApiError: it failed for good, or too often.
        """
        # As with `worker.retry.tried_s`, waiting for a turn is not trying.
        tried_s, attempts = 0.0, 0
        while True:
            async with self._places[project_id]:
                await self._limiter.permit(project_id)
                try:
                    return await read()
                except ApiError as error:
                    failure = error
            verdict = failure.verdict
            if verdict.throttled:
                await self._limiter.throttled(
                    project_id, verdict.retry_after_s, sent_ago_s=failure.answer.duration_s
                )
            attempts += 1
            tried_s += failure.answer.duration_s
            again = decide(
                self._retry,
                attempts=attempts,
                elapsed_s=tried_s,
                backoff_s=backoff_s(self._retry, attempts),
                retry_after_s=verdict.retry_after_s,
            )
            if isinstance(again, GiveUp) or not failure.temporary:
                raise failure
            tried_s += again.seconds
            await asyncio.sleep(again.seconds)

    async def _usage(self, window: timedelta, project_id: str, pool_id: str) -> Any:
        period = period_for(window)
        document = await self._client.monitor(project_id, pool_id, window=window, period=period)
        return parse_usage(document, period)


async def _all(work: Sequence[Awaitable[T]]) -> Sequence[Any]:
    """The results of all, or the first error once all have ended: none is left running."""
    results = await asyncio.gather(*work, return_exceptions=True)
    for result in results:
        if isinstance(result, BaseException):
            raise result
    return results
