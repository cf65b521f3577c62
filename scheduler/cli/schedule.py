"""`poolsweep scheduler` and `schedule`: run the nights, and see them."""

from __future__ import annotations

import asyncio
import json
import os
import sys
import threading
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Annotated, Any

import typer

from scheduler import policy
from scheduler.almanac import Almanac, Night
from scheduler.cli.policies import File, policies_path
from scheduler.cli.session import open_ledger, say, stdout
from scheduler.cli.worker import end_with_stdin
from scheduler.review import records, tables
from scheduler.rota import next_nights
from worker.ledger import RunNotFoundError
from worker.settings import ENV_PREFIX, settings

if TYPE_CHECKING:
    from scheduler.policy import PolicyFile
    from worker.ledger import Ledger


def scheduler(
    path: File = None,
    exit_with_stdin: Annotated[
        bool, typer.Option(hidden=True, help="End when standard input does.")
    ] = False,
) -> None:
    """Run the policies' schedules until stopped: the same as `celery -A scheduler.beat beat`."""
    path = policies_path(path)
    policy.load(path)  # a mistake is told before anything is started
    os.environ[f"{ENV_PREFIX}POLICIES_FILE"] = str(path.absolute())
    settings.cache_clear()
    if exit_with_stdin:
        threading.Thread(target=end_with_stdin, daemon=True).start()
    from scheduler.beat import app

    app.start(["--quiet", "beat", "--loglevel", settings().log_level, "--pidfile="])


def schedule(
    path: File = None,
    as_json: Annotated[bool, typer.Option("--json", help="A JSON list.")] = False,
) -> None:
    """List each policy's next night, and what came of its last ones."""
    policy_file = policy.load(policies_path(path))
    asyncio.run(_schedule(policy_file, as_json))


async def _schedule(policy_file: PolicyFile, as_json: bool) -> None:
    async with open_ledger(settings()) as (redis, ledger):
        almanac = Almanac(redis)
        leader = await almanac.said()
        rows: list[dict[str, Any]] = []
        for name, night in next_nights(policy_file, datetime.now(UTC)).items():
            past = [await _told(ledger, each) for each in await almanac.past(name)]
            rows.append({"policy": name, "next": records.moment(night), "past": past})
    if as_json:
        document = {"leader": leader, "policies": rows}
        sys.stdout.write(json.dumps(document, ensure_ascii=False, indent=1) + "\n")
        return
    stdout.print(tables.schedule(rows))
    if leader is None:
        say("No scheduler is running: start one with `poolsweep scheduler`.")
    elif leader["rejected"]:
        say("The policy file as it is now was rejected; the scheduler goes by the one before:")
        say(leader["rejected"])


async def _told(ledger: Ledger, night: Night) -> dict[str, Any]:
    runs = []
    for project_id, run_id in night.runs.items():
        try:
            run = await ledger.run(run_id)
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
