"""`poolsweep sandbox`: serve the simulated cloud."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import json
import os
import signal
import sys
from typing import Annotated, NoReturn

import typer
from pydantic import ValidationError

from sandbox.config import Faults, SandboxConfig
from sandbox.server import RunningSandbox, running_sandbox

_SHARE = {"min": 0.0, "max": 1.0}


def sandbox(
    pools: Annotated[int, typer.Option(min=0, max=1_000_000, help="Pools in all.")] = 500,
    projects: Annotated[int, typer.Option(min=1, max=1_000, help="Projects.")] = 1,
    seed: Annotated[int, typer.Option(help="The same seed makes the same pools.")] = 7,
    port: Annotated[int, typer.Option(min=0, max=65_535, help="0: a free one.")] = 0,
    delete_seconds: Annotated[float, typer.Option(min=0, help="A deletion takes about that.")] = 2,
    gone: Annotated[float, typer.Option(**_SHARE, help="Share deleted by others.")] = 0,
    throttled: Annotated[float, typer.Option(**_SHARE, help="Share first answered 429.")] = 0,
    flaky: Annotated[float, typer.Option(**_SHARE, help="Share first answered 5xx or 409.")] = 0,
    doomed: Annotated[float, typer.Option(**_SHARE, help="Share that always fails.")] = 0,
    stuck: Annotated[float, typer.Option(**_SHARE, help="Share accepted and never gone.")] = 0,
    rate_429: Annotated[float, typer.Option(**_SHARE, help="Share of calls answered 429.")] = 0,
    rate_5xx: Annotated[float, typer.Option(**_SHARE, help="Share of calls answered 5xx.")] = 0,
    latency_ms: Annotated[float, typer.Option(min=0, max=60_000, help="Of every answer.")] = 0,
    reset_rate: Annotated[float, typer.Option(**_SHARE, help="Share of calls reset.")] = 0,
    hang_rate: Annotated[float, typer.Option(**_SHARE, help="Share never answered.")] = 0,
    quota: Annotated[float, typer.Option(min=0, help="Calls/s and project; 0: no limit.")] = 0,
    quota_burst: Annotated[int, typer.Option(min=0, help="Calls above the quota.")] = 0,
    auth: Annotated[bool, typer.Option(help="Demand tokens or signatures.")] = True,
    token_seconds: Annotated[float, typer.Option(min=1, help="Life of an IAM token.")] = 86_400,
    exit_with_stdin: Annotated[
        bool, typer.Option(hidden=True, help="End when standard input does.")
    ] = False,
) -> None:
    """Serve a simulated ModelArts API on this machine until stopped."""
    try:
        config = SandboxConfig(
            pools=pools,
            projects=projects,
            seed=seed,
            delete_seconds=delete_seconds,
            gone=gone,
            throttled=throttled,
            flaky=flaky,
            doomed=doomed,
            stuck=stuck,
            auth=auth,
            token_seconds=token_seconds,
            faults=Faults(
                rate_429=rate_429,
                rate_5xx=rate_5xx,
                latency_ms=latency_ms,
                reset_rate=reset_rate,
                hang_rate=hang_rate,
                quota=quota,
                quota_burst=quota_burst,
            ),
        )
    except ValidationError as error:
        _refuse(_sentence(error))
    asyncio.run(_serve(config, port, exit_with_stdin))


def _sentence(error: ValidationError) -> str:
    fault = error.errors(include_url=False)[0]
    text = fault["msg"].removeprefix("Value error, ")
    if not fault["loc"]:
        return f"{text.replace('_', '-')}."
    option = str(fault["loc"][-1]).replace("_", "-")
    return f"--{option}: {str(fault['input'])!r} is not accepted: {text[:1].lower()}{text[1:]}."


def _refuse(sentence: str) -> NoReturn:
    sys.stderr.write(f"poolsweep: {sentence}\n")
    raise typer.Exit(2) from None


async def _serve(config: SandboxConfig, port: int, exit_with_stdin: bool) -> None:
    loop = asyncio.get_running_loop()
    stopped = asyncio.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, stopped.set)
    async with contextlib.AsyncExitStack() as stack:
        try:
            running = await stack.enter_async_context(running_sandbox(config, port))
        except OSError as error:
            why = os.strerror(error.errno) if error.errno else str(error)
            _refuse(f"--port: {port} cannot be used: {why}; accepted: a free one, or 0.")
        if exit_with_stdin:
            try:
                loop.add_reader(sys.stdin.fileno(), _stop_at_end, stopped)
            except PermissionError:  # a file, or nothing at all: it has ended already
                stopped.set()
        # Its pools live as long as it: to look for garbage among them would hold up the calls.
        gc.collect()
        gc.freeze()
        _announce(running)
        await stopped.wait()


def _stop_at_end(stopped: asyncio.Event) -> None:
    if not os.read(sys.stdin.fileno(), 4096):
        asyncio.get_running_loop().remove_reader(sys.stdin.fileno())
        stopped.set()


def _announce(running: RunningSandbox) -> None:
    config = running.config
    if not sys.stdout.isatty():
        ready = {
            "event": "sandbox_ready",
            "url": running.url,
            "project_ids": config.project_ids,
            "ak": config.ak,
            "sk": config.sk,
            "token": config.token,
            "pid": os.getpid(),
        }
        sys.stdout.write(json.dumps(ready) + "\n")
        sys.stdout.flush()
        return
    from rich.console import Console  # a program that starts a sandbox need not wait for it

    console = Console(highlight=False)
    console.print(f"Simulated ModelArts API at [bold]{running.url}[/], Ctrl-C to stop")
    console.print(f"Projects: {', '.join(config.project_ids[:3])}")
    console.print(f"export POOLSWEEP_ENDPOINT={running.url}")
    console.print(f"export POOLSWEEP_AK={config.ak} POOLSWEEP_SK={config.sk}")
