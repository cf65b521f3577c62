"""From a project and a wish to a plan: reads the cloud, writes nothing."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from scheduler.selection import Decision, select
from worker.modelarts import Billing, node_billing

if TYPE_CHECKING:
    from collections.abc import Sequence
    from datetime import datetime

    from scheduler.selection import Wish
    from worker.modelarts import ModelArtsClient


@dataclass(frozen=True, slots=True)
class Plan:
    """What is to become of a project's pools.

    Attributes:
        project_id: the project.
        decisions: one for each pool looked at.
        absent: ids that were asked for by name and that the project does not have.
        unreadable: how many pools the cloud showed that could not be understood; they stay.
    """

    project_id: str
    decisions: Sequence[Decision]
    absent: Sequence[str] = ()
    unreadable: int = 0

    @property
    def deletions(self) -> list[Decision]:
        """The pools to delete, sub-pools before their parents."""
        return [decision for decision in self.decisions if decision.delete]

    @property
    def refusals(self) -> list[Decision]:
        """The pools to keep."""
        return [decision for decision in self.decisions if not decision.delete]


async def plan(client: ModelArtsClient, project_id: str, wish: Wish, now: datetime) -> Plan:
    """Plan over all pools of a project.

    Args:
        client: the API.
        project_id: the project.
        wish: which pools somebody wants to be rid of.
        now: an aware time.

    Raises:
        ApiError, AuthError: the pools cannot be listed.
    """
    listing = await client.list_pools(project_id)
    return Plan(project_id, select(listing.pools, wish, now), unreadable=len(listing.unreadable))


async def plan_named(
    client: ModelArtsClient, project_id: str, ids: Sequence[str], wish: Wish, now: datetime
) -> Plan:
    """Plan over pools that are named; only these are in the plan, and their nodes are asked for.

    Args:
        client: the API.
        project_id: the project.
        ids: the pools' ids.
        wish: the wish for just these, see `selection.named`.
        now: an aware time.

    Raises:
        ApiError, AuthError: the pools cannot be read.
    """
    everything = await plan(client, project_id, wish, now)
    wanted = set(ids)
    chosen = [
        await _keep_if_nodes_are_prepaid(client, project_id, each)
        for each in everything.decisions
        if each.pool.pool_id in wanted
    ]
    absent = sorted(wanted - {each.pool.pool_id for each in chosen})
    return Plan(project_id, chosen, absent, everything.unreadable)


async def _keep_if_nodes_are_prepaid(
    client: ModelArtsClient, project_id: str, decision: Decision
) -> Decision:
    pool = decision.pool
    if not decision.delete or pool.is_logical:
        return decision
    nodes = await client.list_nodes(project_id, pool.pool_id)
    if any(node_billing(node) is Billing.PREPAID for node in nodes):
        return Decision(pool, False, "it has prepaid nodes: unsubscribe these first")
    return decision
