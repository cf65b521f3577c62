"""What channels are told of the nights, by a scheduler and a worker, over HTTP."""

from __future__ import annotations

import contextlib
import hashlib
import hmac
import json
import signal
import time
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Any

import pytest
from aiohttp import web

from scheduler.notices import not_swept
from scheduler.policy import Occasion
from tests.conftest import until
from tests.nightly.conftest import last_night, policy, steps
from tests.worker.conftest import refused
from worker.ledger import keys

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from tests.nightly.conftest import Stage

KEY = "the key that both know"


class Receiver:
    """An HTTP server that takes what is announced, if it is signed as it must be."""

    def __init__(self) -> None:
        self.url = ""
        self.events: list[dict[str, Any]] = []
        self.forged: list[bytes] = []

    def of(self, policy: str) -> list[str]:
        """What it was told of a policy, in that order."""
        return [event["event"] for event in self.events if event["policy"] == policy]

    async def take(self, request: web.Request) -> web.Response:
        body = await request.read()
        parts = request.headers["X-Poolsweep-Signature"].split(",")
        at, given = (part.partition("=")[2] for part in parts)
        expected = hmac.new(KEY.encode(), f"{at}.".encode() + body, hashlib.sha256).hexdigest()
        if not hmac.compare_digest(expected, given) or abs(time.time() - int(at)) > 300:
            self.forged.append(body)
            return web.Response(status=403)
        event = json.loads(body)
        assert request.headers["X-Poolsweep-Event"] == event["event"]
        assert request.headers["X-Poolsweep-Delivery"] == event["id"]
        self.events.append(event)
        return web.Response()


@pytest.fixture
async def receiver() -> AsyncIterator[Receiver]:
    made = Receiver()
    app = web.Application()
    app.router.add_post("/hook", made.take)
    runner = web.AppRunner(app, access_log=None, shutdown_timeout=0.1)
    await runner.setup()
    with contextlib.suppress(OSError):
        await web.TCPSite(runner, "127.0.0.1", 0).start()
    host, port = runner.addresses[0][:2]
    made.url = f"http://{host}:{port}/hook"
    yield made
    await runner.cleanup()


CHANNEL = {"ops": {"url": {"env": "HOOK_URL"}, "secret": {"env": "HOOK_KEY"}}}
TOLD = {
    "goes": ["started", "finished"],
    "waits": ["marked"],
    "held": ["braked"],
    "broken": ["failed"],
    "quiet": [],
}


async def test_each_kind_of_night_is_told_as_what_it_came_to(
    stage: Stage, receiver: Receiver
) -> None:
    made = {name: stage.project(name, pools=3) for name in TOLD}
    broken = made["broken"].project_id

    def gateway(request: web.Request) -> web.Response | None:
        if broken in request.path:
            return refused(403, "ModelArts.50010001", "no access to this project")
        return None

    stage.cloud.gateway = gateway
    at, schedule = last_night(timedelta(minutes=2))
    own: dict[str, dict[str, object]] = {
        "waits": {"grace": "1d"},
        "held": {"brakes": {"max_deletions": 0}},
        "quiet": {"notify": []},
    }
    policies = {
        name: policy(name, schedule=schedule, **{"notify": ["ops"], **own.get(name, {})})
        for name in TOLD
    }
    stage.write(policies, notifications=CHANNEL)
    for name in TOLD:
        await stage.last_was(name, at - timedelta(days=1), by=f"{schedule} UTC")
    worker = stage.worker()
    scheduler = stage.scheduler(HOOK_URL=receiver.url, HOOK_KEY=KEY)

    async def all_told() -> bool:
        return len(receiver.events) >= sum(map(len, TOLD.values()))

    await until(all_told, within_s=40)
    for name in TOLD:
        await stage.past_when(name, 0 if name == "broken" else 1)
    for process in (scheduler, worker):
        process.send(signal.SIGTERM)
        assert await process.ended() == 0
    assert {name: receiver.of(name) for name in TOLD} == TOLD
    assert receiver.forged == []
    told = {(event["policy"], event["event"]): event for event in receiver.events}
    for (name, _), event in told.items():
        assert event["project_id"] == made[name].project_id
    assert told["goes", "started"]["details"]["project_pools"] == 3
    assert told["goes", "finished"]["details"]["counts"] == {"deleted": 3}
    assert told["waits", "marked"]["details"]["total"] == 3
    assert told["held", "braked"]["details"]["state"] == "braked"
    failed = told["broken", "failed"]
    assert "no access to this project" in failed["text"]
    assert datetime.fromisoformat(failed["details"]["due_at"]) == at
    assert made["waits"].there() == set(made["waits"].pools)
    assert KEY not in scheduler.text
    assert receiver.url not in scheduler.text


async def test_a_night_that_failed_is_told_once_though_it_is_done_again(
    stage: Stage, receiver: Receiver, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOOK_URL", receiver.url)
    monkeypatch.setenv("HOOK_KEY", KEY)
    stage.project()
    stage.cloud.gateway = lambda _: refused(403, "ModelArts.50010001", "no access")
    at, schedule = last_night(timedelta(minutes=2))
    stage.write(
        {"night": policy("research", schedule=schedule, notify=["ops"])}, notifications=CHANNEL
    )
    async with stage.rota() as rota:
        for times in (1, 2):
            await stage.last_was("night", at - timedelta(days=1), by=f"{schedule} UTC")

            async def filed(times: int = times) -> bool:
                return len(await stage.past("night")) == times

            await steps(rota, filed)

        async def delivered() -> bool:
            return bool(receiver.events) and not await stage.redis.exists(keys.notices("outbox"))

        await steps(rota, delivered)
    assert receiver.of("night") == ["failed"]
    # It owes no word about a run that there never was.
    assert await stage.redis.hgetall(keys.watched("outbox")) == {}


def test_a_failed_sweep_is_told_in_one_sentence_of_bounded_length() -> None:
    night = datetime(2026, 3, 29, 1, tzinfo=UTC)
    notice = not_swept("expired", "p1", night, "it broke\n\x1b[31m" * 500, at=night)
    assert notice.occasion is Occasion.FAILED
    assert (notice.policy, notice.project_id, notice.at) == (
        "expired",
        "p1",
        "2026-03-29T01:00:00.000Z",
    )
    assert notice.text.startswith("Policy expired: the sweep due at 2026-03-29T01:00:00.000Z")
    assert notice.text.isprintable()
    assert len(notice.text) < 600


def test_the_same_failed_sweep_has_the_same_id_and_another_night_another() -> None:
    night = datetime(2026, 3, 29, 1, tzinfo=UTC)
    later = night + timedelta(hours=1)
    ids = {
        not_swept("expired", project, due, reason, at=at).notice_id
        for project, due, reason, at in (
            ("p1", night, "one", night),
            ("p1", night, "two", later),
            ("p2", night, "one", night),
            ("p1", later, "one", night),
        )
    }
    assert len(ids) == 3
