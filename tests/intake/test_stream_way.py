"""Requests by a Redis stream: acknowledged once they are safe, claimed from the dead."""

from __future__ import annotations

import json
import os
import subprocess
from typing import TYPE_CHECKING, Any

import pytest

from scheduler.intake.stream import AT_ONCE, GROUP, LONGEST_LINE, MOST_DELIVERIES
from tests.intake.conftest import OFTEN, Intake, Place, asks
from tests.intake.test_celery_way import GOOD, NO_POOLS, SLOW, section
from tests.sweep.conftest import eventually
from worker import embedded_redis
from worker.ledger import RunState, Source, keys

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from tests.sweep.conftest import Project


@pytest.fixture(scope="module")
def intake(place: Place) -> Iterator[Intake]:
    place.allow(ci={}, web={"ways": ["http"]}, slow=SLOW, narrow={"projects": ["f" * 32]})
    running = place.intake()
    yield running.ready()
    running.kill()


@pytest.fixture
def _nothing_left(place: Place, intake: Intake) -> Iterator[None]:
    """Whatever a test sends has left the stream by its end, and is pending nowhere."""
    yield
    eventually(place.nothing_left)
    with place.server.client() as client:
        assert pending(client) == 0


everyday = pytest.mark.usefixtures("_nothing_left")


def pending(client: Any) -> int:
    return int(client.xpending(keys.STREAM, GROUP)["pending"])


def counts(client: Any) -> list[int]:
    """How often each that is pending is said to have been delivered."""
    found = client.xpending_range(keys.STREAM, GROUP, "-", "+", 1_000)
    return [each["times_delivered"] for each in found]


def consumers(client: Any) -> dict[str, int]:
    """What is pending for each."""
    return {each["name"]: each["pending"] for each in client.xinfo_consumers(keys.STREAM, GROUP)}


@everyday
def test_an_entry_becomes_a_run_of_its_client(place: Place, project: Project) -> None:
    (pool,) = project.add()
    place.xadd(request=json.dumps(asks(project, pool, reason="over")), client="ci")
    run = place.run_in(project)
    assert (run.source, run.client, run.reason) == (Source.INTAKE, "ci", "over")
    assert (run.state, run.total) == (RunState.PLANNED, 1)


@everyday
def test_a_key_stands_for_one_run_and_entries_without_one_are_each_their_own(
    place: Place, project: Project
) -> None:
    request = json.dumps(asks(project, *project.add()))
    for key in ({"idempotency_key": f"key-{project.project}"}, {}):
        for _ in range(2):
            place.xadd(request=request, client="ci", **key)
    eventually(place.nothing_left)
    eventually(lambda: all(run.ended for run in place.runs(project).values()))
    assert len(place.runs(project)) == 3


@everyday
@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"client": "ci"}, "request: it is needed"),
        ({"request": json.dumps(GOOD)}, "client: it is needed"),
        ({"request": json.dumps(GOOD), "client": ""}, "client: '' is not known"),
        ({"request": json.dumps(GOOD), "client": "ci", "pool": "x"}, "'pool' is not known"),
        ({"request": "{", "client": "ci"}, "request: it is not JSON"),
        ({"request": '{"targets": [], "targets": []}', "client": "ci"}, "a key is there twice"),
        ({"request": "5", "client": "ci"}, "request: "),
        ({"request": "[" * 100_000, "client": "ci"}, "request: "),
        ({"request": '"' + "a" * (1 << 20) + '"', "client": "ci"}, "bytes are accepted"),
        ({"request": json.dumps(NO_POOLS), "client": "ci"}, "exactly one of pools and selector"),
        ({"request": json.dumps(GOOD), "client": "ci"}, "client ci may delete nothing in project"),
        ({"request": json.dumps(GOOD), "client": "web"}, "may not send requests by stream"),
        (
            {"request": json.dumps(GOOD), "client": "narrow", "idempotency_key": "a b"},
            "accepted: 1",
        ),
    ],
    ids=range(13),
)
def test_an_entry_that_asks_for_nothing_that_can_be_done_is_noted_as_refused(
    place: Place, intake: Intake, fields: dict[str, str], reason: str
) -> None:
    refusal = place.refusal(place.xadd(**fields))
    assert reason in refusal.reason
    assert (refusal.way, refusal.client) == ("stream", fields.get("client", ""))
    assert refusal.content == json.dumps(fields)[: len(refusal.content)]
    assert len(refusal.content) == min(4_096, len(json.dumps(fields)))


@everyday
def test_a_field_that_is_no_text_is_refused_and_holds_up_nothing(
    place: Place, intake: Intake, project: Project
) -> None:
    with place.server.client() as client:
        entry_id = client.xadd(keys.STREAM, {"request": b"\xff\xfe", "client": b"\x80"})
    assert place.refusal(str(entry_id)).reason
    place.xadd(request=json.dumps(asks(project, *project.add())), client="ci")
    place.run_in(project)


@everyday
def test_a_client_that_asks_too_often_waits_and_is_not_refused(
    place: Place, intake: Intake, project: Project
) -> None:
    for pool in project.add(8):
        place.xadd(request=json.dumps(asks(project, pool)), client="slow")
    place.xadd(request=json.dumps(asks(project, *project.add())), client="ci")
    runs = eventually(lambda: found if len(found := place.runs(project)) == 9 else None)
    assert runs is not None
    in_order = sorted(runs.values(), key=lambda run: run.created_ms)
    assert in_order[-1].client == "slow"
    slow = [run.created_ms for run in in_order if run.client == "slow"]
    assert slow[-1] - slow[0] >= 7 * 1000 / SLOW["rate_limit"] * 0.9


NEVER: dict[str, Any] = {"rate_limit": 0.01, "rate_burst": 1}
"""One request, and no other for as long as a test lasts."""


def test_a_client_with_more_entries_than_there_are_places_or_lines_holds_up_nobody(
    own_place: Place, project: Project
) -> None:
    own_place.allow(ci={}, slow=NEVER)
    (pool,) = project.add()
    fields: dict[Any, Any] = {"request": json.dumps(asks(project, pool)), "client": "slow"}
    many = LONGEST_LINE + 2 * AT_ONCE
    with own_place.server.client() as client:
        with client.pipeline() as pipe:
            for _ in range(many):
                pipe.xadd(keys.STREAM, fields)
            pipe.execute()
        intake = own_place.intake()
        eventually(lambda: client.xlen(keys.STREAM) == many - 1 == pending(client), within_s=90)
        own_place.xadd(request=fields["request"], client="ci")
        eventually(lambda: "ci" in {run.client for run in own_place.runs(project).values()})
        # What is more than a line takes is claimed, and let go again, and none of it counts.
        assert set(eventually(lambda: claimed_often(intake), within_s=90)) == {0}
        assert client.xlen(keys.STREAM) == many - 1 == pending(client)
    assert not own_place.rejected()


def claimed_often(intake: Intake) -> list[int]:
    """The deliveries that counted, whenever an entry was claimed that was so too often to live."""
    claimed: dict[str, list[int]] = {}
    for event in intake.process.events("stream_entry_claimed"):
        claimed.setdefault(event["message_id"], []).append(event["deliveries"])
    return next((found for found in claimed.values() if len(found) > MOST_DELIVERIES), [])


def test_what_waits_when_its_intake_is_killed_does_not_count_as_delivered(
    own_place: Place, project: Project
) -> None:
    own_place.allow(slow=NEVER)
    intake = own_place.intake(LEASE_S="600").ready()
    for pool in project.add(4):
        own_place.xadd(request=json.dumps(asks(project, pool)), client="slow")
    with own_place.server.client() as client:
        eventually(lambda: counts(client) == [0, 0, 0])
        intake.kill()
        # The first of the line is tried now and then, and counts for that time.
        assert sum(counts(client)) <= 1


def test_a_stopped_intake_hands_back_what_it_holds_at_once_and_uncounted(
    own_place: Place, project: Project
) -> None:
    own_place.allow(slow=NEVER)
    first = own_place.intake(LEASE_S="600").ready()
    pools = project.add(4)
    for pool in pools:
        own_place.xadd(request=json.dumps(asks(project, pool)), client="slow")
    with own_place.server.client() as client:
        eventually(lambda: client.xlen(keys.STREAM) == 3 == pending(client))
        assert first.stop() == 0
        assert counts(client) == [0, 0, 0]
        own_place.allow(slow=OFTEN)
        client.delete(*client.keys("*limiter*"))
        second = own_place.intake(LEASE_S="600")
        eventually(lambda: len(own_place.runs(project)) == 4)
        eventually(own_place.nothing_left)
    assert second.stop() == 0
    assert not own_place.rejected()


@everyday
def test_an_entry_that_is_taken_off_while_it_waits_is_noted(
    place: Place, intake: Intake, project: Project
) -> None:
    request = json.dumps(asks(project, *project.add()))
    entries = [place.xadd(request=request, client="slow") for _ in range(8)]
    with place.server.client() as client:
        eventually(lambda: place.runs(project))
        client.xdel(keys.STREAM, entries[-1])
    assert "taken off the stream" in place.refusal(entries[-1]).reason
    eventually(lambda: len(place.runs(project)) == 7)


@everyday
@pytest.mark.parametrize("cut", [0, 1], ids=["whole", "broken"])
def test_what_is_kept_of_a_refused_entry_does_not_tell_its_webhook(
    place: Place, intake: Intake, cut: int
) -> None:
    request = json.dumps({"webhook": "https://example.com/s3cret", **NO_POOLS, "reason": "why"})
    refusal = place.refusal(place.xadd(request=request[: len(request) - cut], client="ci"))
    assert "s3cret" not in refusal.content + refusal.reason
    assert "why" in refusal.content


# What a dead consumer left


def taken_by(client: Any, consumer: str, fields: dict[Any, Any]) -> str:
    """The id of an entry that this very consumer was given, before any other could ask for it."""
    with client.pipeline() as pipe:
        pipe.xadd(keys.STREAM, fields)
        pipe.xreadgroup(GROUP, consumer, {keys.STREAM: ">"})
        return str(pipe.execute()[0])


def left_by_the_dead(
    place: Place, fields: dict[Any, Any], deliveries: int, *, trimmed: bool = False
) -> str:
    """An entry that somebody took, so many times, and never acknowledged. Returns its id."""
    with place.server.client() as client:
        entry_id = taken_by(client, "dead", fields)
        with client.pipeline() as pipe:
            pipe.xclaim(
                keys.STREAM, GROUP, "dead", 0, [entry_id], retrycount=deliveries, idle=3_600_000
            )
            if trimmed:
                pipe.xdel(keys.STREAM, entry_id)
            pipe.execute()
    return entry_id


@everyday
def test_what_a_dead_consumer_left_is_claimed_and_the_consumer_taken_off(
    place: Place, intake: Intake, project: Project
) -> None:
    request = json.dumps(asks(project, *project.add()))
    left_by_the_dead(place, {"request": request, "client": "ci"}, MOST_DELIVERIES - 1)
    place.run_in(project)
    with place.server.client() as client:
        eventually(lambda: "dead" not in consumers(client))


@everyday
def test_an_entry_that_never_comes_to_an_end_is_given_up(
    place: Place, intake: Intake, project: Project
) -> None:
    request = json.dumps(asks(project, *project.add()))
    fields = {"request": request, "client": "ci"}
    refusal = place.refusal(left_by_the_dead(place, fields, MOST_DELIVERIES))
    assert refusal.reason == f"it was delivered {MOST_DELIVERIES} times and never came to an end"
    assert json.loads(refusal.content) == fields
    assert not place.runs(project)


@everyday
def test_an_entry_that_was_trimmed_off_before_it_was_read_is_noted(
    place: Place, intake: Intake
) -> None:
    entry_id = left_by_the_dead(place, {"request": "{}", "client": "ci"}, 1, trimmed=True)
    assert "taken off the stream" in place.refusal(entry_id).reason


@everyday
@pytest.mark.parametrize("loss", ["group", "stream"])
def test_a_group_or_a_stream_that_is_lost_is_made_again(
    place: Place, intake: Intake, project: Project, loss: str
) -> None:
    request = json.dumps(asks(project, *project.add()))
    with place.server.client() as client:
        if loss == "stream":
            client.delete(keys.STREAM)
        else:
            client.xgroup_destroy(keys.STREAM, GROUP)
    place.xadd(request=request, client="ci")
    place.run_in(project)


@everyday
def test_a_consumer_that_still_has_something_is_not_taken_off(
    place: Place, intake: Intake, project: Project
) -> None:
    """Its entries would be forgotten with it."""
    with place.server.client() as client:
        client.xgroup_createconsumer(keys.STREAM, GROUP, "empty")
        request = json.dumps(asks(project, *project.add()))
        entry_id = taken_by(client, "busy", {"request": request, "client": "ci"})

        def seen() -> dict[str, int]:
            # It goes on being at it.
            client.xclaim(keys.STREAM, GROUP, "busy", 0, [entry_id], justid=True)
            return consumers(client)

        eventually(lambda: "empty" not in seen())
        assert seen()["busy"] == 1
        assert not place.runs(project)
        client.xack(keys.STREAM, GROUP, entry_id)
        client.xdel(keys.STREAM, entry_id)


# Several, and whatever dies


def test_several_intakes_share_the_stream_and_leave_it_in_order(
    own_place: Place, project: Project
) -> None:
    both = [own_place.intake().ready(), own_place.intake().ready()]
    pools = project.add(60)
    for pool in pools:
        own_place.xadd(request=json.dumps(asks(project, pool)), client="ci")
    eventually(lambda: len(own_place.runs(project)) == 60)
    accepted = [len(each.process.events("request_accepted")) for each in both]
    assert sum(accepted) == 60
    assert [each.stop() for each in both] == [0, 0]
    with own_place.server.client() as client:
        assert consumers(client) == {}
        assert pending(client) == client.xlen(keys.STREAM) == 0


def test_entries_in_hand_are_not_lost_with_their_intake_nor_with_redis(
    own_place: Place, project: Project
) -> None:
    own_place.allow(slow=SLOW)
    first = own_place.intake().ready()
    for pool in project.add(10):
        own_place.xadd(request=json.dumps(asks(project, pool)), client="slow")
    with own_place.server.client() as client:
        eventually(lambda: pending(client) > 5)
    first.kill()
    second = own_place.intake().ready()
    own_place.server.kill()
    own_place.server.start()
    eventually(lambda: len(own_place.runs(project)) == 10, within_s=60)
    eventually(own_place.nothing_left)
    assert second.stop() == 0
    assert not own_place.rejected()


def test_entries_wait_for_an_intake_that_comes_later(own_place: Place, project: Project) -> None:
    own_place.xadd(request=json.dumps(asks(project, *project.add())), client="ci")
    intake = own_place.intake()
    own_place.run_in(project)
    assert intake.stop() == 0


# The page


def test_the_page_says_how_and_it_works(
    place: Place, intake: Intake, project: Project, tmp_path: Path
) -> None:
    place.allow(ci={}, slow=SLOW, portal=OFTEN)
    eventually(lambda: intake.process.events("clients_taken_up"))
    before = len(place.rejected())
    (pool,) = project.add()
    (example,) = section("By a Redis stream")
    example = example.replace("0123456789abcdef0123456789abcdef", project.project, 1)
    example = example.replace("pool-os-0123456789abcdef0123456789abcdef", pool)
    # redis-cli with the server that comes with the project.
    binaries = embedded_redis.find_server_binary().rpartition("/")[0]
    script = f'redis-cli() {{ {binaries}/redis-cli -s "{place.server.url[7:]}" "$@"; }}\n'
    script += "\n".join(line for line in example.splitlines() if "poolsweep requests" not in line)
    subprocess.run(["/bin/bash", "-ec", script], check=True, cwd=tmp_path, env=dict(os.environ))
    run = place.run_in(project)
    assert (run.client, run.reason) == ("portal", "the project has ended")
    assert len(place.rejected()) == before
