"""Which pools may go, and why: pure.

What somebody wants gone (by name, or what a policy matches) is weighed against what protects a
pool. Protection wins over every match, and a doubt protects too. Where only a further call can
tell, the decision says which facts it needs; with these it is made again.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from scheduler import matchers
from scheduler.facts import Fact, Facts
from scheduler.matchers import Finding, Kind, ask, busy_with
from worker.modelarts import Billing, UnreadableTagsError, nodes_obstacle, validate_pool_name
from worker.modelarts.answers import printable

if TYPE_CHECKING:
    from collections.abc import Collection, Mapping, Sequence
    from datetime import datetime, timedelta

    from scheduler.marks import Veto
    from scheduler.matchers import Matcher
    from scheduler.policy import Policy
    from worker.modelarts import Pool

LONGEST_REASON = 400
PROTECT_TAG = "poolsweep/protect"
_NO = {"0", "false", "no", "off"}


@dataclass(frozen=True, slots=True)
class Decision:
    """What is to become of one pool.

    Attributes:
        pool: the pool.
        delete: whether it is to be deleted.
        reason: why, or why not.
        needs: facts without which this cannot be decided; the pool stays until it is.
    """

    pool: Pool
    delete: bool
    reason: str
    needs: frozenset[Fact] = frozenset()


Find = Callable[["Facts", "datetime"], Finding]
"""(pool and what has been read of it, now) -> whether it matches."""


@dataclass(frozen=True, slots=True)
class Rules:
    """What is weighed.

    Attributes:
        match: which pools somebody wants gone.
        protect: which stay all the same.
        allow_busy: whether pools with running workloads may go.
        allow_shared: whether shared and public pools may go.
        nodes_later: whether the worker is to look how the nodes are paid for, just before its
            call, rather than the plan: a plan over thousands of pools would take hours for it.
        window: how far back utilisation is asked for.
    """

    match: Find
    protect: Find | None = None
    allow_busy: bool = False
    allow_shared: bool = False
    nodes_later: bool = False
    window: timedelta = matchers.SHORTEST_WINDOW


def matching(
    match: Matcher,
    protect: Matcher | None = None,
    *,
    allow_busy: bool = False,
    allow_shared: bool = False,
) -> Rules:
    """Rules for the pools that a matcher finds; see `Rules`."""
    parts = [match] if protect is None else [match, protect]
    return Rules(
        match=lambda facts, now: matchers.find(match, facts, now),
        protect=None if protect is None else lambda facts, now: matchers.find(protect, facts, now),
        allow_busy=allow_busy,
        allow_shared=allow_shared,
        window=matchers.longest_window(parts),
    )


def rules_of(policy: Policy) -> Rules:
    """A policy's rules."""
    return matching(
        policy.match,
        policy.protect,
        allow_busy=policy.allow_busy,
        allow_shared=policy.allow_shared,
    )


MANY = 100
"""The nodes of more pools than this are not read by a plan over pools that somebody names."""


def named(ids: Collection[str]) -> Rules:
    """Rules for pools that somebody names: they may be busy or shared, since they are meant."""
    wanted = frozenset(ids)

    def match(facts: Facts, _now: datetime) -> Finding:
        if facts.pool.pool_id in wanted:
            return matchers.yes("asked for by name")
        return matchers.no("not asked for")

    return Rules(match, allow_busy=True, allow_shared=True, nodes_later=len(wanted) > MANY)


def select(
    pools: Sequence[Facts],
    rules: Rules,
    now: datetime,
    vetoes: Mapping[str, Veto] | None = None,
) -> list[Decision]:
    """Decide about every pool.

    Args:
        pools: all of one project's pools, so that sub-pools are seen.
        rules: what is weighed.
        now: an aware time.
        vetoes: what somebody keeps, by pool id.

    Returns:
        A decision for each, in an order in which sub-pools come before their parents.
    """
    listed = Counter(facts.pool.pool_id for facts in pools)
    decisions = {
        facts.pool.pool_id: decide(facts, rules, now, vetoes or {})
        for facts in pools
        if listed[facts.pool.pool_id] == 1
    }
    family = _Family.of([facts.pool for facts in pools])
    found = []
    # A sub-pool that stays keeps its parent, which therefore is weighed after it.
    for pool in family.ordered:
        decision = decisions.get(pool.pool_id) or Decision(pool, False, "it is listed twice")
        if _may_go(decision) and (why := family.obstacle(pool, decisions)):
            decision = decisions[pool.pool_id] = Decision(pool, False, why)
        reason = printable(decision.reason, LONGEST_REASON)
        found.append(decision if reason == decision.reason else replace(decision, reason=reason))
    return found


def with_relatives(pools: Sequence[Pool], ids: Collection[str]) -> list[Pool]:
    """Of a project's pools those with certain ids, and all that decide about these: pure.

    Args:
        pools: all of one project's pools.
        ids: which are meant.

    Returns:
        They, the pools that lie in them, and those that they lie in, in the given order.
    """
    inside: dict[str, set[str]] = {}
    parents: dict[str, str] = {}
    for pool in pools:
        if pool.parent:
            inside.setdefault(pool.parent, set()).add(pool.pool_id)
            parents[pool.pool_id] = pool.parent
    chosen = set(ids)
    waiting = list(ids)
    while waiting:
        more = inside.get(waiting.pop(), set()) - chosen
        chosen |= more
        waiting += more
    for pool_id in list(chosen):
        while (pool_id := parents.get(pool_id, "")) and pool_id not in chosen:
            chosen.add(pool_id)
    return [pool for pool in pools if pool.pool_id in chosen]


def decide(facts: Facts, rules: Rules, now: datetime, vetoes: Mapping[str, Veto]) -> Decision:
    """Decide about one pool by itself, whatever becomes of the others.

    Args:
        facts: the pool and what has been read of it.
        rules: what is weighed.
        now: an aware time.
        vetoes: what somebody keeps, by pool id.
    """
    pool = facts.pool
    match = rules.match(facts, now)
    if match.kind in {Kind.NO, Kind.DOUBT}:
        return Decision(pool, False, match.reason or "nothing asks for its deletion")
    if veto := vetoes.get(pool.pool_id):
        return Decision(pool, False, str(veto))
    if why := obstacle(pool, allow_shared=rules.allow_shared):
        return Decision(pool, False, why)
    protect = rules.protect(facts, now) if rules.protect else matchers.no()
    if protect.kind is Kind.YES:
        return Decision(pool, False, f"protected by the policy: {protect.reason}")
    if protect.kind is Kind.DOUBT:
        return Decision(pool, False, f"perhaps protected by the policy: {protect.reason}")
    busy = matchers.no() if rules.allow_busy else _busy(facts)
    paid = matchers.no() if rules.nodes_later else _paid_nodes(facts)
    further = (match, protect, busy, paid)
    for finding in further:
        if finding.kind is Kind.DOUBT or (finding.kind is Kind.YES and finding is not match):
            return Decision(pool, False, finding.reason)
    # One fact after the other, so that no call is made for a pool that another one keeps.
    for finding in further:
        if finding.kind is Kind.UNREAD:
            fact = min(finding.needs, key=list(Fact).index)
            return Decision(pool, False, f"not decided: its {fact}", frozenset({fact}))
    return Decision(pool, True, match.reason)


def obstacle(pool: Pool, *, allow_shared: bool = True) -> str:
    """What keeps a pool from being deleted whatever anybody wishes; empty: nothing.

    Args:
        pool: the pool.
        allow_shared: whether shared and public pools may go.

    Source: the API document (DELETE, pool).
    """
    if unknown := _doubt(pool):
        return unknown
    try:
        protected = pool.tags.get(PROTECT_TAG, "no").strip().lower() not in _NO
    except UnreadableTagsError as error:
        return str(error)
    if protected:
        return f"it is protected by the tag {PROTECT_TAG}"
    if pool.billing is Billing.PREPAID:
        return "it is prepaid (yearly/monthly): unsubscribe it at the billing service"
    if pool.billing is Billing.UNKNOWN:
        return "its billing mode is unknown"
    if pool.frozen:
        return "it is frozen"
    if pool.phase in {"Creating", "Deleting"}:
        return f"it is {pool.phase.lower()}"
    if pool.is_shared and not allow_shared:
        return "it is shared or public"
    return ""


def _doubt(pool: Pool) -> str:
    """What of a pool cannot be read although it decides; empty: nothing."""
    try:
        validate_pool_name(pool.pool_id)
    except ValueError:
        return "its id is not one that the API takes"
    if not isinstance(pool.document.metadata.labels, dict | None):
        return "its labels are not a map"
    if pool.created_at is None:
        return "its creation time cannot be read, so a successor could be taken for it"
    if not pool.phase:
        return "its phase is not given"
    if not isinstance(pool.document.status.parent, str | None):
        return "the pool that it lies in cannot be read"
    return ""


def _paid_nodes(facts: Facts) -> Finding:
    """A postpaid pool can hold prepaid nodes, which must be unsubscribed first."""
    if facts.pool.is_logical:
        return matchers.no()  # its nodes are its parent's
    if facts.nodes is None:
        return ask(Fact.NODES, facts)
    why = nodes_obstacle(facts.nodes)
    return matchers.yes(why) if why else matchers.no()


def _busy(facts: Facts) -> Finding:
    if facts.workloads is None:
        return ask(Fact.WORKLOADS, facts)
    if busy := busy_with(facts):
        more = f" and {len(busy) - 1} more" if len(busy) > 1 else ""
        return matchers.yes(f"it is in use by {busy[0]}{more}")
    return matchers.no()


@dataclass(frozen=True, slots=True)
class _Family:
    """Which pools lie in which.

    Attributes:
        ordered: every pool, sub-pools before their parents.
        subpools: the ids of the logical sub-pools known of each pool.
        entangled: the ids of pools that lie in themselves, which no document should say.
    """

    ordered: Sequence[Pool]
    subpools: Mapping[str, Collection[str]]
    entangled: Collection[str] = field(default_factory=frozenset)

    @classmethod
    def of(cls, pools: Sequence[Pool]) -> _Family:
        parents = {pool.pool_id: pool.parent for pool in pools}
        subpools: dict[str, set[str]] = {}
        for pool in pools:
            if pool.parent:
                subpools.setdefault(pool.parent, set()).add(pool.pool_id)
        depths: dict[str, int] = {"": 0}
        entangled: set[str] = set()
        for pool_id in parents:
            above: dict[str, None] = {}
            parent = pool_id
            while parent not in depths and parent not in above:
                above[parent] = None
                parent = parents.get(parent, "")
            if parent in above or parent in entangled:
                entangled.update(above)
            depth = depths.get(parent, 0) + 1
            depths |= {each: depth + place for place, each in enumerate(reversed(above))}
        ordered = sorted(pools, key=lambda pool: -depths[pool.pool_id])
        return cls(ordered, subpools, entangled)

    def obstacle(self, pool: Pool, decisions: Mapping[str, Decision]) -> str:
        """What keeps a pool because of the others; empty: nothing."""
        if pool.pool_id in self.entangled:
            return "it lies in itself, by what its parents say"
        known = self.subpools.get(pool.pool_id, ())
        going = {each for each in known if each in decisions and _may_go(decisions[each])}
        stay = sorted(set(known) - going)
        if stay:
            more = " and more" if len(stay) > 3 else ""
            return f"it has logical sub-pools that stay: {', '.join(stay[:3])}{more}"
        if pool.subpool_count is None:
            return "the number of its logical sub-pools cannot be read"
        if pool.subpool_count > len(known):
            return (
                f"it has {pool.subpool_count} logical sub-pools, "
                f"of which only {len(known)} are seen"
            )
        return ""


def _may_go(decision: Decision) -> bool:
    return decision.delete or bool(decision.needs)


def totals(decisions: Sequence[Decision]) -> tuple[int, Counter[str]]:
    """What the deletions free: the number of pools and the nodes by flavor.

    A logical pool's nodes are its parent's, and go on running without it.
    """
    nodes: Counter[str] = Counter()
    count = 0
    for decision in decisions:
        if decision.delete:
            count += 1
            if not decision.pool.is_logical:
                nodes.update(decision.pool.nodes_by_flavor)
    return count, nodes
