"""The pools of a simulated project: pure, the same for the same seed and time."""

from __future__ import annotations

import json
import random
from dataclasses import dataclass, field
from datetime import timedelta
from enum import StrEnum
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterator
    from datetime import datetime

    from sandbox.config import SandboxConfig

Document = dict[str, Any]


class Category(StrEnum):
    """What a pool is an example of."""

    EXPIRED = "expired"
    TAGGED = "tagged"
    CURRENT = "current"
    UNTAGGED = "untagged"
    PROTECTED = "protected"
    PREPAID = "prepaid"
    PREPAID_NODES = "prepaid_nodes"
    FROZEN = "frozen"
    CREATING = "creating"
    UNREADABLE = "unreadable"
    PARENT = "parent"
    SUBPOOL = "subpool"


class Behaviour(StrEnum):
    """What a pool's DELETE is like."""

    NORMAL = "normal"
    GONE = "gone"
    THROTTLED = "throttled"
    FLAKY = "flaky"
    DOOMED = "doomed"
    STUCK = "stuck"


@dataclass(slots=True)
class Member:
    """A pool of the fleet.

    Attributes:
        project_id: its project.
        category, behaviour: what it is an example of.
        document: as the API shows it.
        workloads: what runs or ran in it.
    """

    project_id: str
    category: Category
    behaviour: Behaviour
    document: Document
    workloads: list[Document] = field(default_factory=list)

    @property
    def name(self) -> str:
        """The pool's id."""
        return str(self.document["metadata"]["name"])


_SHARES = {
    Category.EXPIRED: 0.42,
    Category.TAGGED: 0.34,
    Category.CURRENT: 0.06,
    Category.UNTAGGED: 0.04,
    Category.PROTECTED: 0.05,
    Category.PREPAID: 0.02,
    Category.PREPAID_NODES: 0.01,
    Category.FROZEN: 0.01,
    Category.CREATING: 0.01,
    Category.UNREADABLE: 0.02,
    Category.PARENT: 0.02,
}
_FLAVORS = (
    ("modelarts.vm.cpu.4ud", 12),
    ("modelarts.vm.cpu.16u64g.d", 8),
    ("modelarts.vm.gpu.v100.8u64g", 4),
    ("modelarts.bm.gpu.8a100", 3),
    ("modelarts.bm.npu.arm.8snt9b", 4),
)
_WORDS = ("train", "infer", "nightly", "research", "llm", "vision", "speech", "rank", "ablation")
_TEAMS = ("atlas", "boreas", "ceres", "dione", "elara")
CLEANUP_TAG = "poolsweep/cleanup"
PROTECT_TAG = "poolsweep/protect"
EXPIRY_TAG = "expires-at"


def generate(config: SandboxConfig, now: datetime) -> Iterator[Member]:
    """The fleet.

    Args:
        config: how many pools, of which seed and behaviour.
        now: an aware time, from which ages and expiries are counted.

    Yields:
        Pools, logical ones after their parents.
    """
    rng = random.Random(config.seed)  # noqa: S311 - made to be repeatable
    projects = config.project_ids
    made = 0
    while made < config.pools:
        project = projects[made % len(projects)]
        (category,) = rng.choices(list(_SHARES), list(_SHARES.values()))
        family = [_pool(rng, category, now)]
        if category is Category.PARENT:
            family += _subpools(rng, family[0], now)
        for document in family[: config.pools - made]:
            made += 1
            kind = Category.SUBPOOL if document["status"].get("parent") else category
            behaviour = Behaviour.NORMAL
            if kind in {Category.EXPIRED, Category.TAGGED}:
                behaviour = _behaviour(rng, config)
            yield Member(project, kind, behaviour, document)


def _behaviour(rng: random.Random, config: SandboxConfig) -> Behaviour:
    drawn = rng.random()
    for behaviour in list(Behaviour)[1:]:
        drawn -= getattr(config, behaviour)
        if drawn < 0:
            return behaviour
    return Behaviour.NORMAL


def _hex(rng: random.Random, digits: int) -> str:
    return f"{rng.getrandbits(4 * digits):0{digits}x}"


def _when(moment: datetime) -> str:
    return moment.strftime("%Y-%m-%dT%H:%M:%SZ")


def _tags(rng: random.Random, category: Category, now: datetime) -> dict[str, str]:
    tags = {"team": rng.choice(_TEAMS)}
    past = now - timedelta(hours=rng.uniform(1, 24 * 60))
    match category:
        case Category.EXPIRED | Category.PREPAID | Category.PREPAID_NODES | Category.PARENT:
            tags[EXPIRY_TAG] = _when(past)
        case Category.FROZEN | Category.CREATING:
            tags[EXPIRY_TAG] = past.date().isoformat()
        case Category.TAGGED:
            tags[CLEANUP_TAG] = "true"
        case Category.CURRENT:
            tags[EXPIRY_TAG] = _when(now + timedelta(days=rng.uniform(1, 90)))
        case Category.PROTECTED:
            tags[EXPIRY_TAG] = _when(past)
            tags[PROTECT_TAG] = "true"
        case Category.UNREADABLE:
            tags[EXPIRY_TAG] = rng.choice(("next friday", "31.12.2025", "soon"))
        case _:
            pass
    return tags


def _tags_text(rng: random.Random, tags: dict[str, str]) -> str:
    if rng.random() < 0.5:
        return json.dumps([{"key": key, "value": value} for key, value in tags.items()])
    return json.dumps(tags)


def _pool(rng: random.Random, category: Category, now: datetime) -> Document:
    title = f"{rng.choice(_WORDS)}-{rng.choice(_TEAMS)}-{rng.randint(1, 99)}"
    identity = _hex(rng, 32)
    name = f"{title}-{identity}"
    flavor, most = rng.choice(_FLAVORS)
    count = rng.randint(1, most)
    zone = rng.choice(("cn-north-7a", "cn-north-7b", "cn-north-7c"))
    creating = category is Category.CREATING
    created = now - timedelta(minutes=5 if creating else rng.uniform(60, 60 * 24 * 200))
    text = _tags_text(rng, _tags(rng, category, now))
    if category is Category.UNREADABLE and rng.random() < 0.5:
        text = "env=dev;expires-at=2020-01-01"
    nodes = {
        "flavor": flavor,
        "count": count,
        "maxCount": count,
        "azs": [{"az": zone, "count": count}],
    }
    state = "Enabling" if creating else "Enabled"
    return {
        "apiVersion": "v2",
        "kind": "Pool",
        "metadata": {
            "name": name,
            "creationTimestamp": _when(created),
            "labels": {
                "os.modelarts/name": title,
                "os.modelarts/workspace.id": "0",
                "os.modelarts/resource.id": f"maos-{title}-{_hex(rng, 5)}",
                "os.modelarts/tenant.domain.id": _hex(rng, 32),
                "os.modelarts/enterprise.project.id": "0",
                "os.modelarts/create-from": "console",
                "os.modelarts.pool/biz": "private",
                "os.modelarts/node.prefix": f"os-node-{_hex(rng, 6)}",
            },
            "annotations": {
                "os.modelarts/description": "",
                "os.modelarts/billing.mode": "1" if category is Category.PREPAID else "0",
                "os.modelarts/flavor.resource.ids": f"{flavor}:{_hex(rng, 8)}",
                "os.modelarts/tms.tags": text,
                "os.modelarts.pool/subpools.count": "0",
                "os.modelarts/external-access": "elb",
            },
        },
        "spec": {
            "type": "Dedicate",
            "scope": ["Train", "Infer"],
            "controlMode": 8 if category is Category.FROZEN else 0,
            "resources": [
                nodes
                | {
                    "nodePool": f"nodePool-{_hex(rng, 4)}",
                    "tags": [{"key": "cost-centre", "value": str(rng.randint(1000, 9999))}],
                    "rootVolume": {"volumeType": "SSD", "size": "150"},
                    "extendParams": {"dockerBaseSize": "50"},
                }
            ],
            "network": {"name": f"network-maos-{identity}"},
            "containerNetwork": {"mode": "vpc-router", "cidr": "172.16.0.0/16"},
            "driver": {"gpuVersion": "535.129.03", "updateStrategy": "idle"}
            if ".gpu." in flavor
            else {},
        },
        "status": {
            "phase": "Creating" if creating else "Running",
            "message": "",
            "resources": {("creating" if creating else "available"): [nodes]},
            "scope": [{"scopeType": kind, "state": state} for kind in ("Train", "Infer")],
            "root": name,
        },
    }


def _subpools(rng: random.Random, parent: Document, now: datetime) -> list[Document]:
    """Two logical pools in a physical one: both to go with it, or one to stay."""
    stays = rng.random() < 0.5
    found = []
    for number in range(2):
        category = Category.CURRENT if stays and number else Category.EXPIRED
        document = _pool(rng, category, now)
        document["spec"] = {
            "type": "Logical",
            "controlMode": 0,
            "resources": document["spec"]["resources"],
        }
        del document["status"]["resources"], document["status"]["scope"]
        document["status"] |= {
            "parent": parent["metadata"]["name"],
            "root": parent["metadata"]["name"],
        }
        found.append(document)
    return found
