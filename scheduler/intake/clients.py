"""Who may ask for deletions, in which projects, how fast, and who is told. Read from YAML."""

from __future__ import annotations

import hashlib
import hmac
import re
import secrets
from typing import TYPE_CHECKING, Annotated, Any
from zoneinfo import ZoneInfo

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    PlainValidator,
    ValidationError,
    ValidationInfo,
    WithJsonSchema,
    field_validator,
)
from pydantic_core import PydanticCustomError

from scheduler.intake.addresses import Host
from scheduler.intake.request import ProjectId, Way
from scheduler.policy import EACH_ONCE, Brakes, Name, TimeZone
from worker.limiter import Quota
from worker.projects import SecretRef
from worker.yaml_source import YamlError, YamlSource, parse_yaml, read_yaml

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator
    from pathlib import Path

    from yarl import URL

    from worker.yaml_source import Location

PREFIX = "pst_"
"""What every token begins with, so that one in a log or a repository can be searched for."""
RANDOM_BYTES = 32
_TOKEN = re.compile(PREFIX + r"[A-Za-z0-9_-]{43,256}")
_HASH = re.compile(r"[0-9a-f]{64}")
_OF_NOTHING = hashlib.sha256(b"").hexdigest()
_SECRET = ("tokens", "secret")


def new_token() -> tuple[str, str]:
    """A token of 256 random bits, and its SHA-256 in hex for the clients' file."""
    token = PREFIX + secrets.token_urlsafe(RANDOM_BYTES)
    return token, token_hash(token)


def token_hash(token: str) -> str:
    """The SHA-256 of a token, in hex.

    A password would need a slow hash, since passwords can be guessed. A token's 256 random bits
    cannot, however fast the hash; and a slow one would be work that strangers could ask for.
    """
    return hashlib.sha256(token.encode(errors="surrogatepass")).hexdigest()


def _read_hash(value: Any) -> Any:
    if not isinstance(value, str):
        return value
    text = value.strip().lower()
    if value.strip().startswith(PREFIX):
        raise PydanticCustomError(
            "token",
            "this is a token, not its SHA-256; make a new one, since whoever can read this file "
            "knows it, and write down the new one's hash",
        )
    if not _HASH.fullmatch(text):
        raise PydanticCustomError("token", "accepted: a token's SHA-256, 64 hex digits")
    if text == _OF_NOTHING:
        raise PydanticCustomError(
            "token", "this is the SHA-256 of an empty text; accepted: a token's"
        )
    return text


def _read_host(value: Any) -> Host:
    if isinstance(value, Host):
        return value
    if not isinstance(value, str):
        raise PydanticCustomError("string_type", "a text is needed; put it in quotes")
    return Host.parse(value)


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, hide_input_in_errors=True)


class WebhookRules(_Part):
    """Where a client may have the ends of its runs told."""

    hosts: list[Annotated[Host, PlainValidator(_read_host), WithJsonSchema({"type": "string"})]] = (
        Field(min_length=1, description="Exact names; without a port, the scheme's own.")
    )
    allow_private: bool = Field(
        default=False, description="Whether these may be at addresses that are not public."
    )
    secret: SecretRef | None = Field(
        default=None, description="Where the key is that what is told is signed with."
    )

    def allows(self, name: str, url: URL) -> bool:
        """Whether a URL is at one of the hosts.

        Args:
            name: the URL's host, as `canonical_host` gives it.
            url: the URL.
        """
        usual = {"https": 443, "http": 80}.get(url.scheme)
        return any(host.name == name and (host.port or usual) == url.port for host in self.hosts)


class _Entry(_Part):
    ways: Annotated[list[Way], Field(min_length=1), EACH_ONCE] = [Way.HTTP]
    tokens: list[Annotated[str, BeforeValidator(_read_hash)]] = Field(
        default=[],
        repr=False,
        validate_default=True,
        description="The SHA-256 of each of its tokens, in hex.",
    )
    projects: Annotated[list[ProjectId], Field(min_length=1), EACH_ONCE]
    brakes: Brakes = Brakes()
    timezone: TimeZone = Field(default="UTC", description="The one of the brakes' quiet windows.")
    rate_limit: float = Field(default=5, gt=0, le=100_000, allow_inf_nan=False)
    rate_burst: int = Field(default=20, ge=1, le=100_000)
    allow_busy: bool = False
    allow_shared: bool = False
    webhooks: WebhookRules | None = None

    @field_validator("tokens")
    @classmethod
    def _come_with_http(cls, value: list[str], info: ValidationInfo) -> list[str]:
        if not value and Way.HTTP in info.data.get("ways", ()):
            raise PydanticCustomError(
                "tokens", "a client that comes by http needs a token; or say by which ways it comes"
            )
        return value


class Client(_Entry):
    """Another system that may ask for deletions.

    Attributes:
        name: what the file calls it.
        ways: how its requests may come in.
        tokens: the SHA-256 of each of its tokens, in hex.
        projects: the ids of the projects that it may delete in.
        brakes: what holds its runs; its quiet windows are in `timezone`.
        timezone: the name of a time zone.
        rate_limit: requests a second, by all processes of the intake together.
        rate_burst: requests that may come at once after an idle time.
        allow_busy: whether its selectors find pools with running workloads too.
        allow_shared: whether they find shared and public pools too.
        webhooks: who may be told of its runs; None: nobody.
    """

    name: Name

    @property
    def zone(self) -> ZoneInfo:
        """The time zone that its quiet windows go by."""
        return ZoneInfo(self.timezone)

    @property
    def quota(self) -> Quota:
        """How fast it may ask."""
        return Quota(self.rate_limit, self.rate_burst)


class Clients:
    """The clients that a file names.

    Args:
        clients: each name once, each token once.
    """

    def __init__(self, clients: Iterable[Client]) -> None:
        self._by_name = {client.name: client for client in clients}

    def __iter__(self) -> Iterator[Client]:
        return iter(self._by_name.values())

    def __repr__(self) -> str:
        return f"Clients({', '.join(self._by_name)})"

    @property
    def quotas(self) -> dict[str, Quota]:
        """How fast each may ask, by its name."""
        return {client.name: client.quota for client in self}

    def by_name(self, name: str) -> Client | None:
        """A client; None: there is none of that name."""
        return self._by_name.get(name)

    def authenticate(self, token: str) -> Client | None:
        """Whose token this is; None: nobody's.

        Every hash is compared, each in a time that does not depend on it, so that how long it
        takes tells nothing of the hashes there are. See `token_hash` for why SHA-256 is enough.

        Args:
            token: as it came, without `Bearer`.
        """
        found = None
        given = token_hash(token)
        for client in self:
            for known in client.tokens:
                if hmac.compare_digest(known, given):
                    found = client
        # Whatever somebody has hashed and written down: what can be guessed is no token.
        return found if _TOKEN.fullmatch(token) else None

    def may_be_private(self, host: str) -> bool:
        """Whether a host may be at an address that is not public.

        Args:
            host: as `canonical_host` gives it.
        """
        return any(
            client.webhooks is not None
            and client.webhooks.allow_private
            and any(each.name == host for each in client.webhooks.hosts)
            for client in self
        )


class _File(_Part):
    clients: dict[Name, _Entry] = Field(min_length=1)


def load(path: Path) -> Clients:
    """Read a file of clients.

    Raises:
        YamlError: all that is wrong with it, each with its line. No token is repeated.
    """
    return _validated(read_yaml(path, secret=_SECRET))


def parse(text: str, name: str = "clients") -> Clients:
    """Read such a file's text.

    Raises:
        YamlError: all that is wrong with it, each with its line. No token is repeated.
    """
    return _validated(parse_yaml(text, name, secret=_SECRET))


def _validated(source: YamlSource) -> Clients:
    try:
        entries = _File.model_validate(source.data).clients
    except ValidationError as error:
        schema = _File.model_json_schema(by_alias=True)
        raise YamlError(source.sentences(error, secret=_SECRET, schema=schema)) from None
    wrong = [*_tokens_twice(entries), *_hosts_at_odds(entries)]
    if wrong:
        lines = sorted((source.line(place), what) for place, what in wrong)
        raise YamlError([f"{source.path}:{line}: {what}" for line, what in lines])
    return Clients(Client(name=name, **dict(entry)) for name, entry in entries.items())


def _tokens_twice(entries: dict[str, _Entry]) -> Iterator[tuple[Location, str]]:
    # Whose it is could not be told.
    owners: dict[str, str] = {}
    for name, entry in entries.items():
        for number, each in enumerate(entry.tokens):
            if each in owners:
                what = f"client {owners[each]} has this hash already"
                place = ("clients", name, "tokens", number)
                yield place, f"clients.{name}.tokens[{number}]: {what}"
            owners.setdefault(each, name)


def _hosts_at_odds(entries: dict[str, _Entry]) -> Iterator[tuple[Location, str]]:
    # Whether a host may be at private addresses is a fact about the host: what was looked up for
    # one client's webhook may serve another's.
    first: dict[str, tuple[str, bool]] = {}
    for name, entry in entries.items():
        if (rules := entry.webhooks) is None:
            continue
        for number, host in enumerate(rules.hosts):
            other, allowed = first.setdefault(host.name, (name, rules.allow_private))
            if rules.allow_private is not allowed:
                what = f"client {other} has it with another allow_private; accepted: the same"
                place = ("clients", name, "webhooks", "hosts", number)
                yield place, f"clients.{name}.webhooks.hosts[{number}]: {what}"
