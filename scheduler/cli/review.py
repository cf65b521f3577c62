"""`poolsweep review`: serve the review page until stopped."""

from __future__ import annotations

import asyncio
import signal
import threading
from typing import Annotated

import typer
from redis.asyncio.retry import Retry
from redis.backoff import ConstantBackoff

from scheduler.cli.session import FIRST_BACKOFF_S, open_ledger, say
from scheduler.cli.worker import end_with_stdin
from scheduler.review.web.serving import Audience, served
from worker import log
from worker.settings import settings


def review(
    host: Annotated[str, typer.Option(help="The address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65_535, help="The port, 0 for any.")] = 8081,
    exit_with_stdin: Annotated[
        bool, typer.Option(hidden=True, help="End when standard input does.")
    ] = False,
) -> None:
    """Serve a page to look at runs, jobs and attempts in a browser. It changes nothing."""
    asyncio.run(_review(host, port, exit_with_stdin))


async def _review(host: str, port: int, exit_with_stdin: bool) -> None:
    config = settings()
    audience = Audience(config, host)
    log.configure(config)
    stop = asyncio.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        asyncio.get_running_loop().add_signal_handler(number, stop.set)
    if exit_with_stdin:
        threading.Thread(target=end_with_stdin, daemon=True).start()
    async with open_ledger(config) as (redis, ledger):
        # Somebody waits for the page: it says so when Redis is away, and bridges no outage.
        redis.set_retry(Retry(ConstantBackoff(FIRST_BACKOFF_S), 1))
        async with served(config, redis, ledger, audience, host=host, port=port) as url:
            say(f"The review page is at {url}")
            await stop.wait()
