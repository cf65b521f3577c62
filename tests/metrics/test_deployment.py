"""What a deployment tells those who watch it: metrics, health, and logs to rebuild a run from."""

from __future__ import annotations

import json
import re
import signal
import socket
import subprocess
import sys
import urllib.error
import urllib.request
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

import pytest

from scheduler.almanac import NightState
from scheduler.cli.outcome import EXIT_FAILURES, EXIT_HELD
from tests.cli.conftest import POOLSWEEP
from tests.intake.conftest import Place, asks
from tests.metrics.conftest import CANCELLED, Deployment, get, is_ready, page, served, value
from tests.sweep.conftest import Sandbox, eventually, serving
from tests.worker.conftest import Process
from worker import pause
from worker.ledger import JobState, Ledger, NewJob, NewRun, RunState, Source, new_run_id

if TYPE_CHECKING:
    from collections.abc import Iterable
    from pathlib import Path

    from redis.asyncio import Redis

    from worker.ledger import Job


# What is counted


def test_jobs_are_counted_by_the_outcomes_that_the_ledger_has(deployment: Deployment) -> None:
    ended = Counter(job.state for job in deployment.jobs(deployment.run_id))
    assert set(ended) == {JobState.DELETED, JobState.ALREADY_DELETED, JobState.FAILED}
    endpoint = deployment.endpoint
    for state, count in ended.items():
        told = value(deployment.worker, "poolsweep_jobs_total", endpoint=endpoint, outcome=state)
        assert told == count, state
    accepted = value(
        deployment.worker, "poolsweep_jobs_total", endpoint=endpoint, outcome="accepted"
    )
    assert accepted == ended[JobState.DELETED]  # each was accepted first


def test_calls_are_counted_by_their_status_and_timed(deployment: Deployment) -> None:
    attempts = [
        attempt
        for job in deployment.jobs(deployment.run_id)
        for attempt in job.attempts
        if not attempt.code.startswith("GET")
    ]
    statuses = Counter(attempt.status for attempt in attempts)
    assert statuses[200]
    assert statuses[429] == 1
    assert any(500 <= status < 600 for status in statuses)
    common = {"endpoint": deployment.endpoint, "method": "DELETE"}
    for status, count in statuses.items():
        labels = common | {"class": f"{status // 100}xx", "status": str(status)}
        assert value(deployment.worker, "poolsweep_api_calls_total", **labels) == count, status
    timed = value(deployment.worker, "poolsweep_api_call_seconds_count", **common)
    assert timed == len(attempts)
    reads = value(
        deployment.worker,
        "poolsweep_api_call_seconds_count",
        endpoint=deployment.endpoint,
        method="GET",
    )
    assert reads
    assert len(deployment.project.calls("GET")) >= reads


def test_the_limiter_tells_its_rate_its_waits_and_each_429(deployment: Deployment) -> None:
    endpoint, project = deployment.endpoint, deployment.project.project
    worker = deployment.worker
    assert value(worker, "poolsweep_throttled_total", endpoint=endpoint) == 1
    waited = value(worker, "poolsweep_limiter_wait_seconds_count", endpoint=endpoint)
    assert waited is not None
    assert waited >= len(deployment.project.deletes())
    rate = value(worker, "poolsweep_limiter_rate", endpoint=endpoint, project_id=project)
    assert rate is not None
    assert 0 < rate <= 1000
    breaker = value(worker, "poolsweep_circuit_breaker_open", endpoint=endpoint, project_id=project)
    assert breaker == 0


def test_no_pool_is_told_of_and_no_project_with_what_is_counted(deployment: Deployment) -> None:
    names = {job.pool_name for job in deployment.jobs(deployment.run_id)}
    for process in deployment.processes.values():
        _, text = get(process, "/metrics")
        assert not [name for name in names if name in text]
        for family in page(process).values():
            if family.type in {"histogram", "counter"}:
                assert not [s for s in family.samples if "project_id" in s.labels], family.name


# What the ledger holds


def test_one_worker_tells_of_the_runs_in_the_ledger(deployment: Deployment) -> None:
    worker, endpoint = deployment.worker, deployment.endpoint
    assert value(worker, "poolsweep_reconciler_leads", endpoint=endpoint) == 1
    assert value(worker, "poolsweep_workers", endpoint=endpoint) == 1
    assert value(worker, "poolsweep_runs", endpoint=endpoint, state="finished") == 2
    assert value(worker, "poolsweep_braked_runs", endpoint=endpoint) == 0
    assert value(worker, "poolsweep_oldest_pending_job_seconds", endpoint=endpoint) == 0
    told = {
        sample.labels["state"]: sample.value
        for sample in page(worker)["poolsweep_recent_jobs"].samples
        if sample.value
    }
    both = [*deployment.jobs(deployment.run_id), *deployment.jobs(CANCELLED)]
    assert told == Counter(job.state for job in both)


def test_jobs_that_wait_are_told_of_with_their_age_and_the_pause(deployment: Deployment) -> None:
    worker, endpoint, place = deployment.worker, deployment.endpoint, deployment.place
    seen = len(worker.events("paused"))
    place.ask(lambda redis: pause.pause(redis, pause.EVERYTHING, by="ann", reason=""))
    eventually(lambda: len(worker.events("paused")) > seen)
    try:
        project = place.sandbox.project()
        names = project.add(2)
        ask = {"targets": [{"project_id": project.project, "pools": names}]}
        token = place.tokens["ci"]
        status = _post(deployment, ask, token)
        assert status == 202
        labels = {"endpoint": endpoint, "state": "pending"}
        eventually(lambda: value(worker, "poolsweep_unfinished_jobs", **labels) == 2)
        (run,) = place.runs(project).values()
        age = eventually(
            lambda: value(worker, "poolsweep_oldest_pending_job_seconds", endpoint=endpoint)
        )
        assert age is not None
        # A worker that finds it paused puts it off for a second; from then on it is due, and waits.
        queued = eventually(lambda: value(worker, "poolsweep_queue_age_seconds", endpoint=endpoint))
        assert queued is not None
        now_ms = place.ask(lambda redis: _now_ms(redis))
        assert 0 < age <= (now_ms - run.started_ms) / 1000
        assert 0 < queued <= (now_ms - run.started_ms) / 1000
        assert value(worker, "poolsweep_paused", scope="everything") == 1
        assert value(worker, "poolsweep_paused", scope="project") == 0
        since = value(worker, "poolsweep_paused_since_timestamp_seconds")
        assert since is not None
        assert 0 <= now_ms / 1000 - since < 120
    finally:
        place.ask(lambda redis: pause.resume(redis, pause.EVERYTHING))
    place.run_in(project)
    assert value(worker, "poolsweep_paused_since_timestamp_seconds") is None
    assert value(worker, "poolsweep_paused", scope="everything") == 0


async def _now_ms(redis: Any) -> int:
    seconds, micros = await redis.time()
    return int(seconds) * 1000 + int(micros) // 1000


def _post(deployment: Deployment, body: dict[str, Any], token: str) -> int:
    url = deployment.intake.events("intake_ready")[0]["url"]
    headers = {"Content-Type": "application/json", "Authorization": f"Bearer {token}"}
    request = urllib.request.Request(  # noqa: S310 - a loopback address
        f"{url}/v1/runs", data=json.dumps(body).encode(), headers=headers
    )
    with urllib.request.urlopen(request, timeout=30) as answer:  # noqa: S310
        return int(answer.status)


def test_the_leading_scheduler_tells_of_the_nights(deployment: Deployment) -> None:
    scheduler, due = deployment.scheduler, deployment.at.timestamp()
    assert value(scheduler, "poolsweep_scheduler_leads") == 1
    assert value(scheduler, "poolsweep_policies_rejected") == 0
    assert value(scheduler, "poolsweep_endpoint_workers", endpoint=deployment.endpoint) == 1
    name = "poolsweep_policy_last_success_timestamp_seconds"
    eventually(lambda: value(scheduler, name, policy="night") == due)
    last = "poolsweep_policy_last_night_timestamp_seconds"
    assert value(scheduler, last, policy="night", state=NightState.DONE) == due
    following = value(scheduler, "poolsweep_policy_next_night_timestamp_seconds", policy="night")
    assert following == due + 86_400


def test_the_intake_counts_its_answers_on_a_port_that_is_not_its_clients(
    deployment: Deployment,
) -> None:
    url = deployment.intake.events("intake_ready")[0]["url"]
    assert url != served(deployment.intake)
    before = value(deployment.intake, "poolsweep_intake_requests_total", route="none", status="404")
    with pytest.raises(urllib.error.HTTPError, match="404"):
        urllib.request.urlopen(f"{url}/metrics", timeout=30)  # noqa: S310 - a loopback address
    after = value(deployment.intake, "poolsweep_intake_requests_total", route="none", status="404")
    assert after == (before or 0) + 1


# How they are


def test_a_process_that_works_is_alive_and_ready(deployment: Deployment) -> None:
    for role, process in deployment.processes.items():
        assert get(process, "/healthz") == (200, '{"status": "ok"}')
        assert get(process, "/readyz") == (200, '{"status": "ok"}')
        build = page(process)["poolsweep_build_info"].samples
        assert [sample.labels["role"] for sample in build] == [role]
        assert value(process, "poolsweep_redis_up") == 1
        assert value(process, "poolsweep_ready") == 1


def test_a_port_in_use_is_told_once_and_the_worker_works_without(deployment: Deployment) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        second = deployment.place.process("worker", METRICS_PORT=str(port))
        try:
            eventually(lambda: second.events("metrics_not_served"))
            eventually(
                lambda: (
                    value(deployment.worker, "poolsweep_workers", endpoint=deployment.endpoint) == 2
                )
            )
            (told,) = second.events("metrics_not_served")
            assert re.match(
                f"POOLSWEEP_METRICS_HOST, POOLSWEEP_METRICS_PORT: 127.0.0.1:{port} cannot be "
                "listened on: ",
                told["reason"],
            )
            taken.close()
            assert served(second)  # it was waited for
            eventually(lambda: is_ready(second))
            # Of two workers, one tells of the ledger.
            both = [deployment.worker, second]
            assert [page(each)["poolsweep_runs"].samples != [] for each in both] == [True, False]
            second.send(signal.SIGTERM)
            eventually(lambda: second._popen.poll() is not None)
            assert len(second.events("metrics_not_served")) == 1
        finally:
            second.kill()


def test_without_a_port_nothing_is_served(deployment: Deployment) -> None:
    silent = deployment.place.process("scheduler", str(deployment.place.folder / "policies.yaml"))
    try:
        eventually(lambda: silent.events("scheduler_stands_by"))
        assert not silent.events("metrics_served")
    finally:
        silent.kill()


# What a run is rebuilt from


def _rebuilt(events: Iterable[dict[str, Any]], run_id: str) -> dict[str, dict[str, Any]]:
    """Each job of a run, by its id, from log lines alone."""
    jobs: dict[str, dict[str, Any]] = {}
    for event in events:
        if event["event"] == "job_moved" and event["run_id"] == run_id:
            before = jobs.get(event["job_id"], {})
            # Whoever sees that a pool is gone makes no attempt; they are told when it was accepted.
            attempts = event.get("attempts", before.get("attempts"))
            jobs[event["job_id"]] = {
                "pool": event["pool_name"],
                "project": event["project_id"],
                "state": event["state"],
                "reason": event["reason"],
                "attempts": attempts,
                "at_ms": datetime.fromisoformat(event["timestamp"]).timestamp() * 1000,
            }
    return jobs


def _attempts(job: Job) -> list[dict[str, Any]]:
    names = ("at_ms", "duration_ms", "status", "code", "request_id")
    return [dict(zip(names, attempt.packed(), strict=True)) for attempt in job.attempts]


def _check_rebuilt(deployment: Deployment, run_id: str) -> None:
    events = deployment.worker.events()
    rebuilt = _rebuilt(events, run_id)
    jobs = deployment.jobs(run_id)
    assert set(rebuilt) == {job.job_id for job in jobs}
    for job in jobs:
        found = rebuilt[job.job_id]
        assert found["pool"] == job.pool_name
        assert found["project"] == job.project_id
        assert found["state"] == job.state
        assert found["reason"] == job.reason
        assert found["attempts"] == _attempts(job)
        # The line is written when the ledger has it: by the same clock, never before.
        assert job.done_ms <= found["at_ms"] + 1
    run = deployment.run(run_id)
    (ended,) = [
        each for each in events if each["event"] == "run_ended" and each["run_id"] == run_id
    ]
    assert ended["state"] == run.state
    assert ended["counts"] == {state: count for state, count in run.counts.items() if count}
    assert (ended["started_ms"], ended["finished_ms"]) == (run.started_ms, run.finished_ms)
    assert max(each["at_ms"] for each in rebuilt.values()) + 1 >= run.finished_ms


def test_a_run_is_rebuilt_from_the_log_of_its_worker(deployment: Deployment) -> None:
    jobs = deployment.jobs(deployment.run_id)
    assert any(len(job.attempts) > 1 for job in jobs)
    assert deployment.worker.events("retry")
    _check_rebuilt(deployment, deployment.run_id)


def test_a_run_that_was_cancelled_is_rebuilt_too(deployment: Deployment) -> None:
    assert {job.state for job in deployment.jobs(CANCELLED)} == {JobState.CANCELLED}
    _check_rebuilt(deployment, CANCELLED)


def _check_decisions(deployment: Deployment, events: list[dict[str, Any]], run_id: str) -> None:
    """A run's decisions, and who wanted it, from the log of whoever made it: each told once."""
    run, events = deployment.run(run_id), [each for each in events if each.get("run_id") == run_id]
    told = Counter(
        (each["event"], each["project_id"], each["pool_name"], each["reason"])
        for each in events
        if each["event"] in {"pool_chosen", "pool_kept"}
    )
    jobs, kept = deployment.jobs(run_id), deployment.kept(run_id)
    assert told == Counter(
        [("pool_chosen", job.project_id, job.pool_name, job.chosen) for job in jobs]
        + [("pool_kept", pool.project_id, pool.pool_name, pool.reason) for pool in kept]
    )
    (made,) = [each for each in events if each["event"] == "run_made"]
    names = ("source", "policy", "client", "requester", "reason")
    assert [made[name] for name in names] == [getattr(run, name) for name in names]
    if run.started_ms:
        assert made["state"] == "running"
    else:
        assert (made["state"], made["note"]) == (run.state, run.note)


def test_the_decisions_of_a_night_are_rebuilt_from_the_log_of_its_scheduler(
    deployment: Deployment,
) -> None:
    assert deployment.kept(deployment.run_id)
    _check_decisions(deployment, deployment.scheduler.events(), deployment.run_id)


@pytest.mark.parametrize("dry_run", [False, True])
def test_a_request_is_rebuilt_from_the_logs_of_the_intake_and_the_worker(
    deployment: Deployment, sandbox: Sandbox, dry_run: bool
) -> None:
    project = sandbox.project()
    pools = [*project.add(2), *project.add(1, tags={"poolsweep/protect": "1"})]
    deployment.place.send(client="ci", request=asks(project, *pools, dry_run=dry_run))
    run = deployment.place.run_in(project)
    _check_decisions(deployment, deployment.intake.events(), run.run_id)
    if not dry_run:
        _eventually_told(deployment, run.run_id)
        _check_rebuilt(deployment, run.run_id)


def test_a_command_s_run_is_rebuilt_from_the_logs_of_the_command_and_the_worker(
    deployment: Deployment, sandbox: Sandbox, tmp_path: Path
) -> None:
    project = sandbox.project()
    project.add(3)
    project.add(1, behaviour="doomed")
    project.add(1, tags={"poolsweep/protect": "1"})
    environment = deployment.place.environment() | {"POOLSWEEP_STATE_DIR": str(tmp_path)}

    def command(*arguments: str) -> int:
        line = [POOLSWEEP, "delete", "--project", project.project, "--name", "*", "--yes"]
        return subprocess.run([*line, *arguments], env=environment, check=False).returncode

    assert command("--max-percent", "1") == EXIT_HELD
    assert command("--max-percent", "100", "--reason", "no use") == EXIT_FAILURES
    braked, run = sorted(
        (run for run in deployment.place.runs().values() if project.project in run.projects),
        key=lambda run: run.created_ms,
    )
    text = (tmp_path / "logs/commands.log").read_text()
    events = [json.loads(line) for line in text.splitlines()]
    _check_decisions(deployment, events, run.run_id)
    (made,) = [
        each for each in events if (each["event"], each["run_id"]) == ("run_made", braked.run_id)
    ]
    assert (made["state"], made["note"]) == (RunState.BRAKED, braked.note)
    (ended,) = [each for each in events if each["event"] == "run_ended"]
    assert (ended["run_id"], ended["counts"]) == (run.run_id, {"deleted": 3, "failed": 1})
    _eventually_told(deployment, run.run_id)
    _check_rebuilt(deployment, run.run_id)


def _eventually_told(deployment: Deployment, run_id: str) -> None:
    """Wait until the worker has told of a run's end."""
    eventually(
        lambda: any(each["run_id"] == run_id for each in deployment.worker.events("run_ended"))
    )


# With children


def test_what_the_children_of_a_worker_count_is_told_with_it(
    deployment: Deployment, tmp_path: Path
) -> None:
    with serving() as sandbox:
        place = Place(tmp_path, deployment.place.server, sandbox)
        project = sandbox.project()
        jobs = [NewJob(project.project, name) for name in project.add(30)]
        folder = tmp_path / "counts"
        folder.mkdir()
        given = place.environment(METRICS_PORT="0", CLIENTS_FILE="")
        command = [sys.executable, "-m", "celery", "-A", "worker.app", "worker"]
        options = ["--pool", "processes", "--concurrency", "2"]
        env = given | {"PROMETHEUS_MULTIPROC_DIR": str(folder)}
        worker = Process([*command, *options], tmp_path / "children.log", env=env)
        try:
            eventually(lambda: is_ready(worker))

            async def start(redis: Redis) -> str:
                ledger, run_id = Ledger(redis), new_run_id(datetime.now(UTC))
                await ledger.create(NewRun(run_id, Source.CLI, sandbox.url))
                await ledger.add(run_id, jobs)
                await ledger.start(run_id, len(jobs))
                return run_id

            run_id = place.ask(start)
            eventually(lambda: deployment.run(run_id).ended)
            label = {"endpoint": sandbox.url}
            for outcome in ("accepted", "deleted"):
                told = value(worker, "poolsweep_jobs_total", outcome=outcome, **label)
                assert told == len(jobs), outcome
            calls = value(worker, "poolsweep_api_call_seconds_count", method="DELETE", **label)
            assert calls == len(jobs)
            assert len({each.name.split("_")[-1] for each in folder.iterdir()}) > 1
        finally:
            worker.kill()


# At the end, since Redis is killed


def test_without_redis_none_is_ready_and_all_say_so_once(deployment: Deployment) -> None:
    def without(process: Process) -> None:
        before = len(process.events("process_not_ready"))
        eventually(lambda: not is_ready(process))
        status, text = get(process, "/readyz")
        assert status == 503
        assert "Redis does not answer" in json.loads(text)["missing"]
        assert get(process, "/healthz")[0] == 200
        found = page(process)
        for name in ("poolsweep_redis_up", "poolsweep_ready"):
            assert [sample.value for sample in found[name].samples] == [0]
        assert len(process.events("process_not_ready")) == before + 1

    processes = deployment.processes.values()
    url = deployment.intake.events("intake_ready")[0]["url"]
    with ThreadPoolExecutor(3) as pool:
        deployment.place.server.kill()
        try:
            list(pool.map(without, processes))
            with pytest.raises(urllib.error.HTTPError, match="503"):
                urllib.request.urlopen(f"{url}/readyz", timeout=30)  # noqa: S310 - loopback
        finally:
            deployment.place.server.start()
        list(pool.map(lambda each: eventually(lambda: is_ready(each), within_s=60), processes))
    assert not [
        event
        for event in deployment.intake.events("request_refused")
        if event["route"] in {"/readyz", "/healthz"}
    ]
