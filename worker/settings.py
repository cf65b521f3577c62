"""Everything configurable, read from the environment and validated at start."""

from __future__ import annotations

import contextlib
import functools
import math
import re
import ssl
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, Self
from urllib.parse import parse_qsl, quote, urlencode, urlsplit

import platformdirs
import redis
from pydantic import Field, SecretStr, ValidationError, field_validator, model_validator
from pydantic_settings import BaseSettings, SettingsConfigDict

from worker import embedded_redis
from worker.modelarts import AccessKey, Endpoint, IamUser, Token

if TYPE_CHECKING:
    from collections.abc import Iterator

ENV_PREFIX = "POOLSWEEP_"
WINDOW_S = 5
LEAST_RATE = 0.2
"""A pool is read and then deleted, each in its turn, before what was read is too old."""

Seconds = Annotated[float, Field(gt=0, le=7 * 86_400, allow_inf_nan=False)]


class SettingsError(ValueError):
    """A setting is missing or out of range; the text is one sentence for each, for the user."""


class Settings(BaseSettings):
    """The configuration of one process. Each field is the variable `POOLSWEEP_<FIELD>`.

    Durations are in seconds (`_s`) or days (`_days`), rates in calls a second.
    """

    model_config = SettingsConfigDict(
        env_prefix=ENV_PREFIX, extra="ignore", frozen=True, env_ignore_empty=True
    )

    redis_url: SecretStr | None = None
    """redis://, rediss:// or unix://; unset: an embedded server in `state_dir`."""
    redis_ca_cert: Path | None = None
    """PEM file of certificates that, besides the system's, may vouch for a rediss:// server."""
    redis_client_cert: Path | None = None
    redis_client_key: Path | None = None
    state_dir: Path = Field(default_factory=lambda: Path(platformdirs.user_state_dir("poolsweep")))

    endpoint: str | None = None
    """Base URL of the ModelArts API, such as https://modelarts.<region>.<cloud's domain>."""
    insecure_http: bool = False
    token: SecretStr | None = None
    ak: SecretStr | None = None
    sk: SecretStr | None = None
    security_token: SecretStr | None = None
    iam_endpoint: str | None = None
    iam_user: str | None = None
    iam_password: SecretStr | None = None
    iam_domain: str | None = None
    request_type: str | None = Field(default=None, pattern=r"^[A-Za-z0-9_-]{1,32}$")
    user_id: str | None = Field(default=None, pattern=r"^[A-Za-z0-9_-]{1,64}$")
    connect_timeout_s: Seconds = 5
    total_timeout_s: Seconds = 30

    in_flight: int = Field(default=100, ge=1, le=5_000)
    """HTTP calls to one project under way at once in one worker process."""
    batch_size: int = Field(default=100, ge=1, le=1_000)
    batch_max_s: Seconds = 300
    """After this long a batch gives its unfinished jobs back."""
    worker_batches: int = Field(default=8, ge=1, le=64)
    """Batches that one worker process works on at once."""
    lease_s: float = Field(default=60, ge=1, le=3_600)
    resend_s: float = Field(default=60, ge=1, le=3_600)
    """A job whose message no worker has taken for this long is sent again."""
    shutdown_s: Seconds = 20
    """On SIGTERM, calls under way get this long; then their jobs are given back."""
    visibility_timeout_s: Seconds = 3_600

    rate_limit: float = Field(default=10, ge=0, le=100_000, allow_inf_nan=False)
    """Calls a second to one project, by all workers together; 0 means no limit."""
    rate_burst: int | None = Field(default=None, ge=1, le=100_000)

    max_attempts: int = Field(default=8, ge=1, le=100)
    max_retry_s: Seconds = 3_600
    backoff_base_s: float = Field(default=1, gt=0, le=600)
    backoff_cap_s: float = Field(default=60, gt=0, le=3_600)
    inline_wait_s: float = Field(default=3, ge=0, le=30)
    """Waits up to this long stay in the worker; longer ones go back to the ledger."""

    precondition_max_age_s: float = Field(default=15, ge=1, le=3_600)
    plan_max_age_s: Seconds = 86_400
    """A job whose run was made longer ago, as after a long pause, is skipped."""
    verify_interval_s: Seconds = 10
    verify_deadline_s: Seconds = 5_400
    retention_days: float = Field(default=90, gt=0, le=3_650)

    projects_file: Path | None = None
    """YAML file with `projects:` that have an endpoint, credentials or limits of their own."""
    policies_file: Path | None = None
    """YAML file of policies, for the scheduler and the commands that read policies."""
    clients_file: Path | None = None
    """YAML file of the clients that the intake takes requests from."""
    intake_host: str = "127.0.0.1"
    intake_port: int = Field(default=8080, ge=0, le=65_535)
    intake_tls_cert: Path | None = None
    intake_tls_key: Path | None = None

    review_host: str = "127.0.0.1"
    review_port: int = Field(default=8081, ge=0, le=65_535)

    metrics_port: int | None = Field(default=None, ge=0, le=65_535)
    """Where `/metrics`, `/healthz` and `/readyz` are served; unset: nowhere."""
    metrics_host: str = "127.0.0.1"

    log_level: Literal["debug", "info", "warning", "error"] = "info"
    log_format: Literal["auto", "json", "console"] = "auto"

    @field_validator("redis_url")
    @classmethod
    def _redis_url_is_one(cls, value: SecretStr | None) -> SecretStr | None:
        if value is None:
            return None
        if not _is_redis_url(value.get_secret_value()):
            # The value may hold a password, so it is not repeated.
            raise ValueError(
                "what is set is not the URL of a Redis server; "
                "accepted: redis://host:port/db, rediss://host:port/db or unix:///path"
            )
        if any(name.startswith("ssl") for name, _ in _query(value.get_secret_value())):
            # What they would switch off is what keeps the password from a stranger.
            raise ValueError(
                "what is set has options of TLS in it; accepted: a rediss:// URL without, and "
                "POOLSWEEP_REDIS_CA_CERT, POOLSWEEP_REDIS_CLIENT_CERT and "
                "POOLSWEEP_REDIS_CLIENT_KEY besides"
            )
        return value

    @field_validator("rate_limit")
    @classmethod
    def _rate_is_none_or_some(cls, value: float) -> float:
        if 0 < value < LEAST_RATE:
            raise ValueError(f"accepted: 0 (no limit), or {LEAST_RATE:g} calls a second or more")
        return value

    @model_validator(mode="after")
    def _times_fit_together(self) -> Self:
        if 0 < self.rate_limit < 2 / self.precondition_max_age_s:
            raise ValueError(
                f"POOLSWEEP_RATE_LIMIT: {self.rate_limit:g} is too low for pools that are to be "
                "read and deleted within POOLSWEEP_PRECONDITION_MAX_AGE_S; accepted: at least "
                f"{2 / self.precondition_max_age_s:g}"
            )
        longest_s = self.batch_max_s + self.shutdown_s  # a batch, and the end of its last calls
        if self.visibility_timeout_s < 2 * longest_s:
            raise ValueError(
                f"POOLSWEEP_VISIBILITY_TIMEOUT_S: {self.visibility_timeout_s:g} is too short; "
                "accepted: at least twice POOLSWEEP_BATCH_MAX_S and POOLSWEEP_SHUTDOWN_S together "
                f"({2 * longest_s:g})"
            )
        return self

    @model_validator(mode="after")
    def _redis_certificates_can_be_used(self) -> Self:
        given = {
            f"{ENV_PREFIX}{name.upper()}": path
            for name in ("redis_ca_cert", "redis_client_cert", "redis_client_key")
            if (path := getattr(self, name)) is not None
        }
        if not given:
            return self
        if not self._is_redis_encrypted:
            raise ValueError(
                f"{', '.join(given)}: set for a Redis that is not called with TLS; accepted: only "
                "with a rediss:// URL in POOLSWEEP_REDIS_URL"
            )
        if (self.redis_client_cert is None) != (self.redis_client_key is None):
            raise ValueError(
                "POOLSWEEP_REDIS_CLIENT_CERT, POOLSWEEP_REDIS_CLIENT_KEY: only one of them is set; "
                "accepted: both"
            )
        context = ssl.create_default_context()
        if self.redis_ca_cert is not None:
            with _told("POOLSWEEP_REDIS_CA_CERT", self.redis_ca_cert, "certificates, PEM"):
                context.load_verify_locations(self.redis_ca_cert)
        if self.redis_client_cert is not None and self.redis_client_key is not None:
            what = "a certificate chain and its key, PEM, not encrypted"
            names = "POOLSWEEP_REDIS_CLIENT_CERT, POOLSWEEP_REDIS_CLIENT_KEY"
            with _told(names, self.redis_client_cert, what):
                # Without the function, a key that is encrypted would be asked for on the terminal.
                context.load_cert_chain(
                    self.redis_client_cert, self.redis_client_key, password=lambda: ""
                )
        return self

    @property
    def _is_redis_encrypted(self) -> bool:
        return urlsplit(self._redis_address).scheme == "rediss"

    @property
    def _redis_address(self) -> str:
        if self.redis_url is not None:
            return self.redis_url.get_secret_value()
        return embedded_redis.url(self.state_dir)

    @property
    def _tls_options(self) -> dict[str, str]:
        """How the server is known and who is at its door, in the words of redis-py and kombu.

        All of them are said: kombu knows every server by default.
        """
        if not self._is_redis_encrypted:
            return {}
        files = {
            "ssl_ca_certs": self.redis_ca_cert,
            "ssl_certfile": self.redis_client_cert,
            "ssl_keyfile": self.redis_client_key,
        }
        return {
            "ssl_cert_reqs": "required",
            "ssl_check_hostname": "true",
            **{name: str(path.absolute()) for name, path in files.items() if path is not None},
        }

    @property
    def redis_location(self) -> str:
        """The URL of the Redis to use; may hold a password: never log it."""
        address, options = self._redis_address, self._tls_options
        if not options:
            return address
        parts = urlsplit(address)
        return parts._replace(query=urlencode([*_query(address), *options.items()])).geturl()

    @property
    def broker_location(self) -> str:
        """The same server in kombu's spelling; may hold a password too.

        What redis-py reads from its URL is spelt anew: kombu names a unix socket otherwise, takes
        no password and no option from the query, and a `;` for the end of the URL.
        """
        address = self._redis_address
        parts, read = urlsplit(address), _read_redis_url(address)
        user, password = (quote(read.get(name, ""), safe="") for name in ("username", "password"))
        at = f"{user}:{password}@" if user or password else ""
        database = read.get("db")
        if parts.scheme == "unix":
            query = {} if database is None else {"virtual_host": str(database)}
            where = f"redis+socket://{at}{quote(read['path'])}"
        else:
            query = self._tls_options
            host = f"[{read['host']}]" if ":" in read["host"] else read["host"]
            port = f":{read['port']}" if "port" in read else ""
            where = f"{parts.scheme}://{at}{host}{port}" + (
                "" if database is None else f"/{database}"
            )
        return where + (f"?{urlencode(query)}" if query else "")

    @property
    def api_endpoint(self) -> Endpoint:
        """Where the API is.

        Raises:
            SettingsError: it is not set, or is not a base URL that is accepted.
        """
        return self._endpoint("endpoint", self.endpoint)

    def _endpoint(self, field: str, text: str | None) -> Endpoint:
        name = ENV_PREFIX + field.upper()
        if text is None:
            raise SettingsError(f"{name}: not set; accepted: https://host or https://host:port")
        try:
            return Endpoint.parse(text, insecure_http=self.insecure_http)
        except ValueError as error:
            raise SettingsError(f"{name}: {error}") from None

    @property
    def credentials(self) -> Token | AccessKey | IamUser:
        """How to sign in: the one way that is configured.

        Raises:
            SettingsError: none is, several are, or one is incomplete.
        """
        given: dict[str, list[SecretStr | str | None]] = {
            "POOLSWEEP_TOKEN": [self.token],
            "POOLSWEEP_AK and POOLSWEEP_SK": [self.ak, self.sk],
            "POOLSWEEP_IAM_ENDPOINT, _IAM_USER, _IAM_PASSWORD and _IAM_DOMAIN": [
                self.iam_endpoint,
                self.iam_user,
                self.iam_password,
                self.iam_domain,
            ],
        }
        ways = [way for way, parts in given.items() if any(part is not None for part in parts)]
        if len(ways) != 1:
            how = "no credentials are set" if not ways else "more than one way to sign in is set"
            raise SettingsError(f"{how}; accepted: exactly one of {'; or '.join(given)}.")
        if any(part is None for part in given[ways[0]]):
            raise SettingsError(f"The credentials are incomplete; accepted: all of {ways[0]}.")
        if self.token is not None:
            return Token(self.token)
        if self.ak is not None and self.sk is not None:
            return AccessKey(self.ak, self.sk, self.security_token)
        return IamUser(
            endpoint=self._endpoint("iam_endpoint", self.iam_endpoint),
            name=self.iam_user or "",
            password=self.iam_password or SecretStr(""),
            domain=self.iam_domain or "",
        )

    @property
    def burst(self) -> int:
        """Calls that may go at once after an idle time; a hundredth of the rate unless set."""
        return self.rate_burst or self.burst_of(self.rate_limit)

    @staticmethod
    def burst_of(rate: float) -> int:
        """The burst that goes with a rate unless one is set: one, and a hundredth of the rate.

        A cloud that counts the calls of a second has room for no more, the rate being used up.
        """
        return 1 + math.floor(rate / 100)

    def window(self, projects: int) -> int:
        """Jobs of one run that may be with the broker and the workers at once.

        A few seconds of work at the rate limit: enough to keep the workers busy, few enough
        that a message is worked on before its job counts as lost, that a cancelled run ends
        soon, and that one large run leaves room for others.

        Args:
            projects: how many projects the run is about, 0 where nobody knows; each has its own
                rate, and one that is slow or paused must not fill the room of the others.
        """
        if self.rate_limit == 0:
            return max(2 * self.batch_size, 5_000)
        wanted = math.ceil(WINDOW_S * self.rate_limit * max(1, projects))
        return max(2 * self.batch_size, min(5_000, wanted))


@contextlib.contextmanager
def _told(names: str, path: Path, accepted: str) -> Iterator[None]:
    try:
        yield
    except OSError as error:  # ssl.SSLError is one
        raise ValueError(
            f"{names}: {str(path)!r} cannot be used: {error.strerror or error}; accepted: "
            f"{accepted}"
        ) from None


def _query(url: str) -> list[tuple[str, str]]:
    return parse_qsl(urlsplit(url).query, keep_blank_values=True)


def _read_redis_url(url: str) -> dict[str, Any]:
    """What redis-py takes a URL to say."""
    found: dict[str, Any] = redis.ConnectionPool.from_url(url).connection_kwargs
    return found


def _is_redis_url(text: str) -> bool:
    """Whether both redis-py and kombu understand a URL; nothing is connected."""
    try:
        parts = urlsplit(text)
        redis.ConnectionPool.from_url(text).make_connection()
    except (ValueError, TypeError, redis.RedisError):
        return False
    if parts.scheme == "unix":
        return bool(parts.path.strip("/"))
    # redis-py takes a database that is no number for 0.
    return bool(parts.hostname) and re.fullmatch(r"/?|/[0-9]+", parts.path) is not None


def _sentence(error: object, name: str, given: object, message: str) -> str:
    value = "" if error == "missing" else f"{given!r} is not accepted: "
    text = message.removeprefix("Value error, ")
    return f"{name}: {value}{text[:1].lower()}{text[1:]}"


_SECRET_FIELDS = {"redis_url", "token", "ak", "sk", "security_token", "iam_password"}


def load_settings() -> Settings:
    """Read the settings from the environment.

    Returns:
        The validated settings.

    Raises:
        SettingsError: one sentence for each variable that is not accepted, naming the variable,
            its value (unless secret) and what is accepted.
    """
    try:
        return Settings()
    except ValidationError as error:
        sentences = []
        for item in error.errors(include_url=False):
            if not item["loc"]:
                sentences.append(item["msg"].removeprefix("Value error, "))
                continue
            field = str(item["loc"][0])
            name = ENV_PREFIX + field.upper()
            if field in _SECRET_FIELDS:
                sentences.append(f"{name}: {item['msg'].removeprefix('Value error, ')}")
            else:
                sentences.append(_sentence(item["type"], name, item["input"], item["msg"]))
        raise SettingsError(". ".join(sentences)) from None


@functools.cache
def settings() -> Settings:
    """The settings of this process, read once."""
    return load_settings()
