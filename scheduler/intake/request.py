"""What other systems ask for: one JSON object, the same by every way in. Pure."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from enum import StrEnum
from typing import TYPE_CHECKING, Annotated, Any, Self

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    Strict,
    StringConstraints,
    ValidationError,
    WithJsonSchema,
    model_validator,
)
from pydantic_core import PydanticCustomError

from scheduler.matchers import Matcher
from worker.modelarts.answers import printable
from worker.modelarts.names import (
    POOL_NAME,
    PROJECT_ID,
    validate_pool_name,
    validate_project_id,
)

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

LARGEST = 1 << 20
"""Bytes of a request."""
MOST_POOLS = 10_000
MOST_TARGETS = 100
MOST_FAULTS = 20
DEEPEST = 30
_VALUE_LIMIT = 80


class Way(StrEnum):
    """How a request comes in."""

    HTTP = "http"
    CELERY = "celery"
    STREAM = "stream"


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


# Strict: a number is no text, and 1 is not true.
Words = Annotated[
    str, StringConstraints(strict=True, max_length=500, pattern=r"^[^\x00-\x1f\x7f]*$")
]
Flag = Annotated[bool, Field(strict=True)]
ProjectId = Annotated[
    str,
    Strict(),
    AfterValidator(validate_project_id),
    WithJsonSchema({"type": "string", "pattern": PROJECT_ID}),
]
PoolName = Annotated[
    str,
    Strict(),
    AfterValidator(validate_pool_name),
    WithJsonSchema({"type": "string", "pattern": POOL_NAME}),
]

_NEEDED = {
    "missing": "it is needed",
    "extra_forbidden": "there is no such field",
    "model_type": "an object is needed",
    "dict_type": "an object is needed",
    "list_type": "a list is needed",
    "string_type": "a text is needed",
    "string_unicode": "a text without half characters is needed",
    "bool_type": "true or false is needed",
    "string_pattern_mismatch": "one line of printable characters is needed",
}
"""Pydantic's words for these are about Python, or about its own models."""


class Target(_Part):
    """Pools of one project: those that are named, or those that a selector finds."""

    project_id: ProjectId
    pools: list[PoolName] | None = Field(
        default=None,
        min_length=1,
        max_length=MOST_POOLS,
        description="Pool ids (metadata.name). Only these are deleted.",
    )
    selector: Matcher | None = Field(
        default=None, description="A matcher as policies have it, such as {expired: {}}."
    )

    @model_validator(mode="after")
    def _one_choice(self) -> Self:
        if (self.pools is None) == (self.selector is None):
            raise PydanticCustomError("choice", "exactly one of pools and selector is needed")
        return self


class Request(_Part):
    """What is to be deleted, for whom, and why."""

    targets: list[Target] = Field(min_length=1, max_length=MOST_TARGETS)
    reason: Words = Field(default="", description="Why, for the record.")
    requester: Words = Field(default="", description="Who asks, for the record.")
    dry_run: Flag = Field(default=False, description="Plan only: nothing is deleted.")
    verify: Flag = Field(
        default=True, description="Whether the run ends only when its pools are seen to be gone."
    )
    webhook: Annotated[str, StringConstraints(strict=True, max_length=2_000)] | None = Field(
        default=None, description="A URL that is told of the run's end; its host must be allowed."
    )

    @model_validator(mode="after")
    def _bounds_of_the_whole(self) -> Self:
        ids = [target.project_id for target in self.targets]
        if twice := sorted({each for each in ids if ids.count(each) > 1}):
            raise PydanticCustomError("twice", "project {id}: there twice", {"id": twice[0]})
        if sum(len(target.pools or ()) for target in self.targets) > MOST_POOLS:
            raise PydanticCustomError(
                "too_many", "no more than {most} pools in all are accepted", {"most": MOST_POOLS}
            )
        return self

    @property
    def projects(self) -> list[str]:
        """The ids of its projects."""
        return [target.project_id for target in self.targets]

    def record(self) -> str:
        """The JSON that it is held as: what is not given is left out."""
        return self.model_dump_json(by_alias=True, exclude_unset=True)


@dataclass(frozen=True, slots=True)
class Fault:
    """Something that is wrong with a request.

    Attributes:
        pointer: where, as a JSON pointer (RFC 6901); empty: the whole.
        detail: what, and what is accepted, in one sentence.
    """

    pointer: str
    detail: str


class RequestError(ValueError):
    """A request cannot be accepted; the text is one line.

    Attributes:
        faults: all that is wrong with it, the first 20.
    """

    def __init__(self, faults: Sequence[Fault]) -> None:
        self.faults = list(faults[:MOST_FAULTS])
        parts = [f"{fault.pointer or 'request'}: {fault.detail}" for fault in self.faults]
        if len(faults) > MOST_FAULTS:
            parts.append(f"and {len(faults) - MOST_FAULTS} more")
        super().__init__("; ".join(parts))


class NotJsonError(RequestError):
    """What came is not JSON."""


def read_request(text: str | bytes) -> Request:
    """Read a request's JSON.

    Args:
        text: RFC 8259 JSON, no longer than `LARGEST` bytes.

    Raises:
        NotJsonError: it is not even JSON in UTF-8.
        RequestError: it is no request; all that is wrong with it.
    """
    size = len(text if isinstance(text, bytes) else text.encode(errors="surrogatepass"))
    if size > LARGEST:
        raise RequestError([Fault("", f"no more than {LARGEST} bytes are accepted")])
    try:
        if isinstance(text, bytes):
            text = text.decode()
        data = json.loads(text, object_pairs_hook=_no_key_twice, parse_constant=_no_constant)
    except RequestError:
        raise
    except (ValueError, RecursionError):
        raise NotJsonError([Fault("", "it is not JSON")]) from None
    return validate(data)


def validate(data: Any) -> Request:
    """A request from parsed JSON.

    Raises:
        RequestError: all that is wrong with it.
    """
    if any(depth > DEEPEST for depth in _depths(data)):
        raise RequestError([Fault("", f"no more than {DEEPEST} levels are accepted")])
    if halves := [Fault(_pointer(steps), _NEEDED["string_unicode"]) for steps in _halves(data)]:
        raise RequestError(halves)
    try:
        return Request.model_validate(data, strict=True)
    except ValidationError as error:
        details = error.errors(include_url=False)
        raise RequestError([_fault(data, each) for each in details]) from None


def _no_key_twice(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        # Which of two is meant cannot be known, and a wrong guess deletes.
        raise RequestError([Fault("", "a key is there twice in one object")])
    return found


def _no_constant(name: str) -> Any:
    raise NotJsonError([Fault("", f"{name} is not JSON")])


def _depths(data: Any) -> Iterator[int]:
    """The depth of every container, looked at without recursion."""
    waiting = [(data, 1)]
    while waiting:
        part, depth = waiting.pop()
        if isinstance(part, dict | list):
            yield depth
            if depth <= DEEPEST:
                inner = part.values() if isinstance(part, dict) else part
                waiting.extend((each, depth + 1) for each in inner)


_HALF = re.compile("[\ud800-\udfff]")


def _halves(data: Any) -> Iterator[tuple[str, ...]]:
    """Where texts, or keys of objects, have halves of characters, which no record can hold."""
    waiting: list[tuple[Any, tuple[str, ...]]] = [(data, ())]
    while waiting:
        part, steps = waiting.pop()
        if isinstance(part, str):
            if _HALF.search(part):
                yield steps
        elif isinstance(part, dict):
            if any(isinstance(key, str) and _HALF.search(key) for key in part):
                yield steps
            waiting.extend((each, (*steps, str(key))) for key, each in part.items())
        elif isinstance(part, list):
            waiting.extend((each, (*steps, str(place))) for place, each in enumerate(part))


def _pointer(steps: Iterable[str]) -> str:
    """A JSON pointer (RFC 6901) of printable characters."""
    return "".join(
        "/" + step.replace("~", "~0").replace("/", "~1") for step in map(printable, steps)
    )


def _fault(data: Any, error: Any) -> Fault:
    """Pydantic's words as ours; its locations also name kinds of matchers, which JSON has not."""
    steps: list[str] = []
    part = data
    for step in error["loc"]:
        if isinstance(part, dict) and (step in part or error["type"] == "missing"):
            part = part.get(step)
        elif isinstance(part, list) and isinstance(step, int) and step < len(part):
            part = part[step]
        else:
            continue
        steps.append(str(step))
    pointer = _pointer(steps)
    if needed := _NEEDED.get(error["type"]):
        return Fault(pointer, needed)
    message = error["msg"].removeprefix("Value error, ").rstrip(".")
    if pointer == "/webhook":
        return Fault(pointer, f"no URL that is accepted: {message[:1].lower()}{message[1:]}")
    if isinstance(part, str | int | float | bool) and repr(part) not in message:
        shown = printable(json.dumps(part, ensure_ascii=False), _VALUE_LIMIT)
        message = f"{shown} is not accepted: {message[:1].lower()}{message[1:]}"
    return Fault(pointer, printable(message))
