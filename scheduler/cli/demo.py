"""`poolsweep demo`: the whole way once, against a simulated cloud."""

from __future__ import annotations

import asyncio
import contextlib
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Annotated, Any

import typer

from scheduler import children, policy
from scheduler.cli.execution import show_end
from scheduler.cli.policies import office_of, show_plan
from scheduler.cli.progress import follow
from scheduler.cli.session import remark, requester, say
from scheduler.sweep import carry_out, plan_policy
from worker.ledger import JobState, Ledger, Move, RunState, Source
from worker.settings import ENV_PREFIX, Settings, settings

if TYPE_CHECKING:
    from collections.abc import Mapping

    from scheduler.planner import Plan
    from scheduler.policy import Policy
    from scheduler.sweep import Office

_SANDBOX = ["--delete-seconds", "1", "--latency-ms", "30", "--gone", "0.05", "--throttled", "0.01"]
_SANDBOX += ["--flaky", "0.08", "--doomed", "0.02", "--stuck", "0.01"]

NAME = "expired-or-tagged"
POLICY = """\
  expired-or-tagged:
    projects: [demo]
    match:
      any:
        - expired: {tag: expires-at}
        - tags: {key: poolsweep/cleanup, equals: "true"}
"""
TIGHT_BRAKES = """\
    brakes: {max_deletions: 5}
"""
BRAKES = """\
    brakes: {max_deletions: 500, max_percent: 90, max_failures: 100}
"""


def demo(
    pools: Annotated[int, typer.Option(min=10, max=5_000, help="Pools in the project.")] = 500,
    seed: Annotated[int, typer.Option(help="The same seed makes the same pools.")] = 7,
) -> None:
    """Sweep the expired and tagged pools of a simulated project, with a real worker and Redis."""
    config = settings()
    arguments = ["--pools", str(pools), "--seed", str(seed), *_SANDBOX]
    with children.sandbox(arguments, config.state_dir / "logs" / "sandbox.log") as cloud:
        changes = _settings(cloud)
        demo_settings = Settings(**{**config.model_dump(exclude_unset=True), **changes})
        # To a process, an empty variable is one that is not set.
        environment = {
            ENV_PREFIX + name.upper(): "" if value is None else str(value)
            for name, value in changes.items()
        }
        asyncio.run(_demo(demo_settings, environment, cloud["project_ids"][0]))


def _settings(cloud: Mapping[str, Any]) -> dict[str, Any]:
    """Settings for the sandbox, whatever the user's are for the real cloud.

    It is quicker than a real cloud and allows more calls, and a deletion that takes longer than
    a few seconds never ends.
    """
    return {
        "endpoint": cloud["url"],
        "ak": cloud["ak"],
        "sk": cloud["sk"],
        "security_token": None,
        "token": None,
        "iam_endpoint": None,
        "iam_user": None,
        "iam_password": None,
        "iam_domain": None,
        "projects_file": None,
        "policies_file": None,
        "rate_limit": 1_000,
        "precondition_max_age_s": 3,
        "verify_interval_s": 1,
        "verify_deadline_s": 6,
        "backoff_base_s": 0.5,
        "backoff_cap_s": 2,
        "max_attempts": 5,
        "log_format": "json",
    }


async def _demo(config: Settings, environment: Mapping[str, str], project: str) -> None:
    log = config.state_dir / "logs" / "worker.log"
    head = f"projects:\n  demo: {{id: {project}}}\npolicies:\n"
    cautious = policy.parse(head + POLICY + TIGHT_BRAKES)
    bold = policy.parse(head + POLICY + BRAKES)
    async with office_of(config, bold) as office:
        say(f"Simulated cloud at {office.endpoint(project)}, project {project}")
        say(f"The policy:\n{POLICY}")
        with contextlib.ExitStack() as stack:
            worker = stack.enter_context(children.worker(environment, log))
            plan = await plan_policy(office, bold.policies[NAME], project, datetime.now(UTC))
            show_plan(NAME, plan, None, brief=True)
            await _try_the_brakes(office, cautious.policies[NAME], plan)

            async def attend() -> None:
                worker.check()

            # An interrupted maker would leave half a run: this much is always brought to its end.
            making = asyncio.create_task(_start(office, bold.policies[NAME], plan))
            try:
                run = await follow(office.ledger, await asyncio.shield(making), attend)
            except asyncio.CancelledError:
                # The simulated cloud goes with this process, so nothing can be finished later.
                run_id = await making
                await office.ledger.cancel(run_id)
                await asyncio.to_thread(stack.close)
                await _write_off(office.ledger, run_id)
                remark(f"Interrupted. See what was done with: poolsweep results {run_id}", "yellow")
                raise
        await show_end(office.ledger, run)
    say("The simulated cloud fails some pools on purpose; all others are gone or kept.")
    say(f"The worker's log is {log}")


async def _try_the_brakes(office: Office, cautious: Policy, plan: Plan) -> None:
    """A sweep with brakes that such a plan does not pass."""
    if len(plan.deletions) <= cautious.brakes.max_deletions:
        return
    swept = await carry_out(office, NAME, cautious, plan, source=Source.CLI, requester=requester())
    say(f"With a tight brake nothing is deleted: {swept.run.note}.")
    say(f"It is recorded as run {swept.run.run_id}. With brakes that fit:\n{BRAKES.rstrip()}")


async def _start(office: Office, bold: Policy, plan: Plan) -> str:
    swept = await carry_out(office, NAME, bold, plan, source=Source.CLI, requester=requester())
    return swept.run.run_id


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
