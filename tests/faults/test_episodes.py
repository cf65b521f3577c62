"""Whatever is done to the processes, Redis, the broker, the API and the network, in any order:
the same few things hold at the end."""

from __future__ import annotations

import asyncio
import itertools
from typing import TYPE_CHECKING

import pytest

from tests.faults.episode import Episode
from tests.faults.invariants import check
from tests.faults.rig import Front, Rig, intake, rigged, schedulers

if TYPE_CHECKING:
    from collections import Counter
    from collections.abc import Callable
    from pathlib import Path

FEW = 20
"""Faults of an episode of the usual test run."""
MANY = 110
LONGEST_S = 280
"""An episode that takes longer than this hangs."""

FRONTS = {"requests": intake, "schedules": schedulers}


@pytest.mark.timeout(300)
@pytest.mark.parametrize("front", FRONTS)
async def test_faults_in_any_order_break_no_promise(
    front: str, seed: int, injected: Counter[str], tmp_path: Path
) -> None:
    await go_through(FRONTS[front], seed, FEW, injected, tmp_path)


@pytest.mark.timeout(3_000)
async def test_a_great_many_faults_break_no_promise(
    seed: int, injected: Counter[str], tmp_path: Path, pytestconfig: pytest.Config
) -> None:
    wanted = pytestconfig.getoption("--faults", None)
    if wanted is None:
        pytest.skip("asked for by --faults, as `make faults` does")
    for number, front in enumerate(itertools.cycle(FRONTS)):
        directory = tmp_path / str(number)
        directory.mkdir()
        await go_through(FRONTS[front], seed + number, MANY, injected, directory)
        if injected.total() >= wanted:
            return


async def go_through(
    front: Callable[[Rig], Front], seed: int, faults: int, injected: Counter[str], place: Path
) -> None:
    """One episode, and its judgement."""
    async with asyncio.timeout(LONGEST_S), rigged(place) as rig:
        episode = Episode(rig, front(rig), seed, faults)
        evidence = await episode.run()
    injected.update(episode.injected)
    print(  # noqa: T201 - what a failure is replayed by
        f"\nepisode of {front.__name__} with --seed {seed}: {len(evidence.all_jobs)} jobs, "
        f"{len(evidence.calls)} calls, {episode.injected.total()} of {faults} faults injected"
    )
    check(evidence)
