"""The matchers of a policy: pure conditions on one pool, combined with `all`, `any` and `not`.

A finding is yes, no, a doubt (something that decides cannot be read) or unread (a further call
must be made first). A doubt anywhere outweighs a yes, so that nothing is deleted on doubt; a
matcher that needs further calls is asked for only where all cheaper ones have not decided.
"""

from __future__ import annotations

import re
from abc import abstractmethod
from dataclasses import dataclass
from datetime import UTC, date, datetime, time, timedelta
from enum import Enum, auto
from fnmatch import translate
from functools import lru_cache
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal, get_args

import re2  # type: ignore[import-untyped]
from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Discriminator,
    Field,
    GetJsonSchemaHandler,
    PlainSerializer,
    Tag,
    WithJsonSchema,
    field_validator,
    model_validator,
)
from pydantic_core import PydanticCustomError

from scheduler.durations import (
    ACCEPTED,
    PATTERN,
    Duration,
    format_duration,
    parse_duration,
    read_duration,
)
from scheduler.facts import Fact, Facts
from worker.modelarts import UnreadableTagsError
from worker.modelarts.activity import is_busy, title
from worker.modelarts.answers import printable
from worker.modelarts.pool import NAME_LABEL
from worker.modelarts.schema import DriverSpec, DriverState, DriverStatus, ResourceStatus

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from pydantic_core import CoreSchema

    from worker.modelarts import Pool

EXPIRY_TAG = "expires-at"
TTL_TAG = "ttl"


class Kind(Enum):
    """What a matcher found."""

    YES = auto()
    NO = auto()
    DOUBT = auto()
    UNREAD = auto()


@dataclass(frozen=True, slots=True)
class Finding:
    """What a matcher found, and why.

    Attributes:
        kind: what.
        reason: why, as a phrase about the pool.
        needs: with `UNREAD`, the facts that must be read first.
    """

    kind: Kind
    reason: str = ""
    needs: frozenset[Fact] = frozenset()


def yes(reason: str) -> Finding:
    """The pool matches."""
    return Finding(Kind.YES, reason)


def doubt(reason: str) -> Finding:
    """It cannot be told whether the pool matches."""
    return Finding(Kind.DOUBT, reason)


def no(reason: str = "") -> Finding:
    """The pool does not match."""
    return Finding(Kind.NO, reason)


def ask(fact: Fact, facts: Facts) -> Finding:
    """A fact that is not there: it is to be read, or could not be."""
    if fact in facts.unreadable:
        return doubt(f"its {fact} cannot be read: {facts.unreadable[fact]}")
    return Finding(Kind.UNREAD, needs=frozenset({fact}))


class _Matcher(BaseModel):
    """One condition. Its YAML form is a map with one key, the field's name."""

    model_config = ConfigDict(extra="forbid", frozen=True, populate_by_name=True)

    key: ClassVar[str]

    @abstractmethod
    def find(self, facts: Facts, now: datetime) -> Finding:
        """Look at a pool.

        Args:
            facts: the pool and what has been read of it.
            now: an aware time.
        """


class _Options(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class _Or:
    """What the JSON Schema of a field accepts too, since a validator makes it into the long form.

    Args:
        forms: JSON Schemas.
    """

    def __init__(self, *forms: dict[str, Any]) -> None:
        self._forms = forms

    def __get_pydantic_json_schema__(
        self, schema: CoreSchema, handler: GetJsonSchemaHandler
    ) -> dict[str, Any]:
        return {"anyOf": [handler(schema), *self._forms]}


def _none_is_default(value: Any) -> Any:
    """`expired:` without anything behind it means the defaults."""
    return {} if value is None or value is True else value


_OR_NONE = _Or({"type": "null"}, {"const": True})
_OR_TEXT = _Or({"type": "string", "minLength": 1})
Text = Annotated[str, Field(min_length=1)]


@lru_cache(maxsize=4096)
def _glob(pattern: str) -> re.Pattern[str]:
    return re.compile(translate(pattern))


def _fits(text: str, pattern: str) -> bool:
    """Whether a text fits a glob; what a glob becomes never goes back over what it has matched."""
    return _glob(pattern).match(text) is not None


def _is_a_glob(pattern: str) -> str:
    try:
        _glob(pattern)
    except re.error as error:
        raise PydanticCustomError("glob", "not a glob: {why}", {"why": str(error)}) from None
    return pattern


Glob = Annotated[str, AfterValidator(_is_a_glob)]


def _in_a_list(value: Any) -> Any:
    if not isinstance(value, str | list):
        raise PydanticCustomError("words", "a text or a list of texts is needed")
    return [value] if isinstance(value, str) else value


_ONE_OR_MORE = (Field(min_length=1), BeforeValidator(_in_a_list), _OR_TEXT)
Words = Annotated[list[Text], *_ONE_OR_MORE]
Globs = Annotated[list[Annotated[Glob, Field(min_length=1)]], *_ONE_OR_MORE]


# Combining


class All(_Matcher):
    """Every one of the matchers matches."""

    key: ClassVar = "all"
    all: list[Matcher] = Field(min_length=1)

    def find(self, facts: Facts, now: datetime) -> Finding:
        """Look at a pool."""
        found = [matcher.find(facts, now) for matcher in self.all]
        if all(each.kind is Kind.YES for each in found):
            return yes(" and ".join(each.reason for each in found))
        return _first(Kind.DOUBT, found) or _first(Kind.NO, found) or _unread(found) or no()


class Any_(_Matcher):  # noqa: N801 - `Any` is taken
    """At least one of the matchers matches, and none is in doubt."""

    key: ClassVar = "any"
    any: list[Matcher] = Field(min_length=1)

    def find(self, facts: Facts, now: datetime) -> Finding:
        """Look at a pool."""
        found = [matcher.find(facts, now) for matcher in self.any]
        matched = [each.reason for each in found if each.kind is Kind.YES]
        return (
            _first(Kind.DOUBT, found)
            or (yes("; ".join(matched)) if matched else None)
            or _unread(found)
            or no()
        )


class Not(_Matcher):
    """The matcher does not match."""

    # In errors the field is to be told from the key, since one `not` may stand in another.
    model_config = ConfigDict(loc_by_alias=False)

    key: ClassVar = "not"
    not_: Matcher = Field(alias="not")

    def find(self, facts: Facts, now: datetime) -> Finding:
        """Look at a pool."""
        found = self.not_.find(facts, now)
        match found.kind:
            case Kind.YES:
                return no(found.reason)
            case Kind.NO:
                return yes(found.reason or f"not {self.not_.key}")
            case _:
                return found


def _first(kind: Kind, found: Iterable[Finding]) -> Finding | None:
    return next((each for each in found if each.kind is kind), None)


def _unread(found: Iterable[Finding]) -> Finding | None:
    needs = frozenset(fact for each in found for fact in each.needs)
    return Finding(Kind.UNREAD, needs=needs) if needs else None


# Time


class ExpiredOptions(_Options):
    """`expired`: which tag says when."""

    tag: Text = EXPIRY_TAG


class Expired(_Matcher):
    """The moment that a tag names has passed."""

    key: ClassVar = "expired"
    expired: Annotated[ExpiredOptions, BeforeValidator(_none_is_default), _OR_NONE]

    def find(self, facts: Facts, now: datetime) -> Finding:
        """Look at a pool."""
        tag = self.expired.tag
        text = facts.pool.tags.get(tag)
        if text is None:
            return no(f"no tag {tag}")
        try:
            moment = parse_expiry(text)
        except ValueError as error:
            return doubt(f"{tag}={error}, so its expiry is unknown")
        found = f"{tag}={text}"
        return yes(f"expired: {found}") if moment <= now else no(f"not expired: {found}")


def parse_expiry(text: str) -> datetime:
    """The moment that an expiry tag names.

    Args:
        text: ISO 8601: a date (the moment when it begins, in UTC) or a time, in UTC unless it
            names a zone.

    Raises:
        ValueError: it is neither.
    """
    text = text.strip()
    try:
        if re.fullmatch(r"\d{4}-?\d{2}-?\d{2}", text, re.ASCII):
            return datetime.combine(date.fromisoformat(text), time(), UTC)
        if not re.match(r"\d{4}-\d{2}-\d{2}[T ]", text, re.ASCII):
            raise ValueError  # fromisoformat takes 1801121500000, a time in 2027, for one in 1801
        moment = datetime.fromisoformat(text)
    except ValueError:
        raise ValueError(f"{text!r} is not an ISO 8601 date or time") from None
    return moment if moment.tzinfo else moment.replace(tzinfo=UTC)


FOREVER = "forever"


def _lifetime(life: timedelta | None) -> str:
    return FOREVER if life is None else format_duration(life)


def _read_lifetime(value: Any) -> timedelta | None:
    if value == FOREVER:
        return None
    life = read_duration(value)
    if not life:
        raise PydanticCustomError("ttl", "accepted: a longer time, or {ever}", {"ever": FOREVER})
    return life


Lifetime = Annotated[
    timedelta | None,
    BeforeValidator(_read_lifetime),
    PlainSerializer(_lifetime),
    WithJsonSchema(
        {
            "type": "string",
            "pattern": f"^{FOREVER}$|{PATTERN}",
            "description": f"`{FOREVER}`, or {ACCEPTED}.",
        }
    ),
]


class TtlOptions(_Options):
    """`ttl`: which tag says how long, and what holds without it."""

    tag: Text = TTL_TAG
    default: Lifetime = None


class Ttl(_Matcher):
    """The time to live that a tag names, counted from the pool's creation, is over."""

    key: ClassVar = "ttl"
    ttl: Annotated[TtlOptions, BeforeValidator(_none_is_default), _OR_NONE]

    def find(self, facts: Facts, now: datetime) -> Finding:
        """Look at a pool."""
        options, text = self.ttl, facts.pool.tags.get(self.ttl.tag)
        life = options.default
        said = f"default {options.tag}={_lifetime(life)}"
        if text is not None:
            said = f"{options.tag}={text}"
            try:
                life = None if text.strip().lower() == FOREVER else parse_duration(text)
            except ValueError as error:
                return doubt(f"{options.tag}={error}, so its time to live is unknown")
        if life is None:
            return no(f"lives for ever: {said}")
        if not life:
            return doubt(f"{said} may mean at once or for ever")
        return _older(facts.pool, life, now, f"past its time to live: {said}")


def _age(pool: Pool, now: datetime) -> timedelta | Finding:
    created = pool.created_at
    if created is None:
        return doubt(f"its creation time {pool.created!r} cannot be read")
    if created > now:
        return doubt(f"its creation time {pool.created} is in the future")
    return now - created


def _older(pool: Pool, span: timedelta, now: datetime, reason: str) -> Finding:
    age = _age(pool, now)
    if isinstance(age, Finding):
        return age
    return yes(reason) if age >= span else no(f"not {reason}")


class OlderThan(_Matcher):
    """The pool was created at least so long ago."""

    key: ClassVar = "older_than"
    older_than: Duration

    def find(self, facts: Facts, now: datetime) -> Finding:
        """Look at a pool."""
        return _older(
            facts.pool, self.older_than, now, f"older than {format_duration(self.older_than)}"
        )


# Texts


class TagOptions(_Options):
    """`tags`: a key, what its value must be, and where to look."""

    key: Text
    exists: bool | None = None
    equals: str | None = None
    one_of: list[str] | None = Field(default=None, min_length=1)
    glob: Glob | None = None
    on: Literal["pool", "nodes", "labels", "annotations"] = "pool"

    @model_validator(mode="after")
    def _one_question(self) -> TagOptions:
        given = [self.exists, self.equals, self.one_of, self.glob]
        if sum(each is not None for each in given) > 1:
            raise PydanticCustomError("one_of", "more than one of exists, equals, one_of, glob")
        return self


def _a_key_alone(value: Any) -> Any:
    return {"key": value} if isinstance(value, str) else value


class Tags(_Matcher):
    """A tag, label or annotation is there, or has a value."""

    key: ClassVar = "tags"
    tags: Annotated[TagOptions, BeforeValidator(_a_key_alone), _OR_TEXT]

    def find(self, facts: Facts, now: datetime) -> Finding:
        """Look at a pool."""
        options = self.tags
        values = self._values(facts.pool)
        if any(not isinstance(value, str) for value in values):
            return doubt(f"its {_PLACES[options.on]} {options.key} is not text")
        found = [value for value in values if self._fits(value)]
        if options.exists is False:
            name = f"{_PLACES[options.on]} {options.key}"
            return no(f"has {name}") if values else yes(f"has no {name}")
        if found:
            return yes(f"{_PLACES[options.on]} {options.key}={found[0]}")
        return no(f"no such {_PLACES[options.on]}: {options.key}")

    def _fits(self, value: str) -> bool:
        options = self.tags
        if options.equals is not None:
            return value == options.equals
        if options.one_of is not None:
            return value in options.one_of
        return options.glob is None or _fits(value, options.glob)

    def _values(self, pool: Pool) -> list[Any]:
        key, on = self.tags.key, self.tags.on
        if on == "nodes":
            return [value for name, value in pool.node_tags if name == key]
        found = pool.tags if on == "pool" else getattr(pool.document.metadata, on)
        if not isinstance(found, dict | None):
            raise UnreadableTagsError(f"its {on} are not a map")
        return [found[key]] if found and key in found else []


_PLACES = {"pool": "tag", "nodes": "node tag", "labels": "label", "annotations": "annotation"}


@lru_cache(maxsize=4096)
def _regex(pattern: str) -> Any:
    options = re2.Options()
    options.log_errors = False
    return re2.compile(pattern.encode(), options)


class NameOptions(_Options):
    """`name`: a glob or a regular expression, over the user-given name, the id or either."""

    glob: Annotated[Glob, Field(min_length=1)] | None = None
    # RE2's take no longer than the text is long, whatever they are.
    regex: Annotated[str, Field(min_length=1, description="As RE2 understands it.")] | None = None
    of: Literal["name", "id", "either"] = "either"

    @field_validator("regex")
    @classmethod
    def _is_one(cls, value: str | None) -> str | None:
        try:
            _regex(value or "")
        except re2.error as error:
            why = error.args[0].decode(errors="replace")
            raise PydanticCustomError(
                "regex", "not a regular expression of RE2: {why}", {"why": why}
            ) from None
        return value

    @model_validator(mode="after")
    def _one_question(self) -> NameOptions:
        if (self.glob is None) == (self.regex is None):
            raise PydanticCustomError("one_of", "exactly one of glob and regex is needed")
        return self


def _a_glob_alone(value: Any) -> Any:
    return {"glob": value} if isinstance(value, str) else value


class Name(_Matcher):
    """The pool's user-given name or its id fits a pattern, from beginning to end."""

    key: ClassVar = "name"
    name: Annotated[NameOptions, BeforeValidator(_a_glob_alone), _OR_TEXT]

    def find(self, facts: Facts, now: datetime) -> Finding:
        """Look at a pool."""
        options, pool = self.name, facts.pool
        texts = []
        if options.of != "id":
            if not isinstance(pool.labels.get(NAME_LABEL, ""), str):
                return doubt("its name is not text")
            texts.append(pool.display_name)
        if options.of != "name":
            texts.append(printable(pool.pool_id))
        for text in texts:
            if options.regex is not None:
                fits = _regex(options.regex).fullmatch(text.encode()) is not None
            else:
                fits = _fits(text, options.glob or "")
            if text and fits:
                return yes(f"named {text}")
        return no("of another name")


# What the document says in one word


def _plain(pool_says: Sequence[str], wanted: Sequence[str], what: str) -> Finding:
    for said in pool_says:
        if any(_fits(said, pattern) for pattern in wanted):
            return yes(f"{what} {said}")
    return no(f"{what} is {', '.join(pool_says) or 'not given'}")


class Workspace(_Matcher):
    """The pool is in one of these workspaces (label `os.modelarts/workspace.id`)."""

    key: ClassVar = "workspace"
    workspace: Words

    def find(self, facts: Facts, now: datetime) -> Finding:
        """Look at a pool."""
        said = facts.pool.labels.get("os.modelarts/workspace.id", "0")
        if not isinstance(said, str):
            return doubt("its workspace is not text")
        return yes(f"workspace {said}") if said in self.workspace else no(f"workspace is {said}")


PoolType = Literal["Dedicate", "Logical"]


class Type(_Matcher):
    """The pool is physical (`Dedicate`) or logical (`Logical`)."""

    key: ClassVar = "type"
    type: PoolType

    def find(self, facts: Facts, now: datetime) -> Finding:
        """Look at a pool."""
        if not facts.pool.type:
            return doubt("its type is not given")
        return _plain([facts.pool.type], [self.type], "type")


ScopeType = Literal["Train", "Infer", "Notebook"]


class Scope(_Matcher):
    """The pool is for one of these kinds of work."""

    key: ClassVar = "scope"
    scope: Annotated[
        list[ScopeType],
        Field(min_length=1),
        BeforeValidator(_in_a_list),
        _Or({"enum": list(get_args(ScopeType))}),
    ]

    def find(self, facts: Facts, now: datetime) -> Finding:
        """Look at a pool."""
        scopes = getattr(facts.pool.document.spec, "scope", None)
        if not isinstance(scopes, list | None) or facts.pool.scopes != (scopes or []):
            return doubt("its scope cannot be read")
        return _plain(facts.pool.scopes, self.scope, "scope")


class Flavor(_Matcher):
    """One of the pool's flavors fits a glob, be there nodes of it at present or not."""

    key: ClassVar = "flavor"
    flavor: Globs

    def find(self, facts: Facts, now: datetime) -> Finding:
        """Look at a pool."""
        flavors = _flavors(facts.pool)
        if flavors is None:
            return doubt("its flavors cannot be read")
        return _plain(flavors, self.flavor, "flavor")


def _flavors(pool: Pool) -> list[str] | None:
    """Every flavor that a pool's document names; None if one cannot be read."""
    status = getattr(pool.document.status, "resources", None)
    if not isinstance(status, ResourceStatus | None):
        return None
    parts = [getattr(pool.document.spec, "resources", None)]
    if status is not None:
        parts += [status.creating, status.available, status.abnormal, status.deleting]
    found = set()
    for part in parts:
        if not isinstance(part, list | None):
            return None
        for resource in part or ():
            flavor = getattr(resource, "flavor", None)
            if not isinstance(flavor, str) or not flavor:
                return None
            found.add(flavor)
    return sorted(found)


class BillingIs(_Matcher):
    """How the pool is paid for."""

    key: ClassVar = "billing"
    billing: Literal["postpaid", "prepaid"]

    def find(self, facts: Facts, now: datetime) -> Finding:
        """Look at a pool."""
        said = facts.pool.billing
        if said == "unknown":
            return doubt("its billing mode is unknown")
        return _plain([str(said)], [self.billing], "billing")


class Phase(_Matcher):
    """The pool is in one of these phases."""

    key: ClassVar = "phase"
    phase: Globs

    def find(self, facts: Facts, now: datetime) -> Finding:
        """Look at a pool."""
        if not facts.pool.phase:
            return doubt("its phase is not given")
        return _plain([facts.pool.phase], self.phase, "phase")


class DriverOptions(_Options):
    """`driver`: globs over the driver versions."""

    gpu: Annotated[Glob, Field(min_length=1)] | None = None
    npu: Annotated[Glob, Field(min_length=1)] | None = None

    @model_validator(mode="after")
    def _something(self) -> DriverOptions:
        if self.gpu is None and self.npu is None:
            raise PydanticCustomError("one_of", "at least one of gpu and npu is needed")
        return self


class Driver(_Matcher):
    """The pool's GPU or NPU driver version fits a glob; both, where both are asked for."""

    key: ClassVar = "driver"
    driver: DriverOptions

    def find(self, facts: Facts, now: datetime) -> Finding:
        """Look at a pool."""
        reasons = []
        kinds: tuple[Literal["gpu", "npu"], ...] = ("gpu", "npu")
        for kind in kinds:
            pattern = getattr(self.driver, kind)
            if pattern is None:
                continue
            if _driver_is_odd(facts.pool, kind):
                return doubt(f"its {kind} driver cannot be read")
            said = facts.pool.driver_version(kind)
            if not said or not _fits(said, pattern):
                return no(f"{kind} driver is {said or 'not given'}")
            reasons.append(f"{kind} driver {said}")
        return yes(" and ".join(reasons))


def _driver_is_odd(pool: Pool, kind: str) -> bool:
    ordered = getattr(pool.document.spec, "driver", None)
    runs = getattr(pool.document.status, "driver", None)
    state = getattr(runs, kind, None)
    return not (
        isinstance(ordered, DriverSpec | None)
        and isinstance(runs, DriverStatus | None)
        and isinstance(state, DriverState | None)
        and isinstance(getattr(ordered, f"{kind}_version", None), str | None)
        and isinstance(getattr(state, "version", None), str | None)
    )


# What takes further calls


def busy_with(facts: Facts) -> list[str]:
    """The workloads that use a pool right now, by name.

    Args:
        facts: with the workloads read.
    """
    return [title(workload) for workload in facts.workloads or () if is_busy(workload)]


class Idle(_Matcher):
    """No workload has been queued, pending, created or running for so long.

    How long is known from what was seen at each look since; a pool seen for the first time has
    been idle for no time at all.
    """

    key: ClassVar = "idle"
    idle: Duration

    def find(self, facts: Facts, now: datetime) -> Finding:
        """Look at a pool."""
        if facts.workloads is None:
            return ask(Fact.WORKLOADS, facts)
        if busy := busy_with(facts):
            return no(f"in use by {busy[0]}")
        if facts.idle_since is None:
            return no("not seen idle before")
        text = f"idle since {facts.idle_since:%Y-%m-%dT%H:%MZ}"
        return yes(text) if now - facts.idle_since >= self.idle else no(f"only {text}")


class UtilisationOptions(_Options):
    """`utilisation`: of which device, below which percentage, for how long."""

    of: Literal["gpu", "npu", "cpu"]
    below: float = Field(gt=0, le=100, allow_inf_nan=False)
    over: Duration = timedelta(days=1)

    @field_validator("over")
    @classmethod
    def _within_reach(cls, value: timedelta) -> timedelta:
        if not timedelta(hours=1) <= value <= timedelta(days=30):
            raise PydanticCustomError("window", "from 1h to 30d are accepted")
        return value


_METRICS = {"gpu": "gpuUtil", "npu": "npuUtil", "cpu": "cpuUsage"}


class Utilisation(_Matcher):
    """The highest utilisation seen over a window is below a percentage."""

    key: ClassVar = "utilisation"
    utilisation: UtilisationOptions

    def find(self, facts: Facts, now: datetime) -> Finding:
        """Look at a pool."""
        options = self.utilisation
        age = _age(facts.pool, now)
        if isinstance(age, Finding):
            return age
        if age < options.over:
            return no(f"younger than {format_duration(options.over)}")
        if facts.usage is None:
            return ask(Fact.USAGE, facts)
        series = facts.usage.get(_METRICS[options.of])
        peak = series.peak(now - options.over, now) if series else None
        if peak is None:
            return doubt(
                f"its {options.of} utilisation over {format_duration(options.over)} is not known"
            )
        text = f"{options.of} utilisation at most {peak:g}% over {format_duration(options.over)}"
        return yes(text) if peak < options.below else no(text)


_MATCHERS: tuple[type[_Matcher], ...] = (
    All,
    Any_,
    Not,
    Expired,
    Ttl,
    OlderThan,
    Tags,
    Name,
    Workspace,
    Type,
    Scope,
    Flavor,
    BillingIs,
    Phase,
    Driver,
    Idle,
    Utilisation,
)
KEYS = tuple(matcher.key for matcher in _MATCHERS)


def _tag_of(value: Any) -> str | None:
    if isinstance(value, _Matcher):
        return value.key
    if isinstance(value, dict) and len(value) == 1:
        (key,) = value
        return key if key in KEYS else None
    return None


Matcher = Annotated[
    Annotated[All, Tag("all")]
    | Annotated[Any_, Tag("any")]
    | Annotated[Not, Tag("not")]
    | Annotated[Expired, Tag("expired")]
    | Annotated[Ttl, Tag("ttl")]
    | Annotated[OlderThan, Tag("older_than")]
    | Annotated[Tags, Tag("tags")]
    | Annotated[Name, Tag("name")]
    | Annotated[Workspace, Tag("workspace")]
    | Annotated[Type, Tag("type")]
    | Annotated[Scope, Tag("scope")]
    | Annotated[Flavor, Tag("flavor")]
    | Annotated[BillingIs, Tag("billing")]
    | Annotated[Phase, Tag("phase")]
    | Annotated[Driver, Tag("driver")]
    | Annotated[Idle, Tag("idle")]
    | Annotated[Utilisation, Tag("utilisation")],
    Discriminator(
        _tag_of,
        custom_error_type="matcher",
        custom_error_message=f"a map with exactly one of {', '.join(KEYS)} is needed",
    ),
]
"""Any matcher: in YAML a map with exactly one key."""

for _model in (All, Any_, Not):
    _model.model_rebuild()


SHORTEST_WINDOW = timedelta(hours=1)


def longest_window(parts: Iterable[Matcher]) -> timedelta:
    """How far back matchers look at utilisation; an hour if they do not."""
    found = (window for part in parts for window in _windows(part))
    return max(found, default=SHORTEST_WINDOW)


def _windows(matcher: Matcher) -> list[timedelta]:
    match matcher:
        case All():
            return [window for each in matcher.all for window in _windows(each)]
        case Any_():
            return [window for each in matcher.any for window in _windows(each)]
        case Not():
            return _windows(matcher.not_)
        case Utilisation():
            return [matcher.utilisation.over]
        case _:
            return []


def find(matcher: Matcher, facts: Facts, now: datetime) -> Finding:
    """Look at a pool through a matcher; a pool whose tags cannot be read is a doubt.

    Args:
        matcher: the condition.
        facts: the pool and what has been read of it.
        now: an aware time.
    """
    try:
        return matcher.find(facts, now)
    except UnreadableTagsError as error:
        return doubt(str(error))
