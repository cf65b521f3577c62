"""Requests by Celery, as another system sends them: nothing is lost, nothing comes for ever."""

from __future__ import annotations

import base64
import json
import re
import time
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from pydantic import SecretStr

from scheduler.intake.broker import make_app
from scheduler.intake.tasks import MOST_SWEPT
from tests.intake.conftest import LEASE_S, OFTEN, QUEUE, TASK, Intake, Place, asks
from tests.sweep.conftest import eventually
from worker.broker import KEY_PREFIX
from worker.ledger import RunState, Source, keys
from worker.settings import Settings

if TYPE_CHECKING:
    from collections.abc import Iterator

    from tests.sweep.conftest import Project

SLOW = {"rate_limit": 4, "rate_burst": 1}
UNACKED = f"{KEY_PREFIX}{QUEUE}:unacked"


@pytest.fixture(scope="module")
def intake(place: Place) -> Iterator[Intake]:
    place.allow(ci={}, web={"ways": ["http"]}, slow=SLOW, narrow={"projects": ["f" * 32]})
    running = place.intake()
    yield running.ready()
    running.kill()


@pytest.fixture(autouse=True)
def _nothing_comes_again(place: Place, intake: Intake) -> Iterator[None]:
    """Whatever a test sends is over by its end."""
    yield
    eventually(place.nothing_left)


def test_a_message_becomes_a_run_of_its_client(place: Place, project: Project) -> None:
    (pool,) = project.add()
    place.send(request=asks(project, pool, reason="over", requester="ann"), client="ci")
    run = place.run_in(project)
    assert (run.source, run.client, run.requester) == (Source.INTAKE, "ci", "ann")
    assert (run.state, run.reason, run.total) == (RunState.PLANNED, "over", 1)


@pytest.mark.parametrize("priority", [0, 3, 9])
def test_a_message_of_any_priority_is_taken(place: Place, project: Project, priority: int) -> None:
    place.send(request=asks(project, *project.add()), client="ci", _priority=priority)
    assert place.run_in(project).total == 1


def test_a_message_that_comes_twice_makes_one_run(place: Place, project: Project) -> None:
    request = asks(project, *project.add())
    for _ in range(2):
        place.send(request=request, client="ci", _task_id=f"once-{project.project}")
    eventually(place.nothing_left)
    place.run_in(project)


def test_a_key_stands_for_one_run_by_whichever_way_it_comes(
    place: Place, intake: Intake, project: Project
) -> None:
    request, key = asks(project, *project.add()), f"key-{project.project}"
    place.send(request=request, client="ci", idempotency_key=key)
    place.xadd(request=json.dumps(request), client="ci", idempotency_key=key)
    token = place.tokens["ci"]
    status, made = intake.call(
        "/v1/runs", request, Authorization=f"Bearer {token}", Idempotency_Key=key
    )
    eventually(place.nothing_left)
    assert status == 202
    assert place.run_in(project).run_id == made["run_id"]


def test_a_key_that_was_used_for_something_else_is_refused(place: Place, project: Project) -> None:
    one, other = project.add(2)
    key = f"key-{project.project}"
    place.send(request=asks(project, one), client="ci", idempotency_key=key)
    place.run_in(project)
    again = place.send(request=asks(project, other), client="ci", idempotency_key=key)
    assert "used for another request" in place.refusal(again).reason
    assert len(place.runs(project)) == 1


NO_POOLS = {"targets": [{"project_id": "a" * 32}]}
POOL = f"pool-{'0' * 32}"
GOOD = {"targets": [{"project_id": "f" * 32, "pools": [POOL]}]}


@pytest.mark.parametrize(
    ("given", "reason"),
    [
        ({}, "request: it is needed"),
        ({"request": GOOD}, "client: it is needed"),
        ({"request": GOOD, "client": "nobody"}, "client: 'nobody' is not known"),
        ({"request": GOOD, "client": 7}, "client: 7 is not known"),
        ({"request": GOOD, "client": "ci", "run": 1}, "'run' is not known; accepted: request, cl"),
        ({"request": json.dumps(GOOD), "client": "ci"}, "request: "),
        ({"request": NO_POOLS, "client": "ci"}, "exactly one of pools and selector is needed"),
        ({"request": GOOD, "client": "web"}, "client web may not send requests by celery"),
        ({"request": GOOD, "client": "ci"}, "client ci may delete nothing in project ffff"),
        ({"request": GOOD, "client": "narrow", "idempotency_key": ""}, "idempotency_key: accepted"),
        (
            {"request": GOOD, "client": "narrow", "idempotency_key": "ä"},
            "idempotency_key: accepted",
        ),
    ],
)
def test_a_message_that_asks_for_nothing_that_can_be_done_is_noted_as_refused(
    place: Place, intake: Intake, given: dict[str, Any], reason: str
) -> None:
    message_id = place.send(**given)
    refusal = place.refusal(message_id)
    assert reason in refusal.reason
    assert refusal.way == "celery"
    assert refusal.client == (given.get("client") if isinstance(given.get("client"), str) else "")
    for value in given.values():
        assert json.dumps(value) in refusal.content


def test_positional_arguments_are_refused(place: Place) -> None:
    message_id = place.send(TASK, GOOD, "ci")
    assert "request: it is needed" in place.refusal(message_id).reason
    message_id = place.send(TASK, "more", request=GOOD, client="ci")
    assert "only keyword arguments" in place.refusal(message_id).reason


@pytest.mark.parametrize(
    ("task", "options", "reason"),
    [
        ("poolsweep.other", {}, "task 'poolsweep.other' is not accepted here"),
        ("celery.map", {}, "task 'celery.map' is not accepted here"),
        ("poolsweep.execute_batch", {}, "is not accepted here"),
        (TASK, {"_serializer": "pickle"}, "its body cannot be read"),
        (TASK, {"_task_id": "x" * 300}, "its id is not accepted"),
    ],
)
def test_what_celery_would_not_hand_on_is_noted_as_refused(
    place: Place, task: str, options: dict[str, Any], reason: str
) -> None:
    message_id = place.send(task, request=GOOD, client="ci", **options)
    assert reason in place.refusal(message_id).reason


def test_a_compressed_message_is_refused_without_unpacking_it(place: Place) -> None:
    before = len(place.rejected())
    place.send(request=GOOD, client="ci", _compression="gzip")
    refused = eventually(lambda: place.rejected()[: len(place.rejected()) - before])
    assert "it is compressed" in refused[0].reason


def envelope(payload: Any = None, /, **changes: Any) -> bytes:
    """A message of Celery's, as it lies in the queue."""
    text = json.dumps(
        [[], {"request": GOOD, "client": "nobody"}, {}] if payload is None else payload
    )
    whole = {
        "body": base64.b64encode(text.encode()).decode(),
        "content-type": "application/json",
        "content-encoding": "utf-8",
        "headers": {"task": TASK, "id": "raw"},
        "properties": {"body_encoding": "base64", "delivery_tag": "t", "delivery_info": {}},
    }
    return json.dumps(whole | changes).encode()


@pytest.mark.parametrize(
    "message",
    [
        b"no JSON",
        b"\xff\xfe",
        b"5",
        b"null",
        b"[]",
        b"{}",
        b"[" * 100_000,
        b'{"body": "' + b"a" * (2 << 20) + b'"}',
        envelope(headers=None),
        envelope(headers=[]),
        envelope(headers={"task": TASK}),
        envelope(headers={"task": TASK, "id": 5}),
        envelope(headers={"task": [TASK], "id": "raw"}),
        envelope(headers={}),
        envelope(properties=None),
        envelope(properties={"body_encoding": "rot13"}),
        envelope(5),
        envelope([]),
        envelope([1, 2, 3]),
        envelope([[], [], {}]),
        envelope([[], {}]),
        envelope({"task": TASK}),
        envelope(headers={"task": TASK, "id": "raw", "eta": "soon"}),
        envelope(headers={"task": TASK, "id": "raw", "expires": {}}),
        envelope(body="%%%"),
        envelope(**{"content-type": "application/x-python-serialize"}),
        envelope(**{"content-type": None}),
        envelope(**{"content-encoding": "no-such"}),
    ],
    ids=range(28),
)
def test_what_is_no_message_is_noted_as_refused_and_holds_up_nothing(
    place: Place, intake: Intake, project: Project, message: bytes
) -> None:
    before = len(place.rejected())
    place.push(message)
    refused = eventually(lambda: place.rejected()[: len(place.rejected()) - before])
    assert len(refused) == 1
    assert refused[0].reason
    assert intake.is_ready()


def test_a_message_of_the_older_protocol_is_taken(place: Place, project: Project) -> None:
    kwargs = {"request": asks(project, *project.add()), "client": "ci"}
    place.push(envelope({"task": TASK, "id": "old", "args": [], "kwargs": kwargs}, headers={}))
    assert place.run_in(project).total == 1


def test_a_message_with_a_time_to_come_is_kept_until_then_and_comes_once(
    place: Place, intake: Intake, project: Project
) -> None:
    """Also when that is later than the lease, after which a dead process's messages come again."""
    sent_at = time.time()
    place.send(request=asks(project, *project.add()), client="ci", _countdown=3 * LEASE_S)
    tags: set[str] = set()
    with place.server.client() as client:

        def made() -> bool:
            tags.update(client.hkeys(UNACKED))
            return bool(place.runs(project))

        eventually(made)
    assert place.run_in(project).created_ms / 1000 >= sent_at + 2.9 * LEASE_S
    assert len(tags) == 1  # a new one for each time that it is taken


def test_a_message_that_expires_before_its_time_is_noted_as_refused(
    place: Place, project: Project
) -> None:
    request = asks(project, *project.add())
    message_id = place.send(request=request, client="ci", _countdown=1, _expires=0.5)
    assert "expired" in place.refusal(message_id).reason
    assert not place.runs(project)


def test_a_message_that_expired_is_not_lost_when_that_cannot_be_noted(
    own_place: Place, project: Project
) -> None:
    intake = own_place.intake().ready()
    with own_place.server.client() as client:
        client.set(keys.REJECTED, "in the way of the stream")
        request = asks(project, *project.add())
        message_id = own_place.send(request=request, client="ci", _countdown=1, _expires=0.5)
        eventually(lambda: intake.process.events("redis_unreachable"))
        client.delete(keys.REJECTED)
    assert "expired" in own_place.refusal(message_id).reason
    eventually(own_place.nothing_left)
    assert not own_place.runs(project)


def test_what_is_kept_of_a_refused_message_does_not_tell_its_webhook(place: Place) -> None:
    request = {"webhook": "https://example.com/s3cret", **NO_POOLS, "reason": "why"}
    refusal = place.refusal(place.send(request=request, client="ci"))
    assert "why" in refusal.content
    before = len(place.rejected())
    told = envelope([[], {"request": request}, {}], headers={"kwargsrepr": repr(request)})
    place.push(told.replace(b"{", b'{"headers": {"compression": "x"}, ', 1)[:-1])
    refused = eventually(lambda: place.rejected()[: len(place.rejected()) - before])
    body = base64.b64encode(json.dumps([[], {"request": request}, {}]).encode()).decode()
    for each in (refusal, *refused):
        assert "s3cret" not in each.content + each.reason
        assert body not in each.content


def test_a_client_that_asks_too_often_waits_and_holds_up_nobody(
    place: Place, intake: Intake, project: Project
) -> None:
    pools = project.add(12)
    for pool in pools:
        place.send(request=asks(project, pool), client="slow")
    other = asks(project, *pools)
    place.send(request=other, client="ci")
    runs = eventually(lambda: found if len(found := place.runs(project)) == 13 else None)
    assert runs is not None
    in_order = sorted(runs.values(), key=lambda run: run.created_ms)
    assert in_order[-1].client == "slow"
    slow = [run.created_ms for run in in_order if run.client == "slow"]
    assert slow[-1] - slow[0] >= 11 * 1000 / SLOW["rate_limit"] * 0.9


def test_the_workers_own_messages_are_left_alone(
    place: Place, intake: Intake, project: Project
) -> None:
    """What is long unacknowledged of theirs is for them to bring back, and only of its own is
    brought back by the intake."""
    kwargs = {"request": asks(project, *project.add()), "client": "ci"}
    with place.server.client() as client:
        for key in (f"{KEY_PREFIX}unacked", UNACKED):
            client.hset(key, "tag", envelope([[], kwargs, {}]))
            client.zadd(f"{key}_index", {"tag": 1})
        place.run_in(project)
        assert client.hlen(f"{KEY_PREFIX}unacked") == 1
        client.delete(f"{KEY_PREFIX}unacked", f"{KEY_PREFIX}unacked_index")


# Whatever dies


def left_by_the_dead(place: Place, message: bytes, swept: int) -> None:
    """A message whose process died with it, as others did before so many times."""
    with place.server.client() as client:
        client.hset(UNACKED, "left", f"swept:{swept}:".encode() + message)
        client.zadd(f"{UNACKED}_index", {"left": 1})


def test_a_message_that_kills_whoever_takes_it_is_given_up(place: Place, project: Project) -> None:
    kwargs = {"request": asks(project, *project.add()), "client": "ci"}
    message_id = f"kills-{project.project}"
    message = envelope([[], kwargs, {}], headers={"task": TASK, "id": message_id})
    left_by_the_dead(place, message, MOST_SWEPT - 1)
    refusal = place.refusal(message_id)
    assert refusal.reason.startswith(f"{MOST_SWEPT} times")
    assert json.loads(refusal.content)[1] == kwargs
    assert not place.runs(project)


@pytest.mark.parametrize(("swept", "later"), [(MOST_SWEPT - 2, False), (MOST_SWEPT, True)])
def test_a_message_is_not_given_up_too_soon_nor_while_its_time_is_to_come(
    place: Place, project: Project, swept: int, *, later: bool
) -> None:
    kwargs = {"request": asks(project, *project.add()), "client": "ci"}
    headers = {"task": TASK, "id": f"lives-{project.project}"}
    if later:
        headers["eta"] = (datetime.now(UTC) + timedelta(seconds=4)).isoformat()
    left_by_the_dead(place, envelope([[], kwargs, {}], headers=headers), swept)
    assert place.run_in(project).total == 1


def test_what_the_dead_left_comes_first_and_last_if_that_was_so_before(own_place: Place) -> None:
    app = make_app(Settings(redis_url=SecretStr(own_place.server.url)))
    with app.connection_for_read() as connection, own_place.server.client() as client:
        channel = connection.default_channel
        for message in (b"first", b"other"):
            own_place.push(message)

        def taken() -> tuple[bytes, int]:
            message, swept = channel.queue_script("take", f"tag-{client.incr('tags')}")
            return message, swept

        def sweep() -> None:
            for tag in client.zrange(f"{UNACKED}_index", 0, -1):
                client.zadd(f"{UNACKED}_index", {tag: 1})
            channel.queue_script("sweep", 1_000, 100)

        assert taken() == (b"first", 0)
        sweep()
        assert taken() == (b"first", 1)
        sweep()
        assert taken() == (b"other", 0)
        assert taken() == (b"first", 2)
        # Given back by one that lives, it is no worse than it was.
        channel.queue_script("restore", client.zrevrange(f"{UNACKED}_index", 0, 0)[0])
        assert taken() == (b"first", 2)


def test_a_message_is_not_lost_with_an_intake_that_died_before_it_took_it(
    own_place: Place, project: Project
) -> None:
    """One that waits for messages when it dies must not take the next one along."""
    first = own_place.intake().ready()
    with first.frozen():
        for pool in project.add(5):
            own_place.send(request=asks(project, pool), client="ci")
        first.kill()
    second = own_place.intake()
    eventually(lambda: len(own_place.runs(project)) == 5)
    eventually(own_place.nothing_left)
    assert second.stop() == 0
    assert not own_place.rejected()


def test_messages_in_hand_are_not_lost_with_their_intake_nor_with_redis(
    own_place: Place, project: Project
) -> None:
    own_place.allow(slow=SLOW)
    first = own_place.intake().ready()
    pools = project.add(10)
    for pool in pools:
        own_place.send(request=asks(project, pool), client="slow")
    with own_place.server.client() as client:
        eventually(lambda: client.hlen(UNACKED) > 2)
    first.kill()
    second = own_place.intake().ready()
    own_place.server.kill()
    own_place.server.start()
    eventually(lambda: len(own_place.runs(project)) == 10, within_s=60)
    eventually(own_place.nothing_left)
    assert second.stop() == 0
    assert not own_place.rejected()


def test_what_is_held_when_redis_goes_is_let_be_and_comes_again(
    own_place: Place, project: Project
) -> None:
    """As a process does whose Redis dies while it holds messages and waits for more."""
    for pool in project.add(2):
        own_place.send(request=asks(project, pool), client="ci")
    held: list[Any] = []
    app = make_app(Settings(redis_url=SecretStr(own_place.server.url)))
    connection = app.connection_for_read()
    app.amqp.TaskConsumer(connection.default_channel, on_message=held.append).consume()
    while len(held) < 2:
        connection.drain_events(timeout=20)
    # As a process has one for what it is told by `celery control`.
    app.amqp.TaskConsumer(connection.channel(), on_message=held.append).consume()
    with pytest.raises(TimeoutError):
        connection.drain_events(timeout=0.1)
    own_place.server.kill()
    # Celery's way of clearing away a connection that is lost.
    connection.collect(socket_timeout=1)
    connection.close()
    held[0].ack()
    held[1].reject(requeue=True)
    own_place.server.start()
    intake = own_place.intake()
    eventually(lambda: len(own_place.runs(project)) == 2)
    eventually(own_place.nothing_left)
    assert intake.stop() == 0


def test_a_stopped_intake_gives_back_what_it_holds(own_place: Place, project: Project) -> None:
    own_place.allow(ci={}, slow={"rate_limit": 0.1, "rate_burst": 1})
    first = own_place.intake(LEASE_S="600").ready()
    for pool in project.add(4):
        own_place.send(request=asks(project, pool), client="slow")
    own_place.send(request=asks(project, *project.add()), client="ci", _countdown=600)
    with own_place.server.client() as client:
        eventually(lambda: client.hlen(UNACKED) and own_place.runs(project))
        assert first.stop() == 0
        assert client.hlen(UNACKED) == 0
        assert client.llen(KEY_PREFIX + QUEUE) == 4


# The page


def section(heading: str) -> list[str]:
    """The worked example under a heading of the page."""
    text = (Path(__file__).parents[2] / "docs" / "intake.md").read_text()
    body = re.search(rf"^## {heading}\n(.*?)(?=^## |\Z)", text, re.MULTILINE | re.DOTALL)
    assert body, heading
    return re.findall(r"^```(?:python|sh)\n(.*?)^```$", body[1], re.MULTILINE | re.DOTALL)


def test_the_page_says_how_and_it_works(
    place: Place, intake: Intake, project: Project, monkeypatch: pytest.MonkeyPatch
) -> None:
    place.allow(ci={}, portal=OFTEN)
    eventually(lambda: intake.process.events("clients_taken_up"))
    (pool,) = project.add()
    (example,) = section("By Celery")
    example = example.replace("0123456789abcdef0123456789abcdef", project.project)
    example = example.replace("pool-os-0123456789abcdef0123456789abcdef", pool)
    url = place.server.url.replace("unix://", "redis+socket://")
    assert "redis://localhost:6379/0" in example
    exec(example.replace("redis://localhost:6379/0", url), {})  # noqa: S102 - it is ours
    run = eventually(lambda: list(place.runs(project).values()))[0]
    assert (run.client, run.reason) == ("portal", "the project has ended")
