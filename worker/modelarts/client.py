"""The API over HTTP: one pooled session, bounded in time and size, no redirects."""

from __future__ import annotations

import json
import math
import ssl
import time
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from typing import TYPE_CHECKING, Any, Final, Self

import aiohttp
from yarl import URL

from worker.modelarts.answers import (
    Answer,
    ApiError,
    Body,
    Failure,
    Verdict,
    VerdictKind,
    classify,
    parse_accepted_body,
    parse_error_body,
    parse_retry_after,
    printable,
)
from worker.modelarts.listing import parse_list
from worker.modelarts.names import Endpoint, validate_pool_name, validate_project_id
from worker.modelarts.pool import Pool, UnreadablePoolError, parse_tags
from worker.modelarts.schema import Node, Workload

if TYPE_CHECKING:
    from collections.abc import Callable
    from datetime import timedelta

    from aiohttp.client_middlewares import ClientHandlerType
    from aiohttp.client_reqrep import ConnectionKey
    from aiohttp.connector import Connection
    from aiohttp.tracing import Trace

    from worker.modelarts.answers import ErrorBody
    from worker.modelarts.auth import Authenticator
    from worker.modelarts.listing import ListedPool

SMALL_BODY: Final = 1 << 20
LARGE_BODY: Final = 256 << 20
PAGE: Final = 500
MOST_PAGES: Final = 200
"""A list that goes on after so many pages is not paged as the API says."""
_REQUEST_ID = "X-Request-Id"


@dataclass(frozen=True, slots=True)
class PoolListing:
    """A project's pools.

    Attributes:
        pools: those that could be read.
        unreadable: those that could not be.
    """

    pools: list[Pool]
    unreadable: list[ListedPool]


@dataclass(frozen=True, slots=True)
class ClientOptions:
    """How calls are made.

    Attributes:
        connect_timeout_s: seconds until a connection must stand.
        total_timeout_s: seconds until the whole answer must be there.
        max_connections: connections at once.
        request_type: the header `request-type`; None: not sent.
        user_id: the header `X-ModelArts-User-ID`; None: not sent.
        user_agent: the header `User-Agent`.
    """

    connect_timeout_s: float = 5
    total_timeout_s: float = 30
    max_connections: int = 120
    request_type: str | None = None
    user_id: str | None = None
    user_agent: str = "poolsweep"


class ModelArtsClient:
    """The calls that poolsweep makes.

    Args:
        endpoint: the API's base URL.
        authenticator: signs in.
        options: how calls are made.
        observe: is told what came of each call, reads too; it must neither wait nor raise.
    """

    def __init__(
        self,
        endpoint: Endpoint,
        authenticator: Authenticator,
        options: ClientOptions,
        *,
        observe: Callable[[Answer], None] | None = None,
    ) -> None:
        self._endpoint = endpoint
        self._authenticator = authenticator
        self._options = options
        self._observe = observe
        self._session: aiohttp.ClientSession | None = None
        self._headers = {"Content-Type": "application/json", "User-Agent": options.user_agent}
        if options.request_type:
            self._headers["request-type"] = options.request_type
        if options.user_id:
            self._headers["X-ModelArts-User-ID"] = options.user_id

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.aclose()

    @property
    def endpoint(self) -> str:
        """The API's base URL."""
        return self._endpoint.url

    async def aclose(self) -> None:
        """Close the pooled connections."""
        if self._session:
            await self._session.close()
            self._session = None

    async def renew_credentials(self, project_id: str) -> None:
        """Get new credentials after a 401, if that is possible and was not done already.

        Raises:
            AuthError: there are none to be had.
        """
        await self._authenticator.renew(project_id)

    async def delete_pool(
        self, project_id: str, pool_name: str, *, before: Callable[[], None] | None = None
    ) -> Answer:
        """Exactly one DELETE on the wire.

        Args:
            project_id, pool_name: the pool.

        Returns:
            What came back; trouble on the way is an answer too.

        Raises:
            ValueError: a name that must not stand in a path; nothing is sent.
            AuthError: signing in failed; nothing is sent.
            RedisError: the shared token cannot be read; nothing is sent.

        Source: the API document, DELETE /v2/{project_id}/pools/{pool_name}.
        """
        path = _pool_path(project_id, pool_name)
        answer, _ = await self._call(
            "DELETE", project_id, path, parse=parse_accepted_body, before=before
        )
        return answer

    async def list_pools(self, project_id: str) -> PoolListing:
        """All pools of a project.

        Raises:
            ValueError, AuthError: as with `delete_pool`.
            ApiError: the API does not answer with a list.

        Source: the API document, GET /v2/{project_id}/pools.
        """
        listing = PoolListing([], [])
        for listed in await self.list_unread(project_id):
            try:
                pool = listed.read()
                # What must not stand in a path can neither be looked at nor deleted.
                validate_pool_name(pool.pool_id)
            except ValueError:  # UnreadablePoolError is one
                listing.unreadable.append(listed)
            else:
                listing.pools.append(pool)
        return listing

    async def list_unread(self, project_id: str) -> list[ListedPool]:
        """All pools of a project, for who needs to read only some.

        Raises:
            ValueError, AuthError, ApiError: as with `list_pools`.

        Source: the API document, GET /v2/{project_id}/pools.
        """
        path = f"/v2/{validate_project_id(project_id)}/pools"
        what = "listing the pools"
        return _items(await self._read(what, project_id, path, LARGE_BODY, parse_list), what)

    async def show_pool(self, project_id: str, pool_name: str) -> Pool | None:
        """One pool; None only if the API itself says that it is not found.

        Raises:
            ValueError, AuthError: as with `delete_pool`.
            ApiError: the API answers neither with the pool nor that it is not found.

        Source: the API document, GET /v2/{project_id}/pools/{pool_name}.
        """
        what = f"reading pool {pool_name}"
        try:
            document = await self._read(what, project_id, _pool_path(project_id, pool_name))
        except ApiError as error:
            if error.verdict.kind is VerdictKind.ALREADY_DELETED:
                return None
            raise
        try:
            pool = Pool.parse(document)
        except UnreadablePoolError:
            pool = None
        if pool is None or pool.pool_id != pool_name:
            raise _not_understood(what, "the answer is not that pool")
        return pool

    async def show_pool_tags(self, project_id: str, pool_name: str) -> dict[str, str]:
        """The tags of a pool, from the tag service.

        Raises:
            ValueError, AuthError, ApiError: as with `show_pool`.
            UnreadableTagsError: they are in no form that is understood.

        Source: the API document, GET /v1/{project_id}/pools/{pool_name}/tags.
        """
        path = _pool_path(project_id, pool_name, "v1") + "/tags"
        document = await self._read(f"reading the tags of pool {pool_name}", project_id, path)
        return parse_tags(json.dumps(document.get("tags")))

    async def list_nodes(self, project_id: str, pool_name: str) -> list[Node]:
        """The nodes of a pool.

        Raises:
            ValueError, AuthError, ApiError: as with `list_pools`.
        """
        what = f"listing the nodes of pool {pool_name}"
        path = _pool_path(project_id, pool_name) + "/nodes"
        document = await self._read(what, project_id, path, LARGE_BODY)
        return [Node.model_validate(raw) for raw in _objects(document, what)]

    async def list_workloads(self, project_id: str, pool_name: str) -> list[Workload]:
        """What runs in a pool, all pages of it.

        Raises:
            ValueError, AuthError, ApiError: as with `list_pools`.

        Source: the API document, GET /v2/{project_id}/pools/{pool_name}/workloads.
        """
        what = f"listing the workloads of pool {pool_name}"
        path = _pool_path(project_id, pool_name) + "/workloads"
        found: list[Workload] = []
        for _ in range(MOST_PAGES):
            query = f"?limit={PAGE}&offset={len(found)}"
            document = await self._read(what, project_id, path + query, LARGE_BODY)
            page = [Workload.model_validate(raw) for raw in _objects(document, what)]
            found += page
            total = document.get("total")
            # The API may give smaller pages than were asked for, and says how many there are.
            more = len(found) < total if isinstance(total, int) else len(page) == PAGE
            if not page or not more:
                return found
        raise _not_understood(what, f"the list has not ended after {MOST_PAGES} pages")

    async def monitor(
        self, project_id: str, pool_name: str, *, window: timedelta, period: timedelta
    ) -> dict[str, Any]:
        """The utilisation of a pool until now, as the API gives it; see `activity.parse_usage`.

        Args:
            project_id, pool_name: the pool.
            window: how far back.
            period: how far apart the points are: 60, 300, 900 or 3600 seconds.

        Raises:
            ValueError, AuthError, ApiError: as with `list_pools`.

        Source: the API document, GET /v2/{project_id}/pools/{pool_name}/monitor; the form of
            time_range is that of the cloud's document "Monitoring a Resource Pool".
        """
        query = (
            f"?time_range=-1.-1.{math.ceil(window.total_seconds() / 60)}"
            f"&statistics=maximum&period={round(period.total_seconds())}"
        )
        path = _pool_path(project_id, pool_name) + "/monitor" + query
        what = f"reading the utilisation of pool {pool_name}"
        return await self._read(what, project_id, path, LARGE_BODY)

    async def _read(
        self,
        what: str,
        project_id: str,
        path: str,
        limit: int = SMALL_BODY,
        parse: Callable[[bytes], ErrorBody] = parse_error_body,
    ) -> dict[str, Any]:
        answer, document = await self._call("GET", project_id, path, limit, parse)
        if answer.status == 401:
            await self.renew_credentials(project_id)
            answer, document = await self._call("GET", project_id, path, limit, parse)
        if answer.status == 200 and document is not None:
            return document
        verdict = classify(answer)
        if verdict.kind in {VerdictKind.ACCEPTED, VerdictKind.RENEW}:
            verdict = replace(verdict, kind=VerdictKind.FAILED)
        if verdict.kind is VerdictKind.FAILED and answer.status == 204:
            verdict = replace(verdict, reason="HTTP 204: an empty answer")
        raise ApiError(what, answer, verdict)

    async def _call(
        self,
        method: str,
        project_id: str,
        path: str,
        limit: int = SMALL_BODY,
        parse: Callable[[bytes], ErrorBody] = parse_error_body,
        before: Callable[[], None] | None = None,
    ) -> tuple[Answer, dict[str, Any] | None]:
        """What came back, and the object in its body, if it is one."""
        signed = await self._authenticator.headers(method, self._endpoint, path, project_id)
        if before is not None:
            before()
        # What was signed must be sent to the letter, so the URL is not to be quoted again.
        url = URL(self._endpoint.url + path, encoded=True)
        started = time.perf_counter()
        status, error_body, request_id, retry_after_s = None, parse_error_body(b""), "", None
        failure, detail = None, ""
        try:
            async with self._open().request(
                method, url, headers={**self._headers, **signed}, allow_redirects=False
            ) as response:
                raw = await _bounded(response, limit)
                status = response.status
                request_id = response.headers.get(_REQUEST_ID, "")
                header = response.headers.get("Retry-After")
                retry_after_s = parse_retry_after(header, datetime.now(UTC)) if header else None
            error_body = parse(raw) if status == 200 else parse_error_body(raw)
            if status == 401:
                date = _moment(response.headers.get("Date", ""))
                self._authenticator.refused(project_id, signed, date)
        except _OversizedError:
            failure = Failure.OVERSIZED
        except (aiohttp.ClientError, TimeoutError, OSError, ValueError) as error:
            failure, detail = _failure(error)
        answer = Answer(
            method=method,
            status=status,
            body=error_body.body,
            error_code=error_body.error_code,
            error_msg=error_body.error_msg,
            request_id=printable(request_id, 64) or error_body.request_id,
            retry_after_s=retry_after_s,
            failure=failure,
            detail=detail,
            duration_s=time.perf_counter() - started,
            received_ms=time.time_ns() // 1_000_000,
        )
        if self._observe is not None:
            self._observe(answer)
        return answer, error_body.document

    def _open(self) -> aiohttp.ClientSession:
        if self._session is None:
            options = self._options
            self._session = aiohttp.ClientSession(
                connector=_Connector(limit=options.max_connections),
                timeout=aiohttp.ClientTimeout(
                    total=options.total_timeout_s, sock_connect=options.connect_timeout_s
                ),
                cookie_jar=aiohttp.DummyCookieJar(),
                middlewares=[_send_once],
            )
        return self._session


class _OversizedError(Exception):
    pass


class _ConnectionLostError(aiohttp.ClientConnectionError):
    pass


class _Connector(aiohttp.TCPConnector):
    """Pools connections, but uses none again on which something came that nobody asked for.

    A server or proxy that gives up an idle connection may say so (408, 400), and that would pass
    for the answer to the next call. aiohttp looks only whether the connection still stands.
    """

    async def _get(self, key: ConnectionKey, traces: list[Trace]) -> Connection | None:
        while connection := await super()._get(key, traces):
            if connection.protocol is not None and not connection.protocol.should_close:
                return connection
            connection.close()
        return None


async def _send_once(
    request: aiohttp.ClientRequest, handler: ClientHandlerType
) -> aiohttp.ClientResponse:
    """Keeps aiohttp from sending a request again by itself when a pooled connection is lost.

    An attempt is one call: the limiter, the ledger and the attempts' bound count on it.
    """
    try:
        return await handler(request)
    except (aiohttp.ConnectionTimeoutError, aiohttp.ClientConnectorError):
        raise
    except (aiohttp.ClientOSError, aiohttp.ServerDisconnectedError) as error:
        raise _ConnectionLostError(str(error)) from error


async def _bounded(response: aiohttp.ClientResponse, limit: int) -> bytes:
    """The body as decompressed, read no further than the limit in bytes."""
    chunks, size = [], 0
    async for chunk in response.content.iter_any():
        chunks.append(chunk)
        size += len(chunk)
        if size > limit:
            raise _OversizedError  # leaving the response half read closes its connection
    # An empty body may mean success; one that was cut before its content does not. (What is read
    # from an answer that can have no body does not count its bytes.)
    if not size and getattr(response.content, "total_compressed_bytes", None):
        raise aiohttp.ClientPayloadError("a compressed body that ends before its content")
    return b"".join(chunks)


def _moment(text: str) -> datetime | None:
    """The header Date; None if it is unreadable."""
    try:
        moment = parsedate_to_datetime(text)
    except (TypeError, ValueError, OverflowError):
        return None
    return moment if moment.tzinfo else moment.replace(tzinfo=UTC)


def _failure(error: Exception) -> tuple[Failure, str]:
    detail = printable(str(error) or type(error).__name__)
    if isinstance(
        error, aiohttp.ClientConnectorCertificateError | aiohttp.ClientSSLError | ssl.SSLError
    ):
        return Failure.TLS, detail
    if isinstance(error, TimeoutError):
        return Failure.TIMEOUT, detail
    if isinstance(error, aiohttp.ClientConnectorError):
        return Failure.CONNECT, detail
    if isinstance(error, aiohttp.ClientConnectionError | aiohttp.ClientPayloadError | OSError):
        return Failure.RESET, detail
    return Failure.INVALID, detail


def _pool_path(project_id: str, pool_name: str, version: str = "v2") -> str:
    # Both are of characters that need no quoting; anything else does not get here.
    return f"/{version}/{validate_project_id(project_id)}/pools/{validate_pool_name(pool_name)}"


def _items(document: dict[str, Any], what: str) -> list[Any]:
    items = document.get("items")
    if not isinstance(items, list):
        raise _not_understood(what, "the answer holds no list of items")
    return items


def _objects(document: dict[str, Any], what: str) -> list[dict[str, Any]]:
    items = _items(document, what)
    if not all(isinstance(item, dict) for item in items):
        raise _not_understood(what, "the list holds something that is not an object")
    return items


def _not_understood(what: str, why: str) -> ApiError:
    answer = Answer(method="GET", status=200, body=Body.OBJECT)
    return ApiError(what, answer, Verdict(VerdictKind.FAILED, why))
