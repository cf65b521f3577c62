"""Which pools may go, and why: pure.

A wish (these pools; those that are expired or carry a tag) is weighed against what protects a
pool. Protection wins over every wish, and a doubt protects too.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, date, datetime, time
from typing import TYPE_CHECKING

from worker.modelarts import Billing, UnreadableTagsError

if TYPE_CHECKING:
    from collections.abc import Collection, Mapping, Sequence

    from worker.modelarts import Pool

EXPIRY_TAG = "expires-at"
PROTECT_TAG = "poolsweep/protect"
_NO = {"", "0", "false", "no", "off"}


@dataclass(frozen=True, slots=True)
class Decision:
    """What is to become of one pool.

    Attributes:
        pool: the pool.
        delete: whether it is to be deleted.
        reason: why, or why not.
    """

    pool: Pool
    delete: bool
    reason: str


Wish = Callable[["Pool", "Mapping[str, str]", datetime], "str | None"]
"""(pool, its tags, now) -> why it is to be deleted; None: it is not wished for.

A wish raises `Doubt` for what it cannot read.
"""


class Doubt(ValueError):  # noqa: N818 - it says what it is
    """Something that decides about a pool cannot be read; the text says what."""


def obstacle(pool: Pool, together: Collection[str], subpools: Mapping[str, Sequence[str]]) -> str:
    """What keeps a pool from being deleted whatever anybody wishes; empty: nothing.

    Args:
        pool: the pool.
        together: the ids of the pools that are to be deleted with it.
        subpools: the ids of the logical sub-pools known of each pool.

    Source: the API document (DELETE, pool).
    """
    if pool.tags.get(PROTECT_TAG, "no").strip().lower() not in _NO:
        return f"it is protected by the tag {PROTECT_TAG}"
    if pool.billing is Billing.PREPAID:
        return "it is prepaid (yearly/monthly): unsubscribe it at the billing service"
    if pool.billing is Billing.UNKNOWN:
        return "its billing mode is unknown"
    if pool.frozen:
        return "it is frozen"
    if pool.phase in {"Creating", "Deleting"}:
        return f"it is {pool.phase.lower()}"
    known = subpools.get(pool.pool_id, ())
    if others := sorted(set(known) - set(together)):
        return f"it has logical sub-pools that stay: {', '.join(others[:3])}" + (
            " and more" if len(others) > 3 else ""
        )
    if pool.subpool_count is None:
        return "the number of its logical sub-pools cannot be read"
    if pool.subpool_count > len(known):
        return f"it has {pool.subpool_count} logical sub-pools, of which only {len(known)} are seen"
    return ""


def select(pools: Sequence[Pool], wish: Wish, now: datetime) -> list[Decision]:
    """Decide about every pool.

    Args:
        pools: all of one project's pools, so that sub-pools are seen.
        wish: which of them somebody wants to be rid of.
        now: an aware time.

    Returns:
        A decision for each, in an order in which sub-pools come before their parents.
    """
    reasons: dict[str, str] = {}
    keeps: dict[str, str] = {}
    for pool in pools:
        try:
            wished = wish(pool, pool.tags, now)
        except (Doubt, UnreadableTagsError) as doubt:
            keeps[pool.pool_id] = str(doubt)
        else:
            if wished:
                reasons[pool.pool_id] = wished
            else:
                keeps[pool.pool_id] = "nothing asks for its deletion"
    subpools: dict[str, list[str]] = {}
    for pool in pools:
        if pool.parent:
            subpools.setdefault(pool.parent, []).append(pool.pool_id)
    ordered = sorted(pools, key=lambda pool: not pool.parent)
    # A sub-pool that stays keeps its parent, which therefore is weighed after it.
    for pool in ordered:
        if pool.pool_id in reasons and (why := obstacle(pool, reasons, subpools)):
            del reasons[pool.pool_id]
            keeps[pool.pool_id] = why
    return [
        Decision(
            pool,
            pool.pool_id in reasons,
            reasons.get(pool.pool_id) or keeps[pool.pool_id],
        )
        for pool in ordered
    ]


def parse_expiry(text: str) -> datetime:
    """The moment that an expiry tag names.

    Args:
        text: ISO 8601: a date (the pool expires when it begins, in UTC) or a time, in UTC unless
            it names a zone.

    Raises:
        Doubt: it is neither.
    """
    try:
        if re.fullmatch(r"\d{4}-?\d{2}-?\d{2}", text.strip()):
            return datetime.combine(date.fromisoformat(text.strip()), time(), UTC)
        moment = datetime.fromisoformat(text.strip())
    except ValueError:
        raise Doubt(
            f"{EXPIRY_TAG}={text!r} is not an ISO 8601 date or time, so its expiry is unknown"
        ) from None
    return moment if moment.tzinfo else moment.replace(tzinfo=UTC)


def expired(key: str = EXPIRY_TAG) -> Wish:
    """A wish for the pools whose expiry tag has passed."""

    def wish(_pool: Pool, tags: Mapping[str, str], now: datetime) -> str | None:
        if key not in tags:
            return None
        expiry = parse_expiry(tags[key])
        return f"expired: {key}={tags[key]}" if expiry <= now else None

    return wish


def tagged(key: str, value: str | None = None) -> Wish:
    """A wish for the pools with a tag, whatever its value or with just this one."""

    def wish(_pool: Pool, tags: Mapping[str, str], _now: datetime) -> str | None:
        if key not in tags or (value is not None and tags[key] != value):
            return None
        return f"tagged: {key}={tags[key]}"

    return wish


def named(ids: Collection[str]) -> Wish:
    """A wish for the pools with these ids."""
    wanted = frozenset(ids)

    def wish(pool: Pool, _tags: Mapping[str, str], _now: datetime) -> str | None:
        return "asked for by name" if pool.pool_id in wanted else None

    return wish


def any_of(wishes: Sequence[Wish]) -> Wish:
    """A wish for what any of the wishes is for; a doubt of one is a doubt of all."""

    def wish(pool: Pool, tags: Mapping[str, str], now: datetime) -> str | None:
        found = [why for each in wishes if (why := each(pool, tags, now))]
        return "; ".join(found) or None

    return wish


def totals(decisions: Sequence[Decision]) -> tuple[int, Counter[str]]:
    """What the deletions free: the number of pools and the nodes by flavor."""
    nodes: Counter[str] = Counter()
    count = 0
    for decision in decisions:
        if decision.delete:
            count += 1
            nodes.update(decision.pool.nodes_by_flavor)
    return count, nodes
