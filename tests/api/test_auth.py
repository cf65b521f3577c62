"""Each way of signing in, against the sandbox that checks tokens and signatures for real."""

from __future__ import annotations

import asyncio
import base64
import dataclasses
import itertools
import json
import signal
import socket
import sys
import time
from contextlib import asynccontextmanager
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Any

import pytest
from aiohttp import ClientSession, web
from huaweicloudsdkcore.sdk_request import SdkRequest
from huaweicloudsdkcore.signer.signer import Signer
from hypothesis import given, settings
from hypothesis import strategies as st
from multidict import CIMultiDict
from pydantic import SecretStr

from sandbox.config import SandboxConfig
from sandbox.server import running_sandbox
from sandbox.signing import Keys, signature_fault
from tests.api.servers import POOL, PROJECT, calling, deletable, recording, self_signed
from tests.conftest import until
from worker.modelarts import AccessKey, AuthError, Endpoint, IamUser, Token, VerdictKind, classify
from worker.modelarts.auth import (
    FETCH_LOCK_S,
    RENEW_BEFORE_S,
    IamAuthenticator,
    IamToken,
    RedisTokenCache,
    make_authenticator,
)

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Mapping
    from pathlib import Path

    from redis.asyncio import Redis

    from sandbox.server import RunningSandbox
    from worker.modelarts import Credentials

AK, SK = "SANDBOXACCESSKEY", "sandbox-secret-key"
PASSWORD = "sandbox-password"
PATH = f"/v2/{PROJECT}/pools"
ENDPOINT = Endpoint("https://modelarts.example.com")


def access_key(ak: str = AK, sk: str = SK, security_token: str | None = None) -> AccessKey:
    sts = SecretStr(security_token) if security_token else None
    return AccessKey(SecretStr(ak), SecretStr(sk), sts)


def iam_user(url: str, password: str = PASSWORD) -> IamUser:
    return IamUser(Endpoint.parse(url), "sandbox-user", SecretStr(password), "sandbox-domain")


def token_requests(sandbox: RunningSandbox) -> list[int]:
    """The statuses of the calls that asked for a token."""
    return [call.status for call in sandbox.server.calls if call.path == "/v3/auth/tokens"]


async def revoke(sandbox: RunningSandbox) -> None:
    async with ClientSession() as session:
        (await session.post(f"{sandbox.url}/_sandbox/tokens/revoke")).raise_for_status()


@asynccontextmanager
async def cloud(**config: Any) -> AsyncIterator[RunningSandbox]:
    async with running_sandbox(SandboxConfig(**{"pools": 20, **config})) as sandbox:
        yield sandbox


# A token or an access key of the user's


@pytest.mark.parametrize(
    "credentials",
    [
        Token(SecretStr("sandbox-token")),
        Token(SecretStr("sandbox-token\n")),
        access_key(),
        access_key(f" {AK}\n", f"{SK}\r\n"),
    ],
    ids=["token", "token with a line end", "access key", "access key with white space"],
)
async def test_the_users_credentials_let_every_call_in(credentials: Credentials) -> None:
    async with cloud() as sandbox, calling(sandbox.url, credentials) as client:
        name = deletable(sandbox)[0]
        assert len((await client.list_pools(PROJECT)).pools) == 20
        assert await client.show_pool(PROJECT, name) is not None
        await client.show_pool_tags(PROJECT, name)
        await client.list_nodes(PROJECT, name)
        await client.list_workloads(PROJECT, name)  # with a query
        assert (await client.delete_pool(PROJECT, name)).status == 200
        assert {call.status for call in sandbox.server.calls} == {200}


@pytest.mark.parametrize(
    "credentials",
    [
        Token(SecretStr("another-token")),
        access_key(ak="ANOTHERACCESSKEY"),
        access_key(sk="another-secret-key"),
    ],
    ids=["token", "ak", "sk"],
)
async def test_wrong_credentials_are_answered_401_and_delete_nothing(
    credentials: Credentials,
) -> None:
    async with cloud() as sandbox, calling(sandbox.url, credentials) as client:
        name = deletable(sandbox)[0]
        answer = await client.delete_pool(PROJECT, name)
        await client.renew_credentials(PROJECT)  # changes nothing: they are the user's
        again = await client.delete_pool(PROJECT, name)
        assert sandbox.cloud.projects[PROJECT][name].deletes == 0
    assert [answer.status, again.status] == [401, 401]
    assert answer.error_code == "APIG.0301"
    assert classify(answer).kind is VerdictKind.RENEW


@pytest.mark.parametrize(
    ("security_token", "status"), [("sts-token", 200), ("another", 401), (None, 401)]
)
async def test_temporary_credentials_need_their_security_token(
    security_token: str | None, status: int
) -> None:
    async with (
        cloud(security_token="sts-token") as sandbox,
        calling(sandbox.url, access_key(security_token=security_token)) as client,
    ):
        answer = await client.delete_pool(PROJECT, deletable(sandbox)[0])
    assert answer.status == status


@pytest.mark.parametrize("text", ["", "  ", "a\nb: c", "tok\x00en", "tokén", "to\rken"])
@pytest.mark.parametrize("kind", ["token", "ak", "security_token"])
async def test_what_cannot_stand_in_a_header_is_refused_before_anything_is_sent(
    kind: str, text: str
) -> None:
    credentials: dict[str, Credentials] = {
        "token": Token(SecretStr(text)),
        "ak": AccessKey(SecretStr(text), SecretStr(SK)),
        "security_token": AccessKey(SecretStr(AK), SecretStr(SK), SecretStr(text)),
    }
    async with recording() as server, calling(server.url, credentials[kind]) as client:
        with pytest.raises(AuthError, match="accepted: one line of printable ASCII") as error:
            await client.delete_pool(PROJECT, POOL)
        assert server.received == []
    assert not error.value.temporary
    assert not text.strip() or text not in str(error.value)


def test_no_repr_shows_a_secret(redis_client: Redis) -> None:
    secrets = ["token-is-secret", "AKISSECRET", "sk-is-secret", "sts-is-secret", "pw-is-secret"]
    token, ak, sk, sts, password = map(SecretStr, secrets)
    objects: list[Any] = [
        Token(token),
        AccessKey(ak, sk, sts),
        IamUser(ENDPOINT, "name", password, "domain"),
        IamToken(secrets[0], 1, 0),
        Keys("ak", secrets[2]),
    ]
    for credentials in objects[:3]:
        authenticator = make_authenticator(credentials, redis_client)
        objects += [authenticator, *vars(authenticator).values()]
    objects.append(RedisTokenCache(redis_client, objects[2]))
    for item in objects:
        text = f"{item} {item!r} {item!s}"
        assert not [secret for secret in secrets if secret in text]


# Signatures


async def signed(path: str, method: str = "GET") -> CIMultiDict[str]:
    authenticator = make_authenticator(access_key(), None)
    return CIMultiDict(await authenticator.headers(method, ENDPOINT, path, PROJECT))


def fault(
    headers: Mapping[str, str], path: str, method: str = "GET", body: bytes = b"", sk: str = SK
) -> str:
    resource, _, query = path.partition("?")
    return signature_fault(Keys(AK, sk), method, resource, query, headers, body)


quoted = st.from_regex(r"([A-Za-z0-9._~-]|%[0-7][0-9A-F]|%C3%A9){1,12}", fullmatch=True)


@given(st.lists(st.tuples(quoted, quoted), max_size=4))
@settings(max_examples=40)
def test_a_signature_covers_any_query_as_it_is_sent(pairs: list[tuple[str, str]]) -> None:
    path = f"{PATH}?{'&'.join(f'{key}={value}' for key, value in pairs)}"
    headers = asyncio.run(signed(path))
    assert fault(headers, path) == ""
    assert fault(headers, path + "&more=1") == "the signature does not match"


@pytest.mark.parametrize("path", ["/", PATH, PATH + "/", PATH + "?workspaceId=0&status=", "/a%20b"])
async def test_a_signature_covers_the_path_with_or_without_a_slash_at_its_end(path: str) -> None:
    assert fault(await signed(path), path) == ""


async def test_a_signature_is_for_one_request_only() -> None:
    headers = await signed(PATH)
    assert fault(headers, PATH) == ""
    assert fault(headers, PATH, "DELETE")
    assert fault(headers, PATH + "/x")
    assert fault(headers, PATH + "?a=b")
    assert fault(headers, PATH, body=b"{}")
    assert fault(headers, PATH, sk="another-secret-key")
    for name in ("Host", "X-Project-Id", "Content-Type", "X-Sdk-Date"):
        other = headers.copy()
        other[name] = "20200101T000000Z"
        assert fault(other, PATH), name
        del other[name]
        assert fault(other, PATH), name


@pytest.mark.parametrize(
    ("minutes", "accepted"), [(-16, False), (-14, True), (14, True), (16, False)]
)
def test_a_signature_is_good_for_a_quarter_of_an_hour(minutes: int, accepted: bool) -> None:
    date = datetime.now(UTC) + timedelta(minutes=minutes)
    request = SdkRequest(
        method="GET",
        schema="https",
        host="modelarts.example.com",
        resource_path=PATH,
        query_params=[],
        header_params={"X-Sdk-Date": date.strftime("%Y%m%dT%H%M%SZ")},
        body="",
    )
    headers = CIMultiDict(Signer(Keys(AK, SK)).sign(request).header_params)
    assert (fault(headers, PATH) == "") is accepted


@pytest.mark.parametrize("text", ["", "soon", "20260101", "99999999T999999Z"])
def test_a_signature_with_an_odd_date_is_a_fault_and_no_crash(text: str) -> None:
    given = f"SDK-HMAC-SHA256 Access={AK}, SignedHeaders=host;x-sdk-date, Signature={'0' * 64}"
    headers = CIMultiDict({"Host": "x", "X-Sdk-Date": text, "Authorization": given})
    assert fault(headers, PATH) == "X-Sdk-Date is not a date"


async def test_a_signed_body_is_checked_too() -> None:
    async with cloud() as sandbox, ClientSession() as session:
        url = f"{sandbox.url}{PATH}/{deletable(sandbox)[0]}"
        request = SdkRequest(
            method="DELETE",
            schema="http",
            host=sandbox.url.removeprefix("http://"),
            resource_path=url.removeprefix(sandbox.url),
            query_params=[],
            header_params={"Content-Type": "application/json"},
            body="{ }",
        )
        headers = Signer(Keys(AK, SK)).sign(request).header_params
        async with session.delete(url, data=b"{  }", headers=headers) as response:
            assert response.status == 401
        async with session.delete(url, data=b"{ }", headers=headers) as response:
            assert response.status == 200


# The identity service


async def test_a_token_of_the_identity_service_is_fetched_once_for_many_calls() -> None:
    async with cloud() as sandbox, calling(sandbox.url, iam_user(sandbox.url)) as client:
        listings = await asyncio.gather(*(client.list_pools(PROJECT) for _ in range(50)))
        assert {len(listing.pools) for listing in listings} == {20}
        assert token_requests(sandbox) == [201]


async def test_each_project_has_a_token_of_its_own() -> None:
    async with cloud(projects=2) as sandbox, calling(sandbox.url, iam_user(sandbox.url)) as client:
        for project in sandbox.config.project_ids * 2:
            await client.list_pools(project)
        assert token_requests(sandbox) == [201, 201]


async def test_workers_that_start_at_once_share_one_token(redis_client: Redis) -> None:
    async with cloud() as sandbox:
        workers = [make_authenticator(iam_user(sandbox.url), redis_client) for _ in range(6)]
        calls = [
            worker.headers("GET", Endpoint(sandbox.url), PATH, PROJECT)
            for worker in workers
            for _ in range(5)
        ]
        answers = await asyncio.gather(*calls)
        assert len({answer["X-Auth-Token"] for answer in answers}) == 1
        assert token_requests(sandbox) == [201]


async def test_a_worker_that_starts_later_takes_the_shared_token(redis_client: Redis) -> None:
    async with cloud() as sandbox:
        for _ in range(3):
            async with calling(sandbox.url, iam_user(sandbox.url), redis_client) as client:
                await client.list_pools(PROJECT)
        assert token_requests(sandbox) == [201]


async def test_redis_never_holds_the_token_or_the_password(redis_client: Redis) -> None:
    async with cloud(faults={"latency_ms": 50}) as sandbox:
        authenticator = make_authenticator(iam_user(sandbox.url), redis_client)
        found: dict[str, str] = {}

        async def look() -> int:
            for key in await redis_client.keys():
                assert await redis_client.type(key) == "string"
                found[str(key)] = str(await redis_client.get(key))
            return len(found)

        signing_in = asyncio.create_task(
            authenticator.headers("GET", Endpoint(sandbox.url), PATH, PROJECT)
        )
        await until(look)  # while the token is being fetched
        headers = await signing_in
        assert await look() == 2
    token = headers["X-Auth-Token"]
    for text in itertools.chain(found, found.values()):
        raw = text.encode() + base64.urlsafe_b64decode(text + "==")
        for secret in (token, PASSWORD):
            assert secret.encode() not in raw
            assert base64.b64encode(secret.encode())[:-4] not in raw


async def test_the_shared_token_ends_in_redis_when_it_ends(redis_client: Redis) -> None:
    async with cloud(token_seconds=500) as sandbox:
        async with calling(sandbox.url, iam_user(sandbox.url), redis_client) as client:
            await client.list_pools(PROJECT)
        (key,) = await redis_client.keys()
        assert 0 < await redis_client.ttl(key) <= 500


async def test_a_worker_with_another_password_cannot_use_the_shared_token(
    redis_client: Redis,
) -> None:
    async with cloud() as sandbox:
        right = make_authenticator(iam_user(sandbox.url), redis_client)
        wrong = make_authenticator(iam_user(sandbox.url, "guessed"), redis_client)
        await right.headers("GET", Endpoint(sandbox.url), PATH, PROJECT)
        with pytest.raises(AuthError):
            await wrong.headers("GET", Endpoint(sandbox.url), PATH, PROJECT)
        assert token_requests(sandbox) == [201, 401]


async def test_what_redis_holds_of_another_make_is_fetched_anew(redis_client: Redis) -> None:
    async with cloud() as sandbox:
        for value in (None, "", "not sealed"):
            if value is not None:
                (key,) = await redis_client.keys()
                await redis_client.set(key, value)
            async with calling(sandbox.url, iam_user(sandbox.url), redis_client) as client:
                await client.list_pools(PROJECT)
        assert token_requests(sandbox) == [201] * 3


# Renewal


@given(
    life=st.floats(1, 1e6), share=st.floats(0, 1), issued=st.floats(0, 2e9, allow_subnormal=False)
)
def test_a_token_is_renewed_before_its_end_but_not_in_most_of_its_life(
    life: float, share: float, issued: float
) -> None:
    token = IamToken("x", issued + life, issued)
    now = issued + share * life
    if token.is_good(now):
        assert now < token.ends
    if share < 0.89:
        assert token.is_good(now)
    if now > token.ends - min(RENEW_BEFORE_S, 0.09 * life):
        assert not token.is_good(now)


async def test_a_token_near_its_end_is_renewed_though_it_still_lets_in(redis_client: Redis) -> None:
    async with cloud() as sandbox:
        user, now = iam_user(sandbox.url), time.time()
        cache = RedisTokenCache(redis_client, user)
        await cache.put(PROJECT, IamToken("an-old-one", now + 500, now - 86_000))
        authenticator = make_authenticator(user, redis_client)
        headers = await authenticator.headers("GET", Endpoint(sandbox.url), PATH, PROJECT)
        assert headers["X-Auth-Token"] != "an-old-one"
        assert token_requests(sandbox) == [201]
        await cache.put(PROJECT, IamToken("a-good-one", now + 700, now - 86_000))
        authenticator = make_authenticator(user, redis_client)
        headers = await authenticator.headers("GET", Endpoint(sandbox.url), PATH, PROJECT)
        assert headers["X-Auth-Token"] == "a-good-one"
        assert token_requests(sandbox) == [201]


async def test_a_short_lived_token_is_replaced_again_and_again(redis_client: Redis) -> None:
    async with (
        cloud(token_seconds=0.5) as sandbox,
        calling(sandbox.url, iam_user(sandbox.url), redis_client) as client,
    ):

        async def three_tokens() -> bool:
            await client.list_pools(PROJECT)
            return len(token_requests(sandbox)) >= 3

        await until(three_tokens)


async def test_a_read_with_a_revoked_token_renews_once_and_goes_on(redis_client: Redis) -> None:
    async with (
        cloud() as sandbox,
        calling(sandbox.url, iam_user(sandbox.url), redis_client) as client,
    ):
        await client.list_pools(PROJECT)
        await revoke(sandbox)  # Redis still holds the same token
        assert len((await client.list_pools(PROJECT)).pools) == 20
        await client.list_pools(PROJECT)
        assert token_requests(sandbox) == [201, 201]
        assert [call.status for call in sandbox.server.calls].count(401) == 1


async def test_a_worker_that_finds_a_revoked_token_in_redis_fetches_a_new_one(
    redis_client: Redis,
) -> None:
    async with cloud() as sandbox:
        async with calling(sandbox.url, iam_user(sandbox.url), redis_client) as client:
            await client.list_pools(PROJECT)
        await revoke(sandbox)
        async with calling(sandbox.url, iam_user(sandbox.url), redis_client) as client:
            assert (await client.delete_pool(PROJECT, deletable(sandbox)[0])).status == 401
            await client.renew_credentials(PROJECT)
            assert (await client.delete_pool(PROJECT, deletable(sandbox)[0])).status == 200
        assert token_requests(sandbox) == [201, 201]


@pytest.mark.parametrize("workers", [1, 4])
async def test_a_hundred_refused_calls_at_once_lead_to_one_new_token(
    redis_client: Redis, workers: int
) -> None:
    async with cloud(pools=2) as sandbox:
        user = iam_user(sandbox.url)
        authenticators = [make_authenticator(user, redis_client) for _ in range(workers)]
        endpoint = Endpoint(sandbox.url)
        before = [await one.headers("GET", endpoint, PATH, PROJECT) for one in authenticators]

        async def refused(number: int) -> dict[str, str]:
            one = authenticators[number % workers]
            one.refused(PROJECT, before[number % workers])
            await one.renew(PROJECT)
            return await one.headers("GET", endpoint, PATH, PROJECT)

        after = await asyncio.gather(*(refused(number) for number in range(100)))
        late = await refused(0)  # its answer came when the new token was there already
        tokens = {headers["X-Auth-Token"] for headers in [*after, late]}
        assert len(tokens) == 1
        assert tokens.isdisjoint(headers["X-Auth-Token"] for headers in before)
        assert token_requests(sandbox) == [201, 201]


async def test_refusals_that_are_dealt_with_one_by_one_lead_to_one_new_token(
    redis_client: Redis,
) -> None:
    async with (
        cloud(pools=200) as sandbox,
        calling(sandbox.url, iam_user(sandbox.url), redis_client) as client,
    ):
        await client.list_pools(PROJECT)
        await revoke(sandbox)
        names = deletable(sandbox)[:100]
        assert len(names) == 100
        answers = await asyncio.gather(*(client.delete_pool(PROJECT, name) for name in names))
        assert {answer.status for answer in answers} == {401}
        for name in names:  # as workers do that record each answer first
            await client.renew_credentials(PROJECT)
            assert (await client.delete_pool(PROJECT, name)).status == 200
        assert token_requests(sandbox) == [201, 201]


async def test_the_new_token_is_shared_with_workers_that_were_not_refused_yet(
    redis_client: Redis,
) -> None:
    async with (
        cloud() as sandbox,
        calling(sandbox.url, iam_user(sandbox.url), redis_client) as one,
        calling(sandbox.url, iam_user(sandbox.url), redis_client) as other,
    ):
        await one.list_pools(PROJECT)
        await other.list_pools(PROJECT)
        await revoke(sandbox)
        await one.list_pools(PROJECT)
        await other.list_pools(PROJECT)
        assert token_requests(sandbox) == [201, 201]


# Trouble with the identity service


async def test_a_wrong_password_is_a_sentence_and_is_tried_once(redis_client: Redis) -> None:
    async with cloud() as sandbox:
        password = "wrong-and-secret"
        user = iam_user(sandbox.url, password)
        async with calling(sandbox.url, user, redis_client) as client:
            calls = (client.delete_pool(PROJECT, name) for name in deletable(sandbox)[:8])
            errors = await asyncio.gather(*calls, return_exceptions=True)
            with pytest.raises(AuthError) as later:
                await client.list_pools(PROJECT)
        for error in [*errors, later.value]:
            assert isinstance(error, AuthError)
            assert not error.temporary
            assert str(error) == (
                f"Signing in failed: the identity service at {sandbox.url} refused the user, "
                "password, domain or project (HTTP 401)."
            )
            assert password not in repr(error)
        assert len(errors) == 8
        assert token_requests(sandbox) == [401]  # repeated, it might lock the user out
        assert await redis_client.keys() == []  # nobody is kept waiting


async def test_a_project_without_access_does_not_stand_for_the_others() -> None:
    async with cloud() as sandbox:
        authenticator = make_authenticator(iam_user(sandbox.url), None)
        endpoint = Endpoint(sandbox.url)
        with pytest.raises(AuthError, match="HTTP 403"):
            await authenticator.headers("GET", endpoint, PATH, "f" * 32)
        assert await authenticator.headers("GET", endpoint, PATH, PROJECT)


async def test_an_identity_service_that_cannot_be_reached_is_temporary_trouble(
    redis_client: Redis,
) -> None:
    with socket.socket() as reserved:
        reserved.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{reserved.getsockname()[1]}"
        authenticator = make_authenticator(iam_user(url), redis_client)
        calls = (authenticator.headers("GET", ENDPOINT, PATH, PROJECT) for _ in range(5))
        errors = await asyncio.gather(*calls, return_exceptions=True)
    for error in errors:
        assert isinstance(error, AuthError)
        assert error.temporary
        assert str(error).startswith(f"Signing in failed: the identity service at {url} does not")
        assert PASSWORD not in str(error)
    assert await redis_client.keys() == []


@pytest.mark.parametrize(
    ("status", "temporary"),
    [(429, True), (500, True), (503, True), (200, False), (201, False), (302, False), (404, False)],
)
async def test_an_answer_without_a_token_is_trouble_and_never_a_redirect(
    status: int, temporary: bool
) -> None:
    async with recording() as elsewhere:

        async def answer(_: web.BaseRequest) -> web.StreamResponse:
            return web.Response(status=status, headers={"Location": elsewhere.url})

        async with recording(answer) as identity:
            authenticator = make_authenticator(iam_user(identity.url), None)
            with pytest.raises(AuthError, match=f"HTTP {status} without a token") as error:
                await authenticator.headers("GET", ENDPOINT, PATH, PROJECT)
    assert error.value.temporary is temporary
    assert elsewhere.received == []
    assert len(identity.received) == 1


async def test_after_temporary_trouble_the_next_call_tries_again() -> None:
    statuses = iter([503, 201])

    async def answer(_: web.BaseRequest) -> web.StreamResponse:
        return web.json_response({}, status=next(statuses), headers={"X-Subject-Token": "t"})

    async with recording(answer) as identity:
        authenticator = make_authenticator(iam_user(identity.url), None)
        with pytest.raises(AuthError):
            await authenticator.headers("GET", ENDPOINT, PATH, PROJECT)
        headers = await authenticator.headers("GET", ENDPOINT, PATH, PROJECT)
    assert headers == {"X-Auth-Token": "t"}


async def test_a_password_is_not_sent_to_a_server_that_nobody_vouches_for(tmp_path: Path) -> None:
    async with recording(tls=self_signed(tmp_path)) as identity:
        authenticator = make_authenticator(iam_user(identity.url), None)
        with pytest.raises(AuthError, match="certificate") as error:
            await authenticator.headers("GET", ENDPOINT, PATH, PROJECT)
        assert identity.received == []
    assert not error.value.temporary


async def test_the_token_request_is_the_documented_one() -> None:
    async def answer(_: web.BaseRequest) -> web.StreamResponse:
        return web.json_response({}, status=201, headers={"X-Subject-Token": "t"})

    async with recording(answer) as identity:
        authenticator = make_authenticator(iam_user(identity.url), None)
        await authenticator.headers("GET", ENDPOINT, PATH, PROJECT)
    (request,) = identity.received
    assert (request.method, request.path) == ("POST", "/v3/auth/tokens")
    user = {"name": "sandbox-user", "password": PASSWORD, "domain": {"name": "sandbox-domain"}}
    assert json.loads(request.body) == {
        "auth": {
            "identity": {"methods": ["password"], "password": {"user": user}},
            "scope": {"project": {"id": PROJECT}},
        }
    }


async def test_the_end_of_a_token_is_read_from_an_answer_that_comes_in_parts(
    redis_client: Redis,
) -> None:
    ends = datetime(2090, 1, 1, tzinfo=UTC)

    async def answer(request: web.BaseRequest) -> web.StreamResponse:
        response = web.StreamResponse(status=201, headers={"X-Subject-Token": "t"})
        await response.prepare(request)
        token = {"catalog": ["x" * 300_000], "expires_at": ends.isoformat()}
        text = json.dumps({"token": token}).encode()
        for start in range(0, len(text), 50_000):
            await response.write(text[start : start + 50_000])
            await asyncio.sleep(0.01)
        return response

    async with recording(answer) as identity:
        user = iam_user(identity.url)
        await make_authenticator(user, redis_client).headers("GET", ENDPOINT, PATH, PROJECT)
        shared = await RedisTokenCache(redis_client, user).get(PROJECT)
    assert shared is not None
    assert shared.ends == ends.timestamp()


@pytest.mark.parametrize("body", ["", "<html>", "[]", '{"token": 7}', '{"token": {}}', "[" * 9_000])
async def test_a_token_whose_end_is_unreadable_is_good_for_an_hour(
    redis_client: Redis, body: str
) -> None:
    async def answer(_: web.BaseRequest) -> web.StreamResponse:
        return web.Response(status=201, text=body, headers={"X-Subject-Token": "t"})

    async with recording(answer) as identity:
        user = iam_user(identity.url)
        await make_authenticator(user, redis_client).headers("GET", ENDPOINT, PATH, PROJECT)
        shared = await RedisTokenCache(redis_client, user).get(PROJECT)
    assert shared is not None
    assert shared.ends - shared.issued == 3_600


async def test_a_token_that_has_ended_on_arrival_points_to_the_clock() -> None:
    async def answer(_: web.BaseRequest) -> web.StreamResponse:
        token = {"token": {"expires_at": "2020-01-01T00:00:00.000000Z"}}
        return web.json_response(token, status=201, headers={"X-Subject-Token": "t"})

    async with recording(answer) as identity:
        authenticator = make_authenticator(iam_user(identity.url), None)
        with pytest.raises(AuthError, match="check the clock"):
            await authenticator.headers("GET", ENDPOINT, PATH, PROJECT)


# Workers that go while they fetch a token

DYING_WORKER = """
import asyncio, sys
from pydantic import SecretStr
from redis.asyncio import Redis
from worker.modelarts import Endpoint, IamUser
from worker.modelarts.auth import RedisTokenCache

async def main(redis_url, url, project):
    user = IamUser(Endpoint(url), "sandbox-user", SecretStr("sandbox-password"), "sandbox-domain")
    cache = RedisTokenCache(Redis.from_url(redis_url, decode_responses=True), user)
    async with cache.turn(project):
        print("fetching", flush=True)
        await asyncio.sleep(600)

asyncio.run(main(*sys.argv[1:]))
"""


async def locks_asked_for(redis: Redis) -> int:
    statistics: dict[str, Any] = await redis.info("commandstats")
    return int(statistics["cmdstat_set"]["calls"])


async def test_a_worker_that_is_killed_while_it_fetches_keeps_nobody_waiting_for_long(
    redis_url: str, redis_client: Redis
) -> None:
    async with cloud() as sandbox:
        worker = await asyncio.create_subprocess_exec(
            *(sys.executable, "-c", DYING_WORKER, redis_url, sandbox.url, PROJECT),
            stdout=asyncio.subprocess.PIPE,
        )
        assert worker.stdout is not None
        assert await worker.stdout.readline() == b"fetching\n"
        worker.send_signal(signal.SIGKILL)
        await worker.wait()

        (lock,) = await redis_client.keys()
        assert 0 < await redis_client.ttl(lock) <= FETCH_LOCK_S
        user = iam_user(sandbox.url)
        others = [make_authenticator(user, redis_client) for _ in range(3)]
        asked_before = await locks_asked_for(redis_client)
        calls = [
            asyncio.create_task(other.headers("GET", Endpoint(sandbox.url), PATH, PROJECT))
            for other in others
        ]

        async def asked_twice() -> bool:
            return await locks_asked_for(redis_client) >= asked_before + 2 * len(others)

        await until(asked_twice)
        assert token_requests(sandbox) == []  # they wait for the worker that has the turn
        await redis_client.pexpire(lock, 100)  # as if most of that time had passed
        answers = await asyncio.gather(*calls)
        assert len({answer["X-Auth-Token"] for answer in answers}) == 1
        assert token_requests(sandbox) == [201]


async def test_a_cancelled_fetch_neither_stops_the_others_nor_keeps_the_turn(
    redis_client: Redis,
) -> None:
    async with cloud(faults={"latency_ms": 100}) as sandbox:
        user, endpoint = iam_user(sandbox.url), Endpoint(sandbox.url)
        one, other = (make_authenticator(user, redis_client) for _ in range(2))
        first = asyncio.create_task(one.headers("GET", endpoint, PATH, PROJECT))
        await until(lambda: asyncio.sleep(0, token_requests(sandbox)))
        waiting = [
            asyncio.create_task(worker.headers("GET", endpoint, PATH, PROJECT))
            for worker in (one, other)
        ]
        await asyncio.sleep(0)
        first.cancel()
        with pytest.raises(asyncio.CancelledError):
            await first
        async with asyncio.timeout(FETCH_LOCK_S / 2):  # less than a lost turn would take
            answers = await asyncio.gather(*waiting)
        assert len({answer["X-Auth-Token"] for answer in answers}) == 1
        (key,) = await redis_client.keys()
        assert not str(key).endswith(":lock")


async def test_without_redis_each_worker_fetches_for_itself() -> None:
    async with cloud() as sandbox:
        for _ in range(2):
            authenticator = make_authenticator(iam_user(sandbox.url), None)
            assert isinstance(authenticator, IamAuthenticator)
            await authenticator.headers("GET", Endpoint(sandbox.url), PATH, PROJECT)
        assert token_requests(sandbox) == [201, 201]


def test_credentials_cannot_be_changed_under_a_client() -> None:
    for credentials in (Token(SecretStr("t")), access_key(), iam_user("https://iam.example.com")):
        name = dataclasses.fields(credentials)[0].name
        with pytest.raises(dataclasses.FrozenInstanceError):
            setattr(credentials, name, "x")
