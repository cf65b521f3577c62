"""`poolsweep review`: serve the review page until stopped."""

from __future__ import annotations

import asyncio
import signal
import threading
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from redis.asyncio.retry import Retry
from redis.backoff import ConstantBackoff

from scheduler import prices
from scheduler.cli.session import FIRST_BACKOFF_S, open_ledger, say
from scheduler.cli.worker import end_with_stdin
from scheduler.review.web.serving import Audience, served
from worker import log
from worker.settings import settings

if TYPE_CHECKING:
    from scheduler.prices import Prices
    from worker.settings import Settings


def review(
    host: Annotated[
        str | None, typer.Option(help="The address to listen on; POOLSWEEP_REVIEW_HOST.")
    ] = None,
    port: Annotated[
        int | None,
        typer.Option(min=0, max=65_535, help="The port, 0 for any; POOLSWEEP_REVIEW_PORT."),
    ] = None,
    price_file: Annotated[
        Path | None,
        typer.Option("--prices", help="A YAML file of prices, to tell the money freed."),
    ] = None,
    exit_with_stdin: Annotated[
        bool, typer.Option(hidden=True, help="End when standard input does.")
    ] = False,
) -> None:
    """Serve a page to look at runs, jobs and attempts in a browser. It changes nothing."""
    config = settings()
    host = config.review_host if host is None else host
    port = config.review_port if port is None else port
    audience = Audience(config, host)
    known = None if price_file is None else prices.load(price_file)
    asyncio.run(_review(config, audience, host, port, known, exit_with_stdin))


async def _review(
    config: Settings,
    audience: Audience,
    host: str,
    port: int,
    known: Prices | None,
    exit_with_stdin: bool,
) -> None:
    log.configure(config)
    stop = asyncio.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        asyncio.get_running_loop().add_signal_handler(number, stop.set)
    if exit_with_stdin:
        threading.Thread(target=end_with_stdin, daemon=True).start()
    async with open_ledger(config) as (redis, ledger):
        # Somebody waits for the page: it says so when Redis is away, and bridges no outage.
        redis.set_retry(Retry(ConstantBackoff(FIRST_BACKOFF_S), 1))
        serving = served(config, redis, ledger, audience, host=host, port=port, prices=known)
        async with serving as url:
            say(f"The review page is at {url}")
            await stop.wait()
