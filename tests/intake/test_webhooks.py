"""Completion webhooks: which URLs are taken, and that nothing else is ever called."""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import ipaddress
import json
import logging
import socket
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

import pytest
from aiohttp import web
from aiohttp.abc import AbstractResolver, ResolveResult
from hypothesis import example, given
from hypothesis import strategies as st
from structlog.testing import capture_logs

from scheduler.intake import clients as clients_file
from scheduler.intake.clients import Client, Clients
from scheduler.intake.webhooks import (
    ENDS,
    LONGEST_URL,
    ROOM,
    GuardedResolver,
    Webhooks,
    check,
    webhook_channel,
)
from scheduler.notices import Notice
from scheduler.outbox import Outbox, OutboxOptions, RunWatch
from scheduler.policy import Occasion
from tests.conftest import until
from worker.ledger import Ledger, NewRun, RunState, Source, new_run_id
from worker.retry import RetryPolicy
from worker.settings import SettingsError

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterable, Mapping
    from pathlib import Path

    from redis.asyncio import Redis

PROJECT = "0123456789abcdef0123456789abcdef"
KEY = "k3y-of-the-signatures"
HIDDEN = "t0ken-in-the-query"
PUBLIC = "93.184.215.14"
ONCE = OutboxOptions(
    timeout_s=5, retry=RetryPolicy(max_attempts=1, max_total_s=60, base_s=0.001, cap_s=0.001)
)
OFTEN = OutboxOptions(timeout_s=5, retry=replace(ONCE.retry, max_attempts=100))
NOTICE = Notice(
    notice_id="20260102-030405-0123456789:finished",
    occasion=Occasion.FINISHED,
    policy="",
    project_id=PROJECT,
    at="2026-01-02T03:04:05.000Z",
    text="Run 1 finished.",
    details={"counts": {"deleted": 1}},
)


def parse(**webhooks: Any) -> Clients:
    """One client, `ci`; what is given is under `webhooks`, and nothing: there is no such part."""
    entry: dict[str, Any] = {"projects": [PROJECT], "ways": ["celery"]}
    if webhooks:
        entry["webhooks"] = webhooks
    return clients_file.parse(json.dumps({"clients": {"ci": entry}}))


def ci(**webhooks: Any) -> Client:
    (client,) = parse(**webhooks)
    return client


# What a request may ask for

OPEN = ci(
    hosts=[
        "hooks.example.com",
        "alt.example.com:8443",
        "xn--bcher-kva.example",
        PUBLIC,
        "10.0.0.5",
        "[2606:4700::1111]:444",
        "localhost:8080",
        "127.0.0.1:8080",
    ]
)
INSIDE = ci(hosts=["localhost", "127.0.0.1:8080", "::1", "10.0.0.5"], allow_private=True)


@pytest.mark.parametrize(
    "url",
    [
        "https://hooks.example.com",
        "https://hooks.example.com/",
        "https://HOOKS.Example.com:443/a/b;c?d=e&f=%7B%C3%BC%7D",
        "https://alt.example.com:8443/x",
        "https://xn--bcher-kva.example/",
        f"https://{PUBLIC}/x",
        "https://[2606:4700:0::1111]:444/x",
        "http://localhost:8080/x",
    ],
)
def test_a_url_at_a_host_that_is_allowed_is_taken(url: str) -> None:
    assert check(url, OPEN) is None


@pytest.mark.parametrize(
    "url",
    [
        "http://localhost/x",
        "http://127.0.0.1:8080/x",
        "http://[::1]/x",
        "https://[::1]/x",
        "https://10.0.0.5/x",
    ],
)
def test_a_private_one_is_taken_if_the_file_says_so(url: str) -> None:
    assert check(url, INSIDE) is None


NOT_A_HOST = "its host is not taken; accepted: "
NOT_THERE = "is not where client ci may be told; accepted: hooks.example.com, alt.example.com:8443"
NO_URL = "it is not a URL"
NO_CHARACTER = "it has characters that a URL has not"
CREDENTIALS = "it has credentials in it"
UNENCRYPTED = "it is not encrypted; accepted: https://"
PRIVATE = "is at no address that may be called"


@pytest.mark.parametrize(
    ("url", "why"),
    [
        ("", NO_URL),
        ("hooks.example.com", NO_URL),
        ("//hooks.example.com/", NO_URL),
        ("https:/hooks.example.com/", NO_URL),
        ("https:///x", NO_URL),
        ("https://:443/", NO_URL),
        ("https://hooks.example.com:0/", NO_URL),
        ("https://hooks.example.com:65536/", NO_URL),
        ("https://hooks.example.com:x/", NO_URL),
        ("https://[::1/", NO_URL),
        ("ftp://hooks.example.com/", NO_URL),
        ("file:///etc/passwd", NO_URL),
        ("gopher://127.0.0.1:6379/_x", NO_URL),
        ("https://hooks.example.com\\@elsewhere.example/", NO_URL),
        ("http://hooks.example.com/", UNENCRYPTED),
        ("https://me:hunter2@hooks.example.com/", CREDENTIALS),
        ("https://hunter2@hooks.example.com/", CREDENTIALS),
        ("https://@hooks.example.com/", CREDENTIALS),
        ("https://hooks.example.com/#hunter2", "it has a fragment"),
        ("https://hooks.example.com/#", "it has a fragment"),
        ("https://hooks.example.com/ hunter2", NO_CHARACTER),
        ("https://hooks.example.com/\r\nhunter2: x", NO_CHARACTER),
        ("https://hooks.example.com/\x00", NO_CHARACTER),
        ("https://hooks.example.com/ü", NO_CHARACTER),
        ("https://hooks。example.com/", NO_CHARACTER),
        ("https://①②⑦.⓪.⓪.①/", NO_CHARACTER),
        ("https://hooks.example.com/\ud800", NO_CHARACTER),
        ("https://hooks.example.com/" + LONGEST_URL * "x", "it is longer than 2000 characters"),
        ("https://elsewhere.example/", NOT_THERE),
        ("https://hooks.example.com.evil.example/", NOT_THERE),
        ("https://evil.hooks.example.com/", NOT_THERE),
        ("https://hooks.example.com:8443/", NOT_THERE),
        ("https://alt.example.com/", NOT_THERE),
        ("http://localhost/", NOT_THERE),
        ("https://hooks.example.com./", NOT_A_HOST),
        ("https://hooks%2eexample.com/", NOT_A_HOST),
        ("https://hooks.example.com%00.evil.example/", NOT_A_HOST),
        ("http://2130706433/", NOT_A_HOST),
        ("http://0x7f.1/", NOT_A_HOST),
        ("http://0177.0.0.1/", NOT_A_HOST),
        ("http://127.1/", NOT_A_HOST),
        ("https://[fe80::1%25eth0]/", NOT_A_HOST),
        ("https://10.0.0.5/", PRIVATE),
        ("http://127.0.0.1:8080/", PRIVATE),
    ],
)
def test_any_other_is_refused_with_the_reason_and_not_repeated(url: str, why: str) -> None:
    said = check(url, OPEN)
    assert said is not None
    assert why in said
    assert said.splitlines() == [said]
    assert "hunter2" not in said


@pytest.mark.parametrize(
    "host", ["[::ffff:10.0.0.5]", "[64:ff9b::a00:5]", "169.254.169.254", "[fd00:ec2::254]", "[::]"]
)
def test_an_address_that_is_not_public_is_refused_even_where_it_is_named(host: str) -> None:
    said = check(f"https://{host}/", ci(hosts=[host]))
    assert said is not None
    assert PRIVATE in said


def test_an_address_that_is_no_hosts_is_refused_even_where_private_ones_are_allowed() -> None:
    client = ci(hosts=["0.0.0.0", "224.0.0.1"], allow_private=True)
    assert PRIVATE in (check("https://0.0.0.0/", client) or "")
    assert PRIVATE in (check("https://224.0.0.1/", client) or "")


def test_a_client_without_webhooks_may_name_none() -> None:
    assert check("https://hooks.example.com/", ci()) == "client ci may name no webhook"


urls = st.builds(
    "{}{}{}".format,
    st.sampled_from(["https://", "http://", "https:", "//", ""]),
    st.sampled_from(["hooks.example.com", "localhost:8080", PUBLIC, "a@b", ""]) | st.text(),
    st.text(max_size=20).map("/{}".format) | st.text(),
)


@given(urls)
@example("https://hooks.example.com/|:%7C%3A")
def test_what_is_taken_is_at_a_host_that_is_allowed_and_comes_through_its_channel(
    url: str,
) -> None:
    if check(url, OPEN) is not None:
        return
    parts = urlsplit(url)
    assert (parts.hostname, parts.port) in {
        ("hooks.example.com", None),
        ("localhost", 8080),
        (PUBLIC, None),
    }
    channel = webhook_channel("ci", url)
    assert "|" not in channel
    webhook = Webhooks(lambda: Clients([OPEN])).get(channel)
    assert webhook is not None
    assert webhook.url == url
    assert webhook.client is OPEN
    assert webhook.read()[0].host == parts.hostname


def test_what_is_no_webhooks_channel_is_none() -> None:
    assert Webhooks(lambda: Clients([OPEN])).get("ops") is None


def test_a_webhook_shows_nothing_of_its_url_or_its_client() -> None:
    url = f"https://hooks.example.com/?{HIDDEN}"
    webhook = Webhooks(lambda: Clients([OPEN])).get(webhook_channel("ci", url))
    assert repr(webhook) == "Webhook(ci)"


# Where hosts are


@dataclass
class Dns(AbstractResolver):
    """Answers in turn, the last again and again.

    Attributes:
        answers: the addresses of each answer.
        asked: the hosts that were asked for.
    """

    answers: list[list[str]]
    asked: list[str] = field(default_factory=list)
    closed: bool = False

    async def resolve(
        self, host: str, port: int = 0, family: socket.AddressFamily = socket.AF_UNSPEC
    ) -> list[ResolveResult]:
        self.asked.append(host)
        addresses = self.answers[0] if len(self.answers) == 1 else self.answers.pop(0)
        return [
            ResolveResult(
                hostname=host,
                host=address,
                port=port,
                family=socket.AF_INET6 if ":" in address else socket.AF_INET,
                proto=0,
                flags=socket.AI_NUMERICHOST | socket.AI_NUMERICSERV,
            )
            for address in addresses
        ]

    async def close(self) -> None:
        self.closed = True


async def resolved(addresses: Iterable[str], client: Client, host: str) -> list[str]:
    resolver = GuardedResolver(lambda: Clients([client]), inner=Dns([list(addresses)]))
    return [each["host"] for each in await resolver.resolve(host, 443)]


async def test_of_a_hosts_addresses_only_the_public_ones_are_left() -> None:
    addresses = ["10.0.0.1", PUBLIC, "::1", "2606:4700::1111", "::ffff:127.0.0.1"]
    assert await resolved(addresses, OPEN, "hooks.example.com") == [PUBLIC, "2606:4700::1111"]


@pytest.mark.parametrize(
    "address", ["127.0.0.1", "169.254.169.254", "fe80::1%eth0", "64:ff9b::7f00:1", "no.address"]
)
async def test_a_host_without_a_public_address_is_refused(address: str) -> None:
    with pytest.raises(SettingsError, match=r"host hooks\.example\.com is at no address that may"):
        await resolved([address], OPEN, "hooks.example.com")


async def test_a_host_without_any_address_is_refused() -> None:
    with pytest.raises(SettingsError):
        await resolved([], INSIDE, "localhost")


async def test_private_addresses_are_left_only_for_hosts_that_may_have_them() -> None:
    assert await resolved(["10.0.0.1"], INSIDE, "LOCALHOST") == ["10.0.0.1"]
    for client, host in ((INSIDE, "hooks.example.com"), (OPEN, "localhost"), (INSIDE, "a..b")):
        with pytest.raises(SettingsError):
            await resolved(["10.0.0.1"], client, host)


@given(st.ip_addresses())
def test_no_private_address_comes_through(
    address: ipaddress.IPv4Address | ipaddress.IPv6Address,
) -> None:
    try:
        found = asyncio.run(resolved([str(address)], OPEN, "hooks.example.com"))
    except SettingsError:
        return
    assert found == [str(address)]
    assert address.is_global
    assert not address.is_multicast


async def test_the_systems_resolver_is_guarded_too_and_the_inner_one_closed_with_it() -> None:
    resolver = GuardedResolver(lambda: Clients([INSIDE]))
    found = await resolver.resolve("localhost", 80)
    assert all(ipaddress.ip_address(each["host"]).is_loopback for each in found)
    await resolver.close()
    with pytest.raises(SettingsError):
        await GuardedResolver(lambda: Clients([OPEN])).resolve("localhost", 80)
    inner = Dns([[]])
    await GuardedResolver(lambda: Clients([OPEN]), inner=inner).close()
    assert inner.closed


# On the wire


@dataclass
class Receiver:
    """A web server that is told things.

    Attributes:
        port: where; on every address of this machine's loopback network.
        status: what it answers.
        headers: of its answers.
        endless: whether its answers have no end.
        hung_up: an endless answer was not listened to any more.
        requests: what came: the address that was called, headers and body.
    """

    port: int = 0
    status: int = 200
    headers: dict[str, str] = field(default_factory=dict)
    endless: bool = False
    hung_up: bool = False
    requests: list[tuple[str, Mapping[str, str], bytes]] = field(default_factory=list)

    async def answer(self, request: web.Request) -> web.StreamResponse:
        assert request.transport is not None
        called = str(request.transport.get_extra_info("sockname")[0])
        self.requests.append((called, request.headers, await request.read()))
        response = web.StreamResponse(status=self.status, headers=self.headers)
        await response.prepare(request)
        try:
            while self.endless:
                await response.write(1_000 * b"x")
                await asyncio.sleep(0)
        except ConnectionError:
            self.hung_up = True
        return response


@pytest.fixture
async def receiver() -> AsyncIterator[Receiver]:
    made = Receiver()
    app = web.Application()
    app.router.add_route("*", "/{path:.*}", made.answer)
    runner = web.AppRunner(app, access_log=None, shutdown_timeout=0.1)
    await runner.setup()
    await web.TCPSite(runner, "0.0.0.0", 0).start()
    made.port = runner.addresses[0][1]
    yield made
    await runner.cleanup()


@dataclass
class Post:
    """An intake's outbox, with the clients as they are now.

    Attributes:
        clients: may be changed at any time.
        dns: what hosts resolve to.
    """

    redis: Redis
    receiver: Receiver
    clients: Clients
    dns: Dns
    options: OutboxOptions = ONCE

    def __post_init__(self) -> None:
        resolver = GuardedResolver(lambda: self.clients, inner=self.dns)
        self.outbox = Outbox(self.redis, self.options, room=ROOM, resolver=resolver)
        self.webhooks = Webhooks(lambda: self.clients)

    def url(self, host: str) -> str:
        return f"http://{host}:{self.receiver.port}/hook?{HIDDEN}"

    async def send(self, host: str, *, scheme: str = "http") -> list[dict[str, Any]]:
        """Have a notice sent to a URL at a host. Returns what is logged of it."""
        url = self.url(host).replace("http", scheme, 1)
        await self.outbox.post(webhook_channel("ci", url), NOTICE)
        return await self.deliver()

    async def deliver(self) -> list[dict[str, Any]]:
        with capture_logs() as logs:
            await self.outbox.deliver(self.webhooks)
        return [dict(entry) for entry in logs]


@pytest.fixture
def post(redis_client: Redis, receiver: Receiver, tmp_path: Path) -> Post:
    """`localhost` and two addresses of it are allowed, whatever DNS says."""
    (tmp_path / "key").write_text(KEY)
    clients = parse(
        hosts=[f"{host}:{receiver.port}" for host in ("localhost", "127.0.0.1", "127.0.0.2")],
        allow_private=True,
        secret={"file": str(tmp_path / "key")},
    )
    return Post(redis_client, receiver, clients, Dns([["127.0.0.1"]]))


def only_public(post: Post) -> Clients:
    return parse(hosts=[f"localhost:{post.receiver.port}", f"127.0.0.1:{post.receiver.port}"])


async def test_what_is_told_arrives_signed(post: Post, receiver: Receiver) -> None:
    (sent,) = await post.send("localhost")
    assert (sent["event"], sent["status"], sent["channel"]) == ("notice_sent", 200, "ci")
    ((_, headers, body),) = receiver.requests
    assert Notice.parse(body.decode()) == NOTICE
    assert headers["Host"] == f"localhost:{receiver.port}"
    stamp, _, signature = headers["X-Poolsweep-Signature"].partition(",v1=")
    signed = stamp.removeprefix("t=").encode() + b"." + body
    assert signature == hmac.new(KEY.encode(), signed, hashlib.sha256).hexdigest()


async def test_without_a_key_nothing_is_signed(post: Post, receiver: Receiver) -> None:
    post.clients = parse(hosts=[f"localhost:{receiver.port}"], allow_private=True)
    await post.send("localhost")
    ((_, headers, _),) = receiver.requests
    assert "X-Poolsweep-Signature" not in headers


async def test_the_connection_goes_to_the_address_that_was_looked_at(
    post: Post, receiver: Receiver
) -> None:
    # The name's own address is another, and a second look would find one that may not be called.
    post.dns.answers = [["127.0.0.2"], ["0.0.0.0"]]
    (sent,) = await post.send("localhost")
    assert sent["event"] == "notice_sent"
    assert [called for called, _, _ in receiver.requests] == ["127.0.0.2"]
    assert post.dns.asked == ["localhost"]


async def test_an_address_that_may_not_be_called_is_passed_over(
    post: Post, receiver: Receiver
) -> None:
    post.dns.answers = [["0.0.0.0", "127.0.0.2"]]
    await post.send("localhost")
    assert [called for called, _, _ in receiver.requests] == ["127.0.0.2"]


@pytest.mark.parametrize("address", ["127.0.0.1", "::ffff:127.0.0.1", "0.0.0.0"])
async def test_a_name_that_turns_out_to_be_inside_is_not_called(
    post: Post, receiver: Receiver, address: str
) -> None:
    post.clients = only_public(post)
    post.dns.answers = [[address]]
    (failed,) = await post.send("localhost")
    assert failed["event"] == "notice_given_up"
    assert "host localhost is at no address that may be called" in failed["reason"]
    assert receiver.requests == []


async def test_a_name_that_moves_inside_after_it_was_asked_for_is_not_called(
    redis_client: Redis, post: Post, receiver: Receiver
) -> None:
    moving = Dns([[PUBLIC], ["127.0.0.1"]])
    guarded = GuardedResolver(lambda: post.clients, inner=moving)
    post = Post(redis_client, receiver, only_public(post), moving, OFTEN)
    assert [each["host"] for each in await guarded.resolve("localhost")] == [PUBLIC]
    (failed,) = await post.send("localhost")
    assert "is at no address that may be called" in failed["reason"]
    assert receiver.requests == []


async def test_an_address_is_looked_at_though_no_resolver_is_asked(
    post: Post, receiver: Receiver
) -> None:
    (sent,) = await post.send("127.0.0.2")
    assert sent["event"] == "notice_sent"
    assert post.dns.asked == []
    post.clients = only_public(post)
    (failed,) = await post.send("127.0.0.1")
    assert "host 127.0.0.1 is at no address that may be called" in failed["reason"]
    assert len(receiver.requests) == 1


async def test_every_lookup_is_made_anew_for_another_try(
    redis_client: Redis, post: Post, receiver: Receiver
) -> None:
    post = Post(redis_client, receiver, post.clients, Dns([["127.0.0.1"], ["0.0.0.0"]]), OFTEN)
    receiver.status = 500
    await post.send("localhost")

    async def tried_again() -> list[dict[str, Any]]:
        return await post.deliver()

    (failed,) = await until(tried_again)
    assert "is at no address that may be called" in failed["reason"]
    assert len(receiver.requests) == 1


async def test_redirects_are_not_followed(post: Post, receiver: Receiver) -> None:
    receiver.status = 307
    receiver.headers = {"Location": f"http://127.0.0.1:{receiver.port}/inside"}
    (failed,) = await post.send("localhost")
    assert failed["reason"] == "the receiver answered HTTP 307: redirects are not followed"
    assert len(receiver.requests) == 1


async def test_proxies_of_the_environment_are_not_used(
    post: Post, receiver: Receiver, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("http_proxy", "https_proxy", "all_proxy"):
        monkeypatch.setenv(name, "http://127.0.0.1:1")
        monkeypatch.setenv(name.upper(), "http://127.0.0.1:1")
    monkeypatch.delenv("no_proxy", raising=False)
    monkeypatch.delenv("NO_PROXY", raising=False)
    await post.send("localhost")
    assert len(receiver.requests) == 1


async def test_an_answer_without_an_end_is_not_listened_to(post: Post, receiver: Receiver) -> None:
    receiver.endless = True
    (sent,) = await post.send("localhost")
    assert sent["event"] == "notice_sent"

    async def hung_up() -> bool:
        return receiver.hung_up

    await until(hung_up)


# Clients that change


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ("gone", "Client ci may name no webhook any more."),
        ("no webhooks", "Client ci may name no webhook any more."),
        ("elsewhere", "The webhook may not be called: localhost:"),
    ],
)
async def test_a_client_that_may_not_be_told_any_more_is_not_until_it_may_again(
    redis_client: Redis, post: Post, receiver: Receiver, change: str, why: str
) -> None:
    allowed = post.clients
    post = Post(redis_client, receiver, allowed, post.dns, OFTEN)
    changed = {"gone": Clients([]), "no webhooks": parse(), "elsewhere": parse(hosts=["a.example"])}
    post.clients = changed[change]
    (failed,) = await post.send("localhost")
    assert (failed["event"], failed["status"]) == ("notice_failed", None)
    assert failed["reason"].startswith(why)
    assert receiver.requests == []
    post.clients = allowed

    async def told() -> int:
        return await post.outbox.deliver(post.webhooks)

    assert await until(told) == 1


async def test_a_key_that_cannot_be_read_is_waited_for(
    post: Post, receiver: Receiver, tmp_path: Path
) -> None:
    (tmp_path / "key").unlink()
    (failed,) = await post.send("localhost")
    assert "key for a secret cannot be read" in failed["reason"]
    assert receiver.requests == []


async def test_urls_and_keys_are_in_no_log_line(
    post: Post, receiver: Receiver, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    asyncio.get_running_loop().set_debug(True)
    receiver.status = 500
    logs = await post.send("localhost")
    receiver.status = 200
    logs += await post.send("127.0.0.1")
    logs += await post.send("127.0.0.2", scheme="https")
    logs += await post.send("elsewhere.example")
    logs += await post.send("user:pw@localhost")
    assert len(logs) == 5
    shown = repr(logs) + caplog.text + repr(post.clients) + repr(list(post.clients))
    for secret in (HIDDEN, KEY, "user:pw"):
        assert secret not in shown


# The ends of runs


async def queued(ledger: Ledger) -> str:
    run_id = new_run_id(datetime.now(UTC))
    endpoint = "https://modelarts.example.com"
    await ledger.create(NewRun(run_id, Source.INTAKE, endpoint, projects=(PROJECT,), client="ci"))
    return run_id


@pytest.mark.parametrize(
    ("state", "event"),
    [
        (RunState.PLANNED, "finished"),
        (RunState.BRAKED, "braked"),
        (RunState.ABORTED, "failed"),
    ],
)
async def test_the_end_of_a_run_is_told_however_it_ends(
    redis_client: Redis, post: Post, receiver: Receiver, state: RunState, event: str
) -> None:
    ledger = Ledger(redis_client)
    watch = RunWatch(redis_client, post.outbox, room=ROOM)
    run_id = await queued(ledger)
    await watch.watch(run_id, [webhook_channel("ci", post.url("localhost"))])
    await watch.check(ledger, post.webhooks)
    assert await post.deliver() == []
    await ledger.abort(run_id, "enough", state=state)
    for _ in range(2):
        await watch.check(ledger, post.webhooks)
        await post.deliver()
    ((_, _, body),) = receiver.requests
    told = json.loads(body)
    assert (told["id"], told["event"]) == (f"{run_id}:{event}", event)
    assert told["details"]["state"] == state
    assert told["details"]["client"] == "ci"


async def test_only_ends_are_told(post: Post, receiver: Receiver) -> None:
    channel = webhook_channel("ci", post.url("localhost"))
    for occasion in Occasion:
        notice = replace(NOTICE, notice_id=f"run:{occasion}", occasion=occasion)
        await post.outbox.announce([channel], post.webhooks, notice)
    await post.deliver()
    events = sorted(json.loads(body)["event"] for _, _, body in receiver.requests)
    assert events == sorted(ENDS)
