"""`poolsweep scheduler` and `schedule`: run the nights, and see them."""

from __future__ import annotations

import asyncio
import os
import threading
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Annotated, Any

import typer

from scheduler import policy
from scheduler.almanac import Almanac, Night, NightState
from scheduler.cli.policy_files import File, policies_path
from scheduler.cli.session import open_ledger, say, say_json, stdout
from scheduler.cli.worker import end_with_stdin
from scheduler.review import records, tables
from scheduler.rota import next_nights
from worker.ledger import RunNotFoundError, SchemaError
from worker.settings import ENV_PREFIX, settings
from worker.yaml_source import YamlError

if TYPE_CHECKING:
    from pathlib import Path

    from worker.ledger import Ledger


def scheduler(
    path: File = None,
    exit_with_stdin: Annotated[
        bool, typer.Option(hidden=True, help="End when standard input does.")
    ] = False,
) -> None:
    """Run the policies' schedules until stopped: the same as `celery -A scheduler.beat beat`."""
    os.environ[f"{ENV_PREFIX}POLICIES_FILE"] = str(policies_path(path).absolute())
    settings.cache_clear()
    if exit_with_stdin:
        threading.Thread(target=end_with_stdin, daemon=True).start()
    from scheduler.beat import app

    app.start(["--quiet", "beat"])


def schedule(
    path: File = None,
    as_json: Annotated[bool, typer.Option("--json", help="A JSON object.")] = False,
) -> None:
    """List each policy's next night, and what came of its last ones."""
    asyncio.run(_schedule(policies_path(path), as_json))


async def _schedule(path: Path, as_json: bool) -> None:
    async with open_ledger(settings()) as (redis, ledger):
        almanac = Almanac(redis)
        leader = await almanac.said()
        rejected = leader["rejected"] if leader else ""
        try:
            found = next_nights(policy.load(path), datetime.now(UTC))
            coming = {name: records.moment(at) for name, at in found.items()}
        except YamlError as error:
            if leader is None:
                raise
            rejected = str(error)
            # The scheduler goes by the policies that it read before.
            coming = leader["next"]
        rows = [
            {"policy": name, "next": at, "past": await _past(almanac, ledger, name)}
            for name, at in coming.items()
        ]
    if as_json:
        document = {"leader": leader, "rejected": rejected, "policies": rows}
        say_json(document)
        return
    if rows:
        stdout.print(tables.schedule(rows))
    else:
        say("No policy has a schedule: see `schedule` in docs/policies.md.")
    if leader is None:
        say("No scheduler is running: start one with `poolsweep scheduler`.")
    if rejected:
        say("The policy file as it is now is rejected; the scheduler goes by the one before:")
        say(rejected)


async def _past(almanac: Almanac, ledger: Ledger, name: str) -> list[dict[str, Any]]:
    """The latest nights of a policy, newest first, with the one under way."""
    last, past = await almanac.last(name), await almanac.past(name)
    if last is not None and last.state is NightState.STARTED:
        past.insert(0, last)
    return [await _told(ledger, night) for night in past]


async def _told(ledger: Ledger, night: Night) -> dict[str, Any]:
    runs = []
    for project_id, run_id in night.runs.items():
        try:
            run = await ledger.run(run_id)
        except SchemaError:
            runs.append({"run_id": run_id, "project_id": project_id, "state": "unread"})
        except RunNotFoundError:
            runs.append({"run_id": run_id, "project_id": project_id, "state": "forgotten"})
        else:
            runs.append({"project_id": project_id, **records.run_record(run)})
    return {
        "at": records.moment(night.at),
        "state": night.state,
        "runs": runs,
        "note": night.note,
    }
