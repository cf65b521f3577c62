"""Signing in: a token given by the user, an IAM token fetched and renewed, or AK/SK signatures.

Source: the API document, "Signing in".
"""

from __future__ import annotations

import asyncio
import base64
import contextlib
import hashlib
import json
import ssl
import time
from collections import defaultdict
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Final, Protocol
from urllib.parse import parse_qsl

import aiohttp
import structlog
from cryptography.fernet import Fernet, InvalidToken
from cryptography.hazmat.primitives.kdf.scrypt import Scrypt
from huaweicloudsdkcore.sdk_request import SdkRequest
from huaweicloudsdkcore.signer.signer import Signer
from redis.exceptions import LockError

from worker.modelarts.answers import printable
from worker.modelarts.credentials import AccessKey, AuthError, IamUser, Token

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Mapping
    from contextlib import AbstractAsyncContextManager

    from pydantic import SecretStr
    from redis.asyncio import Redis

    from worker.modelarts.credentials import Credentials
    from worker.modelarts.names import Endpoint

log = structlog.get_logger(__name__)

IAM_TIMEOUT_S: Final = 30.0
RENEW_BEFORE_S: Final = 600.0
"""A token is renewed this long before its end, or a tenth of its life before if that is less."""
FETCH_LOCK_S: Final = 30
"""A worker that dies while it fetches a token keeps the others waiting no longer than this."""
REFUSAL_PAUSE_S: Final = 60.0
"""A refused user is not signed in again before: some wrong passwords lock a user out."""
SIGNATURE_LIFE_S: Final = 900.0
"""The cloud's gateway refuses a signature whose date is further from its own clock.

Source: the cloud's API Gateway FAQ, "signature expired".
"""
_TOKEN_LIMIT = 8 << 20


class Authenticator(Protocol):
    """Makes a request one that the API lets in."""

    async def headers(
        self, method: str, endpoint: Endpoint, path: str, project_id: str
    ) -> dict[str, str]:
        """The headers to send with a request that has no body.

        Args:
            method: the HTTP method.
            endpoint: where it goes.
            path: the path and query exactly as they are sent.
            project_id: the project that it is about.

        Raises:
            AuthError: there are none to be had.
        """
        ...

    def refused(
        self, project_id: str, headers: Mapping[str, str], answered: datetime | None = None
    ) -> None:
        """The API answered 401: what was sent is not to be sent again, if there can be other.

        Args:
            project_id: the project that the request was about.
            headers: those that it was sent with.
            answered: when, by the API's clock; None: it does not say.
        """
        ...

    async def renew(self, project_id: str) -> None:
        """Get new credentials in place of refused ones, unless that is done already.

        Raises:
            AuthError: there are none to be had.
        """
        ...


def make_authenticator(credentials: Credentials, redis: Redis | None) -> Authenticator:
    """What signs requests in.

    Args:
        credentials: the user's.
        redis: where workers share an IAM token, sealed; None: they do not.
    """
    match credentials:
        case Token():
            return TokenAuthenticator(credentials)
        case AccessKey():
            return AccessKeyAuthenticator(credentials)
        case IamUser():
            cache = None if redis is None else RedisTokenCache(redis, credentials)
            return IamAuthenticator(credentials, cache)


class ProjectAuthenticator:
    """Signs in to each project with its own credentials, if it has any.

    Args:
        own: what signs in, by project id.
        others: what signs in to all other projects; None: nothing does.
    """

    def __init__(self, own: Mapping[str, Authenticator], others: Authenticator | None) -> None:
        self._own = own
        self._others = others

    async def headers(
        self, method: str, endpoint: Endpoint, path: str, project_id: str
    ) -> dict[str, str]:
        """The headers of the project's own authenticator."""
        return await self._of(project_id).headers(method, endpoint, path, project_id)

    def refused(
        self, project_id: str, headers: Mapping[str, str], answered: datetime | None = None
    ) -> None:
        """Told to the project's own authenticator."""
        self._of(project_id).refused(project_id, headers, answered)

    async def renew(self, project_id: str) -> None:
        """Done by the project's own authenticator."""
        await self._of(project_id).renew(project_id)

    def _of(self, project_id: str) -> Authenticator:
        found = self._own.get(project_id, self._others)
        if found is None:
            raise AuthError(
                f"Signing in failed: there are no credentials for project {project_id}.",
                temporary=False,
            )
        return found


class TokenAuthenticator:
    """Sends the user's token.

    Args:
        credentials: the token.
    """

    def __init__(self, credentials: Token) -> None:
        self._token = credentials.value

    async def headers(
        self, method: str, endpoint: Endpoint, path: str, project_id: str
    ) -> dict[str, str]:
        """The token's header."""
        return {"X-Auth-Token": _header_value("token", self._token)}

    def refused(
        self, project_id: str, headers: Mapping[str, str], answered: datetime | None = None
    ) -> None:
        """Nothing can be done: the token is the user's."""

    async def renew(self, project_id: str) -> None:
        """Nothing can be done: the token is the user's."""


@dataclass(frozen=True)
class _Key:
    ak: str = field(repr=False)
    sk: str = field(repr=False)


class AccessKeyAuthenticator:
    """Signs each request with an access key, by the official SDK's signer.

    Args:
        credentials: the access key.
    """

    def __init__(self, credentials: AccessKey) -> None:
        self._ak = credentials.ak
        self._sk = credentials.sk
        self._security_token = credentials.security_token
        self._behind_s = 0.0

    async def headers(
        self, method: str, endpoint: Endpoint, path: str, project_id: str
    ) -> dict[str, str]:
        """The signature and what it covers."""
        scheme, _, host = endpoint.url.partition("://")
        resource, _, query = path.partition("?")
        given = {"X-Project-Id": project_id, "Content-Type": "application/json"}
        if self._security_token is not None:
            given["X-Security-Token"] = _header_value("security token", self._security_token)
        key = _Key(_header_value("access key", self._ak), self._sk.get_secret_value().strip())
        request = SdkRequest(
            method=method,
            schema=scheme,
            host=host,
            resource_path=resource,
            query_params=parse_qsl(query, keep_blank_values=True),  # the signer quotes again
            header_params=given,
            body="",
        )
        signed: dict[str, str] = Signer(key).sign(request).header_params
        return signed

    def refused(
        self, project_id: str, headers: Mapping[str, str], answered: datetime | None = None
    ) -> None:
        """Look whether the clock is to blame, by the dates of the request and of the answer."""
        signed = datetime.strptime(headers["X-Sdk-Date"], "%Y%m%dT%H%M%SZ").replace(tzinfo=UTC)
        self._behind_s = (answered - signed).total_seconds() if answered else 0.0

    async def renew(self, project_id: str) -> None:
        """Nothing can be done: the keys are the user's.

        Raises:
            AuthError: the clock is to blame, which signs no request that counts.
        """
        if abs(self._behind_s) > SIGNATURE_LIFE_S:
            side = "behind" if self._behind_s > 0 else "ahead of"
            raise AuthError(
                f"Signing in failed: this machine's clock is {abs(self._behind_s) / 60:.0f} min "
                f"{side} the cloud's, which refuses signatures that are more than "
                f"{SIGNATURE_LIFE_S / 60:.0f} min off: set the clock.",
                temporary=False,
            )


def _header_value(what: str, secret: SecretStr) -> str:
    """A secret as it may stand in a header; white space around it came with a file or a paste."""
    text = secret.get_secret_value().strip()
    if not _fits_header(text):
        raise AuthError(
            f"Signing in failed: the {what} is not one; accepted: one line of printable ASCII "
            "characters.",
            temporary=False,
        )
    return text


def _fits_header(text: str) -> bool:
    return text != "" and text.isascii() and text.isprintable()


@dataclass(frozen=True)
class IamToken:
    """A token of the identity service, and when it ends (s since the epoch)."""

    value: str = field(repr=False)
    ends: float
    issued: float

    def is_good(self, now: float) -> bool:
        """Whether it need not be renewed yet."""
        return now < self.ends - min(RENEW_BEFORE_S, (self.ends - self.issued) / 10)


class TokenCache(Protocol):
    """Where the workers share their tokens."""

    async def get(self, project_id: str) -> IamToken | None:
        """The shared token of a project, if there is one."""
        ...

    async def put(self, project_id: str, token: IamToken) -> None:
        """Share a token until it ends."""
        ...

    def turn(self, project_id: str) -> AbstractAsyncContextManager[None]:
        """Waits, for a bounded time, until no other worker is fetching a token."""
        ...


@dataclass(frozen=True, slots=True)
class _Failure:
    """A sign-in that failed, and until when (monotonic s) its failure stands for others."""

    error: AuthError
    until: float


class IamAuthenticator:
    """Fetches a token for each project, shares it, and renews it before it ends.

    Args:
        user: who signs in.
        cache: where the token is shared; None: it is not.
    """

    def __init__(self, user: IamUser, cache: TokenCache | None) -> None:
        self._user = user
        self._cache = cache
        self._tokens: dict[str, IamToken] = {}
        self._refused: dict[str, str] = {}
        self._failures: dict[str, _Failure] = {}
        self._fetching: defaultdict[str, asyncio.Lock] = defaultdict(asyncio.Lock)

    async def headers(
        self, method: str, endpoint: Endpoint, path: str, project_id: str
    ) -> dict[str, str]:
        """The token's header."""
        return {"X-Auth-Token": (await self._token(project_id)).value}

    def refused(
        self, project_id: str, headers: Mapping[str, str], answered: datetime | None = None
    ) -> None:
        """Forget the token, unless it was replaced while the request was under way."""
        token = self._tokens.get(project_id)
        if token is not None and token.value == headers.get("X-Auth-Token"):
            self._refused[project_id] = token.value
            del self._tokens[project_id]

    async def renew(self, project_id: str) -> None:
        """Use another token: one that other calls or workers brought already, or a new one."""
        await self._token(project_id)

    def _good(self, project_id: str) -> IamToken | None:
        token = self._tokens.get(project_id)
        return token if token and token.is_good(time.time()) else None

    async def _token(self, project_id: str) -> IamToken:
        if token := self._good(project_id):
            return token
        asked = time.monotonic()
        async with self._fetching[project_id]:
            # Whoever held the lock before may have brought one, or tried in vain.
            if token := self._good(project_id):
                return token
            failure = self._failures.get(project_id)
            if failure and asked < failure.until:
                raise AuthError(str(failure.error), temporary=failure.error.temporary)
            try:
                token = await self._shared_or_fetched(project_id)
            except AuthError as error:
                pause_s = 0.0 if error.temporary else REFUSAL_PAUSE_S
                self._failures[project_id] = _Failure(error, time.monotonic() + pause_s)
                raise
            self._tokens[project_id] = token
            return token

    async def _shared_or_fetched(self, project_id: str) -> IamToken:
        cache = self._cache
        if cache is None:
            return await fetch_token(self._user, project_id)
        if token := await self._shared(cache, project_id):
            return token
        async with cache.turn(project_id):
            # Whoever had the turn before may have brought one.
            if token := await self._shared(cache, project_id):
                return token
            token = await fetch_token(self._user, project_id)
            await cache.put(project_id, token)
            return token

    async def _shared(self, cache: TokenCache, project_id: str) -> IamToken | None:
        token = await cache.get(project_id)
        if token is None or not token.is_good(time.time()):
            return None
        return None if token.value == self._refused.get(project_id) else token


async def fetch_token(user: IamUser, project_id: str, timeout_s: float = IAM_TIMEOUT_S) -> IamToken:
    """Ask the identity service for a token with the scope of a project.

    Args:
        user: who signs in.
        project_id: the project.
        timeout_s: seconds until the whole answer must be there.

    Raises:
        AuthError: the credentials are wrong, or the service does not answer as it should.
    """
    domain = {"name": user.domain}
    identity = {
        "methods": ["password"],
        "password": {
            "user": {
                "name": user.name,
                "password": user.password.get_secret_value(),
                "domain": domain,
            }
        },
    }
    request = {"auth": {"identity": identity, "scope": {"project": {"id": project_id}}}}
    url = f"{user.endpoint.url}/v3/auth/tokens"
    where = f"the identity service at {user.endpoint.url}"
    issued = time.time()
    try:
        async with (
            aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=timeout_s)) as session,
            session.post(url, json=request, allow_redirects=False) as response,
        ):
            value = response.headers.get("X-Subject-Token", "")
            body = await _bounded(response)
            status = response.status
    except (aiohttp.ClientError, TimeoutError) as error:
        why = printable(str(error)) or type(error).__name__
        raise AuthError(
            f"Signing in failed: {where} does not answer ({why}).",
            temporary=not isinstance(
                error, aiohttp.ClientConnectorCertificateError | ssl.SSLCertVerificationError
            ),
        ) from None
    if status in {400, 401, 403}:
        raise AuthError(
            f"Signing in failed: {where} refused the user, password, domain or project "
            f"(HTTP {status}).",
            temporary=False,
        )
    if status != 201 or not _fits_header(value):
        raise AuthError(
            f"Signing in failed: {where} answered HTTP {status} without a token.",
            temporary=status in {408, 425, 429} or status >= 500,
        )
    ends = _end_of(body, issued)
    if ends <= issued:
        raise AuthError(
            f"Signing in failed: the token from {where} has ended already by this machine's "
            "clock: check the clock.",
            temporary=True,
        )
    log.info("iam_token_fetched", project_id=project_id)
    return IamToken(value, ends, issued)


async def _bounded(response: aiohttp.ClientResponse) -> bytes:
    """The body to its end: it may come in many parts, as it lists the user's roles and services."""
    body = bytearray()
    async for chunk in response.content.iter_any():
        body += chunk
        if len(body) > _TOKEN_LIMIT:
            raise aiohttp.ClientPayloadError(f"the answer is larger than {_TOKEN_LIMIT} bytes")
    return bytes(body)


def _end_of(body: bytes, issued: float) -> float:
    """When a token ends by the service's answer; in an hour if it does not say so readably."""
    try:
        text = json.loads(body)["token"]["expires_at"]
        moment = datetime.fromisoformat(text)
        return (moment if moment.tzinfo else moment.replace(tzinfo=UTC)).timestamp()
    except (ValueError, TypeError, KeyError, OverflowError, RecursionError):
        return issued + 3_600


class RedisTokenCache:
    """Shares tokens through Redis, sealed: Redis never holds one in clear.

    The key is derived from the password, which every worker knows and Redis does not (scrypt,
    RFC 7914; Fernet seals with AES-CBC and HMAC-SHA256).

    Args:
        redis: a connection that decodes responses.
        user: whose tokens they are.
    """

    def __init__(self, redis: Redis, user: IamUser) -> None:
        self._redis = redis
        self._user = user
        self._identity = "\n".join((user.endpoint.url, user.domain, user.name))
        self._seal: Fernet | None = None
        self._sealing = asyncio.Lock()

    async def get(self, project_id: str) -> IamToken | None:
        """The shared token; None if there is none, or it was sealed with another password."""
        sealed = await self._redis.get(self._key(project_id))
        if sealed is None:
            return None
        try:
            text = (await self._fernet()).decrypt(str(sealed).encode())
            return IamToken(**json.loads(text))
        except (InvalidToken, ValueError, TypeError):
            return None

    async def put(self, project_id: str, token: IamToken) -> None:
        """Share a token until it ends."""
        text = json.dumps({"value": token.value, "ends": token.ends, "issued": token.issued})
        sealed = (await self._fernet()).encrypt(text.encode()).decode()
        life_s = max(1, int(token.ends - time.time()))
        await self._redis.set(self._key(project_id), sealed, ex=life_s)

    @contextlib.asynccontextmanager
    async def turn(self, project_id: str) -> AsyncIterator[None]:
        """Holds the lock that lets one worker at a time fetch; it frees itself if that one dies."""
        lock = self._redis.lock(
            self._key(project_id) + ":lock",
            timeout=FETCH_LOCK_S,
            blocking_timeout=FETCH_LOCK_S,
            sleep=0.1,
        )
        held = await lock.acquire()
        try:
            yield
        finally:
            if held:
                with contextlib.suppress(LockError):  # it took so long that another has it
                    await lock.release()

    def _key(self, project_id: str) -> str:
        text = f"{self._identity}\n{project_id}"
        return f"poolsweep:{{iam:{hashlib.sha256(text.encode()).hexdigest()[:16]}}}"

    async def _fernet(self) -> Fernet:
        async with self._sealing:
            if self._seal is None:
                salt = hashlib.sha256(self._identity.encode()).digest()
                derive = Scrypt(salt=salt, length=32, n=2**15, r=8, p=1).derive
                password = self._user.password.get_secret_value().encode()
                key = await asyncio.to_thread(derive, password)
                self._seal = Fernet(base64.urlsafe_b64encode(key))
            return self._seal
