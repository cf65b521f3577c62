"""What the sandbox does wrong on purpose, seen through our client; and what its pools are like."""

from __future__ import annotations

import asyncio
import json
import sys
from datetime import UTC, datetime, timedelta
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import pytest
from aiohttp import ClientSession
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from sandbox.cloud import Cloud
from sandbox.config import Faults, SandboxConfig
from sandbox.fleet import Behaviour, Category, generate
from sandbox.server import running_sandbox
from tests.api.servers import POOL, PROJECT, calling, deletable
from tests.conftest import until
from worker.modelarts import (
    ApiError,
    Billing,
    Failure,
    Pool,
    UnreadableTagsError,
    VerdictKind,
    classify,
    validate_pool_name,
)

if TYPE_CHECKING:
    from sandbox.server import RunningSandbox
    from worker.modelarts import Answer
    from worker.modelarts.client import ModelArtsClient

NOW = datetime(2026, 5, 4, 3, 2, 1, tzinfo=UTC)


def config(pools: int = 40, **faults: Any) -> SandboxConfig:
    return SandboxConfig(pools=pools, faults=Faults(**faults))


async def deletions(client: ModelArtsClient, sandbox: RunningSandbox, count: int) -> list[Answer]:
    """Calls to the same pool, one after another."""
    name = deletable(sandbox)[0]
    return [await client.delete_pool(PROJECT, name) for _ in range(count)]


# Faults of all calls


async def test_injected_throttling_asks_to_wait_and_deletes_nothing() -> None:
    async with running_sandbox(config(rate_429=1)) as sandbox, calling(sandbox.url) as client:
        (answer,) = await deletions(client, sandbox, 1)
        with pytest.raises(ApiError, match="HTTP 429"):
            await client.list_pools(PROJECT)
        assert not any(pool.deletes for pool in sandbox.cloud.projects[PROJECT].values())
    assert (answer.status, answer.error_code, answer.retry_after_s) == (429, "APIG.0308", 1)
    verdict = classify(answer)
    assert (verdict.kind, verdict.throttled) == (VerdictKind.RETRY, True)
    assert verdict.retry_after_s == 1


async def test_injected_server_errors_are_of_three_kinds_and_to_be_retried() -> None:
    async with running_sandbox(config(rate_5xx=1)) as sandbox, calling(sandbox.url) as client:
        answers = await deletions(client, sandbox, 40)
    assert {answer.status for answer in answers} == {500, 502, 503}
    assert {classify(answer).kind for answer in answers} == {VerdictKind.RETRY}


async def test_a_share_of_calls_fails_and_the_others_pass() -> None:
    async with (
        running_sandbox(config(rate_429=0.2, rate_5xx=0.2, reset_rate=0.2)) as sandbox,
        calling(sandbox.url) as client,
    ):
        answers = await deletions(client, sandbox, 300)
        seen = [call.status for call in sandbox.server.calls]
    assert len(seen) == 300  # a call that is reset is not repeated behind our back
    for statuses in ({429}, {500, 502, 503}, {None}, {200}):
        share = sum(answer.status in statuses for answer in answers) / 300
        assert 0.1 < share < 0.55
    assert [answer.status or 0 for answer in answers] == seen


async def test_latency_lies_on_every_answer() -> None:
    async with running_sandbox(config(latency_ms=80)) as sandbox, calling(sandbox.url) as client:
        answers = await deletions(client, sandbox, 3)
        assert sandbox.server.calls[-1].status == 200
    assert all(answer.status == 200 and answer.duration_s >= 0.08 for answer in answers)


async def test_a_reset_is_no_answer() -> None:
    async with running_sandbox(config(reset_rate=1)) as sandbox, calling(sandbox.url) as client:
        (answer,) = await deletions(client, sandbox, 1)
        assert [call.status for call in sandbox.server.calls] == [0]
    assert (answer.status, answer.failure) == (None, Failure.RESET)


async def test_a_hanging_call_is_in_the_journal_while_it_hangs() -> None:
    async with (
        running_sandbox(config(hang_rate=1)) as sandbox,
        calling(sandbox.url, total_timeout_s=0.2) as client,
    ):
        (answer,) = await deletions(client, sandbox, 1)
        (call,) = sandbox.server.calls
        assert (call.method, call.status) == ("DELETE", 0)
        assert not sandbox.cloud.projects[PROJECT][call.pool].deletes
    assert (answer.status, answer.failure) == (None, Failure.TIMEOUT)


@pytest.mark.parametrize(("quota", "burst", "passed"), [(5, 0, 5), (5, 3, 8), (1, 0, 1)])
async def test_the_quota_lets_so_many_calls_pass_in_a_second(
    quota: float, burst: int, passed: int
) -> None:
    async with (
        running_sandbox(config(quota=quota, quota_burst=burst)) as sandbox,
        calling(sandbox.url) as client,
    ):
        answers = await asyncio.gather(*(client.delete_pool(PROJECT, POOL) for _ in range(20)))
        calls = list(sandbox.server.calls)
    assert {call.status for call in calls[:passed]} == {404}
    first_second = [call.status for call in calls if call.at < calls[0].at + 0.99]
    assert first_second.count(404) <= passed
    assert {answer.retry_after_s for answer in answers if answer.status == 429} == {1}


async def test_the_quota_holds_over_any_second() -> None:
    async with running_sandbox(config(quota=20)) as sandbox, calling(sandbox.url) as client:

        async def thirty_passed() -> bool:
            await client.delete_pool(PROJECT, POOL)
            return sum(call.status == 404 for call in sandbox.server.calls) >= 30

        await until(thirty_passed)
        passed = [call.at for call in sandbox.server.calls if call.status == 404]
    assert all(later - first >= 0.99 for first, later in zip(passed, passed[20:], strict=False))


async def test_a_quota_of_less_than_a_call_a_second_spaces_the_calls() -> None:
    async with running_sandbox(config(quota=0.8)) as sandbox, calling(sandbox.url) as client:

        async def two_passed() -> bool:
            await client.delete_pool(PROJECT, POOL)
            return sum(call.status == 404 for call in sandbox.server.calls) == 2

        await until(two_passed)
        passed = [call.at for call in sandbox.server.calls if call.status == 404]
    assert all(later - first >= 1.24 for first, later in pairwise(passed))


async def test_each_project_has_a_quota_of_its_own() -> None:
    settings = SandboxConfig(pools=4, projects=2, faults=Faults(quota=1))
    async with running_sandbox(settings) as sandbox, calling(sandbox.url) as client:
        for project in settings.project_ids:
            await client.list_pools(project)


async def test_faults_are_changed_while_the_sandbox_serves() -> None:
    async with (
        running_sandbox(config()) as sandbox,
        calling(sandbox.url) as client,
        ClientSession() as session,
    ):
        assert (await deletions(client, sandbox, 1))[0].status == 200
        url = f"{sandbox.url}/_sandbox/faults"
        async with session.post(url, json={"rate_429": 1}) as response:
            assert (response.status, (await response.json())["rate_429"]) == (200, 1)
        assert (await deletions(client, sandbox, 1))[0].status == 429
        wrongs: list[Any] = [{"rate_429": 2}, {"no_such": 1}, {"rate_5xx": 0.5}, [], "x"]
        for wrong in wrongs:
            async with session.post(url, json=wrong) as response:
                assert response.status == 400, wrong
        assert (await deletions(client, sandbox, 1))[0].status == 429
        async with session.post(url, json={"rate_429": 0}) as response:
            assert response.status == 200
        assert (await deletions(client, sandbox, 1))[0].status == 200


async def test_the_same_seed_fails_the_same_calls() -> None:
    async def outcomes(seed: int) -> list[int | None]:
        faults = Faults(rate_429=0.3, rate_5xx=0.3)
        settings = SandboxConfig(pools=20, seed=seed, faults=faults)
        async with running_sandbox(settings) as sandbox, calling(sandbox.url) as client:
            return [answer.status for answer in await deletions(client, sandbox, 40)]

    first, again, other = [await outcomes(seed) for seed in (5, 5, 6)]
    assert first == again
    assert first != other


# What a pool's DELETE is like


async def of_behaviour(behaviour: Behaviour, count: int) -> list[list[Answer]]:
    """Some calls to each of some pools that behave so."""
    settings = SandboxConfig.model_validate({"pools": 60, "delete_seconds": 0, behaviour.value: 1})
    async with running_sandbox(settings) as sandbox, calling(sandbox.url) as client:
        names = [
            name
            for name, pool in sandbox.cloud.projects[PROJECT].items()
            if pool.member.behaviour is behaviour
        ]
        assert len(names) > 20
        listed = {pool.pool_id for pool in (await client.list_pools(PROJECT)).pools}
        assert listed.issuperset(names)
        return [[await client.delete_pool(PROJECT, name) for _ in range(count)] for name in names]


def kinds(answers: list[Answer]) -> list[VerdictKind]:
    return [classify(answer).kind for answer in answers]


async def test_a_pool_that_somebody_else_deleted_is_listed_but_not_found() -> None:
    for answers in await of_behaviour(Behaviour.GONE, 2):
        assert kinds(answers) == [VerdictKind.ALREADY_DELETED] * 2


async def test_a_throttled_pool_takes_the_second_call() -> None:
    for first, second in await of_behaviour(Behaviour.THROTTLED, 2):
        assert (first.status, first.retry_after_s, second.status) == (429, 1, 200)


async def test_a_flaky_pool_takes_the_third_call() -> None:
    everything = await of_behaviour(Behaviour.FLAKY, 3)
    for answers in everything:
        assert kinds(answers) == [VerdictKind.RETRY, VerdictKind.RETRY, VerdictKind.ACCEPTED]
    seen = {answer.status for answers in everything for answer in answers}
    assert seen == {200, 409, 500, 502, 503}


async def test_a_doomed_pool_never_takes_a_call() -> None:
    everything = await of_behaviour(Behaviour.DOOMED, 2)
    for answers in everything:
        assert kinds(answers) == [VerdictKind.FAILED] * 2
    assert {answer.status for answers in everything for answer in answers} == {400, 403}


async def test_a_stuck_pool_takes_every_call_and_stays() -> None:
    for answers in await of_behaviour(Behaviour.STUCK, 2):
        assert [answer.status for answer in answers] == [200, 200]


@pytest.mark.parametrize(
    ("category", "status"),
    [
        (Category.PREPAID, 400),
        (Category.PREPAID_NODES, 400),
        (Category.CREATING, 409),
        (Category.PARENT, 409),
        (Category.SUBPOOL, 200),
        (Category.UNTAGGED, 200),
    ],
)
async def test_a_pool_is_deleted_as_the_document_says_for_its_kind(
    category: Category, status: int
) -> None:
    async with running_sandbox(SandboxConfig(pools=400)) as sandbox, calling(sandbox.url) as client:
        name = next(
            name
            for name, pool in sandbox.cloud.projects[PROJECT].items()
            if pool.member.category is category
        )
        assert (await client.delete_pool(PROJECT, name)).status == status


async def test_a_parent_can_be_deleted_when_its_sub_pools_are_gone() -> None:
    settings = SandboxConfig(pools=400, delete_seconds=0)
    async with running_sandbox(settings) as sandbox, calling(sandbox.url) as client:
        pools = (await client.list_pools(PROJECT)).pools
        parent = next(pool for pool in pools if pool.subpool_count)
        subpools = [pool for pool in pools if pool.parent == parent.pool_id]
        assert parent.subpool_count == len(subpools) == 2
        for left, subpool in zip((1, 0), subpools, strict=True):
            assert (await client.delete_pool(PROJECT, parent.pool_id)).status == 409
            assert (await client.delete_pool(PROJECT, subpool.pool_id)).status == 200
            shown = await client.show_pool(PROJECT, parent.pool_id)
            assert shown is not None
            assert shown.subpool_count == left
        assert (await client.delete_pool(PROJECT, parent.pool_id)).status == 200


# Sign-in, routes and steering


async def test_a_project_that_is_not_there_is_forbidden_and_a_wrong_path_is_the_gateways() -> None:
    async with (
        running_sandbox(config()) as sandbox,
        calling(sandbox.url) as client,
        ClientSession(headers={"X-Auth-Token": "sandbox-token"}) as session,
    ):
        answer = await client.delete_pool("f" * 32, POOL)
        assert (answer.status, answer.error_code) == (403, "ModelArts.50010001")
        for method, path in (
            ("GET", "/"),
            ("DELETE", f"/v3/{PROJECT}/pools/{POOL}"),
            ("PATCH", f"/v2/{PROJECT}/pools/{POOL}"),
            ("DELETE", f"/v2/{PROJECT}/pools/{POOL}/"),
        ):
            async with session.request(method, sandbox.url + path) as response:
                body = await response.json()
            assert (response.status, body["error_code"]) == (404, "APIG.0101"), path


async def test_without_auth_everybody_is_let_in() -> None:
    async with (
        running_sandbox(SandboxConfig(pools=3, auth=False)) as sandbox,
        ClientSession() as session,
        session.get(f"{sandbox.url}/v2/{PROJECT}/pools") as response,
    ):
        assert response.status == 200


async def test_every_answer_has_a_request_id_of_its_own() -> None:
    async with running_sandbox(config()) as sandbox, calling(sandbox.url) as client:
        answers = await deletions(client, sandbox, 5)
    assert len({answer.request_id for answer in answers}) == 5
    assert all(answer.request_id.startswith("sandbox-") for answer in answers)


async def test_the_journal_is_in_the_order_of_arrival() -> None:
    async with (
        running_sandbox(config(latency_ms=100)) as sandbox,
        calling(sandbox.url) as client,
        ClientSession() as session,
    ):
        slow = asyncio.create_task(client.delete_pool(PROJECT, deletable(sandbox)[0]))

        async def arrived() -> int:
            return len(sandbox.server.calls)

        await until(arrived)
        sandbox.server.faults = Faults()
        await client.list_pools(PROJECT)
        await slow
        async with session.get(f"{sandbox.url}/_sandbox/calls") as response:
            calls = await response.json()
        assert [call[1] for call in calls] == ["DELETE", "GET"]
        assert [call[4] for call in calls] == [200, 200]
        since = f"{sandbox.url}/_sandbox/calls?since={calls[0][0]}"
        async with session.get(since) as response:
            assert await response.json() == calls[1:]
        async with session.get(f"{sandbox.url}/_sandbox/calls?since=yesterday") as response:
            assert response.status == 400


async def test_pools_are_added_changed_and_taken_away_from_outside() -> None:
    async with (
        running_sandbox(config()) as sandbox,
        calling(sandbox.url) as client,
        ClientSession() as session,
    ):
        steer = f"{sandbox.url}/_sandbox/pools"
        bare = {"metadata": {"name": POOL}}
        async with session.put(f"{steer}/{PROJECT}", json=bare) as response:
            assert response.status == 201
        shown = await client.show_pool(PROJECT, POOL)
        assert shown is not None
        assert shown.document.to_json() == bare
        assert POOL in {pool.pool_id for pool in (await client.list_pools(PROJECT)).pools}
        assert await client.show_pool_tags(PROJECT, POOL) == {}
        assert await client.list_nodes(PROJECT, POOL) == []

        change = {"labels": {"a": "b"}, "annotations": {"c": "d"}, "phase": "Creating"}
        async with session.post(f"{steer}/{PROJECT}/{POOL}", json=change) as response:
            assert response.status == 200
        shown = await client.show_pool(PROJECT, POOL)
        assert shown is not None
        assert (shown.labels, shown.annotations) == ({"a": "b"}, {"c": "d"})
        assert (await client.delete_pool(PROJECT, POOL)).status == 409

        async with session.delete(f"{steer}/{PROJECT}/{POOL}") as response:
            assert response.status == 200
        assert await client.show_pool(PROJECT, POOL) is None
        for method in ("PUT", "POST", "DELETE"):
            path = "f" * 32 if method == "PUT" else f"{'f' * 32}/{POOL}"
            async with session.request(method, f"{steer}/{path}", json=bare) as response:
                assert response.status in {200, 404}, method


async def test_added_sub_pools_stand_in_their_parents_way_until_they_are_replaced() -> None:
    async with running_sandbox(SandboxConfig(pools=0)) as sandbox, calling(sandbox.url) as client:
        child = "child-" + POOL
        sandbox.cloud.add(PROJECT, {"metadata": {"name": POOL}})
        sandbox.cloud.add(PROJECT, {"metadata": {"name": child}, "status": {"parent": POOL}})
        assert (await client.delete_pool(PROJECT, POOL)).error_code == "ModelArts.50015005"
        sandbox.cloud.add(PROJECT, {"metadata": {"name": child}})
        assert (await client.delete_pool(PROJECT, POOL)).status == 200


@pytest.mark.parametrize(
    "wrong",
    [
        {"gone": 0.6, "flaky": 0.5},
        {"gone": -0.1},
        {"delete_seconds": float("nan")},
        {"delete_seconds": float("inf")},
        {"faults": {"rate_429": 0.7, "hang_rate": 0.7}},
        {"faults": {"latency_ms": float("nan")}},
        {"no_such": 1},
    ],
)
def test_what_the_sandbox_cannot_be_like_is_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        SandboxConfig(**wrong)


def test_shares_that_make_up_everything_are_accepted() -> None:
    SandboxConfig(gone=0.1, throttled=0.2, flaky=0.3, doomed=0.3, stuck=0.1)
    Faults(rate_429=0.1, rate_5xx=0.2, reset_rate=0.3, hang_rate=0.4)


# What the pools are like


def fleet(**options: Any) -> list[dict[str, Any]]:
    return [member.document for member in generate(SandboxConfig(**options), NOW)]


@given(seed=st.integers(), pools=st.integers(0, 60), projects=st.integers(1, 4))
@settings(max_examples=30)
def test_the_same_seed_makes_the_same_pools_and_as_many_as_wished(
    seed: int, pools: int, projects: int
) -> None:
    made = fleet(seed=seed, pools=pools, projects=projects)
    assert made == fleet(seed=seed, pools=pools, projects=projects)
    assert len({document["metadata"]["name"] for document in made}) == pools
    if pools > 10:
        other = {document["metadata"]["name"] for document in fleet(seed=seed + 1, pools=pools)}
        assert other.isdisjoint(document["metadata"]["name"] for document in made)


async def test_two_sandboxes_of_one_seed_show_the_same_pools() -> None:
    async def names(seed: int) -> list[str]:
        settings = SandboxConfig(pools=50, seed=seed)
        async with running_sandbox(settings) as sandbox, calling(sandbox.url) as client:
            return [pool.pool_id for pool in (await client.list_pools(PROJECT)).pools]

    first, again, other = [await names(seed) for seed in (11, 11, 12)]
    assert first == again
    assert set(first).isdisjoint(other)


def test_pools_look_as_in_the_clouds_document() -> None:
    for member in generate(SandboxConfig(pools=600), NOW):
        document = member.document
        validate_pool_name(member.name)
        assert (document["apiVersion"], document["kind"]) == ("v2", "Pool")
        metadata, spec, status = document["metadata"], document["spec"], document["status"]
        created = datetime.strptime(metadata["creationTimestamp"], "%Y-%m-%dT%H:%M:%S%z")
        assert NOW - timedelta(days=201) < created < NOW
        labels, annotations = metadata["labels"], metadata["annotations"]
        title = labels["os.modelarts/name"]
        assert member.name == f"{title}-{member.name[-32:]}"
        assert int(member.name[-32:], 16) >= 0
        assert labels["os.modelarts/resource.id"].startswith(f"maos-{title}-")
        assert labels["os.modelarts/workspace.id"] == "0"
        assert annotations["os.modelarts/billing.mode"] in {"0", "1"}
        assert annotations["os.modelarts/external-access"] == "elb"
        assert annotations["os.modelarts/description"] == ""
        for resource in spec["resources"]:
            assert resource["flavor"].startswith("modelarts.")
            assert resource["count"] == sum(az["count"] for az in resource["azs"]) > 0
        if spec["type"] == "Logical":
            assert status["root"] == status["parent"] != member.name
            assert not {"resources", "scope"} & status.keys()
            assert not {"network", "scope"} & spec.keys()
            continue
        assert spec["type"] == "Dedicate"
        assert spec["scope"] == ["Train", "Infer"]
        assert spec["network"]["name"] == f"network-maos-{member.name[-32:]}"
        assert status["root"] == member.name
        state = {"Running": "Enabled", "Creating": "Enabling"}[status["phase"]]
        assert [(s["scopeType"], s["state"]) for s in status["scope"]] == [
            ("Train", state),
            ("Infer", state),
        ]
        (nodes,) = status["resources"].values()
        assert nodes[0]["azs"][0]["az"].startswith("cn-north-7")


def test_our_schema_knows_every_field_of_the_sandboxes_pools() -> None:
    for document in fleet(pools=300):
        pool = Pool.parse(document)
        assert pool.document.to_json() == document
        for part in (pool.document, pool.document.metadata, pool.document.spec):
            assert not part.model_extra


def test_pools_are_of_every_kind_and_are_read_as_what_they_are() -> None:
    by_category: dict[Category, list[Pool]] = {category: [] for category in Category}
    for member in generate(SandboxConfig(pools=1_000), NOW):
        by_category[member.category].append(Pool.parse(member.document))
    assert all(by_category.values())
    assert all(pool.billing is Billing.PREPAID for pool in by_category[Category.PREPAID])
    assert all(pool.frozen for pool in by_category[Category.FROZEN])
    assert all(pool.is_logical and pool.parent for pool in by_category[Category.SUBPOOL])
    assert not any(pool.is_logical for pool in by_category[Category.PARENT])
    odd = 0
    for pool in by_category[Category.UNREADABLE]:
        try:
            assert not pool.tags["expires-at"][:1].isdigit() or "." in pool.tags["expires-at"]
        except UnreadableTagsError:
            odd += 1
    assert 0 < odd < len(by_category[Category.UNREADABLE])
    forms = {
        type(json.loads(pool.annotations["os.modelarts/tms.tags"]))
        for pool in by_category[Category.TAGGED]
    }
    assert forms == {list, dict}  # the document does not say which


async def test_the_work_of_a_list_grows_no_faster_than_its_pools() -> None:
    async def work(pools: int) -> int:
        """Function calls that one list makes."""
        cloud = Cloud(SandboxConfig(pools=pools), asyncio.get_running_loop().time)
        calls = 0

        def count(_frame: object, event: str, _argument: object) -> None:
            nonlocal calls
            calls += event == "call"

        sys.setprofile(count)
        try:
            assert len(cloud.list(PROJECT)) == pools
        finally:
            sys.setprofile(None)
        return calls

    assert await work(2_000) < 5 * await work(500)
