"""What the deciding side tells Prometheus: the policies' nights, and the intake's requests."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import TYPE_CHECKING

from prometheus_client import Counter, Histogram

from scheduler.almanac import MOST_PAST, Almanac, NightState
from worker.metrics import REGISTRY, gauge
from worker.reconciler import live_workers

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from prometheus_client import Metric
    from redis.asyncio import Redis

FEW = 10
"""Nights that are looked through for one that succeeded, before all are."""

REQUESTS = Counter(
    "poolsweep_intake_requests",
    "Requests that the intake answered by HTTP.",
    ["route", "status"],
    registry=REGISTRY,
)
REQUEST_S = Histogram(
    "poolsweep_intake_request_seconds",
    "Seconds that the intake took to answer; a stream of events is not counted.",
    ["route"],
    buckets=(0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30),
    registry=REGISTRY,
)


class NightFacts:
    """What the leading scheduler tells of the nights: read when it is asked for.

    Args:
        redis: a connection that decodes responses.
    """

    def __init__(self, redis: Redis) -> None:
        self._redis = redis
        self._almanac = Almanac(redis)
        self._success = gauge(
            "policy_last_success_timestamp_seconds",
            "Unix time at which the policy's latest night that succeeded was due.",
            "policy",
        )
        self._last = gauge(
            "policy_last_night_timestamp_seconds",
            "Unix time at which the policy's last night that is past was due, by how it ended.",
            "policy",
            "state",
        )
        self._next = gauge(
            "policy_next_night_timestamp_seconds",
            "Unix time at which the policy's next night is due.",
            "policy",
        )
        self._served = gauge(
            "endpoint_workers",
            "Worker processes that serve the endpoint, as the leading scheduler sees it.",
            "endpoint",
        )

    @property
    def metrics(self) -> list[Metric]:
        """All of them."""
        return [self._success, self._last, self._next, self._served]

    async def read(self, coming: Mapping[str, datetime], endpoints: Iterable[str]) -> None:
        """Read them.

        Args:
            coming: when each policy that has a schedule runs next.
            endpoints: the base URLs of the APIs that the policies' projects are at.

        Raises:
            RedisError: Redis does not answer.
        """
        for policy, at in coming.items():
            self._next.add_metric([policy], at.astimezone(UTC).timestamp())
            past = await self._almanac.past(policy, FEW)
            for night in past[:1]:
                self._last.add_metric([policy, night.state], night.at.timestamp())
            done = [night for night in past if night.state is NightState.DONE]
            if not done and len(past) == FEW:
                more = await self._almanac.past(policy, MOST_PAST)
                done = [night for night in more if night.state is NightState.DONE]
            for night in done[:1]:
                self._success.add_metric([policy], night.at.timestamp())
        for endpoint in endpoints:
            count = await live_workers(self._redis, endpoint)
            self._served.add_metric([endpoint], count)
