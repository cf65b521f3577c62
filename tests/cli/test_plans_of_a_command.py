"""Plans over many projects: made some at once, and shown in a bounded way."""

from __future__ import annotations

import asyncio
import io
from datetime import UTC, datetime

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console

from scheduler.cli.on_demand import PROJECTS_AT_ONCE, plan_over
from scheduler.cli.preview import MOST_ABSENT, MOST_DELETIONS, MOST_REFUSALS, preview
from scheduler.planner import Plan
from scheduler.selection import Decision
from tests.sweep.conftest import document
from worker.modelarts import Pool
from worker.settings import SettingsError

NOW = datetime(2026, 1, 7, 12, tzinfo=UTC)
POOL = Pool.parse(document(nodes=1))


def plan(project: str, deletions: int = 0, refusals: int = 0, absent: int = 0) -> Plan:
    decisions = [Decision(POOL, True, "asked for by name") for _ in range(deletions)]
    decisions += [Decision(POOL, False, "it is frozen") for _ in range(refusals)]
    return Plan(
        project_id=project,
        endpoint="http://127.0.0.1:9",
        decisions=decisions,
        at=NOW,
        pools=deletions + refusals,
        absent=[f"gone-{number:032x}" for number in range(absent)],
    )


# Planning


async def test_only_some_projects_are_planned_over_at_once_and_the_plans_keep_their_order() -> None:
    projects = [f"p{number}" for number in range(3 * PROJECTS_AT_ONCE)]
    full, under_way, most = asyncio.Event(), 0, 0

    async def over(project: str) -> Plan:
        nonlocal under_way, most
        under_way += 1
        most = max(most, under_way)
        if under_way == PROJECTS_AT_ONCE:
            full.set()
        async with asyncio.timeout(20):
            await full.wait()
        await asyncio.sleep(0)
        under_way -= 1
        return plan(project)

    plans = await plan_over(projects, over)
    assert [each.project_id for each in plans] == projects
    assert most == PROJECTS_AT_ONCE


async def test_a_project_that_cannot_be_planned_over_stops_the_others() -> None:
    waiting, stopped = asyncio.Event(), []

    async def over(project: str) -> Plan:
        if project == "broken":
            await waiting.wait()
            raise SettingsError("no credentials")
        waiting.set()
        try:
            await asyncio.Event().wait()
        finally:
            stopped.append(project)
        return plan(project)

    async with asyncio.timeout(20):
        with pytest.raises(SettingsError, match="no credentials"):
            await plan_over(["slow", "broken", "slower"], over)
    assert sorted(stopped) == ["slow", "slower"]


# Showing

counts = st.integers(0, 2 * MOST_DELETIONS)


@settings(deadline=None, max_examples=40)
@given(st.lists(st.tuples(counts, counts, counts), min_size=1, max_size=3))
def test_a_preview_tells_all_numbers_and_is_bounded(projects: list[tuple[int, int, int]]) -> None:
    out = io.StringIO()
    preview(
        [plan(f"project-{number}", *each) for number, each in enumerate(projects)],
        Console(file=out, width=300),
    )
    text = out.getvalue()
    lines = text.splitlines()
    deletions, refusals, absent = (sum(column) for column in zip(*projects, strict=True))
    totals = f"{deletions} to delete, {refusals} to keep, {absent} not there"
    if len(projects) > 1:
        totals += f", in {len(projects)} projects"
    assert sum(line.startswith(totals) for line in lines) == 1
    assert sum(" delete " in line and POOL.pool_id in line for line in lines) == min(
        deletions, MOST_DELETIONS
    )
    kept = sum(" keep " in line and POOL.pool_id in line for line in lines)
    assert kept == (refusals if refusals <= MOST_REFUSALS else 0)
    if refusals > MOST_REFUSALS:
        assert f" {refusals}  it is frozen" in text
    assert text.count("not in the project; its job will end") == min(absent, MOST_ABSENT)
    for count, most, words in (
        (deletions, MOST_DELETIONS, "more to delete"),
        (absent, MOST_ABSENT, "more that are not there"),
    ):
        assert (f"… and {count - most} {words}" in lines) == (count > most)
