"""What a pool's document means: pure facts, each ready for a document that says it oddly."""

from __future__ import annotations

import json
from collections import Counter
from datetime import UTC, datetime
from enum import StrEnum
from functools import cached_property
from typing import TYPE_CHECKING, Any, Final

from worker.modelarts.schema import Node, PoolDocument

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

NAME_LABEL: Final = "os.modelarts/name"
BILLING_ANNOTATION: Final = "os.modelarts/billing.mode"
TAGS_ANNOTATION: Final = "os.modelarts/tms.tags"
SUBPOOLS_ANNOTATION: Final = "os.modelarts.pool/subpools.count"
FROZEN_BITS: Final = 8 | 16
"""controlMode: frozen, and frozen by the police."""


class UnreadablePoolError(ValueError):
    """A document that names no pool."""


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
        UnreadablePoolError: the document names no pool.
    """

    def __init__(self, document: PoolDocument) -> None:
        self.document = document
        name = getattr(document.metadata, "name", None)
        if not isinstance(name, str) or not name:
            raise UnreadablePoolError("the document has no metadata.name")
        self.pool_id = name

    @classmethod
    def parse(cls, raw: Any) -> Pool:
        """Read a pool from JSON as parsed.

        Raises:
            UnreadablePoolError: it is not an object, or names no pool.
        """
        if not isinstance(raw, dict):
            raise UnreadablePoolError("the document is not an object")
        return cls(PoolDocument.model_validate(raw))

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
        return _text(self.labels.get(NAME_LABEL))

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
        return _text(getattr(self.document.status, "phase", None))

    @property
    def message(self) -> str:
        """status.message; empty if there is none."""
        return _text(getattr(self.document.status, "message", None))

    @property
    def billing(self) -> Billing:
        """How the pool is paid for, unknown unless the document says so plainly."""
        return _billing(self.annotations)

    @property
    def control_mode(self) -> int | None:
        """spec.controlMode, 0 if absent; None if it cannot be read."""
        mode = getattr(self.document.spec, "control_mode", None)
        if mode is None:
            return 0
        return mode if isinstance(mode, int) else None

    @property
    def frozen(self) -> bool:
        """Whether the pool is frozen, or may be."""
        mode = self.control_mode
        return mode is None or bool(mode & FROZEN_BITS)

    @property
    def is_logical(self) -> bool:
        """Whether it is a logical pool, without a network of its own."""
        return getattr(self.document.spec, "type", None) == "Logical"

    @property
    def parent(self) -> str:
        """The pool that a logical pool lies in; empty for a physical one."""
        return _text(getattr(self.document.status, "parent", None))

    @property
    def subpool_count(self) -> int | None:
        """The number of its logical sub-pools, 0 if it does not say; None if unreadable."""
        text = self.annotations.get(SUBPOOLS_ANNOTATION, "0")
        return int(text) if isinstance(text, str) and text.isdecimal() else None

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
        """The tags on its nodes (`spec.resources[].tags`), as they stand."""
        resources = getattr(self.document.spec, "resources", None)
        return [
            (_text(getattr(tag, "key", None)), _text(getattr(tag, "value", None)))
            for resource in _sequence(resources)
            for tag in _sequence(getattr(resource, "tags", None))
        ]


def node_billing(node: Node) -> Billing:
    """How a node is paid for: a postpaid pool can hold prepaid nodes.

    Source: the API document, DELETE.
    """
    return _billing(_mapping(getattr(node.metadata, "annotations", None)))


def _billing(annotations: Mapping[str, Any]) -> Billing:
    mode = annotations.get(BILLING_ANNOTATION)
    return _BILLING.get(mode, Billing.UNKNOWN) if isinstance(mode, str) else Billing.UNKNOWN


def parse_tags(text: Any) -> dict[str, str]:
    """Read the tags annotation: a JSON list of {key, value}, or a JSON map.

    Args:
        text: the annotation.

    Raises:
        UnreadableTagsError: it is neither, or says two things of one key.
    """
    try:
        raw = json.loads(text)
    except (TypeError, ValueError, RecursionError):
        raise UnreadableTagsError("its tags are not JSON") from None
    if isinstance(raw, dict):
        pairs = list(raw.items())
    elif isinstance(raw, list) and all(isinstance(item, dict) for item in raw):
        pairs = [(item.get("key"), item.get("value", "")) for item in raw]
    else:
        raise UnreadableTagsError("its tags are neither a list of {key, value} nor a map")
    tags: dict[str, str] = {}
    for key, value in pairs:
        if value is None:
            value = ""
        if not isinstance(key, str) or not isinstance(value, str):
            raise UnreadableTagsError("its tags hold something that is not text")
        if tags.setdefault(key, value) != value:
            raise UnreadableTagsError("its tags say two things of one key")
    return tags


def _text(value: Any) -> str:
    return value if isinstance(value, str) else ""


def _mapping(value: Any) -> Mapping[str, Any]:
    return value if isinstance(value, dict) else {}


def _sequence(value: Any) -> Iterable[Any]:
    return value if isinstance(value, list) else ()


def _count_nodes(resources: Any, found: Counter[str]) -> None:
    for resource in _sequence(resources):
        flavor, count = getattr(resource, "flavor", None), getattr(resource, "count", None)
        if isinstance(flavor, str) and isinstance(count, int) and count > 0:
            found[flavor] += count
