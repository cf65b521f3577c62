"""Notices on their way to their channels: in Redis until they have arrived, or are given up.

Posting the same notice twice sends it once. A deliverer leases what it sends, so that two do not
both send it; if one dies in between, its notice is sent again, by the same id. URLs and secrets
are read when a notice is sent: they are never in Redis, in a log or in an error's text.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import time
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.resources import files
from typing import TYPE_CHECKING, Any, cast

import aiohttp
import structlog

from scheduler.notices import Notice, braked, ended, lost, message, wanted
from worker.ledger import HALF_MADE_S, RunNotFoundError, SchemaError, keys
from worker.modelarts.answers import parse_retry_after
from worker.retry import GiveUp, RetryPolicy, backoff_s, decide
from worker.settings import SettingsError

if TYPE_CHECKING:
    from collections.abc import Awaitable, Iterable

    from aiohttp.abc import AbstractResolver
    from redis.asyncio import Redis

    from scheduler.notices import Channels, Destination
    from worker.ledger import Ledger, Run

MEMORY_S = 30 * 86_400.0
"""A notice that is posted again within this time is not sent again."""
PAGE = 20
"""Notices that one deliverer sends at once."""
RETRY = RetryPolicy(max_attempts=500, max_total_s=86_400, base_s=5, cap_s=1_800)
ROOM = "outbox"
"""Where the notices lie that policies ask for."""

log = structlog.get_logger(__name__)


@dataclass(frozen=True, slots=True)
class OutboxOptions:
    """How notices are sent.

    Attributes:
        timeout_s: seconds until a receiver must have answered.
        lease_s: seconds for which a notice is its deliverer's; more than `timeout_s`.
        retry: when a notice that did not arrive is sent again.
        undelivered_kept: how many notices that were given up are kept, the newest.
    """

    timeout_s: float = 10
    lease_s: float = 30
    retry: RetryPolicy = RETRY
    undelivered_kept: int = 1_000


@dataclass(frozen=True, slots=True)
class Undelivered:
    """A notice that was given up.

    Attributes:
        channel: where it was to go.
        notice: what it said.
        attempts: how often it was sent.
        reason: what went wrong the last time.
    """

    channel: str
    notice: Notice
    attempts: int
    reason: str


@dataclass(frozen=True, slots=True)
class _Delivery:
    """A notice that this deliverer has leased."""

    entry_id: str
    notice: Notice
    attempts: int
    elapsed_s: float
    channel: str


@dataclass(frozen=True, slots=True)
class _Outcome:
    """What came of sending: delivered if there is no reason why not."""

    status: int | None = None
    reason: str = ""
    retry_after_s: float | None = None


class Outbox:
    """The notices on their way.

    Args:
        redis: a connection that decodes responses.
        options: how they are sent.
        room: where in Redis they lie: those of one room are none of another's.
        resolver: finds the addresses of channels' hosts, and raises SettingsError if there is none
            that may be called; the caller closes it. None: the system's.
    """

    def __init__(
        self,
        redis: Redis,
        options: OutboxOptions | None = None,
        *,
        room: str = ROOM,
        resolver: AbstractResolver | None = None,
    ) -> None:
        self._redis = redis
        self._options = options or OutboxOptions()
        self._keys = keys.of_outbox(room)
        self._undelivered = keys.undelivered(room)
        self._resolver = resolver
        self._script = redis.register_script((files("scheduler") / "outbox.lua").read_text())

    async def post(self, channel: str, notice: Notice) -> bool:
        """Have a notice sent. Nothing is sent here: that is for `deliver`.

        Args:
            channel: the channel's name.
            notice: what to say.

        Returns:
            False if it was posted to this channel in the last 30 days: it is not sent again.

        Raises:
            RedisError: it may or may not be posted; posting it again is safe.
        """
        entry_id = f"{_remembered(channel)}|{notice.notice_id}"
        return bool(await self._call("post", _ms(MEMORY_S), entry_id, notice.record(), channel))

    async def announce(self, notify: Iterable[str], channels: Channels, notice: Notice) -> None:
        """Post a notice to those channels that want it.

        Args:
            notify: the channels' names.
            channels: the channels by name.
            notice: what to say.

        Raises:
            RedisError: as with `post`.
        """
        for name in wanted(notify, channels, notice):
            await self.post(name, notice)

    async def deliver(self, channels: Channels) -> int:
        """Send what is due. Call it every few seconds; any number of processes may.

        A notice that does not arrive, whatever the reason, is sent again later, for a day.

        Args:
            channels: the channels by name, as they are now.

        Returns:
            How many arrived.

        Raises:
            RedisError: what was sent and could not be noted as sent is sent again.
        """
        arrived = 0
        while deliveries := await self._claim():
            async with self._session() as session:
                # Each is noted by itself: what has arrived does not wait for what is slow.
                results = await asyncio.gather(
                    *(self._send(session, channels, delivery) for delivery in deliveries),
                    return_exceptions=True,
                )
            for result in results:
                if isinstance(result, BaseException):
                    raise result
                arrived += result
            if len(deliveries) < PAGE:
                break
        return arrived

    async def undelivered(self, limit: int = 100) -> list[Undelivered]:
        """The notices that were given up, the newest first.

        Args:
            limit: how many at most.
        """
        texts = self._redis.lrange(self._undelivered, 0, limit - 1)
        return [
            Undelivered(channel, Notice.parse(notice), attempts, reason)
            for channel, notice, attempts, reason in map(
                json.loads, await cast("Awaitable[list[str]]", texts)
            )
        ]

    async def _call(self, *args: str | int) -> Any:
        return await self._script(keys=self._keys, args=args)

    async def _claim(self) -> list[_Delivery]:
        flat = await self._call("claim", _ms(self._options.lease_s), PAGE)
        entries = [flat[start : start + 5] for start in range(0, len(flat), 5)]
        return [
            _Delivery(entry_id, Notice.parse(text), int(attempts), int(elapsed_ms) / 1000, channel)
            for entry_id, text, attempts, elapsed_ms, channel in entries
        ]

    def _session(self) -> aiohttp.ClientSession:
        # No proxy of the environment's: it would look hosts up itself.
        return aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(resolver=self._resolver),
            timeout=aiohttp.ClientTimeout(total=self._options.timeout_s),
            cookie_jar=aiohttp.DummyCookieJar(),
            auto_decompress=False,
            trust_env=False,
            headers={"User-Agent": "poolsweep"},
        )

    async def _send(
        self, session: aiohttp.ClientSession, channels: Channels, delivery: _Delivery
    ) -> bool:
        """Send one and note what came of it. Returns whether it arrived."""
        outcome = await self._attempt(session, channels.get(delivery.channel), delivery.notice)
        event = log.bind(
            notice_id=delivery.notice.notice_id,
            channel=_shown(delivery.channel),
            occasion=str(delivery.notice.occasion),
            status=outcome.status,
            attempts=delivery.attempts,
        )
        if not outcome.reason:
            await self._call("sent", _ms(MEMORY_S), delivery.entry_id)
            event.info("notice_sent")
            return True
        retry = self._options.retry
        decision = decide(
            retry,
            attempts=delivery.attempts,
            elapsed_s=delivery.elapsed_s,
            backoff_s=backoff_s(retry, delivery.attempts),
            retry_after_s=outcome.retry_after_s,
        )
        if isinstance(decision, GiveUp):
            if await self._give_up(delivery, outcome.reason):
                event.error("notice_given_up", reason=outcome.reason)
        else:
            wait_ms = _ms(decision.seconds)
            await self._call("retry", wait_ms, delivery.entry_id, delivery.attempts)
            event.warning("notice_failed", reason=outcome.reason, wait_s=wait_ms / 1000)
        return False

    async def _give_up(self, delivery: _Delivery, reason: str) -> bool:
        channel = _shown(delivery.channel)
        record = json.dumps([channel, delivery.notice.record(), delivery.attempts, reason])
        kept = self._options.undelivered_kept
        return bool(
            await self._call(
                "give_up", _ms(MEMORY_S), delivery.entry_id, delivery.attempts, record, kept
            )
        )

    async def _attempt(
        self, session: aiohttp.ClientSession, channel: Destination | None, notice: Notice
    ) -> _Outcome:
        """Exactly one POST on the wire, or none, and why."""
        if channel is None:
            return _Outcome(reason="there is no such channel under notifications")
        try:
            # A file may be on a slow disk.
            url, secret = await asyncio.to_thread(channel.read)
            what = message(notice, channel.format, secret=secret, now_s=int(time.time()))
            async with session.post(
                url, data=what.body, headers=what.headers, allow_redirects=False
            ) as response:
                return self._weigh(response)
        except SettingsError as error:
            return _Outcome(reason=str(error))
        except TimeoutError:
            return _Outcome(reason=f"no answer within {self._options.timeout_s:g} s")
        except Exception as error:
            # Its text may hold the URL.
            return _Outcome(reason=f"it could not be sent ({type(error).__name__})")

    def _weigh(self, response: aiohttp.ClientResponse) -> _Outcome:
        status = response.status
        if 200 <= status <= 299:
            return _Outcome(status)
        wait_s = parse_retry_after(response.headers.get("Retry-After"), datetime.now(UTC))
        if wait_s is not None:
            wait_s = min(wait_s, self._options.retry.cap_s)
        hint = ": redirects are not followed" if 300 <= status <= 399 else ""
        return _Outcome(status, f"the receiver answered HTTP {status}{hint}", wait_s)


def _shown(channel: str) -> str:
    """A channel's name as it may stand in a log: what comes after a colon may hold a secret."""
    return channel.partition(":")[0]


def _remembered(channel: str) -> str:
    """A channel's name as it is remembered for long after it was told: what may hold a secret is a
    digest."""
    shown, colon, rest = channel.partition(":")
    return shown + colon + hashlib.sha256(rest.encode()).hexdigest()[:32] if colon else channel


def _ms(seconds: float) -> int:
    return round(seconds * 1000)


class RunWatch:
    """Which runs still owe a notice of their end.

    Args:
        redis: a connection that decodes responses.
        outbox: where the notices are posted.
        room: where in Redis it is noted: the outbox's own.
        lost_after_s: a run that is not in the ledger so long after it was first watched is lost.
    """

    def __init__(
        self,
        redis: Redis,
        outbox: Outbox,
        *,
        room: str = ROOM,
        lost_after_s: float = HALF_MADE_S,
    ) -> None:
        self._redis = redis
        self._outbox = outbox
        self._watched = keys.watched(room)
        self._lost_after_s = lost_after_s

    async def watch(self, run_id: str, notify: Iterable[str], *, policy: str = "") -> None:
        """Have the end of a run told. Best called before it is created: then none is missed.

        Args:
            run_id: the run.
            notify: the channels' names; none: nothing is watched.
            policy: the policy that it carries out, to be named if its records are lost.

        Raises:
            RedisError: it may or may not be watched; watching it again is safe.
        """
        names = list(notify)
        if names:
            record = json.dumps([names, policy, await self._now_ms()])
            await self._redis.hsetnx(self._watched, run_id, record)

    async def check(self, ledger: Ledger, channels: Channels) -> None:
        """Tell what is to be told of the watched runs; those that have ended are watched no more.

        Told is a brake that stopped a run midway, as soon as it is seen, and each run's end. Call
        it every few seconds; any number of processes may.

        Args:
            ledger: where the runs are.
            channels: the channels by name: each is told only what it wants.

        Raises:
            RedisError: what was not told yet is told by a later check.
        """
        watched = cast("Awaitable[dict[str, str]]", self._redis.hgetall(self._watched))
        for run_id, text in (await watched).items():
            notify, policy, since_ms = json.loads(text)
            try:
                run = await ledger.run(run_id)
            except SchemaError:
                continue  # it is a newer version's, and so is the telling
            except RunNotFoundError:
                now_ms = await self._now_ms()
                if now_ms - since_ms < self._lost_after_s * 1000:
                    continue
                told = [lost(run_id, policy, datetime.fromtimestamp(now_ms / 1000, UTC))]
                over = True
            else:
                told, over = _to_be_told(run), run.ended
            for notice in told:
                await self._outbox.announce(notify, channels, notice)
            # Only now: whoever is stopped before this leaves it to the next check.
            if over:
                await self._redis.hdel(self._watched, run_id)

    async def _now_ms(self) -> int:
        seconds, micros = await self._redis.time()
        return int(seconds) * 1000 + int(micros) // 1000


def _to_be_told(run: Run) -> list[Notice]:
    """What is to be told of a run as it is now; telling it again changes nothing."""
    told = [braked(run)] if run.braked_ms else []
    if run.ended and (end := ended(run)) not in told:
        told.append(end)
    return told
