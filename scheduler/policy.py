"""Policies: which pools go, what protects them, what stops a run, and when. Read from YAML."""

from __future__ import annotations

import re
from datetime import UTC, datetime, time, timedelta
from enum import StrEnum
from functools import cache
from typing import TYPE_CHECKING, Annotated, Any, Literal
from zoneinfo import ZoneInfo, ZoneInfoNotFoundError

from cronsim import CronSim, CronSimError
from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    GetJsonSchemaHandler,
    ValidationError,
    ValidationInfo,
    WithJsonSchema,
    field_validator,
)
from pydantic.json_schema import GenerateJsonSchema
from pydantic_core import PydanticCustomError
from yarl import URL

from scheduler.durations import Duration, format_duration
from scheduler.matchers import Matcher
from worker.modelarts import Endpoint
from worker.projects import EACH_ID_ONCE, SECRET_FIELDS, Project, SecretRef
from worker.settings import SettingsError
from worker.yaml_source import YamlError, YamlSource, parse_yaml, read_yaml

if TYPE_CHECKING:
    from pathlib import Path

    from pydantic_core.core_schema import NullableSchema

Name = Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9_-]{0,62}$")]


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


def _is_a_zone(value: str) -> str:
    try:
        ZoneInfo(value)
    except (ZoneInfoNotFoundError, ValueError, OSError):
        raise PydanticCustomError(
            "timezone", "no such time zone; accepted: a name such as UTC or Europe/Berlin"
        ) from None
    return value


TimeZone = Annotated[str, AfterValidator(_is_a_zone)]
_CLOCK = "([01][0-9]|2[0-3]):[0-5][0-9]"


def _read_start(value: Any) -> time:
    # Neither seconds nor a zone, nor a number, by which somebody may mean hours.
    if isinstance(value, str) and re.fullmatch(_CLOCK, value, re.ASCII):
        return time.fromisoformat(value)
    raise PydanticCustomError("clock", "accepted: a time such as 08:00")


def _read_end(value: Any) -> time:
    return time(0) if value == "24:00" else _read_start(value)


# A window cannot begin at 24:00, by which somebody may mean the next day's beginning.
Start = Annotated[
    time,
    BeforeValidator(_read_start),
    WithJsonSchema({"type": "string", "pattern": f"^{_CLOCK}$"}),
]
End = Annotated[
    time,
    BeforeValidator(_read_end),
    WithJsonSchema({"type": "string", "pattern": f"^({_CLOCK}|24:00)$"}),
]
CRON = "five cron fields, such as 0 2 * * *, or six with seconds first"
DAYS = ("mon", "tue", "wed", "thu", "fri", "sat", "sun")


class QuietWindow(_Part):
    """A time when nothing is deleted. One that ends before it begins goes on past midnight."""

    days: list[Literal["mon", "tue", "wed", "thu", "fri", "sat", "sun"]] = Field(
        default=["mon", "tue", "wed", "thu", "fri", "sat", "sun"],
        min_length=1,
        description="The days on which the window begins.",
    )
    start: Start = Field(default=time(0), alias="from")
    end: End = Field(default=time(0), alias="to", description="00:00 is the end of the day.")

    def covers(self, moment: datetime) -> bool:
        """Whether a moment, in the time zone that counts, lies in it."""
        at, today = moment.time(), DAYS[moment.weekday()]
        yesterday = DAYS[moment.weekday() - 1]
        if self.end == time(0):
            return today in self.days and self.start <= at
        if self.start < self.end:
            return today in self.days and self.start <= at < self.end
        return (today in self.days and at >= self.start) or (
            yesterday in self.days and at < self.end
        )


class Brakes(_Part):
    """What stops a run before it starts, or midway."""

    max_deletions: int = Field(
        default=50, ge=0, description="More deletions than this in a run: none is made."
    )
    max_percent: float = Field(
        default=50,
        ge=0,
        le=100,
        allow_inf_nan=False,
        description="More than this share of the project's pools: none is deleted.",
    )
    max_failures: int = Field(
        default=20, ge=0, description="More failed jobs than this: the rest of the run stops."
    )
    max_failure_percent: float = Field(
        default=50,
        ge=0,
        le=100,
        allow_inf_nan=False,
        description="A larger share of the ended jobs failed, of ten or more: the rest stops.",
    )
    quiet: list[QuietWindow] = Field(
        default=[], description="Nothing is deleted then, in the policy's time zone."
    )


def _known(part: str) -> AfterValidator:
    def check(value: str, info: ValidationInfo) -> str:
        if info.context is not None and value not in info.context[part]:
            raise PydanticCustomError(
                "reference",
                "there is no such name under {part}; accepted: {names}",
                {"part": part, "names": ", ".join(map(str, info.context[part])) or "none yet"},
            )
        return value

    return AfterValidator(check)


def _each_once(values: list[str]) -> list[str]:
    if twice := sorted({each for each in values if values.count(each) > 1}):
        raise PydanticCustomError("twice", "{names}: there twice", {"names": ", ".join(twice)})
    return values


EACH_ONCE = AfterValidator(_each_once)
"""Makes a list of names refuse one that is there twice."""
ProjectNames = Annotated[list[Annotated[str, _known("projects")]], Field(min_length=1), EACH_ONCE]
ChannelNames = Annotated[list[Annotated[str, _known("notifications")]], EACH_ONCE]


class _LeftOut:
    """A field that may be left out, but not be null."""

    def __get_pydantic_json_schema__(
        self, schema: NullableSchema, handler: GetJsonSchemaHandler
    ) -> dict[str, Any]:
        return handler(schema["schema"])


SHORTEST_CATCH_UP = timedelta(minutes=1)


class Policy(_Part):
    """Which pools of which projects go, and under which conditions."""

    description: str = ""
    projects: ProjectNames = Field(description="Names from `projects`.")
    match: Matcher = Field(description="Which pools are to be deleted.")
    protect: Annotated[Matcher | None, _LeftOut()] = Field(
        default=None, description="Wins over every match."
    )
    allow_busy: bool = Field(default=False, description="Also pools with running workloads.")
    allow_shared: bool = Field(default=False, description="Also shared and public pools.")
    grace: Annotated[Duration | None, _LeftOut()] = Field(
        default=None, description="Mark first; delete what still matches after so long."
    )
    brakes: Brakes = Brakes()
    schedule: str | None = Field(default=None, description="Five cron fields, such as `0 2 * * *`.")
    timezone: TimeZone = "UTC"
    catch_up: Duration = Field(
        default=timedelta(hours=6),
        description="A missed run is made up for within this time; else recorded as missed.",
    )
    notify: ChannelNames = Field(default=[], description="Names from `notifications`.")

    @field_validator("protect", "grace", mode="before")
    @classmethod
    def _is_not_empty(cls, value: Any) -> Any:
        # Nothing after the colon may be an oversight, and would make for more deletions.
        if value is None:
            raise PydanticCustomError("empty", "it is empty; leave it out, or say what holds")
        return value

    @field_validator("schedule")
    @classmethod
    def _is_a_schedule(cls, value: str | None) -> str | None:
        if value is not None:
            try:
                first = next(CronSim(value, datetime(2024, 1, 1, tzinfo=UTC)), None)
            except CronSimError as error:
                raise PydanticCustomError(
                    "cron", "{why}; accepted: " + CRON, {"why": str(error)}
                ) from None
            if first is None:
                raise PydanticCustomError("cron", "it never comes; accepted: " + CRON)
        return value

    @field_validator("catch_up")
    @classmethod
    def _reaches_the_next_look(cls, value: timedelta) -> timedelta:
        # The clock is looked at about once a second, so with less no night would be in time.
        if value < SHORTEST_CATCH_UP:
            raise PydanticCustomError("catch_up", "1m or more is accepted")
        return value

    @property
    def zone(self) -> ZoneInfo:
        """The time zone that its schedule and its quiet windows go by."""
        return ZoneInfo(self.timezone)


class Occasion(StrEnum):
    """What notifications are sent on."""

    MARKED = "marked"
    STARTED = "started"
    BRAKED = "braked"
    FINISHED = "finished"
    FAILED = "failed"


class Channel(_Part):
    """Where notifications go."""

    url: SecretRef = Field(description="Where the webhook's URL is; it is a secret.")
    format: Literal["json", "slack"] = "json"
    secret: SecretRef | None = Field(
        default=None, description="Where the key is that JSON notifications are signed with."
    )
    on: list[Occasion] = Field(default=list(Occasion), min_length=1)

    def read(self) -> tuple[URL, str | None]:
        """The URL, and the secret if there is one.

        Raises:
            SettingsError: one is not there, or the URL is none that may be used.
        """
        text = self.url.read().get_secret_value()
        secret = None if self.secret is None else self.secret.read().get_secret_value()
        try:
            url = URL(text)
            Endpoint.parse(str(url.origin()))
        except ValueError:
            raise SettingsError(
                "The channel's URL cannot be used; accepted: https://…, and http://… only for "
                "this machine."
            ) from None
        return url, secret


class PolicyFile(_Part):
    """A file of policies."""

    version: Literal[1] = 1
    projects: Annotated[dict[Name, Project], EACH_ID_ONCE] = Field(min_length=1)
    policies: dict[Name, Policy] = Field(min_length=1)
    notifications: dict[Name, Channel] = {}


_SECRET = (*SECRET_FIELDS, "url", "secret")


def load(path: Path) -> PolicyFile:
    """Read a policy file.

    Raises:
        YamlError: all that is wrong with it, each with its line.
    """
    return _validated(read_yaml(path, secret=_SECRET))


def parse(text: str, name: str = "policies") -> PolicyFile:
    """Read a policy file's text.

    Raises:
        YamlError: all that is wrong with it, each with its line.
    """
    return _validated(parse_yaml(text, name, secret=_SECRET))


def _validated(source: YamlSource) -> PolicyFile:
    parts = source.data if isinstance(source.data, dict) else {}
    # Names are checked where they stand, so that every error comes at once and with its line.
    known = {
        part: tuple(names) if isinstance(names := parts.get(part), dict) else ()
        for part in ("projects", "notifications")
    }
    try:
        return PolicyFile.model_validate(source.data, context=known)
    except ValidationError as error:
        said = source.sentences(error, secret=_SECRET, schema=json_schema())
        raise YamlError(said) from None


class _AsWritten(GenerateJsonSchema):
    def encode_default(self, dft: Any) -> Any:
        if isinstance(dft, timedelta):
            return format_duration(dft)
        return f"{dft:%H:%M}" if isinstance(dft, time) else super().encode_default(dft)


@cache
def json_schema() -> dict[str, Any]:
    """The JSON Schema (2020-12) of a policy file, for editors; not to be changed."""
    schema = PolicyFile.model_json_schema(by_alias=True, schema_generator=_AsWritten)
    for part in schema["properties"].values():
        if "patternProperties" in part:
            part["additionalProperties"] = False
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "poolsweep policies",
        **{key: value for key, value in schema.items() if key != "title"},
    }
