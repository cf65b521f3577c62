"""What the simulated cloud is like."""

from __future__ import annotations

import hashlib
from typing import Annotated, Final, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

Share = Annotated[float, Field(ge=0, le=1)]
FIRST_PROJECT = "0123456789abcdef0123456789abcdef"
_RANDOM_FAULTS: Final = ("rate_429", "rate_5xx", "reset_rate", "hang_rate")
_BEHAVIOURS: Final = ("gone", "throttled", "flaky", "doomed", "stuck")


def _check_sum(model: BaseModel, names: tuple[str, ...]) -> None:
    """One draw decides among shares, so together they are no more than everything."""
    shares = {name: getattr(model, name) for name in names}
    if sum(shares.values()) > 1 + 1e-9:
        given = ", ".join(f"{name} {share:g}" for name, share in shares.items() if share)
        raise ValueError(f"{given} are more than all; accepted: shares of at most 1 together")


class Faults(BaseModel):
    """What goes wrong at random, as shares of all calls.

    Attributes:
        rate_429: answered 429 with `Retry-After: 1`.
        rate_5xx: answered 500, 502 or 503.
        latency_ms: added to every answer.
        reset_rate: the connection is reset instead of an answer.
        hang_rate: no answer for two minutes.
        quota: calls a second and project; above it 429. 0: no limit.
        quota_burst: calls above the quota that a second may have.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    rate_429: Share = 0
    rate_5xx: Share = 0
    latency_ms: float = Field(default=0, ge=0, le=60_000)
    reset_rate: Share = 0
    hang_rate: Share = 0
    quota: float = Field(default=0, ge=0)
    quota_burst: int = Field(default=0, ge=0)

    @model_validator(mode="after")
    def _shares_fit_together(self) -> Self:
        _check_sum(self, _RANDOM_FAULTS)
        return self


class SandboxConfig(BaseModel):
    """The simulated cloud.

    Attributes:
        pools, projects, seed: how many pools in how many projects; the same seed makes the same.
        delete_seconds: how long a deletion takes, give or take a half.
        gone, throttled, flaky, doomed, stuck: shares of the deletable pools whose DELETE says
            that somebody else was quicker; is refused by 429 or 5xx at first; fails for good; is
            accepted and never ends.
        auth: whether calls must be signed in.
        token, ak, sk, security_token, iam_user, iam_password, iam_domain: what lets one in.
        token_seconds: how long a token of the identity service lives.
        faults: what goes wrong at random.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    pools: int = Field(default=500, ge=0, le=1_000_000)
    projects: int = Field(default=1, ge=1, le=1_000)
    seed: int = 7
    delete_seconds: float = Field(default=2.0, ge=0)
    gone: Share = 0
    throttled: Share = 0
    flaky: Share = 0
    doomed: Share = 0
    stuck: Share = 0
    auth: bool = True
    token: str = "sandbox-token"  # noqa: S105 - lets one in to the sandbox only
    ak: str = "SANDBOXACCESSKEY"
    sk: str = "sandbox-secret-key"
    security_token: str | None = None
    iam_user: str = "sandbox-user"
    iam_password: str = "sandbox-password"  # noqa: S105
    iam_domain: str = "sandbox-domain"
    token_seconds: float = Field(default=86_400, gt=0)
    faults: Faults = Faults()

    @model_validator(mode="after")
    def _shares_fit_together(self) -> Self:
        _check_sum(self, _BEHAVIOURS)
        return self

    @property
    def project_ids(self) -> list[str]:
        """The projects' ids; the first is always the same."""
        others = (
            hashlib.sha256(f"project {number}".encode()).hexdigest()[:32]
            for number in range(1, self.projects)
        )
        return [FIRST_PROJECT, *others]
