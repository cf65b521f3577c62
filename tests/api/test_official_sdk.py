"""The cloud's own SDK, unchanged, against the sandbox; and beside our client on the wire."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any

import pytest
from huaweicloudsdkcore.auth.credentials import BasicCredentials
from huaweicloudsdkcore.exceptions.exceptions import ClientRequestException
from huaweicloudsdkmodelarts.v1 import (
    DeletePoolRequest,
    ListPoolsRequest,
    ListWorkloadsRequest,
    ModelArtsClient,
    ShowPoolRequest,
    ShowPoolTagsRequest,
)
from pydantic import SecretStr

from sandbox.config import SandboxConfig
from sandbox.server import running_sandbox
from sandbox.signing import Keys, signature_fault
from tests.api.servers import POOL, PROJECT, calling, deletable, recording
from tests.conftest import until
from worker.modelarts import AccessKey

if TYPE_CHECKING:
    from sandbox.server import RunningSandbox
    from tests.api.servers import Received

AK, SK = "SANDBOXACCESSKEY", "sandbox-secret-key"
KEYS = Keys(AK, SK)


def sdk(url: str, *, sk: str = SK, security_token: str | None = None) -> Any:
    credentials = BasicCredentials(AK, sk, PROJECT)
    if security_token:
        credentials = credentials.with_security_token(security_token)
    builder = ModelArtsClient.new_builder().with_credentials(credentials)
    return builder.with_endpoint(url).build()


async def call(client: Any, operation: str, request: Any) -> Any:
    """The SDK blocks, so it works in a thread."""
    return await asyncio.to_thread(getattr(client, operation), request)


def statuses(sandbox: RunningSandbox) -> set[int]:
    return {call.status for call in sandbox.server.calls}


async def test_the_sdk_lists_the_pools_as_they_are() -> None:
    async with running_sandbox(SandboxConfig(pools=60)) as sandbox:
        answer = await call(sdk(sandbox.url), "list_pools", ListPoolsRequest())
        there = sandbox.cloud.projects[PROJECT]
        assert answer.kind == "PoolList"
        assert [pool.metadata.name for pool in answer.items] == list(there)
        for pool in answer.items:
            document = there[pool.metadata.name].document
            assert pool.metadata.creation_timestamp == document["metadata"]["creationTimestamp"]
            assert pool.spec.type == document["spec"]["type"]
            assert pool.status.phase == document["status"]["phase"]
            resource, sent = pool.spec.resources[0], document["spec"]["resources"][0]
            assert (resource.flavor, resource.count) == (sent["flavor"], sent["count"])


@pytest.mark.parametrize(
    ("query", "wanted"),
    [
        ({"workspace_id": "0"}, "all"),
        ({"workspace_id": "no-such"}, "none"),
        ({"status": "creating"}, "creating"),
        ({"status": "created"}, "created"),
        ({"label_selector": "os.modelarts/create-from=console"}, "all"),
        ({"label_selector": "os.modelarts/name=a b&c=d/é+%"}, "none"),
        ({"workspace_id": "0", "status": "creating", "label_selector": ""}, "creating"),
        ({"workspace_id": "0", "status": "created", "label_selector": "a=b"}, "none"),
    ],
)
async def test_the_sdk_lists_with_a_query(query: dict[str, str], wanted: str) -> None:
    async with running_sandbox(SandboxConfig(pools=200)) as sandbox:
        answer = await call(sdk(sandbox.url), "list_pools", ListPoolsRequest(**query))
        there = sandbox.cloud.projects[PROJECT].values()
        creating = sum(pool.phase == "Creating" for pool in there)
        assert 0 < creating < 20
        counts = {"all": 200, "none": 0, "creating": creating, "created": 200 - creating}
        assert len(answer.items) == counts[wanted]
        assert "?" in sandbox.server.calls[0].path
        assert statuses(sandbox) == {200}


async def test_the_sdk_shows_a_pool_its_tags_and_its_workloads() -> None:
    async with running_sandbox(SandboxConfig(pools=30)) as sandbox:
        client, name = sdk(sandbox.url), deletable(sandbox)[0]
        pool = await call(client, "show_pool", ShowPoolRequest(pool_name=name))
        assert pool.metadata.name == name
        assert pool.metadata.labels.os_modelarts_name == name[:-33]
        tags = await call(client, "show_pool_tags", ShowPoolTagsRequest(pool_name=name))
        assert "team" in [tag.key for tag in tags.tags]
        request = ListWorkloadsRequest(pool_name=name, limit=500, offset=0)
        assert (await call(client, "list_workloads", request)).items == []
        assert statuses(sandbox) == {200}


async def test_the_sdk_deletes_a_pool_which_is_then_gone() -> None:
    async with running_sandbox(SandboxConfig(pools=30, delete_seconds=0.2)) as sandbox:
        client, name = sdk(sandbox.url), deletable(sandbox)[0]
        answer = await call(client, "delete_pool", DeletePoolRequest(pool_name=name))
        assert answer.metadata.name == name
        assert answer.metadata.deletion_timestamp

        async def gone() -> bool:
            try:
                shown = await call(client, "show_pool", ShowPoolRequest(pool_name=name))
            except ClientRequestException as error:
                return bool(error.status_code == 404)
            assert shown.status.phase == "Deleting"
            return False

        await until(gone)
        listed = await call(client, "list_pools", ListPoolsRequest())
        assert name not in [pool.metadata.name for pool in listed.items]


@pytest.mark.parametrize(
    ("operation", "request_type"),
    [("delete_pool", DeletePoolRequest), ("show_pool", ShowPoolRequest)],
)
async def test_the_sdk_understands_that_a_pool_is_not_found(
    operation: str, request_type: Any
) -> None:
    async with running_sandbox(SandboxConfig(pools=1)) as sandbox:
        with pytest.raises(ClientRequestException) as error:
            await call(sdk(sandbox.url), operation, request_type(pool_name=POOL))
    assert error.value.status_code == 404
    assert error.value.error_code == "ModelArts.50015001"
    assert error.value.error_msg == "pool not found"
    assert error.value.request_id.startswith("sandbox-")


async def test_the_sdk_is_refused_with_a_wrong_secret() -> None:
    async with running_sandbox(SandboxConfig(pools=1)) as sandbox:
        with pytest.raises(ClientRequestException) as error:
            await call(sdk(sandbox.url, sk="another"), "list_pools", ListPoolsRequest())
    assert (error.value.status_code, error.value.error_code) == (401, "APIG.0301")


async def test_the_sdk_signs_in_with_temporary_credentials() -> None:
    async with running_sandbox(SandboxConfig(pools=3, security_token="sts")) as sandbox:
        client = sdk(sandbox.url, security_token="sts")
        assert len((await call(client, "list_pools", ListPoolsRequest())).items) == 3
        with pytest.raises(ClientRequestException) as error:
            await call(sdk(sandbox.url), "list_pools", ListPoolsRequest())
    assert error.value.status_code == 401


# On the wire


def fault(request: Received) -> str:
    path, _, query = request.path.partition("?")
    return signature_fault(KEYS, request.method, path, query, request.headers, request.body)


@pytest.mark.parametrize("security_token", [None, "sts"])
async def test_our_delete_is_on_the_wire_what_the_sdks_is(security_token: str | None) -> None:
    async with recording() as server:
        client = sdk(server.url, security_token=security_token)
        request = DeletePoolRequest(pool_name=POOL, x_model_arts_user_id="tenant-7")
        await call(client, "delete_pool", request)
        sts = SecretStr(security_token) if security_token else None
        credentials = AccessKey(SecretStr(AK), SecretStr(SK), sts)
        async with calling(server.url, credentials, user_id="tenant-7") as ours:
            await ours.delete_pool(PROJECT, POOL)
    theirs, our = server.received
    assert (our.method, our.path, our.body) == (theirs.method, theirs.path, theirs.body)
    assert (our.method, our.path) == ("DELETE", f"/v2/{PROJECT}/pools/{POOL}")
    assert fault(theirs) == fault(our) == ""
    names = ["Host", "Content-Type", "X-Project-Id", "X-ModelArts-User-ID", "X-Security-Token"]
    for name in names:
        assert our.headers.get(name) == theirs.headers.get(name), name
    assert our.headers["User-Agent"] != theirs.headers["User-Agent"]


async def test_our_reads_are_on_the_wire_what_the_sdks_are() -> None:
    async with recording() as server:
        client = sdk(server.url)
        credentials = AccessKey(SecretStr(AK), SecretStr(SK))
        await call(client, "show_pool", ShowPoolRequest(pool_name=POOL))
        await call(
            client, "list_workloads", ListWorkloadsRequest(pool_name=POOL, limit=500, offset=0)
        )
        async with calling(server.url, credentials) as ours:
            await ours.show_pool(PROJECT, POOL)
            with pytest.raises(Exception, match="no list of items"):
                await ours.list_workloads(PROJECT, POOL)
    show, workloads, our_show, our_workloads = server.received
    assert (our_show.method, our_show.path) == (show.method, show.path)
    assert our_workloads.path.partition("?")[0] == workloads.path.partition("?")[0]
    assert sorted(our_workloads.path.partition("?")[2].split("&")) == sorted(
        workloads.path.partition("?")[2].split("&")
    )
    assert [fault(request) for request in server.received] == [""] * 4


async def test_the_check_of_signatures_sees_a_changed_request_of_the_sdks() -> None:
    async with recording() as server:
        await call(sdk(server.url), "list_pools", ListPoolsRequest(workspace_id="0"))
    (request,) = server.received
    path, _, query = request.path.partition("?")
    assert fault(request) == ""
    assert signature_fault(KEYS, "DELETE", path, query, request.headers, b"")
    assert signature_fault(KEYS, "GET", path, "workspaceId=1", request.headers, b"")
    assert signature_fault(KEYS, "GET", path + "x", query, request.headers, b"")
