"""One of several processes leads: a lock in Redis that its holder must renew."""

from __future__ import annotations

import os
import secrets
import socket
from importlib.resources import files
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from redis.asyncio import Redis


def process_name() -> str:
    """A name for this process that no other has: host, process id, and some random bits."""
    return f"{socket.gethostname()}:{os.getpid()}:{secrets.token_hex(4)}"


class Leadership:
    """A candidate for the lead.

    Args:
        redis: a connection that decodes responses.
        key: the lock.
        name: this candidate's.
        ttl_s: seconds after which a leader that is not heard of is replaced.
    """

    def __init__(self, redis: Redis, key: str, name: str, *, ttl_s: float) -> None:
        self._redis = redis
        self._key = key
        self._name = name
        self._ttl_ms = round(ttl_s * 1000)
        self._script = redis.register_script((files("worker") / "leader.lua").read_text())

    async def leads(self) -> bool:
        """Whether this candidate leads; doing so, or finding nobody does, renews its lock."""
        return bool(await self._script(keys=[self._key], args=["lead", self._name, self._ttl_ms]))

    async def resign(self) -> None:
        """Let another lead at once."""
        await self._script(keys=[self._key], args=["resign", self._name])
