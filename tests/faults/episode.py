"""One episode: pools are asked for in waves while a plan of faults is carried out; then all heals,
everything that was begun comes to its end, and what is left is the evidence."""

from __future__ import annotations

import asyncio
import contextlib
import json
import random
import time
from collections import Counter
from typing import TYPE_CHECKING, Final, cast

from pydantic import SecretStr
from redis.exceptions import RedisError

from tests.conftest import until
from tests.faults.faults import KINDS, Planned, plan
from tests.faults.invariants import FINAL, Call, Evidence, Harm
from tests.faults.rig import LEASE_S
from worker.cancellation import cancel
from worker.ledger import Job, JobState, Ledger, Run, keys
from worker.redis_connection import connect
from worker.settings import Settings

if TYPE_CHECKING:
    from collections.abc import Awaitable

    from redis.asyncio import Redis

    from tests.faults.rig import Front, Rig

END_S: Final = 90.0
"""In this time everything has come to its end once nothing is broken any more."""
WAVE: Final = 8
WAVE_EVERY_S: Final = 0.4


class Episode:
    """An episode on a rig.

    Args:
        rig: what is broken.
        front: what asks for deletions.
        seed: the same makes the same plan of faults, and the same waves.
        faults: how many are planned.

    Attributes:
        injected: how many faults of each kind were really injected.
    """

    def __init__(self, rig: Rig, front: Front, seed: int, faults: int) -> None:
        self._rig = rig
        self._front = front
        rng = random.Random(seed)
        self._plan = plan(rng, faults)
        self._waves = random.Random(rng.getrandbits(32))
        self._seen_ended: dict[str, tuple[int, int]] = {}
        self.injected: Counter[str] = Counter()

    async def run(self) -> Evidence:
        """Go through it. Returns what is there to be judged."""
        await self._rig.up()
        async with asyncio.TaskGroup() as group:
            others = [
                group.create_task(self._rig.supervise()),
                group.create_task(self._watch_ends()),
            ]
            await self._break_things()
            await self._come_to_an_end()
            await cancel(*others)
        for program in self._rig.programs.values():
            if program.status is None and (complaint := await program.stop()):
                self._rig.complaints.append(complaint)
        return await self._evidence()

    async def _break_things(self) -> None:
        async with asyncio.TaskGroup() as group:
            waves = group.create_task(self._make_waves(group))
            await until(self._has_begun, within_s=END_S)
            began = time.monotonic()
            faults = [group.create_task(self._inject(each, began)) for each in self._plan]
            await asyncio.sleep(self._plan[-1].at_s)
            await cancel(waves)
            await asyncio.wait(faults)

    async def _has_begun(self) -> bool:
        await asyncio.sleep(0.1)
        return any(method == "DELETE" for _, method, *_ in await self._rig.calls())

    async def _make_waves(self, group: asyncio.TaskGroup) -> None:
        number = 0
        behaviours = self._front.behaviours
        kinds, weights = list(behaviours), list(behaviours.values())
        while True:
            project = self._rig.projects[number % len(self._rig.projects)]
            # A wave that was begun is asked for, whatever ends meanwhile.
            group.create_task(self._wave(project, self._waves.choices(kinds, weights, k=WAVE)))
            number += 1
            await asyncio.sleep(WAVE_EVERY_S)

    async def _wave(self, project: str, kinds: list[str]) -> None:
        names = await self._rig.wave(project, kinds)
        await self._front.ask(project, names)

    async def _inject(self, planned: Planned, began: float) -> None:
        await asyncio.sleep(began + planned.at_s - time.monotonic())
        _, fault = KINDS[planned.kind]
        if await fault(self._rig, random.Random(planned.seed)):
            self.injected[planned.kind] += 1

    async def _come_to_an_end(self) -> None:
        try:
            await until(self._has_ended, within_s=END_S)
        except TimeoutError:
            self._rig.complaints.append(f"not everything had ended after {END_S:g} s of peace")

    async def _has_ended(self) -> bool:
        await asyncio.sleep(0.2)
        rig = self._rig
        async with rig.redis.client() as client:
            runs = await Ledger(client).runs(limit=10_000)
        if not all(run.ended for run in runs):
            return False
        if self._front.acknowledged:
            return len(runs) == len(self._front.acknowledged)
        state = await rig.ask("GET", "/state")
        return not any(state[pool]["there"] for pool in rig.wanted)

    async def _watch_ends(self) -> None:
        """See, of each run that says that it has finished, whether its jobs say so too."""
        while True:
            await asyncio.sleep(0.25)
            with contextlib.suppress(RedisError, OSError):
                async with self._rig.redis.client() as client:
                    for run in await Ledger(client).runs(limit=10_000):
                        if run.finished_ms and run.started_ms:
                            await self._see(client, run)

    async def _see(self, client: Redis, run: Run) -> None:
        if run.run_id in self._seen_ended:
            return
        texts = await cast("Awaitable[list[str]]", client.hvals(keys.jobs(run.run_id)))
        jobs = [Job.parse(run.run_id, 0, text) for text in texts]
        final = sum(job.state in FINAL for job in jobs)
        self._seen_ended[run.run_id] = (final, run.total)

    async def _evidence(self) -> Evidence:
        rig = self._rig
        wall_ms = time.time() * 1000 - time.monotonic() * 1000
        redis = connect(Settings(redis_url=SecretStr(rig.redis.url)))
        ledger = Ledger(redis)
        try:
            runs = await ledger.runs(limit=10_000)
            jobs = {r.run_id: [job async for job in ledger.all_jobs(r.run_id)] for r in runs}
            listed = {
                run.run_id: [
                    job.number
                    for state in JobState
                    for job in [j async for j in ledger.all_jobs(run.run_id, outcome=state)]
                ]
                for run in runs
            }
            kept = {
                run.run_id: {k.pool_name: k.reason async for k in ledger.all_kept(run.run_id)}
                for run in runs
            }
        finally:
            await redis.aclose()
        state = await rig.ask("GET", "/state")
        return Evidence(
            runs=runs,
            jobs=jobs,
            listed=listed,
            kept=kept,
            calls=[
                Call(at * 1000 + wall_ms, pool, status)
                for at, method, _, pool, status in await rig.calls()
                if method == "DELETE"
            ],
            there={name for name, pool in state.items() if pool["there"]},
            wanted=rig.wanted,
            spared=rig.spared,
            acknowledged=self._front.acknowledged,
            seen_ended=self._seen_ended,
            harms=[
                Harm(d.kind, d.target, d.begun * 1000 + wall_ms, d.ended * 1000 + wall_ms)
                for d in rig.disruptions
            ],
            complaints=rig.complaints,
            logged=Counter(self._events()),
            lease_ms=LEASE_S * 1000,
        )

    def _events(self) -> list[str]:
        """The names of the events of all logs; a line that a kill cut short is none."""
        names = []
        for program in self._rig.programs.values():
            for process in program.processes:
                for line in process.text.splitlines():
                    with contextlib.suppress(ValueError, KeyError, TypeError):
                        names.append(str(json.loads(line)["event"]))
        return names
