"""The pool document: lenient in, lossless out."""

from __future__ import annotations

import contextlib
import copy
import json
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import given, settings

from tests.modelarts.pool_documents import (
    EXAMPLE,
    FULL,
    HALVES_TOO,
    exact,
    json_values,
    mutations,
    nested,
    with_value,
)
from worker.modelarts import Pool, UnreadablePoolError
from worker.modelarts.precondition import Precondition
from worker.modelarts.schema import Document, Node, PoolDocument, Workload

if TYPE_CHECKING:
    from collections.abc import Iterator

patient = settings(deadline=None)


def typed(value: Any) -> Iterator[Document]:
    """Every part of a document, as typed."""
    if isinstance(value, Document):
        yield value
        for name in type(value).model_fields:
            yield from typed(getattr(value, name))
    elif isinstance(value, list):
        for item in value:
            yield from typed(item)


def parts(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The path of every object in JSON but the maps of texts, which have no type of their own."""
    if isinstance(value, dict) and path[-1:] not in {("labels",), ("annotations",)}:
        yield path
    if isinstance(value, dict | list):
        for key in value if isinstance(value, dict) else range(len(value)):
            yield from parts(value[key], (*path, key))


@pytest.mark.parametrize("raw", [EXAMPLE, FULL], ids=["example", "every field"])
def test_a_documented_pool_dumps_to_exactly_what_came_in(raw: dict[str, Any]) -> None:
    before = copy.deepcopy(raw)
    document = Pool.parse(raw).document
    assert exact(document.to_json()) == exact(before)
    assert exact(raw) == exact(before), "what was parsed is left as it was"


def test_every_documented_field_has_a_place_of_its_own() -> None:
    found = list(typed(Pool.parse(FULL).document))
    assert len(found) == len(list(parts(FULL)))
    for part in found:
        assert not part.model_extra, f"{type(part).__name__} does not know {part.model_extra}"


def test_the_example_reads_as_documented() -> None:
    document = Pool.parse(EXAMPLE).document
    assert (document.kind, document.api_version) == ("Pool", "v2")
    assert document.metadata.name == "auto-pool-os-86c13962597848eeb29c5861153a391f"
    assert document.metadata.creation_timestamp == "2022-09-16T03:10:40Z"
    assert document.metadata.labels is not None
    assert document.metadata.labels["os.modelarts/name"] == "auto-pool-os"
    assert (document.spec.type, document.spec.scope) == ("Dedicate", ["Train", "Infer"])
    assert document.spec.resources is not None
    (resource,) = document.spec.resources
    assert (resource.flavor, resource.count) == ("modelarts.vm.cpu.4ud", 2)
    assert document.spec.network is not None
    assert document.spec.network.name == "network-maos-86c13962597848eeb29c5861153a391f"
    assert document.status.phase == "Running"
    assert document.status.scope is not None
    assert [(scope.scope_type, scope.state) for scope in document.status.scope] == [
        ("Train", "Enabled"),
        ("Infer", "Enabled"),
    ]
    assert document.status.resources is not None
    assert document.status.resources.available is not None
    (available,) = document.status.resources.available
    assert available.azs is not None
    assert [(zone.az, zone.count) for zone in available.azs] == [("cn-north-7c", 2)]


def test_deep_fields_are_typed() -> None:
    spec = Pool.parse(FULL).document.spec
    assert spec.resources is not None
    (resource,) = spec.resources
    assert resource.volume_group_configs is not None
    (config,) = resource.volume_group_configs
    assert (config.docker_thin_pool, config.types) == (90, ["volume"])
    assert config.lvm_config is not None
    assert config.lvm_config.lv_type == "linear"
    assert spec.container_network is not None
    assert spec.containernetwork is not None
    assert (spec.container_network.mode, spec.containernetwork.mode) == ("overlay_l2", "vpc-router")
    status = Pool.parse(FULL).document.status
    assert status.driver is not None
    assert status.driver.npu is not None
    assert status.driver.npu.state == "Upgrading"


@patient
@given(mutations())
def test_any_document_that_names_its_pool_is_parsed_without_loss(raw: dict[str, Any]) -> None:
    pool = Pool.parse(raw)
    assert pool.pool_id == FULL["metadata"]["name"]
    assert exact(pool.document.to_json()) == exact(raw)


@patient
@given(
    json_values(HALVES_TOO)
    | json_values().map(lambda value: {"metadata": value})
    | json_values().map(lambda value: {"metadata": {"name": value}})
    | mutations(HALVES_TOO)
)
def test_no_json_raises_anything_but_that_the_pool_cannot_be_read(raw: Any) -> None:
    with contextlib.suppress(UnreadablePoolError):
        pool = Pool.parse(raw)
        assert pool.pool_id == raw["metadata"]["name"]
        pool.document.to_json()
        Precondition.of(pool)


@pytest.mark.parametrize(
    "raw",
    [
        None,
        [],
        "pool",
        {},
        {"metadata": None},
        {"metadata": []},
        {"metadata": {}},
        {"metadata": {"name": None}},
        {"metadata": {"name": ""}},
        {"metadata": {"name": 7}},
        {"metadata": {"name": ["pool"]}},
        {"name": "pool"},
    ],
    ids=str,
)
def test_what_names_no_pool_is_refused(raw: Any) -> None:
    with pytest.raises(UnreadablePoolError):
        Pool.parse(raw)


@pytest.mark.parametrize("where", ["", "metadata", "spec", "status"])
def test_a_key_that_is_no_text_hides_nothing(where: str) -> None:
    # Half a surrogate pair is JSON, yet no text; a part with it is not read as half a part.
    raw = with_value("spec.controlMode", 8)
    (raw[where] if where else raw)[json.loads(r'"\ud800"')] = 1
    with pytest.raises(UnreadablePoolError):
        Pool.parse(raw)


def test_one_odd_item_does_not_hide_its_list() -> None:
    raw = with_value("spec.resources", [7, {"flavor": "a", "count": 2, "azs": [None, {"az": "z"}]}])
    document = Pool.parse(raw).document
    resources: Any = document.spec.resources
    odd, resource = resources
    assert odd == 7
    assert resource.flavor == "a"
    assert resource.azs[1].az == "z"
    assert exact(document.to_json()) == exact(raw)


def test_a_value_of_another_type_is_kept_and_not_converted() -> None:
    raw = with_value("spec.resources", [{"flavor": 4, "count": "2", "maxCount": 2.0, "azs": {}}])
    document = Pool.parse(raw).document
    resources: Any = document.spec.resources
    (resource,) = resources
    assert (resource.flavor, resource.count, resource.azs) == (4, "2", {})
    assert exact(document.to_json()) == exact(raw)


def test_an_unknown_field_is_not_taken_for_a_documented_one() -> None:
    # `control_mode` is the field's name in Python only; the API's is `controlMode`.
    raw = with_value("spec.control_mode", 8)
    assert Pool.parse(raw).document.spec.control_mode is None
    raw["spec"]["controlMode"] = 0
    document = Pool.parse(raw).document
    assert document.spec.control_mode == 0
    assert exact(document.to_json()) == exact(raw)


def test_a_document_cannot_be_changed() -> None:
    document = Pool.parse(EXAMPLE).document
    with pytest.raises(ValueError, match="frozen"):
        document.kind = "Other"  # type: ignore[misc]


@pytest.mark.parametrize("path", ["spec", "spec.type", "metadata.labels", "unknown"])
def test_deep_nesting_is_kept(path: str) -> None:
    raw = with_value(path, nested(900))
    dumped = Pool.parse(raw).document.to_json()
    for key in path.split("."):
        dumped = dumped[key]
    depth = 0
    while isinstance(dumped, list):
        (dumped,) = dumped
        depth += 1
    assert depth == 900


@patient
@given(json_values(), json_values())
def test_nodes_and_workloads_are_parsed_without_loss_too(first: Any, second: Any) -> None:
    node = {"metadata": first, "other": second}
    assert exact(Node.model_validate(node).to_json()) == exact(node)
    workload = {"type": first, "jobName": second, "createTime": first, "hostIps": second}
    assert exact(Workload.model_validate(workload).to_json()) == exact(workload)


def test_a_missing_part_is_empty_rather_than_none() -> None:
    document = PoolDocument.model_validate({"metadata": {"name": "pool"}})
    assert (document.spec.type, document.status.phase) == (None, None)
    assert document.to_json() == {"metadata": {"name": "pool"}}
