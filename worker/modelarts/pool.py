"""What a pool's document means: pure facts, each ready for a document that says it oddly."""

from __future__ import annotations

import json
import re
from collections import Counter
from datetime import UTC, datetime
from enum import StrEnum
from functools import cached_property
from typing import TYPE_CHECKING, Any, Final, Literal, TypeVar

from pydantic import ValidationError

from worker.modelarts.answers import printable
from worker.modelarts.schema import Metadata, Node, PoolDocument, PoolSpec, ResourceSpec, Tag

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

P = TypeVar("P")

NAME_LABEL: Final = "os.modelarts/name"
BILLING_ANNOTATION: Final = "os.modelarts/billing.mode"
TAGS_ANNOTATION: Final = "os.modelarts/tms.tags"
SUBPOOLS_ANNOTATION: Final = "os.modelarts.pool/subpools.count"
BIZ_LABEL: Final = "os.modelarts.pool/biz"
SHARING_LABEL: Final = "os.modelarts/sharing"
_NOT_SHARED: Final = {"", "0", "false", "no", "none", "private"}
FROZEN_BITS: Final = 8 | 16
"""controlMode: frozen, and frozen by the police."""


class UnreadablePoolError(ValueError):
    """A document that names no pool, or whose parts cannot be read at all."""


class UnreadableTagsError(ValueError):
    """The tags are in a form that is not understood, so that anything may be among them."""


class Billing(StrEnum):
    """How a pool is paid for. Source: the API document, annotation `billing.mode`."""

    POSTPAID = "postpaid"
    PREPAID = "prepaid"
    UNKNOWN = "unknown"


_BILLING = {"0": Billing.POSTPAID, "1": Billing.PREPAID}


class Pool:
    """A pool, as read at some moment.

    Attributes:
        document: the whole document.
        pool_id: its `metadata.name`.

    Raises:
        UnreadablePoolError: the document names no pool, or one of its parts cannot be read.
    """

    def __init__(self, document: PoolDocument) -> None:
        self.document = document
        name = getattr(document.metadata, "name", None)
        if not isinstance(name, str) or not name:
            raise UnreadablePoolError("the document has no metadata.name")
        # An object that did not become one of ours would hide all that it says.
        if isinstance(document.spec, dict) or isinstance(document.status, dict):
            raise UnreadablePoolError("the document has keys that are not text")
        self.pool_id = name

    @classmethod
    def parse(cls, raw: Any) -> Pool:
        """Read a pool from JSON as parsed.

        Raises:
            UnreadablePoolError: it is not an object, names no pool, or cannot be read.
        """
        if not isinstance(raw, dict):
            raise UnreadablePoolError("the document is not an object")
        try:
            document = PoolDocument.model_validate(raw)
        except ValidationError:
            raise UnreadablePoolError("the document has keys that are not text") from None
        return cls(document)

    def __repr__(self) -> str:
        return f"Pool({self.pool_id!r})"

    @cached_property
    def labels(self) -> Mapping[str, Any]:
        """metadata.labels; empty if there are none or they are no map."""
        return _mapping(getattr(self.document.metadata, "labels", None))

    @cached_property
    def annotations(self) -> Mapping[str, Any]:
        """metadata.annotations; empty if there are none or they are no map."""
        return _mapping(getattr(self.document.metadata, "annotations", None))

    @property
    def display_name(self) -> str:
        """The name that the user gave it; empty if none."""
        return printable(self.labels.get(NAME_LABEL))

    @property
    def created(self) -> str:
        """creationTimestamp as it came; empty if there is none."""
        return _text(getattr(self.document.metadata, "creation_timestamp", None))

    @cached_property
    def created_at(self) -> datetime | None:
        """When it was created; None if that cannot be read."""
        try:
            moment = datetime.fromisoformat(self.created)
        except ValueError:
            return None
        return moment if moment.tzinfo else moment.replace(tzinfo=UTC)

    @property
    def phase(self) -> str:
        """status.phase; empty if there is none."""
        return printable(getattr(self.document.status, "phase", None))

    @property
    def message(self) -> str:
        """status.message; empty if there is none."""
        return printable(getattr(self.document.status, "message", None))

    @property
    def billing(self) -> Billing:
        """How the pool is paid for, unknown unless the document says so plainly."""
        return _billing(self.annotations)

    @property
    def control_mode(self) -> int | None:
        """spec.controlMode, 0 if absent; None if it cannot be read."""
        if not isinstance(self.document.spec, PoolSpec):
            return None
        mode = self.document.spec.control_mode
        return 0 if mode is None else _count(mode)

    @property
    def frozen(self) -> bool:
        """Whether the pool is frozen, or may be."""
        mode = self.control_mode
        return mode is None or bool(mode & FROZEN_BITS)

    @property
    def type(self) -> str:
        """spec.type: `Dedicate` (physical) or `Logical`; empty if there is none."""
        return _text(getattr(self.document.spec, "type", None))

    @property
    def scopes(self) -> list[str]:
        """spec.scope: what it is for; empty for a logical pool."""
        scopes = getattr(self.document.spec, "scope", None)
        return [scope for scope in _sequence(scopes) if isinstance(scope, str)]

    @property
    def is_shared(self) -> bool:
        """Whether it is shared or public, or may be."""
        public = self.labels.get(BIZ_LABEL, "private") != "private"
        shared = self.labels.get(SHARING_LABEL, "false")
        return public or not (isinstance(shared, str) and shared.strip().lower() in _NOT_SHARED)

    def driver_version(self, kind: Literal["gpu", "npu"]) -> str:
        """The driver that runs, else the one that was ordered; empty if there is none."""
        runs = getattr(getattr(self.document.status, "driver", None), kind, None)
        ordered = getattr(self.document.spec, "driver", None)
        return _text(getattr(runs, "version", None)) or _text(
            getattr(ordered, f"{kind}_version", None)
        )

    @property
    def is_logical(self) -> bool:
        """Whether it is a logical pool, without a network of its own."""
        return self.type == "Logical"

    @property
    def parent(self) -> str:
        """The pool that a logical pool lies in; empty for a physical one."""
        return _text(getattr(self.document.status, "parent", None))

    @property
    def subpool_count(self) -> int | None:
        """The number of its logical sub-pools, 0 if it does not say; None if unreadable."""
        text = self.annotations.get(SUBPOOLS_ANNOTATION, "0")
        return int(text) if isinstance(text, str) and re.fullmatch(r"[0-9]{1,9}", text) else None

    @cached_property
    def nodes_by_flavor(self) -> Counter[str]:
        """Nodes by flavor: those there are, or those ordered if the status is blank."""
        found: Counter[str] = Counter()
        resources = getattr(self.document.status, "resources", None)
        for kind in ("available", "abnormal", "creating"):
            _count_nodes(getattr(resources, kind, None), found)
        if not found:
            _count_nodes(getattr(self.document.spec, "resources", None), found)
        return found

    @cached_property
    def tags(self) -> dict[str, str]:
        """The tags given by the user (TMS).

        Raises:
            UnreadableTagsError: they are in no form that is understood.
        """
        text = self.annotations.get(TAGS_ANNOTATION)
        if text is None or text == "":
            if not isinstance(getattr(self.document.metadata, "annotations", {}), dict | None):
                raise UnreadableTagsError("its annotations are not a map")
            return {}
        return parse_tags(text)

    @cached_property
    def node_tags(self) -> list[tuple[str, str]]:
        """The tags on its nodes (`spec.resources[].tags`), as they stand.

        Raises:
            UnreadableTagsError: something there is not as documented, and may be a tag.
        """
        if not isinstance(self.document.spec, PoolSpec):
            raise UnreadableTagsError("the tags of its nodes cannot be read")
        return [
            (_node_tag_text(tag.key), _node_tag_text(tag.value))
            for resource in _parts(self.document.spec.resources, ResourceSpec)
            for tag in _parts(resource.tags, Tag)
        ]


def node_billing(node: Node) -> Billing:
    """How a node is paid for: a postpaid pool can hold prepaid nodes.

    Source: the API document, DELETE.
    """
    return _billing(_mapping(getattr(node.metadata, "annotations", None)))


def nodes_obstacle(nodes: Iterable[Node]) -> str:
    """What keeps a postpaid pool from being deleted because of how its nodes are paid for.

    Args:
        nodes: all of its nodes.

    Returns:
        The reason, as a phrase about the pool; empty: nothing.

    Source: the API document, DELETE.
    """
    doubt = ""
    for node in nodes:
        billing = node_billing(node)
        if billing is Billing.PREPAID:
            return "it has prepaid nodes: unsubscribe these first"
        if billing is Billing.UNKNOWN and not _says_nothing(node):
            doubt = "the billing mode of a node is unknown"
    return doubt


def _says_nothing(node: Node) -> bool:
    """Whether a node says nothing of how it is paid for: then it is as its pool is."""
    metadata = node.metadata
    annotations = metadata.annotations if isinstance(metadata, Metadata) else metadata
    return annotations is None or (
        isinstance(annotations, dict) and BILLING_ANNOTATION not in annotations
    )


def _billing(annotations: Mapping[str, Any]) -> Billing:
    mode = annotations.get(BILLING_ANNOTATION)
    return _BILLING.get(mode, Billing.UNKNOWN) if isinstance(mode, str) else Billing.UNKNOWN


def parse_tags(text: Any) -> dict[str, str]:
    """Read the tags annotation: a JSON list of {key, value} or {key, values}, or a JSON map.

    Args:
        text: the annotation.

    Returns:
        The tags; a value that is missing or null is empty.

    Raises:
        UnreadableTagsError: it is neither, may be either, or says two things of one key.
    """
    try:
        raw = json.loads(text, object_pairs_hook=_without_repetition)
    except UnreadableTagsError:
        raise
    except (TypeError, ValueError, RecursionError):
        raise UnreadableTagsError("its tags are not JSON") from None
    if isinstance(raw, dict):
        if "key" in raw and raw.keys() & {"value", "values"}:
            raise UnreadableTagsError("its tags are one {key, value}, or a map of tags so named")
        pairs = [(key, [value]) for key, value in raw.items()]
    elif isinstance(raw, list) and all(isinstance(item, dict) for item in raw):
        pairs = [(item.get("key"), _values(item)) for item in raw]
    else:
        raise UnreadableTagsError("its tags are neither a list of {key, value} nor a map")
    tags: dict[str, str] = {}
    for key, values in pairs:
        for value in values:
            text = "" if value is None else value
            if not isinstance(key, str) or not isinstance(text, str):
                raise UnreadableTagsError("its tags hold something that is not text")
            if tags.setdefault(key, text) != text:
                raise UnreadableTagsError("its tags say two things of one key")
    return tags


def _without_repetition(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise UnreadableTagsError("its tags say two things of one key")
    return found


def _values(item: dict[str, Any]) -> list[Any]:
    """What an item of a list says of its key: at least one value."""
    if len(item) > 1 and not item.keys() & {"value", "values"}:
        raise UnreadableTagsError("its tags are neither a list of {key, value} nor a map")
    values = item.get("values", [])
    found = values if isinstance(values, list) else [values]
    if "value" in item:
        found = [*found, item["value"]]
    return found or [""]


def _parts(value: Any, part: type[P]) -> list[P]:
    if value is None:
        return []
    if not isinstance(value, list) or not all(isinstance(item, part) for item in value):
        raise UnreadableTagsError("the tags of its nodes cannot be read")
    return value


def _node_tag_text(value: Any) -> str:
    if value is not None and not isinstance(value, str):
        raise UnreadableTagsError("the tags of its nodes hold something that is not text")
    return value or ""


def _text(value: Any) -> str:
    return value if isinstance(value, str) else ""


def _count(value: Any) -> int | None:
    """A whole number from 0; None for anything else, such as true, which Python takes for 1."""
    return value if isinstance(value, int) and type(value) is not bool and value >= 0 else None


def _mapping(value: Any) -> Mapping[str, Any]:
    return value if isinstance(value, dict) else {}


def _sequence(value: Any) -> Iterable[Any]:
    return value if isinstance(value, list) else ()


def _count_nodes(resources: Any, found: Counter[str]) -> None:
    for resource in _sequence(resources):
        flavor = getattr(resource, "flavor", None)
        count = _count(getattr(resource, "count", None))
        if isinstance(flavor, str) and count:
            found[flavor] += count
