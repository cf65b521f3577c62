"""The state of the simulated cloud and what its calls do to it; no HTTP."""

from __future__ import annotations

import json
import math
import random
from collections import defaultdict
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

from sandbox.fleet import Behaviour, Category, Member, generate

if TYPE_CHECKING:
    from collections.abc import Callable

    from sandbox.config import SandboxConfig

NOT_FOUND = "ModelArts.50015001"
SUBPOOLS = "os.modelarts.pool/subpools.count"


@dataclass(slots=True)
class Reply:
    """What the service answers."""

    status: int
    body: bytes
    retry_after_s: int | None = None
    html: bool = False


class SandboxPool:
    """A pool and what has become of it.

    Attributes:
        member: how it began.
        document: as the API shows it.
        gone_at: when it is gone, in seconds of the cloud's clock.
        deletes: DELETE calls that it was the target of.
        accepted: whether one was accepted.
        vanished: whether somebody else deleted it, so that calls do not find it.
        workloads: what the workloads call shows.
        usage: what the monitor call shows, all the time: percent by metric.
    """

    def __init__(self, member: Member) -> None:
        self.member = member
        self.document = member.document
        self.gone_at = math.inf
        self.deletes = 0
        self.accepted = False
        self.vanished = False
        self.workloads = member.workloads
        self.usage = {"cpuUsage": 3.0, "memUsedRate": 12.0, "gpuUtil": 0.0, "npuUtil": 0.0}
        self._text: bytes | None = None

    @property
    def labels(self) -> dict[str, Any]:
        """Its labels, or none."""
        return self._part("metadata", "labels")

    @property
    def annotations(self) -> dict[str, Any]:
        """Its annotations, or none."""
        return self._part("metadata", "annotations")

    @property
    def phase(self) -> str:
        """Its phase, or empty."""
        return str(self._part("status").get("phase", ""))

    @property
    def parent(self) -> str:
        """The pool that it lies in, or empty."""
        return str(self._part("status").get("parent") or "")

    @property
    def node_count(self) -> int:
        """The nodes of its first flavor."""
        resources = self._part("spec").get("resources")
        return int(resources[0].get("count", 0)) if resources else 0

    def _part(self, *names: str) -> dict[str, Any]:
        part: Any = self.document
        for name in names:
            part = part.get(name) if isinstance(part, dict) else None
        return part if isinstance(part, dict) else {}

    @property
    def text(self) -> bytes:
        """The document as JSON."""
        if self._text is None:
            self._text = json.dumps(self.document).encode()
        return self._text

    def change(self, part: str, values: dict[str, Any]) -> None:
        """Merge values into a part of the document."""
        self.document = {**self.document, part: {**self._part(part), **values}}
        self._text = None


class Cloud:
    """Projects and their pools.

    Args:
        config: what they are like.
        clock: monotonic seconds.
    """

    def __init__(self, config: SandboxConfig, clock: Callable[[], float]) -> None:
        self.config = config
        self._clock = clock
        self._rng = random.Random(config.seed + 1)  # noqa: S311 - made to be repeatable
        self.projects: dict[str, dict[str, SandboxPool]] = {
            project_id: {} for project_id in config.project_ids
        }
        self._subpools: defaultdict[str, dict[str, SandboxPool]] = defaultdict(dict)
        for member in generate(config, datetime.now(UTC)):
            self._put(SandboxPool(member))

    def add(
        self,
        project_id: str,
        document: dict[str, Any],
        category: Category = Category.UNTAGGED,
        behaviour: Behaviour = Behaviour.NORMAL,
    ) -> SandboxPool:
        """Put a pool into a project, in place of one with the same name.

        Args:
            project_id: a project that there is.
            document: the pool; it may lack anything but its name.
            category, behaviour: what it is an example of.
        """
        pool = SandboxPool(Member(project_id, category, behaviour, document))
        self._put(pool)
        return pool

    def _put(self, pool: SandboxPool) -> None:
        name, pools = pool.member.name, self.projects[pool.member.project_id]
        if before := pools.get(name):
            self._subpools[before.parent].pop(name, None)
        pools[name] = pool
        if pool.parent:
            self._subpools[pool.parent][name] = pool

    def is_there(self, pool: SandboxPool) -> bool:
        """Whether the pool still exists."""
        return not pool.vanished and self._clock() < pool.gone_at

    def find(self, project_id: str, name: str) -> SandboxPool | None:
        """A pool that exists."""
        pool = self.projects.get(project_id, {}).get(name)
        if not pool or not self.is_there(pool):
            return None
        self._count_subpools(pool)
        return pool

    def list(self, project_id: str) -> list[SandboxPool]:
        """The pools that a list shows."""
        pools, now = self.projects[project_id], self._clock()
        for parent in self._subpools:
            if pool := pools.get(parent):
                self._count_subpools(pool)
        return [pool for pool in pools.values() if now < pool.gone_at and not pool.vanished]

    def _count_subpools(self, pool: SandboxPool) -> int:
        """The logical pools that are left in a pool; its annotation says so too."""
        subpools = self._subpools.get(pool.member.name)
        if not subpools:
            return 0
        left = sum(map(self.is_there, subpools.values()))
        if pool.annotations.get(SUBPOOLS) != str(left):
            pool.change("metadata", {"annotations": {**pool.annotations, SUBPOOLS: str(left)}})
        return left

    def delete(self, project_id: str, name: str) -> Reply:
        """The DELETE call. Source: the API document, DELETE."""
        pool = self.projects[project_id].get(name)
        if pool is not None:
            pool.deletes += 1
            # Somebody else is always just quicker.
            pool.vanished = pool.vanished or pool.member.behaviour is Behaviour.GONE
        if pool is None or not self.is_there(pool):
            return refusal(404, NOT_FOUND, "pool not found")
        if refused := self._refused(pool):
            return refused
        answer = pool.text
        if not pool.accepted:
            pool.accepted = True
            if pool.member.behaviour is not Behaviour.STUCK:
                taken = self.config.delete_seconds * self._rng.uniform(0.5, 1.5)
                pool.gone_at = self._clock() + taken
            deleted = datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
            pool.change("metadata", {"deletionTimestamp": deleted})
            answer = pool.text  # may still say Running, as the document warns
            pool.change("status", {"phase": "Deleting"})
        return Reply(200, answer)

    def _refused(self, pool: SandboxPool) -> Reply | None:
        name = pool.member.name
        if pool.annotations.get("os.modelarts/billing.mode") == "1":
            return refusal(400, "ModelArts.50015009", "a yearly/monthly pool must be unsubscribed")
        if pool.member.category is Category.PREPAID_NODES:
            return refusal(400, "ModelArts.50015010", "yearly/monthly nodes must be unsubscribed")
        if pool.phase == "Creating":
            return refusal(409, "ModelArts.50015004", "the pool is being created")
        if self._count_subpools(pool):
            return refusal(409, "ModelArts.50015005", "the pool has logical pools")
        match pool.member.behaviour:
            case Behaviour.THROTTLED if pool.deletes <= 1:
                return refusal(429, "APIG.0308", "the throttling threshold is reached", 1)
            case Behaviour.FLAKY if pool.deletes <= 2:
                return _stumble(pool.deletes + len(name))
            case Behaviour.DOOMED if len(name) % 2:
                return refusal(403, "ModelArts.50010003", "no permission for this operation")
            case Behaviour.DOOMED:
                return refusal(400, "ModelArts.50015007", "the pool is locked by another service")
            case _:
                return None


def refusal(status: int, code: str, message: str, retry_after_s: int | None = None) -> Reply:
    """An error as the service and the gateway word it."""
    body = json.dumps({"error_code": code, "error_msg": message}).encode()
    return Reply(status, body, retry_after_s)


def _stumble(number: int) -> Reply:
    match number % 4:
        case 0:
            return refusal(500, "ModelArts.50000001", "internal error")
        case 1:
            return Reply(502, b"<html><h1>502 Bad Gateway</h1></html>", html=True)
        case 2:
            return refusal(503, "ModelArts.50000002", "service unavailable", 1)
        case _:
            return refusal(409, "ModelArts.50015006", "the pool is being scaled")
