"""Who may look, and at what."""

from __future__ import annotations

import base64
import json
from datetime import UTC, datetime
from typing import TYPE_CHECKING

import pytest
from aiohttp import ClientSession

from scheduler.intake import clients as clients_file
from scheduler.intake.clients import Clients, new_token
from scheduler.intake.http import Bounds
from scheduler.intake.problems import ProblemError
from scheduler.marks import Mark, Marks
from scheduler.review.web.access import Viewer, check_local, token_of
from tests.conftest import until
from tests.intake.api import ENDPOINT, PROJECTS
from tests.review.site import Site, new_jobs, pool_name, serving
from worker import pause
from worker.modelarts import Precondition

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from redis.asyncio import Redis


class Doors:
    """The clients' file as it is now, and the tokens of those in it."""

    def __init__(self) -> None:
        self.tokens = {name: new_token()[0] for name in ("ops", "ci", "queue")}
        self.clients: Clients
        self.let_in("ops", "ci", "queue")

    def let_in(self, *names: str) -> None:
        entries = {
            "ops": {"projects": list(PROJECTS)},
            "ci": {"projects": [PROJECTS[1], PROJECTS[2]]},
            "queue": {"projects": list(PROJECTS), "ways": ["celery"]},
        }
        text = {
            name: entries[name] | {"tokens": [clients_file.token_hash(self.tokens[name])]}
            for name in names
        }
        self.clients = clients_file.parse(json.dumps({"clients": text}))


@pytest.fixture
def doors() -> Doors:
    return Doors()


@pytest.fixture
async def guarded(redis_client: Redis, doors: Doors) -> AsyncIterator[Site]:
    """The page with a clients' file."""
    async with serving(redis_client, clients=lambda: doors.clients) as running:
        yield running


async def status(site: Site, path: str, authorization: str | None) -> int:
    headers = {} if authorization is None else {"Authorization": authorization}
    async with ClientSession() as session, session.get(site.url + path, headers=headers) as answer:
        return answer.status


def basic(user: str, password: str) -> str:
    return "Basic " + base64.b64encode(f"{user}:{password}".encode()).decode()


# Signing in


async def test_a_token_opens_the_page_as_a_bearer_and_as_a_password(
    guarded: Site, doors: Doors
) -> None:
    token = doors.tokens["ops"]
    for given in (f"Bearer {token}", f"bearer {token}", basic("", token), basic("anybody", token)):
        assert await status(guarded, "/", given) == 200


async def test_nobody_else_is_let_in(guarded: Site, doors: Doors) -> None:
    run_id = await guarded.run(new_jobs(1))
    token = doors.tokens["ops"]
    wrong = [
        None,
        "",
        token,
        f"Bearer {new_token()[0]}",
        f"Bearer {token} {token}",
        f"Digest {token}",
        basic(token, ""),
        basic(token, "x"),
        "Basic " + base64.b64encode(token.encode()).decode(),
        "Basic " + base64.b64encode(b"\xff:\xff").decode(),
        "Basic !",
    ]
    run = f"/runs/{run_id}"
    for path in ("/", "/runs", run, f"{run}/events", f"{run}/kept", f"{run}/jobs/0", "/no/page"):
        for given in wrong:
            assert await status(guarded, path, given) == 401
    assert await status(guarded, "/static/style.css", None) == 200


async def test_a_browser_is_told_to_ask_for_a_password(guarded: Site) -> None:
    async with ClientSession() as session, session.get(guarded.url) as answer:
        assert answer.status == 401
        assert answer.headers["WWW-Authenticate"].startswith('Basic realm="poolsweep"')
        assert "WWW-Authenticate" not in await answer.text()


async def test_a_client_that_does_not_come_by_http_does_not_look_either(
    guarded: Site, doors: Doors
) -> None:
    assert await status(guarded, "/", f"Bearer {doors.tokens['queue']}") == 403


async def test_who_is_struck_from_the_file_sees_nothing_from_then_on(
    guarded: Site, doors: Doors
) -> None:
    run_id = await guarded.run(new_jobs(1))
    headers = {"Authorization": f"Bearer {doors.tokens['ops']}"}
    async with (
        ClientSession(headers=headers) as session,
        session.get(f"{guarded.url}/runs/{run_id}/events") as stream,
    ):
        assert stream.status == 200
        doors.let_in("ci")
        assert await status(guarded, "/", headers["Authorization"]) == 401
        await stream.read()  # it comes to its end, though the run goes on
    assert not (await guarded.ledger.run(run_id)).ended


# What is shown to whom


async def test_a_client_sees_the_runs_whose_projects_are_all_its_own(
    guarded: Site, doors: Doors
) -> None:
    mine = await guarded.run(new_jobs(1, project=PROJECTS[1]), projects=PROJECTS[1:2])
    both = await guarded.run(new_jobs(1, project=PROJECTS[1]), projects=PROJECTS[1:3])
    other = await guarded.run(new_jobs(1), projects=PROJECTS[:1])
    mixed = await guarded.run(new_jobs(1), projects=PROJECTS[:2])
    unplanned = await guarded.run([], projects=(), client="ci")
    others_unplanned = await guarded.run([], projects=(), client="ops")
    shown = {mine, both, unplanned}
    bearer = f"Bearer {doors.tokens['ci']}"
    async with ClientSession(headers={"Authorization": bearer}) as session:
        for path in ("/", "/runs"):
            async with session.get(guarded.url + path) as answer:
                text = await answer.text()
            for run_id in (mine, both, other, mixed, unplanned, others_unplanned):
                assert (run_id in text) is (run_id in shown)
            assert PROJECTS[0] not in text
    for run_id in (mine, other, mixed, others_unplanned):
        for rest in ("", "/kept", "/jobs/0", "/events"):
            if rest in {"/events", "/jobs/0"} and run_id in shown:
                continue
            expected = 200 if run_id in shown else 404
            assert await status(guarded, f"/runs/{run_id}{rest}", bearer) == expected


async def test_a_client_is_told_of_its_own_projects_alone(guarded: Site, doors: Doors) -> None:
    await guarded.run(new_jobs(1))
    for number in (0, 1):
        mark = Mark(
            project_id=PROJECTS[number],
            pool_id=pool_name(number),
            display_name="",
            policy="idle",
            precondition=Precondition("", ""),
            marked_at=datetime.now(UTC),
            due_at=datetime.now(UTC),
            reason="idle",
        )
        await Marks(guarded.redis, ENDPOINT).put([mark])
        await pause.pause(guarded.redis, PROJECTS[number], by="jo", reason=f"why {number}")
    headers = {"Authorization": f"Bearer {doors.tokens['ci']}"}
    async with ClientSession(headers=headers) as session, session.get(guarded.url) as answer:
        text = await answer.text()
    assert pool_name(1) in text
    assert "why 1" in text
    for hidden in (PROJECTS[0], pool_name(0), "why 0", ENDPOINT):
        assert hidden not in text


async def test_one_client_cannot_hold_all_the_streams(redis_client: Redis, doors: Doors) -> None:
    bounds = Bounds(streams_of_a_client=1)
    bearer = {name: {"Authorization": f"Bearer {doors.tokens[name]}"} for name in ("ops", "ci")}
    async with (
        serving(redis_client, clients=lambda: doors.clients, bounds=bounds) as site,
        ClientSession() as session,
    ):
        run_id = await site.run(new_jobs(2, project=PROJECTS[1]), projects=PROJECTS[1:2])
        url = f"{site.url}/runs/{run_id}/events"

        async def asked(name: str) -> int:
            async with session.get(url, headers=bearer[name]) as answer:
                return answer.status

        async with session.get(url, headers=bearer["ops"]) as first:
            assert first.status == 200
            assert await asked("ops") == 429
            assert await asked("ci") == 200

        async def let_in_again() -> bool:
            return await asked("ops") == 200

        await until(let_in_again)


async def test_all_clients_together_hold_only_so_many_streams(
    redis_client: Redis, doors: Doors
) -> None:
    bearer = {name: {"Authorization": f"Bearer {doors.tokens[name]}"} for name in ("ops", "ci")}
    async with (
        serving(redis_client, clients=lambda: doors.clients, bounds=Bounds(streams=1)) as site,
        ClientSession() as session,
    ):
        run_id = await site.run(new_jobs(2, project=PROJECTS[1]), projects=PROJECTS[1:2])
        url = f"{site.url}/runs/{run_id}/events"
        async with session.get(url, headers=bearer["ops"]) as first:
            assert first.status == 200
            async with session.get(url, headers=bearer["ci"]) as refused:
                assert (refused.status, refused.content_type) == (503, "text/html")


# For this machine alone


@pytest.mark.parametrize(
    "host", ["localhost", "LOCALHOST:8081", "127.0.0.1", "127.0.0.1:9", "127.9.9.9", "[::1]:8081"]
)
def test_a_page_for_this_machine_goes_by_this_machines_names(host: str) -> None:
    check_local([host])


@pytest.mark.parametrize(
    "hosts",
    [
        [],
        [""],
        ["evil.example"],
        ["evil.example:8081"],
        ["localhost.evil.example"],
        ["127.0.0.1.evil.example"],
        ["localhost:8081@evil.example"],
        ["10.0.0.1"],
        ["0.0.0.0"],
        ["[::2]"],
        ["2130706433"],
        ["localhost", "evil.example"],
    ],
)
def test_a_page_for_this_machine_goes_by_no_other_name(hosts: list[str]) -> None:
    with pytest.raises(ProblemError, match="accepted: localhost"):
        check_local(hosts)


async def test_another_hosts_name_is_refused_on_every_page(
    site: Site, session: ClientSession
) -> None:
    run_id = await site.run(new_jobs(1))
    for path in ("/", "/runs", f"/runs/{run_id}", f"/runs/{run_id}/events"):
        async with session.get(path, headers={"Host": "evil.example"}) as answer:
            assert answer.status == 403
            assert run_id not in await answer.text()


async def test_who_comes_by_a_proxy_is_not_taken_for_one_at_this_machine(
    session: ClientSession,
) -> None:
    for name in ("X-Forwarded-For", "Forwarded", "Via"):
        async with session.get("/", headers={name: "203.0.113.7"}) as answer:
            assert answer.status == 403


# Pure


def test_a_token_may_be_of_any_characters_and_the_name_too() -> None:
    assert token_of([basic("a", "b:c:ü")]) == "b:c:ü"


def test_who_sees_some_projects_sees_nothing_that_is_about_none() -> None:
    assert not Viewer("ci", frozenset(PROJECTS)).sees()
    assert Viewer().sees()
