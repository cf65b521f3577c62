"""What a pool's document says to a reader of the API document who takes nothing for granted.

Written anew from the API document and the project's rules, without anything of the product's own
reading: what this cannot read plainly is a doubt, and a pool with a doubt must stay.
"""

from __future__ import annotations

import json
import re
from datetime import UTC, datetime
from typing import Any

NAME = "os.modelarts/name"
BILLING = "os.modelarts/billing.mode"
TAGS = "os.modelarts/tms.tags"
SUBPOOLS = "os.modelarts.pool/subpools.count"
BIZ = "os.modelarts.pool/biz"
SHARING = "os.modelarts/sharing"
PROTECT = "poolsweep/protect"
EXPIRY = "expires-at"


class Doubt(Exception):  # noqa: N818 - it is no error
    """Something protects the pool, or may."""


def need(condition: bool, what: str) -> None:
    if not condition:
        raise Doubt(what)


def part(parent: dict[str, Any], key: str) -> dict[str, Any]:
    """A map that may be missing or null, but nothing else."""
    found = parent.get(key)
    need(found is None or isinstance(found, dict), f"{key} is no map")
    return found or {}


class _Object(tuple[tuple[str, Any], ...]):
    """A JSON object with all that it says, also what it says twice."""

    @property
    def names(self) -> list[str]:
        return [name for name, _ in self]


def tags_of(annotations: dict[str, Any]) -> dict[str, str]:
    """The user's tags, of which none may be said in two ways."""
    text = annotations.get(TAGS)
    if text is None or text == "":
        return {}
    need(isinstance(text, str), "the tags are no text")
    try:
        read = json.loads(text, object_pairs_hook=_Object)
    except (ValueError, RecursionError):
        raise Doubt("the tags are no JSON") from None
    said: list[tuple[Any, Any]] = []
    if isinstance(read, _Object):
        one = "key" in read.names and bool({"value", "values"} & set(read.names))
        need(not one, "they may be one tag, or three")
        said += read
    else:
        need(isinstance(read, list), "the tags are neither a list nor a map")
        for item in read:
            need(isinstance(item, _Object), "a tag is no object")
            need(len(item.names) == len(set(item.names)), "a tag says something twice")
            fields = dict(item)
            need("key" in fields, "a tag has no key")
            need(len(fields) == 1 or bool({"value", "values"} & set(fields)), "it has no value")
            values = fields.get("values", [])
            values = list(values) if isinstance(values, list) else [values]
            values += [fields["value"]] if "value" in fields else []
            said += [(fields["key"], value) for value in values or [""]]
    tags: dict[str, str] = {}
    for key, value in said:
        need(isinstance(key, str), "a tag's key is no text")
        need(value is None or isinstance(value, str), "a tag's value is no text")
        need(tags.setdefault(key, value or "") == (value or ""), "a tag has two values")
    return tags


def has_passed(text: str, now: datetime) -> bool:
    """Whether an ISO 8601 date or time, in UTC unless it says otherwise, has passed."""
    text = text.strip()
    form = r"\d{4}-\d\d-\d\d([T ].+)?|\d{8}"
    need(re.fullmatch(form, text, re.ASCII) is not None, "the expiry is no date")
    try:
        moment = datetime.fromisoformat(text)
    except ValueError:
        raise Doubt("the expiry is no date") from None
    return (moment if moment.tzinfo else moment.replace(tzinfo=UTC)) <= now


def see_that_it_may_go(
    raw: Any, now: datetime, *, by_policy: bool = False, subpools_seen: int = 0
) -> None:
    """See that nothing in a document keeps its pool, and that all that might is plain to read.

    Args:
        raw: the document.
        now: an aware time.
        by_policy: whether the policy of these tests chose it, rather than somebody by name: it must
            have expired and must not be shared, be a platform's or be named demo-….
        subpools_seen: how many sub-pools it is seen to have.

    Raises:
        Doubt: not so.
    """
    need(isinstance(raw, dict), "it is no object")
    metadata, spec, status = raw.get("metadata"), raw.get("spec", {}), raw.get("status")
    need(isinstance(metadata, dict), "there is no metadata")
    need(isinstance(spec, dict), "the spec is no map")
    need(isinstance(status, dict), "there is no status")

    name, created = metadata.get("name"), metadata.get("creationTimestamp")
    need(isinstance(name, str) and bool(re.fullmatch("[a-z][a-z0-9-]{34,61}[a-z0-9]", name)), "id")
    need(isinstance(created, str) and created[:4].isdigit(), "the creation cannot be read")

    annotations, labels = part(metadata, "annotations"), part(metadata, "labels")
    billing = annotations.get(BILLING)
    need(isinstance(billing, str) and billing == "0", "it is not plainly pay per use")
    tags = tags_of(annotations)
    off = {"0", "false", "no", "off"}
    need(PROTECT not in tags or tags[PROTECT].strip().lower() in off, "it is protected")

    mode = spec.get("controlMode")
    need(mode is None or (type(mode) is int and mode >= 0), "the control mode is no number")
    need(not (mode or 0) & 24, "it is frozen")

    phase, parent = status.get("phase"), status.get("parent")
    need(isinstance(phase, str) and bool(phase.strip()), "the phase is not given")
    need(phase.strip() not in {"Creating", "Deleting"}, "it is being made or deleted")
    need(parent is None or isinstance(parent, str), "the parent cannot be read")

    count = annotations.get(SUBPOOLS, "0")
    plain = isinstance(count, str) and re.fullmatch("[0-9]+", count) is not None
    need(plain, "the number of sub-pools cannot be read")
    need(int(count) <= subpools_seen, "it has sub-pools that are not seen")

    if by_policy:
        need(EXPIRY in tags and has_passed(tags[EXPIRY], now), "it has not expired")
        need(tags.get("owner") != "platform", "it is the platform's")
        title = labels.get(NAME, "")
        need(isinstance(title, str) and not title.startswith("demo-"), "it is for demos")
        need(not name.startswith("demo-"), "it is for demos")
        need(labels.get(BIZ, "private") == "private", "it is public")
        shared = labels.get(SHARING, "false")
        alone = {"", "0", "false", "no", "none", "private"}
        need(isinstance(shared, str) and shared.strip().lower() in alone, "it is shared")


def may_go(raw: Any, now: datetime, **given: Any) -> bool:
    """Whether `see_that_it_may_go` finds nothing."""
    try:
        see_that_it_may_go(raw, now, **given)
    except Doubt:
        return False
    return True
