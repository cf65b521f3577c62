"""Plans as JSON: shown to programs, saved, and carried out later exactly as they are."""

from __future__ import annotations

import hashlib
import json
from datetime import datetime, timedelta
from typing import TYPE_CHECKING, Any, Final, Literal

from pydantic import AwareDatetime, BaseModel, ConfigDict, Field, ValidationError

from scheduler.durations import format_duration
from scheduler.selection import totals
from worker.modelarts import Precondition

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from scheduler.planner import Plan
    from scheduler.prices import Prices
    from scheduler.selection import Decision

FORMAT: Final = "poolsweep-plan/1"
LONGEST_AGE = timedelta(hours=1)
LARGEST = 256 << 20


class PlanFileError(ValueError):
    """A saved plan cannot be carried out; the text is one sentence."""


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class PlannedPool(_Part):
    """What a plan says of one pool."""

    pool_name: str
    name: str
    created_at: str
    nodes: dict[str, int]
    decision: Literal["delete", "keep"]
    reason: str
    fingerprint: str

    @property
    def precondition(self) -> Precondition:
        """The pool as it was planned over."""
        return Precondition(self.created_at, self.fingerprint)


class Freed(_Part):
    """What a plan's deletions free."""

    pools: int
    nodes: dict[str, int]
    node_hours_per_day: int
    money_per_day: float | None = None
    currency: str | None = None


class PlanRecord(_Part):
    """A plan for one project, as JSON."""

    policy: str
    project_id: str
    endpoint: str
    planned_at: AwareDatetime
    pools_in_project: int
    frees: Freed
    pools: list[PlannedPool]

    @property
    def deletions(self) -> list[PlannedPool]:
        """The pools to delete, in the order of the plan."""
        return [pool for pool in self.pools if pool.decision == "delete"]


class PlanFile(_Part):
    """A file of plans, with a digest that shows whether it is as it was written."""

    format: Literal["poolsweep-plan/1"] = Field(default=FORMAT)
    plans: list[PlanRecord]
    sha256: str


def freed_by(decisions: Sequence[Decision], prices: Prices | None) -> Freed:
    """What deletions free: pure.

    Args:
        decisions: of which those to delete count.
        prices: what nodes cost; None: not known.
    """
    count, nodes = totals(decisions)
    money = None if prices is None else round(prices.per_day(nodes)[0], 2)
    return Freed(
        pools=count,
        nodes=dict(sorted(nodes.items())),
        node_hours_per_day=24 * nodes.total(),
        money_per_day=money,
        currency=None if prices is None else prices.currency,
    )


def record_of(policy: str, plan: Plan, prices: Prices | None = None) -> PlanRecord:
    """A plan as it is written."""
    return PlanRecord(
        policy=policy,
        project_id=plan.project_id,
        endpoint=plan.endpoint,
        planned_at=plan.at,
        pools_in_project=plan.pools,
        frees=freed_by(plan.decisions, prices),
        pools=[_pool_record(decision) for decision in plan.decisions],
    )


def _pool_record(decision: Decision) -> PlannedPool:
    precondition = Precondition.of(decision.pool)
    return PlannedPool(
        pool_name=decision.pool.pool_id,
        name=decision.pool.display_name,
        created_at=precondition.created,
        nodes=dict(sorted(decision.pool.nodes_by_flavor.items())),
        decision="delete" if decision.delete else "keep",
        reason=decision.reason,
        fingerprint=precondition.fingerprint,
    )


def dumps(records: Sequence[PlanRecord]) -> str:
    """The text of a plan file."""
    plans = [record.model_dump(mode="json") for record in records]
    file = {"format": FORMAT, "plans": plans, "sha256": _digest(plans)}
    text = json.dumps(file, ensure_ascii=False, indent=1) + "\n"
    # Half a surrogate pair, which no encoding takes, as JSON escapes it.
    return text.encode(errors="backslashreplace").decode()


def _digest(plans: Any) -> str:
    text = json.dumps(plans, sort_keys=True, ensure_ascii=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()


def load(path: Path, now: datetime) -> list[PlanRecord]:
    """Read a saved plan that may still be carried out.

    Args:
        path: the file.
        now: an aware time.

    Raises:
        PlanFileError: it cannot be read, is not as it was written, or is older than an hour.
    """
    try:
        with path.open("rb") as file:
            raw = file.read(LARGEST + 1)
        document = json.loads(raw)
        parsed = PlanFile.model_validate(document)
    except OSError as error:
        raise PlanFileError(f"--plan: {path} cannot be read: {error.strerror}.") from None
    except (ValidationError, ValueError, RecursionError):
        raise PlanFileError(
            f"--plan: {path} is no saved plan; accepted: what `poolsweep plan --json` wrote."
        ) from None
    if _digest(document["plans"]) != parsed.sha256:
        raise PlanFileError(
            f"--plan: {path} was changed after it was written; make a new one with "
            "`poolsweep plan --json`."
        )
    for record in parsed.plans:
        age = now - record.planned_at
        if not timedelta(0) <= age <= LONGEST_AGE:
            raise PlanFileError(
                f"--plan: {path} was made at {record.planned_at.isoformat(timespec='minutes')}; "
                f"accepted: a plan that is not older than {format_duration(LONGEST_AGE)}."
            )
    return parsed.plans


def differences(saved: PlanRecord, fresh: Plan) -> list[str]:
    """Why a saved plan does not hold any more, pool by pool: pure.

    Args:
        saved: the plan.
        fresh: the same policy's plan over the project as it is now.

    Returns:
        A phrase for each pool that was to be deleted and that the policy would not delete now, or
        that is no longer as it was, or that got a sub-pool.
    """
    now_planned = {decision.pool.pool_id: decision for decision in fresh.decisions}
    saved_ids = {pool.pool_name for pool in saved.deletions}
    new_inside = {
        decision.pool.parent: decision.pool.pool_id
        for decision in fresh.decisions
        if decision.pool.pool_id not in saved_ids
    }
    found = []
    for pool in saved.deletions:
        decision = now_planned.get(pool.pool_name)
        if decision is None:
            found.append(f"{pool.pool_name} is not in the project any more")
        elif not decision.delete:
            found.append(f"{pool.pool_name} is to be kept now: {decision.reason}")
        elif Precondition.of(decision.pool) != pool.precondition:
            found.append(f"{pool.pool_name} has changed")
        elif subpool := new_inside.get(pool.pool_name):
            found.append(f"{pool.pool_name} has the sub-pool {subpool}, which was not planned for")
    return found
