"""What a command works with: the consoles, the settings' Redis, joined, and the ledger in it."""

from __future__ import annotations

import asyncio
import contextlib
import getpass
import os
import sys
from typing import TYPE_CHECKING, Any

from redis.asyncio.retry import Retry
from redis.backoff import ConstantBackoff
from redis.exceptions import AuthenticationError, AuthorizationError, RedisError, ResponseError
from rich.console import Console

from scheduler.cli.errors import UnreachableError, UsageError
from scheduler.cli.log_file import log_to_file
from scheduler.review.records import json_text
from scheduler.review.sections import unread_runs
from worker import embedded_redis
from worker.ledger import Ledger
from worker.redis_connection import connect

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterator

    from redis.asyncio import Redis

    from worker.settings import Settings

FIRST_BACKOFF_S = 0.5
_REFUSALS = (AuthenticationError, AuthorizationError, ResponseError)
_UNBOUNDED = 1_000_000
"""Columns of a console that is no terminal: there a line break would break what is grepped."""


def _console(*, stderr: bool) -> Console:
    console = Console(stderr=stderr, highlight=False)
    if not console.file.isatty():
        console.width = _UNBOUNDED
    return console


stdout = _console(stderr=False)
stderr = _console(stderr=True)


def say(sentence: str) -> None:
    """Tell the user something."""
    stdout.print(sentence, markup=False)


def say_json(value: Any) -> None:
    """Tell a program something: one JSON value, past rich, which would wrap and style it."""
    sys.stdout.write(json_text(value, indent=1) + "\n")


def remark(sentence: str, style: str = "dim") -> None:
    """Tell the user something that is not part of the result."""
    stderr.print(sentence, style=style, markup=False)


def remark_unread(count: int) -> None:
    """Tell the user that some runs are missing from what is shown, and why.

    Args:
        count: how many; of 0 nothing is said.
    """
    if count:
        remark(unread_runs(count), "yellow")


def requester() -> str:
    """Who runs the command: the user's name, or number if it has no name."""
    try:
        return getpass.getuser()
    except (KeyError, OSError):
        return str(os.getuid())


def heed_interrupt() -> None:
    """Raise an interrupt that was lost on its way through a call to Redis.

    Before Python 3.12 `asyncio.wait_for`, through which redis-py sends, drops a cancellation that
    comes when it is just done.
    """
    task = asyncio.current_task()
    if task and task.cancelling():
        raise asyncio.CancelledError


@contextlib.contextmanager
def joined_redis(settings: Settings) -> Iterator[None]:
    """Use the embedded Redis, and say so in a line, unless a Redis is configured."""
    if settings.redis_url is not None:
        yield
        return
    with embedded_redis.join(settings.state_dir) as server:
        verb = "Started" if server.started else "Joined"
        remark(f"{verb} the embedded Redis in {settings.state_dir}")
        yield


@contextlib.asynccontextmanager
async def connected(settings: Settings) -> AsyncIterator[Redis]:
    """A connection to the settings' Redis, tried out; the embedded one must run already.

    The first try is short, for a mistyped URL; from then on outages are bridged.

    Raises:
        UsageError: its URL is not one, or the server refuses the user or the password.
        UnreachableError: it does not answer.
        RedisError: the embedded one does not answer, or this one fails later.
    """
    try:
        redis = connect(settings)
    except ValueError as error:
        raise UsageError(
            f"POOLSWEEP_REDIS_URL: {error}; accepted: redis://host:port/db, "
            "rediss://host:port/db or unix:///path."
        ) from None
    try:
        patience = redis.get_retry()
        redis.set_retry(Retry(ConstantBackoff(FIRST_BACKOFF_S), 1))
        try:
            await redis.ping()
        except RedisError as error:
            if settings.redis_url is None:
                raise
            sentence = (
                f"POOLSWEEP_REDIS_URL: the server cannot be used: {error}; accepted: the URL of a "
                "Redis server that answers, with its user and password if it asks for them."
            )
            # redis-py wraps the refusal of a user that a connection signs in as.
            if any(isinstance(each, _REFUSALS) for each in (error, error.__cause__)):
                raise UsageError(sentence) from None
            raise UnreachableError(sentence) from None
        if patience:
            redis.set_retry(patience)
        heed_interrupt()
        yield redis
    finally:
        await redis.aclose()


@contextlib.asynccontextmanager
async def open_ledger(settings: Settings) -> AsyncIterator[tuple[Redis, Ledger]]:
    """The ledger of the settings' Redis; what is done with it is logged.

    Raises:
        UsageError, UnreachableError, RedisError: as with `connected`.
        EmbeddedRedisError: the embedded one cannot be used.
    """
    log_to_file(settings)
    with joined_redis(settings):
        async with connected(settings) as redis:
            yield redis, Ledger(redis, retention_days=settings.retention_days)
