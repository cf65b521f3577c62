"""What a run would do, shown before anybody is asked: bounded, however many pools there are."""

from __future__ import annotations

from collections import Counter
from itertools import chain, islice
from typing import TYPE_CHECKING

from scheduler.review import tables
from scheduler.selection import totals

if TYPE_CHECKING:
    from collections.abc import Sequence

    from rich.console import Console

    from scheduler.planner import Plan

MOST_DELETIONS = 100
MOST_REFUSALS = 20
MOST_ABSENT = 20


def preview(plans: Sequence[Plan], out: Console) -> None:
    """Show plans, and their totals.

    Args:
        plans: one for each project.
        out: where to.
    """
    rows_left = MOST_DELETIONS
    listed = sum(len(plan.refusals) for plan in plans) <= MOST_REFUSALS
    for plan in plans:
        deletions = plan.deletions
        rows = deletions[:rows_left]
        rows_left -= len(rows)
        kept = plan.refusals if listed else []
        if rows or kept:
            if len(plans) > 1:
                out.print(f"Project {plan.project_id}:", markup=False)
            # Sub-pools come before their parents, those that stay among those that go.
            chosen = {id(decision) for decision in chain(rows, kept)}
            shown = [decision for decision in plan.decisions if id(decision) in chosen]
            out.print(tables.decisions(shown, plan.at))
    count = sum(len(plan.deletions) for plan in plans)
    if count > MOST_DELETIONS:
        out.print(f"… and {count - MOST_DELETIONS} more to delete", markup=False)
    refusals = [decision for plan in plans for decision in plan.refusals]
    if not listed:
        out.print("Kept, and why:", markup=False)
        out.print(tables.kept(refusals))
    _absent(plans, out)
    _totals(plans, out)


def _absent(plans: Sequence[Plan], out: Console) -> None:
    absent = chain.from_iterable(plan.absent for plan in plans)
    for pool_id in islice(absent, MOST_ABSENT):
        text = f"{pool_id}: not in the project; its job will end as already_deleted"
        out.print(text, markup=False)
    more = sum(len(plan.absent) for plan in plans) - MOST_ABSENT
    if more > 0:
        out.print(f"… and {more} more that are not there", markup=False)


def _totals(plans: Sequence[Plan], out: Console) -> None:
    count, nodes = 0, Counter[str]()
    for plan in plans:
        some, freed = totals(plan.decisions)
        count += some
        nodes += freed
    kept = sum(len(plan.refusals) for plan in plans)
    absent = sum(len(plan.absent) for plan in plans)
    text = f"{count} to delete, {kept} to keep, {absent} not there"
    if len(plans) > 1:
        text += f", in {len(plans)} projects"
    out.print(f"{text}; frees {tables.nodes(nodes)}", markup=False)
    if any(plan.nodes_later and plan.deletions for plan in plans):
        text = "How their nodes are paid for is looked up just before each call; prepaid ones stay."
        out.print(text, markup=False)
    if unreadable := sum(plan.unreadable for plan in plans):
        text = f"{unreadable} pools of the projects could not be read; they stay."
        out.print(text, markup=False)
