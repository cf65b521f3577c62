"""The pool document as typed models that lose nothing.

Every field of the API document has its place; unknown fields are kept, and a value of another
type than documented is kept as it came, so that one odd field never hides a pool, nor one odd item
its list. Nothing is converted: what was parsed dumps to what came in.

Source: the API document, "The pool".
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any, TypeAlias, TypeVar

from pydantic import AliasGenerator, BaseModel, ConfigDict, Field
from pydantic.alias_generators import to_camel
from pydantic_core import core_schema

if TYPE_CHECKING:
    from pydantic import GetCoreSchemaHandler

T = TypeVar("T")


class _KeptIfUnfit:
    """Marks a value that is kept as it came if it is of another type."""

    def __get_pydantic_core_schema__(
        self, source: Any, handler: GetCoreSchemaHandler
    ) -> core_schema.CoreSchema:
        # A union rather than a validator of ours: thousands of documents are read without a call
        # back into Python.
        either: list[core_schema.CoreSchema | tuple[core_schema.CoreSchema, str]]
        either = [handler(source), core_schema.any_schema()]
        return core_schema.union_schema(either, mode="left_to_right")


Kept: TypeAlias = Annotated[T, _KeptIfUnfit()]
"""A value that may turn out to be anything."""
Texts: TypeAlias = dict[str, str]
Items: TypeAlias = list[Kept[T]]


class Document(BaseModel):
    """A part of an API document: lenient in, lossless out."""

    model_config = ConfigDict(
        extra="allow",
        strict=True,
        frozen=True,
        alias_generator=AliasGenerator(alias=to_camel),
        defer_build=True,  # many a command reads no pool
    )

    def to_json(self) -> dict[str, Any]:
        """The document as it came.

        With one exception: an unknown field that is spelled like a documented one's name in
        Python (`control_mode`) is kept, and the documented one, if missing, is added as null.
        """
        return self.model_dump(by_alias=True, exclude_unset=True, warnings=False)


class Metadata(Document):
    name: Kept[str | None] = None
    creation_timestamp: Kept[str | None] = None
    deletion_timestamp: Kept[str | None] = None
    labels: Kept[Texts | None] = None
    annotations: Kept[Texts | None] = None


class Zone(Document):
    az: Kept[str | None] = None
    count: Kept[int | None] = None


class Taint(Document):
    key: Kept[str | None] = None
    value: Kept[str | None] = None
    effect: Kept[str | None] = None


class Tag(Document):
    key: Kept[str | None] = None
    value: Kept[str | None] = None


class NodeExtendParams(Document):
    docker_base_size: Kept[str | None] = None
    post_install: Kept[str | None] = None


class CreatingStep(Document):
    step: Kept[int | None] = None
    type: Kept[str | None] = None


class RootVolume(Document):
    volume_type: Kept[str | None] = None
    size: Kept[str | None] = None


class VolumeExtendParams(Document):
    volume_group: Kept[str | None] = None


class DataVolume(Document):
    volume_type: Kept[str | None] = None
    size: Kept[str | None] = None
    count: Kept[int | None] = None
    extend_params: Kept[VolumeExtendParams | None] = None


class LvmConfig(Document):
    lv_type: Kept[str | None] = None
    path: Kept[str | None] = None


class VolumeGroupConfig(Document):
    volume_group: Kept[str | None] = None
    docker_thin_pool: Kept[int | None] = None
    lvm_config: Kept[LvmConfig | None] = None
    types: Kept[Items[str] | None] = None


class NodeNetwork(Document):
    vpc: Kept[str | None] = None
    subnet: Kept[str | None] = None
    security_groups: Kept[Items[str] | None] = None


class NodeOs(Document):
    name: Kept[str | None] = None
    image_id: Kept[str | None] = None
    image_type: Kept[str | None] = None


class ResourceSpec(Document):
    flavor: Kept[str | None] = None
    count: Kept[int | None] = None
    max_count: Kept[int | None] = None
    azs: Kept[Items[Zone] | None] = None
    node_pool: Kept[str | None] = None
    taints: Kept[Items[Taint] | None] = None
    labels: Kept[Texts | None] = None
    tags: Kept[Items[Tag] | None] = None
    network: Kept[NodeNetwork | None] = None
    extend_params: Kept[NodeExtendParams | None] = None
    creating_step: Kept[CreatingStep | None] = None
    root_volume: Kept[RootVolume | None] = None
    data_volumes: Kept[Items[DataVolume] | None] = None
    volume_group_configs: Kept[Items[VolumeGroupConfig] | None] = None
    os: Kept[NodeOs | None] = None


class Network(Document):
    name: Kept[str | None] = None


class ContainerNetwork(Document):
    mode: Kept[str | None] = None
    cidr: Kept[str | None] = None


class Master(Document):
    az: Kept[str | None] = None


class DriverSpec(Document):
    gpu_version: Kept[str | None] = None
    npu_version: Kept[str | None] = None
    update_strategy: Kept[str | None] = None


class PoolSpec(Document):
    type: Kept[str | None] = None
    scope: Kept[Items[str] | None] = None
    control_mode: Kept[int | None] = None
    resources: Kept[Items[ResourceSpec] | None] = None
    network: Kept[Network | None] = None
    container_network: Kept[ContainerNetwork | None] = None
    containernetwork: Kept[ContainerNetwork | None] = Field(default=None, alias="containernetwork")
    kubernetes_svc_ip_range: Kept[str | None] = None
    masters: Kept[Items[Master] | None] = None
    cluster_flavor: Kept[str | None] = None
    driver: Kept[DriverSpec | None] = None


class ResourceCount(Document):
    flavor: Kept[str | None] = None
    count: Kept[int | None] = None
    max_count: Kept[int | None] = None
    azs: Kept[Items[Zone] | None] = None
    creating_step: Kept[CreatingStep | None] = None
    node_pool: Kept[str | None] = None


class ResourceStatus(Document):
    creating: Kept[Items[ResourceCount] | None] = None
    available: Kept[Items[ResourceCount] | None] = None
    abnormal: Kept[Items[ResourceCount] | None] = None
    deleting: Kept[Items[ResourceCount] | None] = None


class PluginStatus(Document):
    name: Kept[str | None] = None
    phase: Kept[str | None] = None


class ScopeStatus(Document):
    scope_type: Kept[str | None] = None
    state: Kept[str | None] = None
    plugins: Kept[Items[PluginStatus] | None] = None
    message: Kept[str | None] = None


class DriverState(Document):
    version: Kept[str | None] = None
    state: Kept[str | None] = None


class DriverStatus(Document):
    gpu: Kept[DriverState | None] = None
    npu: Kept[DriverState | None] = None


class PoolStatus(Document):
    phase: Kept[str | None] = None
    message: Kept[str | None] = None
    resources: Kept[ResourceStatus | None] = None
    scope: Kept[Items[ScopeStatus] | None] = None
    driver: Kept[DriverStatus | None] = None
    parent: Kept[str | None] = None
    root: Kept[str | None] = None


class PoolDocument(Document):
    """A pool as the API writes it. `pool.Pool` says what it means."""

    api_version: Kept[str | None] = None
    kind: Kept[str | None] = None
    metadata: Kept[Metadata] = Field(default_factory=Metadata)
    spec: Kept[PoolSpec] = Field(default_factory=PoolSpec)
    status: Kept[PoolStatus] = Field(default_factory=PoolStatus)


class Node(Document):
    """A node of a pool, of which only what tells about billing is read."""

    metadata: Kept[Metadata] = Field(default_factory=Metadata)


class Workload(Document):
    """Something that runs in a pool. Source: the API document, "Reading"."""

    type: Kept[str | None] = None
    status: Kept[str | None] = None
    name: Kept[str | None] = None
    job_name: Kept[str | None] = None
    create_time: Any = None
    running_duration: Any = None
    host_ips: Any = None
