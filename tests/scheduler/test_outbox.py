"""Notices through a real Redis, alone and in cluster mode, to a real receiver over HTTP."""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import json
import logging
from collections import deque
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any, cast

import pytest
from aiohttp import web
from redis.asyncio import Redis
from structlog.testing import capture_logs

from scheduler.notices import Notice, ended
from scheduler.outbox import PAGE, RETRY, Outbox, OutboxOptions, RunWatch
from scheduler.policy import Channel, Occasion
from tests.conftest import until
from worker.ledger import (
    JobState,
    Ledger,
    Move,
    NewJob,
    NewRun,
    Run,
    RunState,
    Source,
    keys,
    new_run_id,
)
from worker.projects import SecretRef
from worker.retry import RetryPolicy

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
    from pathlib import Path

ENDPOINT = "https://modelarts.example.com"
PROJECT = "0123456789abcdef0123456789abcdef"
HOOK = "T0KEN-in-the-URL"
SECRET = "k3y-of-the-signatures"
AT_ONCE = RetryPolicy(max_attempts=500, max_total_s=86_400, base_s=0.001, cap_s=0.001)
DAY_MS = 86_400_000
NOTICE = Notice(
    notice_id="20260102-030405-0123456789:finished",
    occasion=Occasion.FINISHED,
    policy="stale",
    project_id=PROJECT,
    at="2026-01-02T03:04:05.000Z",
    text="Policy stale: run 1 finished: Pool ü <!channel> 😀 \ud800.",
    details={"counts": {"deleted": 1}, "projects": [], "ratio": 0.1, "none": None},
)


def notice_of(number: int) -> Notice:
    return replace(NOTICE, notice_id=f"run-{number}:finished")


@dataclass
class Request:
    path: str
    headers: Mapping[str, str]
    body: bytes

    @property
    def document(self) -> dict[str, Any]:
        return cast("dict[str, Any]", json.loads(self.body))


@dataclass
class Receiver:
    """A web server that is told things.

    Attributes:
        url: where; secret.
        answers: the next statuses, with headers; then 200.
        open: while it is not set, those that come are not answered.
        requests: what came.
    """

    url: str = ""
    answers: deque[tuple[int, dict[str, str]]] = field(default_factory=deque)
    open: asyncio.Event = field(default_factory=asyncio.Event)
    requests: list[Request] = field(default_factory=list)

    async def answer(self, request: web.Request) -> web.Response:
        gate = self.open
        body = await request.read()
        self.requests.append(Request(request.path, dict(request.headers), body))
        status, headers = self.answers.popleft() if self.answers else (200, {})
        await gate.wait()
        return web.Response(status=status, headers=headers, text=f"told at {request.url}")

    def ids(self) -> list[str]:
        return sorted(request.document["id"] for request in self.requests)

    async def has(self, count: int) -> None:
        async def came() -> bool:
            return len(self.requests) >= count

        await until(came)


@pytest.fixture
async def receiver() -> AsyncIterator[Receiver]:
    receiver = Receiver()
    receiver.open.set()
    app = web.Application()
    app.router.add_route("*", "/{path:.*}", receiver.answer)
    runner = web.AppRunner(app, access_log=None, shutdown_timeout=0.1)
    await runner.setup()
    try:
        await web.TCPSite(runner, "127.0.0.1", 0).start()
        receiver.url = "http://{}:{}/{}".format(*runner.addresses[0][:2], HOOK)
        yield receiver
    finally:
        receiver.open.set()
        await runner.cleanup()


@pytest.fixture(params=["redis_url", "cluster_url"])
def server(request: pytest.FixtureRequest) -> str:
    return cast("str", request.getfixturevalue(request.param))


@pytest.fixture
async def redis(server: str) -> AsyncIterator[Redis]:
    client = Redis.from_url(server, decode_responses=True)
    await client.flushdb()
    yield client
    await client.aclose()


@pytest.fixture
async def other_redis(server: str) -> AsyncIterator[Redis]:
    """The connection of another process."""
    client = Redis.from_url(server, decode_responses=True)
    yield client
    await client.aclose()


@pytest.fixture
def outbox(redis: Redis) -> Outbox:
    return Outbox(redis, OutboxOptions(retry=AT_ONCE))


@pytest.fixture
def channel(tmp_path: Path, receiver: Receiver) -> Channel:
    return channel_to(receiver.url, tmp_path)


def channel_to(url: str, directory: Path, **changes: Any) -> Channel:
    """A signed JSON channel."""
    (directory / "url").write_text(f"{url}\n")
    (directory / "secret").write_text(SECRET)
    references = {name: SecretRef(file=directory / name) for name in ("url", "secret")}
    return Channel(**{**references, **changes})


async def on_their_way(redis: Redis) -> int:
    waiting = await redis.hlen(keys.notices("outbox"))
    assert await redis.zcard(keys.notices_due("outbox")) == waiting
    return waiting


async def due_ms(redis: Redis) -> float:
    """When the only notice on its way is sent next, or its lease runs out."""
    ((_, score),) = cast(
        "list[tuple[str, float]]",
        await redis.zrange(keys.notices_due("outbox"), 0, -1, withscores=True),
    )
    return score


async def now_ms(redis: Redis) -> float:
    seconds, micros = await redis.time()
    return seconds * 1000 + micros / 1000


# Delivery


async def test_a_notice_arrives_signed_and_as_it_was_posted(
    redis: Redis, outbox: Outbox, channel: Channel, receiver: Receiver
) -> None:
    assert await outbox.post("ops", NOTICE)
    with capture_logs() as logs:
        assert await outbox.deliver({"ops": channel}) == 1
    (request,) = receiver.requests
    assert Notice.parse(request.body.decode()) == NOTICE
    assert request.headers["Content-Type"] == "application/json"
    assert request.headers["X-Poolsweep-Event"] == "finished"
    assert request.headers["X-Poolsweep-Delivery"] == NOTICE.notice_id
    stamp, _, signature = request.headers["X-Poolsweep-Signature"].partition(",v1=")
    signed = stamp.removeprefix("t=").encode() + b"." + request.body
    assert signature == hmac.new(SECRET.encode(), signed, hashlib.sha256).hexdigest()
    assert await on_their_way(redis) == 0
    assert logs == [
        {
            "event": "notice_sent",
            "log_level": "info",
            "notice_id": NOTICE.notice_id,
            "channel": "ops",
            "occasion": "finished",
            "status": 200,
            "attempts": 1,
        }
    ]


async def test_slack_gets_its_own_format_and_no_signature(
    outbox: Outbox, receiver: Receiver, tmp_path: Path
) -> None:
    await outbox.post("ops", NOTICE)
    await outbox.deliver({"ops": channel_to(receiver.url, tmp_path, format="slack")})
    (request,) = receiver.requests
    assert request.document.keys() == {"text", "blocks"}
    assert "Pool ü &lt;!channel&gt; 😀" in request.document["text"]
    assert not [name for name in request.headers if name.startswith("X-Poolsweep")]


async def test_after_a_500_it_is_sent_again_and_arrives_once(
    redis: Redis, outbox: Outbox, channel: Channel, receiver: Receiver
) -> None:
    receiver.answers.append((500, {}))
    await outbox.post("ops", NOTICE)
    with capture_logs() as logs:
        assert await outbox.deliver({"ops": channel}) == 0
        assert await on_their_way(redis) == 1
        assert await until(lambda: outbox.deliver({"ops": channel})) == 1
        assert await outbox.deliver({"ops": channel}) == 0
    assert [request.document["id"] for request in receiver.requests] == 2 * [NOTICE.notice_id]
    failed, sent = logs
    assert (failed["event"], failed["log_level"]) == ("notice_failed", "warning")
    assert (failed["status"], failed["attempts"], failed["channel"]) == (500, 1, "ops")
    assert failed["reason"] == "the receiver answered HTTP 500"
    assert (sent["event"], sent["status"], sent["attempts"]) == ("notice_sent", 200, 2)


async def test_what_failed_waits_for_its_backoff(
    redis: Redis, channel: Channel, receiver: Receiver
) -> None:
    outbox = Outbox(redis)
    receiver.answers.append((503, {"Retry-After": "600"}))
    await outbox.post("ops", NOTICE)
    before_ms = await now_ms(redis)
    await outbox.deliver({"ops": channel})
    assert await outbox.deliver({"ops": channel}) == 0
    wait_ms = await due_ms(redis) - before_ms
    assert 600_000 <= wait_ms < 660_000
    assert len(receiver.requests) == 1


async def test_a_receiver_cannot_put_a_notice_off_for_longer_than_the_longest_backoff(
    redis: Redis, channel: Channel, receiver: Receiver
) -> None:
    outbox = Outbox(redis)
    receiver.answers.append((429, {"Retry-After": "9" * 20}))
    await outbox.post("ops", NOTICE)
    before_ms = await now_ms(redis)
    await outbox.deliver({"ops": channel})
    wait_ms = await due_ms(redis) - before_ms
    assert RETRY.cap_s * 1000 <= wait_ms < RETRY.cap_s * 1000 + 60_000


async def test_posting_the_same_notice_again_sends_it_once(
    outbox: Outbox, channel: Channel, receiver: Receiver
) -> None:
    assert await outbox.post("ops", NOTICE)
    assert not await outbox.post("ops", NOTICE)
    await outbox.deliver({"ops": channel})
    assert not await outbox.post("ops", replace(NOTICE, text="said otherwise"))
    assert await outbox.deliver({"ops": channel}) == 0
    assert len(receiver.requests) == 1


async def test_each_channel_gets_its_own(
    outbox: Outbox, channel: Channel, receiver: Receiver
) -> None:
    assert await outbox.post("ops", NOTICE)
    assert await outbox.post("dev", NOTICE)
    assert await outbox.deliver({"ops": channel, "dev": channel}) == 2
    assert len(receiver.requests) == 2


async def test_only_channels_that_are_on_for_it_are_told(
    outbox: Outbox, receiver: Receiver, tmp_path: Path
) -> None:
    quiet = channel_to(receiver.url, tmp_path, on=[Occasion.FAILED])
    channels = {"ops": channel_to(receiver.url, tmp_path), "quiet": quiet}
    await outbox.announce(["ops", "quiet"], channels, NOTICE)
    assert await outbox.deliver(channels) == 1


async def test_a_notice_is_remembered_for_thirty_days(
    redis: Redis, outbox: Outbox, channel: Channel
) -> None:
    await outbox.post("ops", NOTICE)
    await outbox.deliver({"ops": channel})
    assert 29 * DAY_MS < await redis.pttl(keys.notices_posted("outbox")) <= 30 * DAY_MS
    (entry_id,) = cast("list[str]", await redis.zrange(keys.notices_posted("outbox"), 0, -1))
    at_ms = await now_ms(redis)
    await redis.zadd(keys.notices_posted("outbox"), {entry_id: at_ms - 29 * DAY_MS})
    assert not await outbox.post("ops", NOTICE)
    await redis.zadd(keys.notices_posted("outbox"), {entry_id: at_ms - 31 * DAY_MS})
    assert await outbox.post("ops", NOTICE)
    await redis.zadd(keys.notices_posted("outbox"), {entry_id: at_ms - 31 * DAY_MS})
    assert not await outbox.post("ops", NOTICE)  # it is still on its way
    await outbox.post("ops", notice_of(1))
    assert await redis.zscore(keys.notices_posted("outbox"), entry_id) is None


async def test_more_than_a_page_is_delivered_at_once(
    redis: Redis, outbox: Outbox, channel: Channel, receiver: Receiver
) -> None:
    count = 2 * PAGE + 1
    for number in range(count):
        await outbox.post("ops", notice_of(number))
    assert await outbox.deliver({"ops": channel}) == count
    assert receiver.ids() == sorted(notice_of(number).notice_id for number in range(count))
    assert await on_their_way(redis) == 0


# Deliverers


async def test_two_deliverers_at_once_send_once(
    redis: Redis, other_redis: Redis, channel: Channel, receiver: Receiver
) -> None:
    receiver.open.clear()
    for number in range(PAGE - 1):
        await Outbox(redis).post("ops", notice_of(number))
    one = asyncio.create_task(Outbox(redis).deliver({"ops": channel}))
    await receiver.has(PAGE - 1)
    # The first waits for all of its answers; the second finds nothing to do.
    assert await Outbox(other_redis).deliver({"ops": channel}) == 0
    receiver.open.set()
    assert await one == PAGE - 1
    assert len(set(receiver.ids())) == len(receiver.requests) == PAGE - 1


async def test_many_deliverers_share_the_work_without_sending_anything_twice(
    redis: Redis, other_redis: Redis, channel: Channel, receiver: Receiver
) -> None:
    count = 3 * PAGE
    for number in range(count):
        await Outbox(redis).post("ops", notice_of(number))
    outboxes = [Outbox(each) for each in (redis, other_redis) * 2]
    shares = await asyncio.gather(*(each.deliver({"ops": channel}) for each in outboxes))
    assert sum(shares) == count
    assert len(set(receiver.ids())) == len(receiver.requests) == count


async def test_the_lease_of_a_dead_deliverer_runs_out(
    redis: Redis, other_redis: Redis, channel: Channel, receiver: Receiver
) -> None:
    receiver.open.clear()
    dying = Outbox(redis, OutboxOptions(lease_s=0.3))
    await dying.post("ops", NOTICE)
    task = asyncio.create_task(dying.deliver({"ops": channel}))
    await receiver.has(1)
    task.cancel()
    await asyncio.wait([task])
    receiver.open.set()
    assert await on_their_way(redis) == 1
    other = Outbox(other_redis)
    assert await until(lambda: other.deliver({"ops": channel})) == 1
    assert [request.document["id"] for request in receiver.requests] == 2 * [NOTICE.notice_id]
    assert await on_their_way(redis) == 0


async def test_a_deliverer_that_was_too_slow_does_not_give_anothers_notice_away(
    redis: Redis, other_redis: Redis, channel: Channel, receiver: Receiver
) -> None:
    first = receiver.open = asyncio.Event()
    receiver.answers.append((500, {}))
    slow = Outbox(redis, OutboxOptions(lease_s=0.1, retry=AT_ONCE))
    await slow.post("ops", NOTICE)
    late = asyncio.create_task(slow.deliver({"ops": channel}))
    await receiver.has(1)
    second = receiver.open = asyncio.Event()
    other = Outbox(other_redis)
    taking_over = asyncio.create_task(until(lambda: other.deliver({"ops": channel})))
    await receiver.has(2)
    lease_ends_ms = await due_ms(redis)
    first.set()
    assert await late == 0
    assert await due_ms(redis) == lease_ends_ms
    second.set()
    assert await taking_over == 1
    assert await on_their_way(redis) == 0
    assert len(receiver.requests) == 2


async def test_what_a_deliverer_gives_up_too_late_may_still_arrive_by_another(
    redis: Redis, other_redis: Redis, channel: Channel, receiver: Receiver
) -> None:
    first = receiver.open = asyncio.Event()
    receiver.answers.append((500, {}))
    once = OutboxOptions(lease_s=0.1, retry=replace(AT_ONCE, max_attempts=1))
    slow = Outbox(redis, once)
    await slow.post("ops", NOTICE)
    late = asyncio.create_task(slow.deliver({"ops": channel}))
    await receiver.has(1)
    second = receiver.open = asyncio.Event()
    other = Outbox(other_redis)
    taking_over = asyncio.create_task(until(lambda: other.deliver({"ops": channel})))
    await receiver.has(2)
    first.set()
    assert await late == 0
    assert await slow.undelivered() == []
    second.set()
    assert await taking_over == 1


# Rooms


def test_the_room_of_policies_notices_is_where_it_always_was() -> None:
    assert [*keys.of_outbox("outbox"), keys.watched("outbox")] == [
        f"poolsweep:{{outbox}}:{name}"
        for name in ("notices", "due", "posted", "undelivered", "watched")
    ]


async def test_what_is_in_one_room_is_not_in_another(
    redis: Redis, channel: Channel, receiver: Receiver
) -> None:
    once = OutboxOptions(retry=replace(AT_ONCE, max_attempts=1))
    one, other = Outbox(redis, once), Outbox(redis, once, room="other")
    assert await one.post("ops", NOTICE)
    assert await other.deliver({"ops": channel}) == 0
    assert await other.post("ops", NOTICE)
    assert await other.deliver({}) == 0
    assert [each.notice for each in await other.undelivered()] == [NOTICE]
    assert await one.undelivered() == []
    assert await one.deliver({"ops": channel}) == 1
    assert len(receiver.requests) == 1


async def test_a_run_is_told_in_the_room_that_watches_it(
    redis: Redis,
    ledger: Ledger,
    runs: Runs,
    outbox: Outbox,
    channel: Channel,
    receiver: Receiver,
) -> None:
    channels = {"ops": channel}
    other = Outbox(redis, room="other")
    watch, other_watch = RunWatch(redis, outbox), RunWatch(redis, other, room="other")
    run_id = await runs.make(1)
    await other_watch.watch(run_id, ["ops"])
    await runs.end(run_id, JobState.DELETED)
    await watch.check(ledger, channels)
    await other_watch.check(ledger, channels)
    assert await told(outbox, channels, receiver) == []
    assert await told(other, channels, receiver) == [f"{run_id}:finished"]


async def test_what_comes_after_a_colon_in_a_channels_name_is_in_no_log_line(
    outbox: Outbox, channel: Channel
) -> None:
    await outbox.post(f"ci:{HOOK}", NOTICE)
    with capture_logs() as logs:
        assert await outbox.deliver({f"ci:{HOOK}": channel}) == 1
    assert logs[0]["channel"] == "ci"
    assert HOOK not in repr(logs)


# What goes wrong


async def test_what_never_arrives_is_given_up_and_kept_for_the_record(
    redis: Redis, channel: Channel, receiver: Receiver
) -> None:
    thrice = replace(AT_ONCE, max_attempts=3)
    outbox = Outbox(redis, OutboxOptions(retry=thrice))
    receiver.answers.extend([(500, {}), (404, {}), (302, {"Location": "/elsewhere"})])
    await outbox.post("ops", NOTICE)

    async def given_up() -> bool:
        assert await outbox.deliver({"ops": channel}) == 0
        return await on_their_way(redis) == 0

    with capture_logs() as logs:
        await until(given_up)
    assert [entry["event"] for entry in logs] == 2 * ["notice_failed"] + ["notice_given_up"]
    assert [entry["status"] for entry in logs] == [500, 404, 302]
    assert logs[-1]["log_level"] == "error"
    (undelivered,) = await outbox.undelivered()
    assert (undelivered.channel, undelivered.notice) == ("ops", NOTICE)
    assert undelivered.attempts == 3
    assert undelivered.reason == "the receiver answered HTTP 302: redirects are not followed"
    assert {request.path for request in receiver.requests} == {f"/{HOOK}"}
    assert not await outbox.post("ops", NOTICE)


async def test_a_notice_is_tried_for_a_day(
    redis: Redis, channel: Channel, receiver: Receiver
) -> None:
    outbox = Outbox(redis, OutboxOptions(retry=replace(RETRY, base_s=0.001, cap_s=0.001)))
    receiver.answers.extend(3 * [(500, {})])
    await outbox.post("ops", NOTICE)
    await outbox.deliver({"ops": channel})
    for age_ms, left in ((DAY_MS - 60_000, 1), (DAY_MS + 60_000, 0)):
        await made_older(redis, age_ms)
        await until(lambda: attempted(receiver, outbox, channel))
        assert await on_their_way(redis) == left
        assert len(await outbox.undelivered()) == 1 - left


async def made_older(redis: Redis, age_ms: int) -> None:
    """Put the first attempt of the only notice back in time."""
    ((entry_id, text),) = (
        await cast("Awaitable[dict[str, str]]", redis.hgetall(keys.notices("outbox")))
    ).items()
    first_ms = round(await now_ms(redis)) - age_ms
    record = json.dumps({**json.loads(text), "first": first_ms})
    await redis.hset(keys.notices("outbox"), entry_id, record)


async def attempted(receiver: Receiver, outbox: Outbox, channel: Channel) -> bool:
    before = len(receiver.requests)
    await outbox.deliver({"ops": channel})
    return len(receiver.requests) > before


async def test_of_what_was_given_up_the_newest_are_kept(redis: Redis) -> None:
    once = replace(AT_ONCE, max_attempts=1)
    outbox = Outbox(redis, OutboxOptions(retry=once, undelivered_kept=2))
    for number in range(3):
        await outbox.post("gone", notice_of(number))
        await outbox.deliver({})
    assert [each.notice for each in await outbox.undelivered()] == [notice_of(2), notice_of(1)]
    assert [each.notice for each in await outbox.undelivered(limit=1)] == [notice_of(2)]


async def test_a_channel_that_is_not_there_is_waited_for(
    outbox: Outbox, channel: Channel, receiver: Receiver
) -> None:
    await outbox.post("ops", NOTICE)
    with capture_logs() as logs:
        assert await outbox.deliver({}) == 0
    assert logs[0]["event"] == "notice_failed"
    assert logs[0]["status"] is None
    assert logs[0]["reason"] == "there is no such channel under notifications"
    assert await until(lambda: outbox.deliver({"ops": channel})) == 1
    assert len(receiver.requests) == 1


@pytest.mark.parametrize("missing", ["url", "secret"])
async def test_a_secret_that_cannot_be_read_is_waited_for(
    outbox: Outbox, channel: Channel, receiver: Receiver, tmp_path: Path, missing: str
) -> None:
    text = (tmp_path / missing).read_text()
    (tmp_path / missing).unlink()
    await outbox.post("ops", NOTICE)
    with capture_logs() as logs:
        assert await outbox.deliver({"ops": channel}) == 0
    assert f"{tmp_path / missing} for a secret cannot be read" in logs[0]["reason"]
    assert receiver.requests == []
    (tmp_path / missing).write_text(text)
    assert await until(lambda: outbox.deliver({"ops": channel})) == 1


@pytest.mark.parametrize(
    "url",
    [
        f"http://hooks.example.com/{HOOK}",
        f"ftp://127.0.0.1/{HOOK}",
        f"//127.0.0.1/{HOOK}",
        f"127.0.0.1/{HOOK}",
        f"https:///{HOOK}",
        f"https://127.0.0.1:99999/{HOOK}",
        f"https://[::1/{HOOK}",
        HOOK,
    ],
)
async def test_a_url_without_encryption_or_that_is_none_is_not_used_or_shown(
    redis_client: Redis, tmp_path: Path, url: str
) -> None:
    outbox = Outbox(redis_client, OutboxOptions(retry=replace(AT_ONCE, max_attempts=1)))
    await outbox.post("ops", NOTICE)
    with capture_logs() as logs:
        assert await outbox.deliver({"ops": channel_to(url, tmp_path)}) == 0
    assert logs[0]["event"] == "notice_given_up"
    assert logs[0]["reason"] == (
        "The channel's URL cannot be used; accepted: https://…, and http://… only for this machine."
    )


async def test_what_hangs_holds_up_nothing_else(
    redis: Redis, receiver: Receiver, channel: Channel, tmp_path: Path
) -> None:
    receiver.open.clear()
    outbox = Outbox(redis, OutboxOptions(timeout_s=0.2, retry=AT_ONCE))
    await outbox.post("ops", NOTICE)
    await outbox.post("gone", NOTICE)
    with capture_logs() as logs:
        assert await outbox.deliver({"ops": channel}) == 0
    reasons = {entry["channel"]: entry["reason"] for entry in logs}
    assert reasons["ops"] == "no answer within 0.2 s"
    assert reasons["gone"] == "there is no such channel under notifications"
    receiver.open.set()
    assert await until(lambda: outbox.deliver({"ops": channel})) == 1


@pytest.fixture
async def garbled_port() -> AsyncIterator[int]:
    """The port of a server that does not answer in HTTP."""

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(b"200 OK\r\n\r\n")
        writer.close()

    async with await asyncio.start_server(answer, "127.0.0.1", 0) as server:
        yield server.sockets[0].getsockname()[1]


async def everything_in(redis: Redis) -> str:
    """All keys and values, as they are held."""
    readers: dict[str, Callable[[str], Awaitable[Any]]] = {
        "string": redis.get,
        "hash": redis.hgetall,
        "list": lambda key: cast("Awaitable[Any]", redis.lrange(key, 0, -1)),
        "set": redis.smembers,
        "zset": lambda key: redis.zrange(key, 0, -1, withscores=True),
    }
    names = [cast("str", key) async for key in redis.scan_iter()]
    return repr([(name, await readers[str(await redis.type(name))](name)) for name in names])


async def test_urls_and_secrets_are_in_no_value_of_redis_and_in_no_log_line(
    redis: Redis,
    receiver: Receiver,
    channel: Channel,
    garbled_port: int,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.DEBUG)
    asyncio.get_running_loop().set_debug(True)
    closed = receiver.url.rpartition(":")[0] + f":1/{HOOK}"
    elsewhere = {"closed": closed, "unsafe": f"http://hooks.example.com/{HOOK}"}
    elsewhere |= {"tls": receiver.url.replace("http:", "https:"), "none": f"://{HOOK}"}
    elsewhere["garbled"] = f"http://127.0.0.1:{garbled_port}/{HOOK}"
    channels = {"ops": channel}
    for name, url in elsewhere.items():
        (tmp_path / name).mkdir()
        channels[name] = channel_to(url, tmp_path / name)
    outbox = Outbox(redis, OutboxOptions(timeout_s=0.5, retry=replace(AT_ONCE, max_attempts=2)))
    receiver.answers.append((500, {"Location": receiver.url}))
    held = []
    with capture_logs() as logs:
        for name in channels:
            await outbox.post(name, NOTICE)

        async def all_over() -> bool:
            await outbox.deliver(channels)
            held.append(await everything_in(redis))
            return await on_their_way(redis) == 0

        await until(all_over)
    given_up = {entry["channel"] for entry in logs if entry["event"] == "notice_given_up"}
    assert given_up == elsewhere.keys()
    assert {each.channel for each in await outbox.undelivered()} == elsewhere.keys()
    assert len(receiver.requests) == 2
    shown = repr(logs) + caplog.text + repr(outbox) + repr(channels)
    for text in (shown, *held):
        assert NOTICE.notice_id in text  # it is looked at what there is
        assert HOOK not in text
        assert SECRET not in text


# The ends of runs


@pytest.fixture
def ledger(redis: Redis) -> Ledger:
    return Ledger(redis)


class Runs:
    """Runs of the policy `stale`, whose jobs a worker leases and ends."""

    def __init__(self, ledger: Ledger) -> None:
        self.ledger = ledger

    async def make(self, count: int, *, start: bool = True, **fields: Any) -> str:
        run_id = new_run_id(datetime.now(UTC))
        run = NewRun(
            run_id, Source.SCHEDULE, ENDPOINT, policy="stale", projects=(PROJECT,), **fields
        )
        await self.ledger.create(run)
        await self.ledger.add(run_id, [NewJob(PROJECT, f"pool-{n}") for n in range(count)])
        if start:
            assert await self.ledger.start(run_id, count)
            await self.ledger.claim(run_id, range(count), owner="me", lease_s=60)
        return run_id

    async def end(self, run_id: str, *states: JobState) -> Run:
        """End its jobs in these states, one after the other; those that are not named stay."""
        open_jobs = await self.ledger.jobs(run_id, outcome=JobState.LEASED)
        moves = [
            Move(job.number, JobState.LEASED, state, "me")
            for job, state in zip(open_jobs, states, strict=False)
        ]
        assert all(await self.ledger.record(run_id, moves))
        return await self.ledger.run(run_id)


@pytest.fixture
def runs(ledger: Ledger) -> Runs:
    return Runs(ledger)


async def told(outbox: Outbox, channels: Mapping[str, Channel], receiver: Receiver) -> list[str]:
    """What the receiver is told now, in any order: the notices' ids."""
    del receiver.requests[:]
    await outbox.deliver(channels)
    return receiver.ids()


async def test_the_end_of_a_watched_run_is_told_once_to_each_channel(
    redis: Redis,
    ledger: Ledger,
    runs: Runs,
    outbox: Outbox,
    channel: Channel,
    receiver: Receiver,
) -> None:
    channels = {"ops": channel, "dev": channel, "unasked": channel}
    watch = RunWatch(redis, outbox)
    run_id = await runs.make(2)
    await watch.watch(run_id, ["ops", "dev"], policy="stale")
    await watch.check(ledger, channels)
    assert await told(outbox, channels, receiver) == []
    await runs.end(run_id, JobState.DELETED, JobState.DELETED)
    await watch.check(ledger, channels)
    assert not await redis.exists(keys.watched("outbox"))
    await watch.check(ledger, channels)
    assert await told(outbox, channels, receiver) == 2 * [f"{run_id}:finished"]
    assert "2 of 2 pools deleted" in receiver.requests[0].document["text"]


async def test_an_end_is_told_only_to_channels_that_want_it(
    redis: Redis,
    ledger: Ledger,
    runs: Runs,
    outbox: Outbox,
    receiver: Receiver,
    tmp_path: Path,
) -> None:
    channels = {"bad": channel_to(receiver.url, tmp_path, on=[Occasion.FAILED])}
    watch = RunWatch(redis, outbox)
    good, bad = await runs.make(1), await runs.make(1)
    for run_id, end in ((good, JobState.DELETED), (bad, JobState.FAILED)):
        await watch.watch(run_id, ["bad"])
        await runs.end(run_id, end)
    await watch.check(ledger, channels)
    assert await told(outbox, channels, receiver) == [f"{bad}:failed"]
    assert not await redis.exists(keys.watched("outbox"))


async def test_two_checkers_at_once_tell_once(
    redis: Redis,
    other_redis: Redis,
    runs: Runs,
    outbox: Outbox,
    channel: Channel,
    receiver: Receiver,
) -> None:
    ids = [await runs.make(1) for _ in range(5)]
    for run_id in ids:
        await RunWatch(redis, outbox).watch(run_id, ["ops"])
        await runs.end(run_id, JobState.DELETED)
    checks = [
        RunWatch(each, Outbox(each)).check(Ledger(each), {"ops": channel})
        for each in (redis, other_redis)
    ]
    await asyncio.gather(*checks)
    expected = sorted(f"{run_id}:finished" for run_id in ids)
    assert await told(outbox, {"ops": channel}, receiver) == expected


async def test_a_checker_that_was_stopped_halfway_is_made_up_for(
    redis: Redis,
    ledger: Ledger,
    runs: Runs,
    outbox: Outbox,
    channel: Channel,
    receiver: Receiver,
) -> None:
    channels = {"ops": channel, "dev": channel}
    watch = RunWatch(redis, outbox)
    run_id = await runs.make(1)
    await watch.watch(run_id, ["ops", "dev"])
    run = await runs.end(run_id, JobState.DELETED)
    # It came as far as the first of two channels, and that was delivered.
    await outbox.announce(["ops"], channels, ended(run))
    assert await told(outbox, channels, receiver) == [f"{run_id}:finished"]
    await watch.check(ledger, channels)
    assert await told(outbox, channels, receiver) == [f"{run_id}:finished"]


async def test_a_brake_midway_is_told_at_once_and_the_end_when_it_comes(
    redis: Redis,
    ledger: Ledger,
    runs: Runs,
    outbox: Outbox,
    channel: Channel,
    receiver: Receiver,
) -> None:
    channels = {"ops": channel}
    watch = RunWatch(redis, outbox)
    run_id = await runs.make(2, max_failures=0)
    await watch.watch(run_id, ["ops"])
    run = await runs.end(run_id, JobState.FAILED)
    assert not run.ended
    for _ in range(2):
        await watch.check(ledger, channels)
    assert await told(outbox, channels, receiver) == [f"{run_id}:braked"]
    assert "more than max_failures=0" in receiver.requests[0].document["text"]
    await runs.end(run_id, JobState.DELETED)
    await watch.check(ledger, channels)
    assert await told(outbox, channels, receiver) == [f"{run_id}:failed"]


async def test_a_run_that_a_brake_held_is_told_of_once(
    redis: Redis,
    ledger: Ledger,
    runs: Runs,
    outbox: Outbox,
    channel: Channel,
    receiver: Receiver,
) -> None:
    watch = RunWatch(redis, outbox)
    run_id = await runs.make(1, start=False)
    await watch.watch(run_id, ["ops"])
    assert await ledger.abort(run_id, "too many", state=RunState.BRAKED)
    await watch.check(ledger, {"ops": channel})
    assert await told(outbox, {"ops": channel}, receiver) == [f"{run_id}:braked"]
    assert not await redis.exists(keys.watched("outbox"))


async def test_a_run_that_redis_lost_has_failed(
    redis: Redis,
    ledger: Ledger,
    runs: Runs,
    outbox: Outbox,
    channel: Channel,
    receiver: Receiver,
) -> None:
    channels = {"ops": channel}
    run_id = await runs.make(1)
    await RunWatch(redis, outbox).watch(run_id, ["ops"], policy="stale")
    await redis.delete(*keys.of_run(run_id))
    for _ in range(2):
        await RunWatch(redis, outbox, lost_after_s=0).check(ledger, channels)
    assert await told(outbox, channels, receiver) == [f"{run_id}:failed"]
    (request,) = receiver.requests
    assert "are gone from Redis" in request.document["text"]
    assert request.document["policy"] == "stale"


async def test_a_run_that_is_watched_before_it_is_created_is_not_taken_for_lost(
    redis: Redis,
    ledger: Ledger,
    outbox: Outbox,
    channel: Channel,
) -> None:
    watch = RunWatch(redis, outbox)
    await watch.watch("20260102-030405-0123456789", ["ops"])
    await watch.check(ledger, {"ops": channel})
    assert await on_their_way(redis) == 0
    assert await redis.exists(keys.watched("outbox"))


async def test_a_run_that_nobody_is_told_of_is_not_watched(redis: Redis, outbox: Outbox) -> None:
    await RunWatch(redis, outbox).watch("20260102-030405-0123456789", [])
    assert not await redis.exists(keys.watched("outbox"))
