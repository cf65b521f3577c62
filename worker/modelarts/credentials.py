"""What the user signs in with."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pydantic import SecretStr

    from worker.modelarts.names import Endpoint


class AuthError(RuntimeError):
    """Signing in failed; the text is one sentence.

    Attributes:
        temporary: whether it may succeed later, unlike with wrong credentials.
    """

    def __init__(self, sentence: str, *, temporary: bool) -> None:
        super().__init__(sentence)
        self.temporary = temporary


@dataclass(frozen=True)
class Token:
    """Signing in with a token that the user got.

    Attributes:
        value: the token.
    """

    value: SecretStr


@dataclass(frozen=True)
class AccessKey:
    """Signing in with an access key.

    Attributes:
        ak, sk: the key and its secret.
        security_token: with temporary credentials: their token.
    """

    ak: SecretStr
    sk: SecretStr
    security_token: SecretStr | None = None


@dataclass(frozen=True)
class IamUser:
    """Signing in as a user of the identity service.

    Attributes:
        endpoint: the identity service.
        name, password, domain: the user's.
    """

    endpoint: Endpoint
    name: str
    password: SecretStr
    domain: str


Credentials = Token | AccessKey | IamUser
