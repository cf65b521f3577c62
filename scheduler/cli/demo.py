"""`poolsweep demo`: the whole way once, against a simulated cloud."""

from __future__ import annotations

import asyncio
import contextlib
import getpass
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Annotated

import typer

from scheduler import children
from scheduler.cli.progress import follow
from scheduler.cli.session import open_ledger, stdout
from scheduler.dispatch import Order, dispatch
from scheduler.planner import Plan, plan
from scheduler.review import tables
from scheduler.selection import any_of, expired, tagged, totals
from worker.broker import make_app, sender
from worker.feed import Feed
from worker.ledger import JobState, Ledger, Move, RunState, Source
from worker.modelarts_client import make_client
from worker.settings import ENV_PREFIX, Settings, settings

if TYPE_CHECKING:
    from collections.abc import Mapping
    from typing import Any

CLEANUP_TAG = "poolsweep/cleanup"
_SANDBOX = ["--delete-seconds", "1", "--latency-ms", "30", "--gone", "0.05", "--throttled", "0.01"]
_SANDBOX += ["--flaky", "0.08", "--doomed", "0.02", "--stuck", "0.01"]


def demo(
    pools: Annotated[int, typer.Option(min=10, max=5_000, help="Pools in the project.")] = 500,
    seed: Annotated[int, typer.Option(help="The same seed makes the same pools.")] = 7,
) -> None:
    """Sweep the expired and tagged pools of a simulated project, with a real worker and Redis."""
    config = settings()
    logs = config.state_dir / "logs"
    arguments = ["--pools", str(pools), "--seed", str(seed), *_SANDBOX]
    with children.sandbox(arguments, logs / "sandbox.log") as cloud:
        environment = _environment(cloud)
        overrides: dict[str, Any] = {
            name.removeprefix(ENV_PREFIX).lower(): value for name, value in environment.items()
        }
        demo_settings = Settings(**{**config.model_dump(exclude_unset=True), **overrides})
        asyncio.run(_demo(demo_settings, environment, cloud["project_ids"][0]))


def _environment(cloud: Mapping[str, Any]) -> dict[str, str]:
    """Settings for the sandbox: quicker than a real cloud would allow, and impatient."""
    values = {
        "ENDPOINT": cloud["url"],
        "AK": cloud["ak"],
        "SK": cloud["sk"],
        "RATE_LIMIT": "100",
        "VERIFY_INTERVAL_S": "1",
        "VERIFY_DEADLINE_S": "8",
        "BACKOFF_BASE_S": "0.5",
        "BACKOFF_CAP_S": "2",
        "MAX_ATTEMPTS": "5",
        "LOG_FORMAT": "json",
    }
    return {ENV_PREFIX + name: value for name, value in values.items()}


async def _demo(config: Settings, environment: Mapping[str, str], project: str) -> None:
    endpoint = config.api_endpoint.url
    log = config.state_dir / "logs" / "worker.log"
    async with open_ledger(config) as (redis, ledger):
        stdout.print(f"Simulated cloud at {endpoint}, project {project}")
        with contextlib.ExitStack() as stack:
            stack.enter_context(children.worker(environment, log))
            wish = any_of([expired(), tagged(CLEANUP_TAG, "true")])
            async with make_client(config, redis) as client:
                swept = await plan(client, project, wish, datetime.now(UTC))
            _show(swept)
            order = Order(endpoint, Source.CLI, getpass.getuser(), "demo")
            feed = Feed(ledger, sender(make_app(config)), config)
            run_id = await dispatch([swept], order, ledger=ledger, feed=feed)
            try:
                run = await follow(ledger, run_id)
            except asyncio.CancelledError:
                # The simulated cloud goes with this process, so nothing can be finished later.
                await ledger.cancel(run_id)
                await asyncio.to_thread(stack.close)
                await _write_off(ledger, run_id)
                raise
        stdout.print(tables.outcomes(run))
        failures = await ledger.jobs(run_id, outcome=JobState.FAILED)
        if failures:
            stdout.print(tables.failures(failures))
    stdout.print("The simulated cloud fails some pools on purpose; all others are gone or kept.")
    stdout.print(f"Look again with: poolsweep results {run_id}")
    stdout.print(f"Only failures:   poolsweep results {run_id} --outcome failed")
    stdout.print(f"The worker's log is {log}")


def _show(swept: Plan) -> None:
    count, nodes = totals(swept.decisions)
    stdout.print(f"Plan: {count} of {len(swept.decisions)} pools to delete; {tables.nodes(nodes)}")
    stdout.print(tables.kept(swept.refusals))


async def _write_off(ledger: Ledger, run_id: str) -> None:
    reason = "the simulated cloud was stopped before the pool was seen to be gone"
    while (await ledger.run(run_id)).state is RunState.RUNNING:
        waiting = await ledger.accepted(run_id)
        if not waiting:
            return
        moves = [
            Move(job.number, JobState.ACCEPTED, JobState.FAILED, reason=reason)
            for job, _ in waiting
        ]
        await ledger.record(run_id, moves)
