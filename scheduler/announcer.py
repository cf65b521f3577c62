"""Who is told what of a sweep: marks, start, brake and end, through the outbox."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import TYPE_CHECKING

from scheduler import notices
from scheduler.outbox import Outbox, RunWatch
from scheduler.selection import totals
from worker.ledger import RunState

if TYPE_CHECKING:
    from collections.abc import Mapping

    from redis.asyncio import Redis

    from scheduler.policy import Channel, Policy
    from scheduler.sweep import Swept
    from worker.ledger import Ledger


class Announcer:
    """Tells the channels that policies name.

    Args:
        redis: a connection that decodes responses.
        ledger: where runs are looked up.
        channels: the channels by name, as the policy file has them now.
    """

    def __init__(self, redis: Redis, ledger: Ledger, channels: Mapping[str, Channel]) -> None:
        self._ledger = ledger
        self._outbox = Outbox(redis)
        self._watch = RunWatch(redis, self._outbox)
        self.channels = channels

    async def expect(self, run_id: str, name: str, policy: Policy) -> None:
        """The end of a run will be told. Best called before it is created: then none is missed.

        Who makes a run again after being cut off may call it once the run's id is certain.
        """
        if policy.notify:
            await self._watch.watch(run_id, policy.notify, policy=name)

    async def swept(self, policy: Policy, swept: Swept) -> None:
        """A sweep was carried out: tell what was marked, and that its run started or is braked."""
        if not policy.notify:
            return
        _, freed = totals(swept.plan.decisions)
        pools = swept.plan.pools
        if swept.marked:
            notice = notices.marked(swept.marked, project_pools=pools)
            await self._outbox.announce(policy.notify, self.channels, notice)
        if swept.run.state is RunState.BRAKED:
            notice = notices.braked(swept.run)
            await self._outbox.announce(policy.notify, self.channels, notice)
        elif swept.run.total:
            notice = notices.started(swept.run, project_pools=pools, freed=freed)
            await self._outbox.announce(policy.notify, self.channels, notice)

    async def failed(
        self, policy: Policy, name: str, project_id: str, night: datetime, reason: str
    ) -> None:
        """A sweep came to no run: its pools could not be listed, and the like.

        Args:
            policy, name: the policy.
            project_id: the project.
            night: when the sweep was due; an aware time.
            reason: why, in a sentence.
        """
        notice = notices.not_swept(name, project_id, night, reason, at=datetime.now(UTC))
        await self._outbox.announce(policy.notify, self.channels, notice)

    async def tell(self) -> None:
        """Send what is due, and look whether a watched run has ended.

        Raises:
            RedisError: Redis does not answer; nothing is lost.
        """
        await self._watch.check(self._ledger, self.channels)
        await self._outbox.deliver(self.channels)
