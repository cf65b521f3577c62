"""What a job demands of its pool just before the call: optimistic concurrency, as with If-Match.

The fingerprint is made of short digests, one for each part that a plan looks at, so that when it
no longer matches it tells which part changed.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

from worker.modelarts.answers import printable
from worker.modelarts.pool import SUBPOOLS_ANNOTATION, TAGS_ANNOTATION, UnreadableTagsError

if TYPE_CHECKING:
    from worker.modelarts.pool import Pool

PARTS: Final = ("labels", "annotations", "tags", "control mode")
_DIGITS = 8
_ELSEWHERE = {
    TAGS_ANNOTATION,  # a part of its own
    SUBPOOLS_ANNOTATION,  # goes down as a run deletes the sub-pools; looked at by itself
}


@dataclass(frozen=True, slots=True)
class Precondition:
    """A pool as it was when it was chosen.

    Attributes:
        created: its creationTimestamp: which incarnation it is.
        fingerprint: digests of what the plan looked at.
    """

    created: str
    fingerprint: str

    @classmethod
    def of(cls, pool: Pool) -> Precondition:
        """The precondition that a pool fulfils now."""
        metadata = pool.document.metadata
        # As they came if they are no map, so that a map that becomes unreadable is a change.
        labels, annotations = _or_empty(metadata.labels), _or_empty(metadata.annotations)
        if isinstance(annotations, dict):
            annotations = {key: annotations[key] for key in annotations.keys() - _ELSEWHERE}
        tags = [pool.annotations.get(TAGS_ANNOTATION), _node_tags(pool)]
        parts = (labels, annotations, tags, pool.control_mode)
        return cls(pool.created, "-".join(_digest(part) for part in parts))


def changes(precondition: Precondition, pool: Pool) -> tuple[str, ...]:
    """What about a pool is no longer as it was: pure.

    Args:
        precondition: the pool as it was.
        pool: the pool as just read.

    Returns:
        A phrase for each change; empty: the precondition holds.
    """
    now = Precondition.of(pool)
    if now == precondition:
        return ()
    found = []
    if now.created != precondition.created:
        found.append(
            f"another incarnation, created {printable(now.created) or 'at an unknown time'} "
            f"(was {printable(precondition.created) or 'unknown'})"
        )
    before, after = precondition.fingerprint.split("-"), now.fingerprint.split("-")
    if len(before) != len(after):
        found.append("its fingerprint is of another make")
    else:
        changed = [name for name, old, new in zip(PARTS, before, after, strict=True) if old != new]
        found += [f"{name} changed" for name in changed]
        if "tags" in changed:
            text = str(pool.annotations.get(TAGS_ANNOTATION) or "none")
            found.append(f"tags are now {printable(text, 200)}")
    return tuple(found)


def _or_empty(found: Any) -> Any:
    # None only: an empty list or text where a map was is a change.
    return {} if found is None else found


def _node_tags(pool: Pool) -> Any:
    try:
        return pool.node_tags
    except UnreadableTagsError as error:
        return str(error)


_ENCODER: Final = json.JSONEncoder(
    sort_keys=True, ensure_ascii=True, separators=(",", ":"), default=str
)


def _digest(part: Any) -> str:
    return hashlib.sha256(_ENCODER.encode(part).encode()).hexdigest()[:_DIGITS]
