"""Pool documents for the tests: the API document's example, one with every field, and odd ones."""

from __future__ import annotations

import copy
import json
from typing import TYPE_CHECKING, Any

from hypothesis import strategies as st

from worker.modelarts import Pool

if TYPE_CHECKING:
    from collections.abc import Iterator

EXAMPLE: dict[str, Any] = {
    "kind": "Pool",
    "apiVersion": "v2",
    "metadata": {
        "name": "auto-pool-os-86c13962597848eeb29c5861153a391f",
        "creationTimestamp": "2022-09-16T03:10:40Z",
        "labels": {
            "os.modelarts/name": "auto-pool-os",
            "os.modelarts/resource.id": "maos-auto-pool-os-72w8d",
        },
        "annotations": {
            "os.modelarts/description": "",
            "os.modelarts/billing.mode": "0",
            "os.modelarts/external-access": "elb",
        },
    },
    "spec": {
        "type": "Dedicate",
        "scope": ["Train", "Infer"],
        "resources": [{"flavor": "modelarts.vm.cpu.4ud", "count": 2}],
        "network": {"name": "network-maos-86c13962597848eeb29c5861153a391f"},
    },
    "status": {
        "phase": "Running",
        "scope": [
            {"scopeType": "Train", "state": "Enabled"},
            {"scopeType": "Infer", "state": "Enabled"},
        ],
        "resources": {
            "available": [
                {
                    "flavor": "modelarts.vm.cpu.4ud",
                    "count": 2,
                    "azs": [{"az": "cn-north-7c", "count": 2}],
                }
            ]
        },
    },
}
"""The example of the API document."""

_COUNT: dict[str, Any] = {
    "flavor": "modelarts.bm.npu.arm.8snt9b",
    "count": 3,
    "maxCount": 5,
    "azs": [{"az": "cn-north-7c", "count": 2}, {"az": "cn-north-7a", "count": 1}],
    "creatingStep": {"step": 1, "type": "hyperinstance"},
    "nodePool": "node-pool-1",
}

FULL: dict[str, Any] = {
    "apiVersion": "v2",
    "kind": "Pool",
    "metadata": {
        "name": "train-pool-0f2b9e4c1d6a4b8f9c3e7d5a1b2c3d4e",
        "creationTimestamp": "2021-11-01T03:49:41Z",
        "deletionTimestamp": "2021-11-02T03:49:41Z",
        "labels": {
            "os.modelarts/name": "train",
            "os.modelarts/workspace.id": "0",
            "os.modelarts/resource.id": "maos-train-72w8d",
            "os.modelarts/tenant.domain.id": "dddddddddddddddddddddddddddddddd",
            "os.modelarts/tenant.project.id": "0123456789abcdef0123456789abcdef",
            "os.modelarts/enterprise.project.id": "0",
            "os.modelarts/create-from": "console",
            "os.modelarts.pool/biz": "private",
            "os.modelarts/sharing": "false",
            "os.modelarts/node.prefix": "train-node",
            "os.modelarts/nobilling": "false",
            "os.modelarts/order.name": "order-1",
            "os.modelarts/region": "cn-north-7",
        },
        "annotations": {
            "os.modelarts/description": "for training",
            "os.modelarts/billing.mode": "0",
            "os.modelarts/period.num": "1",
            "os.modelarts/period.type": "2",
            "os.modelarts/auto.renew": "0",
            "os.modelarts/order.id": "CS1",
            "os.modelarts/flavor.resource.ids": "{}",
            "os.modelarts/tms.tags": '[{"key": "expires-at", "value": "2021-12-01"}]',
            "os.modelarts/scheduler.extension": "{}",
            "os.modelarts.pool/subpools.count": "0",
            "os.modelarts/volcano.scheduler.cabinet-exclusive.enabled": "false",
            "os.modelarts.pool/scope.external.dependency.Train": "{}",
            "os.modelarts.pool/scope.external.dependency.Infer": "{}",
            "os.modelarts.pool/scope.external.dependency.Notebook": "{}",
            "os.modelarts/external-access": "elb",
        },
    },
    "spec": {
        "type": "Dedicate",
        "scope": ["Train", "Infer", "Notebook"],
        "controlMode": 0,
        "resources": [
            {
                "flavor": "modelarts.bm.npu.arm.8snt9b",
                "count": 3,
                "maxCount": 5,
                "azs": [{"az": "cn-north-7c", "count": 3}],
                "nodePool": "node-pool-1",
                "taints": [{"key": "dedicated", "value": "train", "effect": "NoSchedule"}],
                "labels": {"team": "vision"},
                "tags": [{"key": "cost-center", "value": "42"}],
                "network": {"vpc": "vpc-1", "subnet": "subnet-1", "securityGroups": ["sg-1"]},
                "extendParams": {"dockerBaseSize": "50", "postInstall": "ZWNobyBoaQ=="},
                "creatingStep": {"step": 1, "type": "hyperinstance"},
                "rootVolume": {"volumeType": "SSD", "size": "500"},
                "dataVolumes": [
                    {
                        "volumeType": "GPSSD",
                        "size": "1000",
                        "count": 2,
                        "extendParams": {"volumeGroup": "vgpaas"},
                    }
                ],
                "volumeGroupConfigs": [
                    {
                        "volumeGroup": "vgpaas",
                        "dockerThinPool": 90,
                        "lvmConfig": {"lvType": "linear", "path": "/data"},
                        "types": ["volume"],
                    }
                ],
                "os": {"name": "EulerOS", "imageId": "image-1", "imageType": "public"},
            }
        ],
        "network": {"name": "network-maos-1"},
        "containerNetwork": {"mode": "overlay_l2", "cidr": "172.16.0.0/16"},
        "containernetwork": {"mode": "vpc-router", "cidr": "172.17.0.0/16"},
        "kubernetesSvcIpRange": "10.247.0.0/16",
        "masters": [{"az": "cn-north-7a"}, {"az": "cn-north-7c"}],
        "clusterFlavor": "cce.s2.small",
        "driver": {"gpuVersion": "535.1", "npuVersion": "23.0.6", "updateStrategy": "idle"},
    },
    "status": {
        "phase": "Running",
        "message": "all is well",
        "resources": {
            "creating": [{**_COUNT, "count": 1}],
            "available": [_COUNT],
            "abnormal": [{**_COUNT, "count": 1}],
            "deleting": [{**_COUNT, "count": 7}],
        },
        "scope": [
            {
                "scopeType": "Train",
                "state": "Enabled",
                "plugins": [{"name": "volcano", "phase": "Running"}],
                "message": "",
            }
        ],
        "driver": {
            "gpu": {"version": "535.1", "state": "Running"},
            "npu": {"version": "23.0.6", "state": "Upgrading"},
        },
        "parent": "",
        "root": "train-pool-0f2b9e4c1d6a4b8f9c3e7d5a1b2c3d4e",
    },
}
"""Every field of the API document's table."""

TAGS = "os.modelarts/tms.tags"
BILLING = "os.modelarts/billing.mode"
SUBPOOLS = "os.modelarts.pool/subpools.count"


def document(name: str = "pool", *, base: dict[str, Any] = EXAMPLE, **changes: Any) -> Any:
    """A copy of a document, with the changes that the tests most often need.

    Args:
        name: metadata.name; one that is too short is filled up to an id.
        base: the document that is copied.
        changes: created, labels, annotations (added to), tags (a map), control_mode, phase,
            parent, subpools, type.
    """
    made = copy.deepcopy(base)
    metadata, spec, status = made["metadata"], made["spec"], made["status"]
    metadata["name"] = pool_id(name)
    metadata["annotations"] |= changes.pop("annotations", {})
    metadata["labels"] |= changes.pop("labels", {})
    if "tags" in changes:
        tags = changes.pop("tags")
        items = [{"key": key, "value": value} for key, value in tags.items()]
        metadata["annotations"][TAGS] = json.dumps(items)
    if "subpools" in changes:
        metadata["annotations"][SUBPOOLS] = changes.pop("subpools")
    if "parent" in changes:
        status["parent"] = changes.pop("parent")
        spec["type"] = "Logical"
    for field, part, key in (
        ("created", metadata, "creationTimestamp"),
        ("control_mode", spec, "controlMode"),
        ("type", spec, "type"),
        ("phase", status, "phase"),
    ):
        if field in changes:
            part[key] = changes.pop(field)
    assert not changes, f"unknown changes: {changes}"
    return made


def pool_id(name: str) -> str:
    """A pool's id, made of a short name for people."""
    return name if len(name) >= 36 else f"{name}-{'0' * 35}"[:36]


def pool(name: str = "pool", **changes: Any) -> Pool:
    """A pool; see `document`."""
    return Pool.parse(document(name, **changes))


def without(path: str, base: dict[str, Any] = EXAMPLE) -> Any:
    """A document without the field at a dotted path."""
    made = copy.deepcopy(base)
    *parents, last = path.split(".")
    part = made
    for key in parents:
        part = part[key]
    del part[last]
    return made


def with_value(path: str, value: Any, base: dict[str, Any] = EXAMPLE) -> Any:
    """A document with another value at a dotted path."""
    made = copy.deepcopy(base)
    *parents, last = path.split(".")
    part = made
    for key in parents:
        part = part.setdefault(key, {})
    part[last] = value
    return made


def exact(value: Any) -> str:
    """JSON as text, in which 1, 1.0 and true differ, which for Python are equal."""
    return json.dumps(value, sort_keys=True)


AWKWARD_KEYS = ["", "name", "count", "copy", "to_json", "model_config", "model_dump", "__class__"]
AWKWARD_TEXTS = ["", "0", "1", "8", "Deleting", "null", "../x", "\x00", "\n=1", "é" * 50, "[]"]
TEXT = st.characters(codec="utf-8")
HALVES_TOO = st.characters()
"""Characters, and halves of surrogate pairs, which JSON can hold although they are no text."""


def keys(alphabet: st.SearchStrategy[str] = TEXT) -> st.SearchStrategy[str]:
    """Any key of an object."""
    return st.sampled_from(AWKWARD_KEYS) | st.text(alphabet, max_size=10)


def json_values(alphabet: st.SearchStrategy[str] = TEXT) -> st.SearchStrategy[Any]:
    """Any JSON value."""
    plain = (
        st.none()
        | st.booleans()
        | st.integers()
        | st.sampled_from([0, 1, 8, 16, -1, -8, 2**63, 10**400])
        | st.floats(allow_nan=False)
        | st.sampled_from(AWKWARD_TEXTS)
        | st.text(alphabet, max_size=20)
    )
    return st.recursive(
        plain,
        lambda inner: (
            st.lists(inner, max_size=4)
            | st.dictionaries(keys(alphabet), inner, max_size=4)
            | st.builds(nested, st.integers(50, 300), inner)
        ),
        max_leaves=8,
    )


def nested(depth: int, value: Any = None) -> Any:
    """A value in so many lists."""
    for _ in range(depth):
        value = [value]
    return value


def paths(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The path of everything in a document."""
    items: Any = ()
    if isinstance(value, dict):
        items = value.items()
    elif isinstance(value, list):
        items = enumerate(value)
    for key, inner in items:
        yield (*path, key)
        yield from paths(inner, (*path, key))


_FIXED = {("metadata",), ("metadata", "name")}
_FREE = [path for path in paths(FULL) if path not in _FIXED]


def _part_at(made: Any, path: tuple[Any, ...]) -> Any:
    for key in path:
        try:
            made = made[key]
        except (LookupError, TypeError):
            return None
    return made


def mutations(alphabet: st.SearchStrategy[str] = TEXT) -> st.SearchStrategy[dict[str, Any]]:
    """The full document after a few changes anywhere but in metadata.name: values replaced by
    other JSON, fields removed, unknown fields added.
    """
    values = json_values(alphabet)
    replace = st.tuples(st.sampled_from(_FREE), values)
    remove = st.tuples(st.sampled_from(_FREE))
    add = st.tuples(st.sampled_from([(), ("metadata",), *_FREE]), values, keys(alphabet))
    return st.lists(replace | remove | add, min_size=1, max_size=4).map(_changed)


def _changed(changes: list[tuple[Any, ...]]) -> dict[str, Any]:
    made = copy.deepcopy(FULL)
    for path, *rest in changes:
        part = _part_at(made, path if len(rest) == 2 else path[:-1])
        match rest:
            case [value, str(key)] if isinstance(part, dict):
                part.setdefault(key, value)
            case [value] if isinstance(part, dict):
                part[path[-1]] = value
            case [] if isinstance(part, dict):
                part.pop(path[-1], None)
    return made
