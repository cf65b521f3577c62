"""The scheduler's steps: lead, read the policies again, start what is due, tell who wants to know.

Several schedulers may run; one leads. Whatever a leader had begun when it died, the next one
does again, and the runs' ids see to it that nothing is done twice.
"""

from __future__ import annotations

import asyncio
from dataclasses import replace
from datetime import UTC, datetime
from typing import TYPE_CHECKING

import structlog
from redis.exceptions import RedisError

from scheduler import policy as policies
from scheduler.almanac import Almanac, Night, NightState
from scheduler.nights import due, next_night
from scheduler.sweep import carry_out, night_run_id, plan_policy
from worker.leader import Leadership, process_name
from worker.ledger import RunNotFoundError, RunState, Source, keys
from worker.modelarts import ApiError, AuthError
from worker.projects import Directory
from worker.settings import SettingsError
from worker.yaml_source import YamlError

if TYPE_CHECKING:
    from pathlib import Path

    from scheduler.announcer import Announcer
    from scheduler.policy import Policy, PolicyFile
    from scheduler.sweep import Office, Swept

LEADER_S = 5.0
STEP_S = 1.0

log = structlog.get_logger(__name__)


class Rota:
    """One scheduler process.

    Args:
        office: the connections.
        announcer: tells who wants to know.
        path: the policy file; it is read again when it changes.
        policy_file: what it holds now.
    """

    def __init__(
        self, office: Office, announcer: Announcer, path: Path, policy_file: PolicyFile
    ) -> None:
        self._office = office
        self._announcer = announcer
        self._path = path
        self._file = policy_file
        self._stamp = _stamp(path)
        self._rejected = ""
        self._almanac = Almanac(office.redis)
        self._name = process_name()
        self._leadership = Leadership(office.redis, keys.SCHEDULER, self._name, ttl_s=LEADER_S)
        self._led = False
        self._sweeps: dict[str, asyncio.Task[None]] = {}
        self._telling: asyncio.Task[None] | None = None

    async def step(self) -> None:
        """Do what there is to do now. Called about once a second."""
        self._read_again()
        try:
            leads = await self._leadership.leads()
        except RedisError as error:
            log.warning("redis_unreachable", reason=str(error))
            return
        if leads != self._led:
            log.info("scheduler_leads" if leads else "scheduler_stands_by", name=self._name)
            self._led = leads
        if not leads:
            return
        try:
            for name, policy in self._file.policies.items():
                await self._look_at(name, policy)
            await self._almanac.say(self._state())
        except RedisError as error:
            log.warning("redis_unreachable", reason=str(error))
        if self._telling is None or self._telling.done():
            self._telling = asyncio.create_task(self._tell())

    async def close(self) -> None:
        """Stop, and let another lead. A sweep under way is done again by the next leader."""
        under_way = [*self._sweeps.values(), *([self._telling] if self._telling else [])]
        for task in under_way:
            task.cancel()
        await asyncio.gather(*under_way, return_exceptions=True)
        await self._leadership.resign()

    def _state(self) -> dict[str, object]:
        return {
            "leader": self._name,
            "path": str(self._path),
            "policies": sorted(self._file.policies),
            "rejected": self._rejected,
            "at": datetime.now(UTC).isoformat(timespec="seconds"),
        }

    def _read_again(self) -> None:
        stamp = _stamp(self._path)
        if stamp == self._stamp:
            return
        self._stamp = stamp
        try:
            self._file = policies.load(self._path)
        except YamlError as error:
            self._rejected = str(error)
            log.error("policies_rejected", path=str(self._path), reasons=error.sentences)
        else:
            self._rejected = ""
            directory = Directory(self._office.directory.settings, self._file.projects)
            self._office = replace(self._office, directory=directory)
            self._announcer.channels = self._file.notifications
            log.info("policies_read", path=str(self._path), policies=sorted(self._file.policies))

    async def _look_at(self, name: str, policy: Policy) -> None:
        if policy.schedule is None or name in self._sweeps:
            return
        now = datetime.now(UTC)
        last = await self._almanac.last(name)
        if last is None:
            # A new policy's nights begin now; those before it are nobody's.
            await self._almanac.put(Night(name, now, NightState.WATCHED))
            return
        if last.state is NightState.STARTED and now - last.at <= policy.catch_up:
            log.warning("night_resumed", policy=name, night=last.at.isoformat())
            self._begin(last, policy)
            return
        found = due(
            policy.schedule, policy.zone, handled=last.at, now=now, catch_up=policy.catch_up
        )
        missed = [
            Night(name, at, NightState.MISSED, note="no scheduler was running in time")
            for at in found.missed
        ]
        for night in missed:
            log.warning("night_missed", policy=name, night=night.at.isoformat())
        await self._almanac.file(missed)
        if found.run is not None:
            night = Night(name, found.run, NightState.STARTED)
            await self._almanac.put(night)
            self._begin(night, policy)
        elif missed:
            await self._almanac.put(missed[-1])

    def _begin(self, night: Night, policy: Policy) -> None:
        task = asyncio.create_task(self._night(night, policy))
        self._sweeps[night.policy] = task
        task.add_done_callback(lambda _: self._sweeps.pop(night.policy, None))

    async def _night(self, night: Night, policy: Policy) -> None:
        log.info("night_started", policy=night.policy, night=night.at.isoformat())
        runs: dict[str, str] = {}
        notes: list[str] = []
        for project in policy.projects:
            project_id = self._file.projects[project].id
            try:
                swept = await self._sweep(night, policy, project_id)
            except (ApiError, AuthError, SettingsError, RunNotFoundError) as error:
                log.error("sweep_failed", policy=night.policy, project=project, reason=str(error))
                notes.append(f"{project}: {error}")
            except RedisError as error:
                # The night stays as started, so it is done again when Redis is back.
                log.warning("redis_unreachable", reason=str(error))
                return
            except Exception as error:
                log.exception("sweep_crashed", policy=night.policy, project=project)
                notes.append(f"{project}: internal error: {type(error).__name__}")
            else:
                runs[project_id] = swept.run.run_id
                if swept.run.state is RunState.BRAKED:
                    notes.append(f"{project}: braked: {swept.run.note}")
        done = night.done(runs, "; ".join(notes))
        await self._almanac.put(done)
        await self._almanac.file([done])
        log.info("night_done", policy=night.policy, night=night.at.isoformat(), runs=runs)

    async def _sweep(self, night: Night, policy: Policy, project_id: str) -> Swept:
        run_id = night_run_id(night.policy, project_id, night.at)
        await self._announcer.expect(run_id, night.policy, policy)
        plan = await plan_policy(self._office, policy, project_id, datetime.now(UTC))
        swept = await carry_out(
            self._office,
            night.policy,
            policy,
            plan,
            source=Source.SCHEDULE,
            requester=f"policy {night.policy}",
            run_id=run_id,
        )
        await self._announcer.swept(policy, swept)
        return swept

    async def _tell(self) -> None:
        try:
            await self._announcer.tell()
        except RedisError as error:
            log.warning("redis_unreachable", reason=str(error))
        except Exception:
            log.exception("announcer_crashed")


def next_nights(policy_file: PolicyFile, now: datetime) -> dict[str, datetime]:
    """When each policy that has a schedule runs next, in UTC."""
    return {
        name: next_night(policy.schedule, policy.zone, now)
        for name, policy in policy_file.policies.items()
        if policy.schedule is not None
    }


def _stamp(path: Path) -> tuple[int, int, int] | None:
    """What changes when a file does; None: it is not there."""
    try:
        found = path.stat()
    except OSError:
        return None
    return found.st_mtime_ns, found.st_size, found.st_ino
