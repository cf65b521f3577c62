"""The faults: each a small function that does one thing to the rig, for a while.

Each returns whether it was really injected: a message can only be lost if there is one, and a cut
of a network that nobody uses is none.
"""

from __future__ import annotations

import asyncio
import signal
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final, cast

from redis.exceptions import RedisError

from tests.faults.proxy import Break
from tests.faults.rig import LATENCY_MS, LEASE_S

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable
    from random import Random

    from tests.faults.rig import Program, Rig

    Fault = Callable[[Rig, Random], Awaitable[bool]]


@dataclass(frozen=True, slots=True)
class Planned:
    """A fault of a plan.

    Attributes:
        at_s: when, in seconds from the beginning.
        kind: its name in `KINDS`.
        seed: what it draws its own numbers from, so that they do not depend on the others' times.
    """

    at_s: float
    kind: str
    seed: int


def plan(rng: Random, count: int) -> list[Planned]:
    """So many faults, a tenth to three tenths of a second apart: pure."""
    kinds = list(KINDS)
    weights = [KINDS[kind][0] for kind in kinds]
    at_s, planned = 0.0, []
    for kind in rng.choices(kinds, weights, k=count):
        at_s += rng.uniform(0.1, 0.3)
        planned.append(Planned(at_s, kind, rng.getrandbits(32)))
    return planned


# Processes


def killed(*names: str) -> Fault:
    """SIGKILL, at whatever it is doing, and another start a little later."""

    async def kill(rig: Rig, rng: Random) -> bool:
        program = _one(rig, rng, names)
        if program is None:
            return False
        with program.handled(), rig.disrupting("kill", program.name):
            program.present.kill()
            await asyncio.sleep(rng.uniform(0, 0.5))
            program.start()
        return True

    return kill


def stopped(*names: str) -> Fault:
    """SIGTERM, and another start when it has ended."""

    async def stop(rig: Rig, rng: Random) -> bool:
        program = _one(rig, rng, names)
        if program is None:
            return False
        with program.handled(), rig.disrupting("stop", program.name):
            if complaint := await program.stop():
                rig.complaints.append(complaint)
            program.start()
        return True

    return stop


def frozen(*names: str) -> Fault:
    """SIGSTOP for longer than a lease, and SIGCONT."""

    async def freeze(rig: Rig, rng: Random) -> bool:
        program = _one(rig, rng, names)
        if program is None:
            return False
        with program.handled(), rig.disrupting("freeze", program.name):
            program.present.send(signal.SIGSTOP)
            await asyncio.sleep(LEASE_S * rng.uniform(1.2, 3.5))
            program.present.send(signal.SIGCONT)
        return True

    return freeze


def _one(rig: Rig, rng: Random, names: tuple[str, ...]) -> Program | None:
    draw = rng.random()
    up = sorted(rig.named(*names), key=lambda program: program.name)
    return up[int(draw * len(up))] if up else None


# Redis


def of_redis(kind: str, act: Callable[[Rig, float], Awaitable[bool]], most_s: float) -> Fault:
    """Something that is done to Redis for up to so many seconds, and to it alone."""

    async def fault(rig: Rig, rng: Random) -> bool:
        seconds = rng.uniform(0.1, most_s)
        if rig.redis_busy:
            return False
        rig.redis_busy = True
        try:
            with rig.disrupting(kind, "redis"):
                return await act(rig, seconds)
        except (RedisError, OSError):
            return False
        finally:
            rig.redis_busy = False

    return fault


async def _kill_redis(rig: Rig, seconds: float) -> bool:
    rig.redis.kill()
    await asyncio.sleep(seconds)
    await rig.redis.start()
    return True


async def _freeze_redis(rig: Rig, seconds: float) -> bool:
    rig.redis.send(signal.SIGSTOP)
    await asyncio.sleep(seconds)
    rig.redis.send(signal.SIGCONT)
    return True


async def _pause_redis(rig: Rig, seconds: float) -> bool:
    async with rig.redis.client() as client:
        await client.client_pause(round(seconds * 1000))
        await asyncio.sleep(seconds)
    return True


async def _sleep_redis(rig: Rig, seconds: float) -> bool:
    async with rig.redis.client(seconds + 5) as client:
        await client.execute_command("DEBUG", "SLEEP", seconds)  # type: ignore[no-untyped-call]
    return True


async def _fill_redis(rig: Rig, seconds: float) -> bool:
    async with rig.redis.client() as client:
        await client.config_set("maxmemory", "1")
        try:
            await asyncio.sleep(seconds)
        finally:
            await client.config_set("maxmemory", "0")
    return True


async def _disconnect_redis(rig: Rig, _: float) -> bool:
    async with rig.redis.client() as client:
        return bool(await client.client_kill_filter(_type="normal"))


# The broker's messages


async def lose_message(rig: Rig, rng: Random) -> bool:
    """The next message is gone."""
    async with rig.redis.client() as client:
        return await cast("Awaitable[str | None]", client.rpop(rig.queue)) is not None


async def repeat_message(rig: Rig, rng: Random) -> bool:
    """A message is there twice."""
    async with rig.redis.client() as client:
        found = await cast("Awaitable[list[str]]", client.lrange(rig.queue, 0, -1))
        if not found:
            return False
        await client.lpush(rig.queue, rng.choice(found))
    return True


async def hold_message(rig: Rig, rng: Random) -> bool:
    """The next message comes late; some so late that its jobs have been sent again."""
    seconds = rng.uniform(0.2, 3 * LEASE_S)
    async with rig.redis.client() as client:
        held = await cast("Awaitable[str | None]", client.rpop(rig.queue))
    if held is None:
        return False
    await asyncio.sleep(seconds)
    async with rig.redis.client() as client:
        await client.lpush(rig.queue, held)
    return True


async def replay_message(rig: Rig, rng: Random) -> bool:
    """A message comes again, perhaps when its run has ended."""
    seconds = rng.uniform(0.5, 3 * LEASE_S)
    async with rig.redis.client() as client:
        old = await cast("Awaitable[str | None]", client.lindex(rig.queue, -1))
    if old is None:
        return False
    await asyncio.sleep(seconds)
    async with rig.redis.client() as client:
        await client.lpush(rig.queue, old)
    return True


def of_broker(fault: Fault) -> Fault:
    """A fault that Redis may be too unwell for."""

    async def attempt(rig: Rig, rng: Random) -> bool:
        try:
            return await fault(rig, rng)
        except (RedisError, OSError):
            return False

    return attempt


# The API


def of_api(field: str, statuses: set[int], least: float, most: float, usually: float = 0) -> Fault:
    """The API answers so for a while."""

    async def fault(rig: Rig, rng: Random) -> bool:
        value, seconds = rng.uniform(least, most), rng.uniform(0.2, 0.6)
        began = time.monotonic()
        with rig.disrupting(field, "api"):
            await rig.ask("POST", "/faults", {field: value})
            await asyncio.sleep(seconds)
            await rig.ask("POST", "/faults", {field: usually})
        calls = await rig.calls(began)
        return any(not statuses or status in statuses for *_, status in calls)

    return fault


# The network


def of_network(how: Break, most_s: float) -> Fault:
    """The network between the workers and the API is broken for a while."""

    async def fault(rig: Rig, rng: Random) -> bool:
        with rig.disrupting(how, "network"):
            return await rig.proxy.broken(how, rng.uniform(0.1, most_s)) > 0

    return fault


FRONTS: Final = ("intake", "scheduler")
KINDS: Final[dict[str, tuple[float, Fault]]] = {
    "worker killed": (4, killed("worker")),
    "worker stopped": (2, stopped("worker")),
    "worker frozen": (4, frozen("worker")),
    "front killed": (2, killed(*FRONTS)),
    "front stopped": (1, stopped(*FRONTS)),
    "front frozen": (1, frozen(*FRONTS)),
    "redis killed": (2, of_redis("redis killed", _kill_redis, 0.5)),
    "redis frozen": (3, of_redis("redis frozen", _freeze_redis, 0.8)),
    "redis paused": (3, of_redis("redis paused", _pause_redis, 0.8)),
    "redis asleep": (3, of_redis("redis asleep", _sleep_redis, 0.8)),
    "redis full": (4, of_redis("redis full", _fill_redis, 0.6)),
    "redis disconnected": (3, of_redis("redis disconnected", _disconnect_redis, 0.1)),
    "message lost": (10, of_broker(lose_message)),
    "message repeated": (10, of_broker(repeat_message)),
    "message held back": (10, of_broker(hold_message)),
    "message replayed": (8, of_broker(replay_message)),
    "api throttles": (4, of_api("rate_429", {429}, 0.1, 0.25)),
    "api errors": (7, of_api("rate_5xx", {500, 502, 503}, 0.1, 0.25)),
    "api resets": (6, of_api("reset_rate", {0}, 0.1, 0.25)),
    "api hangs": (5, of_api("hang_rate", {0}, 0.1, 0.25)),
    "api slow": (6, of_api("latency_ms", set(), 200, 800, LATENCY_MS)),
    "network cut": (7, of_network(Break.CUT, 0.4)),
    "network swallows requests": (6, of_network(Break.DEAF, 0.4)),
    "network swallows answers": (7, of_network(Break.MUTE, 0.4)),
    "network stalls midway": (6, of_network(Break.STALL, 0.4)),
}
"""What may happen, and how often of a hundred and twenty or so."""
