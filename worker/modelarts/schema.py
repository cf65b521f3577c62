"""The pool document as typed models that lose nothing.

Every field of the API document has its place; unknown fields are kept, and a value of another
type than documented is kept as it came, so that one odd field never hides a pool, nor one odd item
its list. Nothing is converted: what was parsed dumps to what came in.

Source: the API document, "The pool".
"""

from __future__ import annotations

from typing import Annotated, Any, TypeAlias, TypeVar

from pydantic import (
    AliasGenerator,
    BaseModel,
    ConfigDict,
    Field,
    ValidationError,
    ValidatorFunctionWrapHandler,
    WrapValidator,
    field_validator,
)
from pydantic.alias_generators import to_camel

T = TypeVar("T")


def _keep_if_unfit(value: Any, handler: ValidatorFunctionWrapHandler) -> Any:
    try:
        return handler(value)
    except ValidationError:
        return value


Texts: TypeAlias = dict[str, str]
Items: TypeAlias = list[Annotated[T, WrapValidator(_keep_if_unfit)]]


class Document(BaseModel):
    """A part of an API document: lenient in, lossless out."""

    model_config = ConfigDict(
        extra="allow",
        strict=True,
        frozen=True,
        alias_generator=AliasGenerator(alias=to_camel),
    )

    @field_validator("*", mode="wrap")
    @classmethod
    def _keep_what_does_not_fit(cls, value: Any, handler: ValidatorFunctionWrapHandler) -> Any:
        return _keep_if_unfit(value, handler)

    def to_json(self) -> dict[str, Any]:
        """The document as it came.

        With one exception: an unknown field that is spelled like a documented one's name in
        Python (`control_mode`) is kept, and the documented one, if missing, is added as null.
        """
        return self.model_dump(by_alias=True, exclude_unset=True, warnings=False)


class Metadata(Document):
    name: str | None = None
    creation_timestamp: str | None = None
    deletion_timestamp: str | None = None
    labels: Texts | None = None
    annotations: Texts | None = None


class Zone(Document):
    az: str | None = None
    count: int | None = None


class Taint(Document):
    key: str | None = None
    value: str | None = None
    effect: str | None = None


class Tag(Document):
    key: str | None = None
    value: str | None = None


class NodeExtendParams(Document):
    docker_base_size: str | None = None
    post_install: str | None = None


class CreatingStep(Document):
    step: int | None = None
    type: str | None = None


class RootVolume(Document):
    volume_type: str | None = None
    size: str | None = None


class VolumeExtendParams(Document):
    volume_group: str | None = None


class DataVolume(Document):
    volume_type: str | None = None
    size: str | None = None
    count: int | None = None
    extend_params: VolumeExtendParams | None = None


class LvmConfig(Document):
    lv_type: str | None = None
    path: str | None = None


class VolumeGroupConfig(Document):
    volume_group: str | None = None
    docker_thin_pool: int | None = None
    lvm_config: LvmConfig | None = None
    types: Items[str] | None = None


class NodeNetwork(Document):
    vpc: str | None = None
    subnet: str | None = None
    security_groups: Items[str] | None = None


class NodeOs(Document):
    name: str | None = None
    image_id: str | None = None
    image_type: str | None = None


class ResourceSpec(Document):
    flavor: str | None = None
    count: int | None = None
    max_count: int | None = None
    azs: Items[Zone] | None = None
    node_pool: str | None = None
    taints: Items[Taint] | None = None
    labels: Texts | None = None
    tags: Items[Tag] | None = None
    network: NodeNetwork | None = None
    extend_params: NodeExtendParams | None = None
    creating_step: CreatingStep | None = None
    root_volume: RootVolume | None = None
    data_volumes: Items[DataVolume] | None = None
    volume_group_configs: Items[VolumeGroupConfig] | None = None
    os: NodeOs | None = None


class Network(Document):
    name: str | None = None


class ContainerNetwork(Document):
    mode: str | None = None
    cidr: str | None = None


class Master(Document):
    az: str | None = None


class DriverSpec(Document):
    gpu_version: str | None = None
    npu_version: str | None = None
    update_strategy: str | None = None


class PoolSpec(Document):
    type: str | None = None
    scope: Items[str] | None = None
    control_mode: int | None = None
    resources: Items[ResourceSpec] | None = None
    network: Network | None = None
    container_network: ContainerNetwork | None = None
    containernetwork: ContainerNetwork | None = Field(default=None, alias="containernetwork")
    kubernetes_svc_ip_range: str | None = None
    masters: Items[Master] | None = None
    cluster_flavor: str | None = None
    driver: DriverSpec | None = None


class ResourceCount(Document):
    flavor: str | None = None
    count: int | None = None
    max_count: int | None = None
    azs: Items[Zone] | None = None
    creating_step: CreatingStep | None = None
    node_pool: str | None = None


class ResourceStatus(Document):
    creating: Items[ResourceCount] | None = None
    available: Items[ResourceCount] | None = None
    abnormal: Items[ResourceCount] | None = None
    deleting: Items[ResourceCount] | None = None


class PluginStatus(Document):
    name: str | None = None
    phase: str | None = None


class ScopeStatus(Document):
    scope_type: str | None = None
    state: str | None = None
    plugins: Items[PluginStatus] | None = None
    message: str | None = None


class DriverState(Document):
    version: str | None = None
    state: str | None = None


class DriverStatus(Document):
    gpu: DriverState | None = None
    npu: DriverState | None = None


class PoolStatus(Document):
    phase: str | None = None
    message: str | None = None
    resources: ResourceStatus | None = None
    scope: Items[ScopeStatus] | None = None
    driver: DriverStatus | None = None
    parent: str | None = None
    root: str | None = None


class PoolDocument(Document):
    """A pool as the API writes it. `pool.Pool` says what it means."""

    api_version: str | None = None
    kind: str | None = None
    metadata: Metadata = Metadata()
    spec: PoolSpec = PoolSpec()
    status: PoolStatus = PoolStatus()


class Node(Document):
    """A node of a pool, of which only what tells about billing is read."""

    metadata: Metadata = Metadata()


class Workload(Document):
    """Something that runs in a pool. Source: the API document, "Reading"."""

    type: str | None = None
    status: str | None = None
    name: str | None = None
    job_name: str | None = None
    create_time: Any = None
    running_duration: Any = None
    host_ips: Any = None
