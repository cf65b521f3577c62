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

from scheduler.almanac import SILENT_S, Almanac, Night, NightState, NotLeadingError
from scheduler.metrics import NightFacts
from scheduler.nights import due, next_night
from scheduler.review.records import moment
from scheduler.sweep import carry_out, night_run_id, plan_policy
from worker.cancellation import cancel
from worker.health import Health, answers
from worker.leader import Leadership, process_name
from worker.ledger import RunNotFoundError, RunState, SchemaError, Source, keys, schema
from worker.metrics import gauge
from worker.modelarts import ApiError, AuthError
from worker.projects import Directory
from worker.settings import SettingsError
from worker.yaml_source import YamlError

if TYPE_CHECKING:
    from prometheus_client import Metric

    from scheduler.announcer import Announcer
    from scheduler.file_watch import FileWatch
    from scheduler.policy import Policy, PolicyFile
    from scheduler.sweep import Office, Swept

LEADER_S = 5.0
STEP_S = 1.0
NOT_BEGUN = "it was not begun in time: no scheduler was running, or the night before still went on"
NOT_ENDED = "it was begun and not ended, and no scheduler was running in time to go on with it"
TAKEN_AWAY = "it was begun and not ended, and then the policy or its schedule was taken away"

log = structlog.get_logger(__name__)


class Rota:
    """One scheduler process.

    Args:
        office: the connections.
        announcer: tells who wants to know.
        watch: the policy file.
    """

    def __init__(self, office: Office, announcer: Announcer, watch: FileWatch[PolicyFile]) -> None:
        self._office = office
        self._announcer = announcer
        self._watch = watch
        self._name = process_name()
        self._almanac = Almanac(office.redis, self._name)
        self._leadership = Leadership(office.redis, keys.SCHEDULER, self._name, ttl_s=LEADER_S)
        self._led: bool | None = None
        self._sweeps: dict[str, asyncio.Task[None]] = {}
        self._telling: asyncio.Task[None] | None = None
        self._stepped_at = float("-inf")
        self._serving: asyncio.Task[None] | None = None
        self._health = Health(
            office.directory.settings,
            "scheduler",
            redis_answers=lambda: answers(office.redis.ping),
            missing=self._missing,
            found=self._found,
        )

    async def step(self) -> None:
        """Do what there is to do now. Called about once a second."""
        if self._serving is None:
            self._serving = asyncio.create_task(self._health.run())
        await self._read_again()
        try:
            await self._lead()
        except NotLeadingError:
            await self._stand_by()
        except RedisError as error:
            log.warning("redis_unreachable", reason=str(error))
            return
        self._stepped_at = asyncio.get_running_loop().time()

    async def close(self) -> None:
        """Stop, and let another lead. A sweep under way is done again by the next leader.

        Raises:
            RedisError: the lead ends by itself in a few seconds.
        """
        await self._drop_work()
        if self._serving is not None:
            await cancel(self._serving)
        if self._led:
            await self._almanac.fall_silent()
        await self._leadership.resign()

    async def _lead(self) -> None:
        """A step of the leader.

        Raises:
            NotLeadingError: another leads.
            RedisError: the next step goes on.
        """
        try:
            await schema.check(self._office.redis)
        except SchemaError as error:
            if self._led is not False:
                log.error("scheduler_left_to_newer_version", reason=str(error))
            await self._leadership.resign()
            raise NotLeadingError from None
        if not await self._leadership.leads():
            raise NotLeadingError
        if not self._led:
            log.info("scheduler_leads", name=self._name)
            self._led = True
        scheduled = {
            name: policy
            for name, policy in self._watch.current.policies.items()
            if policy.schedule is not None
        }
        for name, policy in scheduled.items():
            try:
                if name not in self._sweeps:
                    await self._look_at(name, policy, policy.schedule or "")
            except (NotLeadingError, RedisError):
                raise
            except Exception:
                # One policy's trouble, such as a record that cannot be read, is not the others'.
                log.exception("policy_crashed", policy=name)
        # One that comes back later is new: its nights until then were nobody's.
        for name in await self._almanac.policies() - scheduled.keys() - self._sweeps.keys():
            await self._forget(name)
        await self._almanac.say(self._state())
        if self._telling is None or self._telling.done():
            self._telling = asyncio.create_task(self._tell())

    async def _stand_by(self) -> None:
        """Another leads: it goes on with what was begun here."""
        await self._drop_work()
        if self._led is not False:
            log.info("scheduler_stands_by", name=self._name)
            self._led = False

    async def _drop_work(self) -> None:
        await cancel(*self._sweeps.values(), *([self._telling] if self._telling else []))

    async def _missing(self, redis_up: bool) -> list[str]:
        """What this scheduler lacks to do its work, besides Redis.

        Raises:
            RedisError: Redis does not answer any more.
        """
        missing = []
        if asyncio.get_running_loop().time() - self._stepped_at > SILENT_S:
            missing.append(f"it has not looked at the policies for {SILENT_S:g} s")
        if redis_up and await self._almanac.said() is None:
            missing.append("no scheduler leads")
        return missing

    async def _found(self, redis_up: bool) -> list[Metric]:
        """What this scheduler finds when it is asked.

        Raises:
            RedisError: Redis does not answer any more.
        """
        leads = gauge("scheduler_leads", "1 if this scheduler leads, else 0.")
        leads.add_metric([], bool(self._led))
        rejected = gauge(
            "policies_rejected", "1 while the policy file as it is now is rejected, else 0."
        )
        rejected.add_metric([], bool(self._watch.rejected))
        facts = NightFacts(self._office.redis)
        if redis_up and self._led:
            coming = next_nights(self._watch.current, datetime.now(UTC))
            await facts.read(coming, self._office.directory.endpoints)
        return [leads, rejected, *facts.metrics]

    def _state(self) -> dict[str, object]:
        now = datetime.now(UTC)
        nights = next_nights(self._watch.current, now)
        return {
            "leader": self._name,
            "path": str(self._watch.path),
            "next": {name: moment(at) for name, at in nights.items()},
            "rejected": self._watch.rejected,
            "at": moment(now),
        }

    async def _read_again(self) -> None:
        path = str(self._watch.path)
        try:
            changed = await asyncio.to_thread(self._watch.look)
        except YamlError as error:
            log.error("policies_rejected", path=path, reasons=error.sentences)
            return
        if changed:
            found = self._watch.current
            directory = Directory(self._office.directory.settings, found.projects)
            self._office = replace(self._office, directory=directory)
            self._announcer.channels = found.notifications
            log.info("policies_read", path=path, policies=sorted(found.policies))

    async def _look_at(self, name: str, policy: Policy, schedule: str) -> None:
        """Begin what is due of a policy, and record what was missed."""
        now = datetime.now(UTC)
        by = f"{schedule} {policy.timezone}"
        last = await self._almanac.last(name)
        if last is not None and last.state is NightState.STARTED:
            if now - last.at <= policy.catch_up:
                log.warning("night_resumed", policy=name, night=last.at.isoformat())
                self._begin(last, policy)
            else:
                await self._miss([replace(last, state=NightState.MISSED, note=NOT_ENDED)])
            return
        if last is None or last.schedule != by:
            # A new schedule's nights begin now; those before it are nobody's.
            await self._almanac.put(Night(name, now, NightState.WATCHED, by))
            return
        found = due(schedule, policy.zone, handled=last.at, now=now, catch_up=policy.catch_up)
        missed = [Night(name, at, NightState.MISSED, by, note=NOT_BEGUN) for at in found.missed]
        if missed:
            await self._miss(missed)
        if found.run is not None:
            night = Night(name, found.run, NightState.STARTED, by)
            await self._almanac.put(night)
            self._begin(night, policy)

    async def _forget(self, name: str) -> None:
        last = await self._almanac.last(name)
        if last is not None and last.state is NightState.STARTED:
            await self._miss([replace(last, state=NightState.MISSED, note=TAKEN_AWAY)])
        await self._almanac.forget(name)

    async def _miss(self, nights: list[Night]) -> None:
        await self._almanac.put(nights[-1], nights)
        for night in nights:
            at = night.at.isoformat()
            log.warning("night_missed", policy=night.policy, night=at, reason=night.note)

    def _begin(self, night: Night, policy: Policy) -> None:
        # The policies as they are now: a change does not reach into a night that has begun.
        work = self._night(night, policy, self._watch.current, self._office)
        task = asyncio.create_task(work)
        self._sweeps[night.policy] = task
        task.add_done_callback(lambda _: self._sweeps.pop(night.policy, None))

    async def _night(
        self, night: Night, policy: Policy, policy_file: PolicyFile, office: Office
    ) -> None:
        """Carry a night out. If that is cut short it stays as started, and is begun again."""
        event = log.bind(policy=night.policy, night=night.at.isoformat())
        event.info("night_started")
        try:
            done = await self._sweep_all(night, policy, policy_file, office)
            await self._almanac.put(done, [done])
        except RedisError as error:
            event.warning("redis_unreachable", reason=str(error))
        except (NotLeadingError, RunNotFoundError):
            event.warning("night_left_to_another")
        except Exception:
            event.exception("night_crashed")
        else:
            event.info("night_done", state=str(done.state), runs=done.runs)

    async def _sweep_all(
        self, night: Night, policy: Policy, policy_file: PolicyFile, office: Office
    ) -> Night:
        """Sweep each project of a night. Returns the night as it ended.

        Raises:
            NotLeadingError, RunNotFoundError: another scheduler carries it out.
            RedisError: it is to be done again.
        """
        runs: dict[str, str] = {}
        notes: list[str] = []
        state = NightState.DONE
        for project in policy.projects:
            project_id = policy_file.projects[project].id
            try:
                swept = await self._sweep(night, policy, project_id, office)
            except (NotLeadingError, RunNotFoundError, RedisError):
                raise
            except Exception as error:
                event = log.bind(policy=night.policy, project=project)
                if isinstance(error, ApiError | AuthError | SettingsError):
                    reason = str(error)
                    event.error("sweep_failed", reason=reason)
                else:
                    reason = f"internal error: {type(error).__name__}"
                    event.exception("sweep_failed", reason=reason)
                state = NightState.FAILED
                notes.append(f"{project}: {reason}")
                await self._announcer.failed(policy, night.policy, project_id, night.at, reason)
            else:
                runs[project_id] = swept.run.run_id
                await self._announce(night.policy, policy, swept)
                if swept.run.state is RunState.BRAKED:
                    notes.append(f"{project}: braked: {swept.run.note}")
        return replace(night, state=state, runs=runs, note="; ".join(notes))

    async def _sweep(self, night: Night, policy: Policy, project_id: str, office: Office) -> Swept:
        run_id = night_run_id(night.policy, project_id, night.at)
        plan = await plan_policy(office, policy, project_id, datetime.now(UTC))
        # Planning takes its time, in which this process may have been paused.
        if not await self._leadership.leads():
            raise NotLeadingError
        return await carry_out(
            office,
            night.policy,
            policy,
            plan,
            source=Source.SCHEDULE,
            requester=f"policy {night.policy}",
            run_id=run_id,
        )

    async def _announce(self, name: str, policy: Policy, swept: Swept) -> None:
        """Have a sweep told; what goes wrong here is no failure of the sweep.

        Raises:
            RedisError: it is to be told again.
        """
        try:
            if swept.run.total:  # a night with nothing to delete is no news
                await self._announcer.expect(swept.run.run_id, name, policy)
            await self._announcer.swept(policy, swept)
        except RedisError:
            raise
        except Exception:
            log.exception("announcement_crashed", policy=name)

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
