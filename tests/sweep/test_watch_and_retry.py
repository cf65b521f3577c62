"""`poolsweep watch` and `retry`: a run joined from anywhere, and its failures tried again."""

from __future__ import annotations

import asyncio
import contextlib
import threading
from dataclasses import replace
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

import pytest
from redis.asyncio import Redis

from scheduler.cli.attendance import TO_BE_PLANNED, Attendance
from scheduler.cli.execution import see_through
from scheduler.cli.retry import as_chosen
from scheduler.facts import Facts
from scheduler.selection import select
from tests.cli.conftest import Command, User, one_sentence
from tests.conftest import until
from tests.sweep.conftest import (
    FAILURES,
    HELD,
    PAST,
    REFUSED,
    Operator,
    Project,
    document,
    eventually,
    settings_for,
    tags_text,
)
from worker import pause
from worker.deletion import ABSENT
from worker.ledger import Job, JobState, Ledger, NewJob, NewRun, RunState, Source, keys, new_run_id
from worker.modelarts import Pool, Precondition
from worker.settings import Settings

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from tests.sweep.conftest import Sandbox

pytestmark = pytest.mark.usefixtures("worker")


def detached(ann: Operator, project: Project, *pools: str) -> str:
    """A run of which nothing is called, since its project is paused. Returns its id."""
    ann.pauses(project)
    ended = ann.run("delete", "--project", project.project, *pools, "--yes", "--detach")
    assert ended.code == 0, ended.err
    (run_id,) = ended.lines
    return run_id


def goes_on(ann: Operator, project: Project) -> None:
    assert ann.ask(lambda redis: pause.resume(redis, project.project))


def watching(user: User, run_id: str) -> Command:
    """Somebody who watches a run, and has begun to."""
    command = user.start("watch", run_id)
    assert command.stderr
    assert command.stderr.readline().startswith(f"Run {run_id}: ")
    return command


# Watching


def test_a_run_is_watched_to_its_end_by_somebody_else(
    ann: Operator, project: Project, sandbox: Sandbox, broker: str, tmp_path: Path
) -> None:
    pools = project.add(3)
    run_id = detached(ann, project, *pools)
    bob = User(tmp_path / "bob", settings_for(sandbox, broker))
    command = watching(bob, run_id)
    assert project.written() == set()
    goes_on(ann, project)
    ended = command.end()
    assert ended.code == 0, ended.err
    assert f"Run {run_id}: 3 of 3 jobs ended after " in ended.err.splitlines()[-1]
    assert f"Look again with: poolsweep results {run_id}" in ended.lines
    assert project.there() == set()
    again = bob.run("watch", run_id)
    assert (again.code, again.out) == (0, ended.out), "a run that has ended is shown at once"


def test_whoever_stops_watching_is_told_how_to_go_on_and_the_run_does(
    ann: Operator, project: Project
) -> None:
    run_id = detached(ann, project, *project.add(2))
    command = watching(ann, run_id)
    command.interrupt(group=True)
    ended = command.end()
    assert ended.code == 130
    assert f"Run {run_id} goes on" in ended.err
    assert ended.err.splitlines()[-2:] == [
        f"Watch it with:  poolsweep watch {run_id}",
        f"Cancel it with: poolsweep cancel {run_id}",
    ]
    goes_on(ann, project)
    assert ann.ended(run_id).counts[JobState.DELETED] == 2


def test_a_run_that_is_cancelled_meanwhile_is_told_by_the_exit_code(
    ann: Operator, project: Project
) -> None:
    run_id = detached(ann, project, *project.add(2))
    command = watching(ann, run_id)
    assert ann.run("cancel", run_id).code == 0
    ended = command.end()
    assert ended.code == HELD, ended.err
    assert "cancelled" in ended.out
    assert project.written() == set()
    goes_on(ann, project)


def test_a_pool_that_changed_meanwhile_is_told_by_the_exit_code(
    ann: Operator, project: Project
) -> None:
    changed, plain = project.add(2)
    run_id = detached(ann, project, changed, plain)
    command = watching(ann, run_id)
    project.protect(changed)
    goes_on(ann, project)
    ended = command.end()
    assert ended.code == HELD, ended.err
    assert ann.outcomes(run_id) == {"skipped": {changed}, "deleted": {plain}}


def test_a_run_that_waits_to_be_planned_is_waited_for(ann: Operator, project: Project) -> None:
    run_id = new_run_id(datetime.now(UTC))
    run = NewRun(run_id, Source.INTAKE, project.url, projects=(project.project,))
    assert ann.ask(lambda redis: Ledger(redis).queue(run))
    command = watching(ann, run_id)
    assert command.stderr
    assert command.stderr.readline() == f"Run {run_id} {TO_BE_PLANNED}\n"
    note = "7 deletions are more than max_deletions=5 allows"
    assert ann.ask(lambda redis: Ledger(redis).abort(run_id, note, state=RunState.BRAKED))
    ended = command.end()
    assert ended.code == HELD, ended.err
    assert note in ended.lines
    assert TO_BE_PLANNED not in ended.err, "it is said once"


def test_nothing_is_said_of_workers_before_a_run_is_there_for_them(
    ann: Operator, project: Project
) -> None:
    nowhere = "http://127.0.0.1:9"
    run_id = new_run_id(datetime.now(UTC))
    run = NewRun(run_id, Source.INTAKE, nowhere, projects=(project.project,))
    assert ann.ask(lambda redis: Ledger(redis).queue(run))
    command = watching(ann, run_id)
    assert command.stderr
    assert command.stderr.readline() == f"Run {run_id} {TO_BE_PLANNED}\n"
    assert ann.ask(lambda redis: Ledger(redis).create(run, maker="m"))
    job = NewJob(project.project, f"gone-{0:032x}")
    assert ann.ask(lambda redis: Ledger(redis).add(run_id, iter([job]), maker="m")) == 1
    assert ann.ask(lambda redis: Ledger(redis).start(run_id, 1, maker="m"))
    assert command.stderr.readline().startswith("No worker is running for this endpoint")
    command.interrupt(group=True)
    ended = command.end()
    assert ended.code == 130
    assert f"Run {run_id} waits until a worker is started" in ended.err
    assert ann.run("cancel", run_id).code == 0


def test_whoever_stops_watching_a_queued_run_is_told_what_it_waits_for(
    ann: Operator, project: Project
) -> None:
    run_id = new_run_id(datetime.now(UTC))
    run = NewRun(run_id, Source.INTAKE, project.url, projects=(project.project,))
    assert ann.ask(lambda redis: Ledger(redis).queue(run))
    command = watching(ann, run_id)
    command.interrupt(group=True)
    ended = command.end()
    assert ended.code == 130
    assert f"Interrupted. Run {run_id} {TO_BE_PLANNED}." in ended.err
    assert "worker" not in ended.err
    assert ann.run("cancel", run_id).code == 0


def test_a_dry_run_deleted_nothing_and_is_told_by_the_exit_code(
    ann: Operator, project: Project
) -> None:
    run_id = new_run_id(datetime.now(UTC))
    run = NewRun(run_id, Source.INTAKE, project.url, projects=(project.project,))
    note = "a dry run: nothing was deleted"
    assert ann.ask(lambda redis: Ledger(redis).create(run, maker="m"))
    assert ann.ask(
        lambda redis: Ledger(redis).abort(run_id, note, state=RunState.PLANNED, maker="m")
    )
    ended = ann.run("watch", run_id)
    assert ended.code == HELD, ended.err
    assert note in ended.lines


async def test_whoever_is_interrupted_when_a_run_has_ended_is_told_so(
    redis_client: Redis, redis_url: str, capsys: pytest.CaptureFixture[str]
) -> None:
    ledger = Ledger(redis_client)
    run_id = new_run_id(datetime.now(UTC))
    assert await ledger.queue(NewRun(run_id, Source.INTAKE, "http://127.0.0.1:9"))

    async def ends() -> None:
        async with Redis.from_url(redis_url, decode_responses=True) as redis:
            assert await Ledger(redis).abort(run_id, "given up")

    async def is_followed() -> bool:
        return f"Run {run_id}: queued" in capsys.readouterr().err

    with contextlib.ExitStack() as stack:
        attendance = Attendance(Settings(), redis_client, may_start=False, stack=stack)
        run = await ledger.run(run_id)
        watching = asyncio.create_task(see_through(ledger, run, attendance))
        await until(is_followed)
        # In a thread that is waited for, so that no look comes between the end and the interrupt.
        thread = threading.Thread(target=lambda: asyncio.run(ends()))
        thread.start()
        thread.join()
        watching.cancel()
        with pytest.raises(asyncio.CancelledError):
            await watching
    assert f"Interrupted, but run {run_id} has ended." in capsys.readouterr().err


def test_an_interrupted_sweep_says_how_to_go_on(ann: Operator, project: Project) -> None:
    project.add(2)
    ann.pauses(project)
    path = ann.writes({"lab": project}, expired={"brakes": {"max_percent": 100}})
    command = ann.start("sweep", path, "--yes")
    (run,) = eventually(lambda: ann.runs_in(project))
    run_id = run["run_id"]
    assert command.stderr
    assert command.stderr.readline().startswith(f"Run {run_id}: ")
    command.interrupt(group=True)
    ended = command.end()
    assert ended.code == 130
    assert f"Run {run_id} goes on" in ended.err
    assert f"poolsweep watch {run_id}" in ended.err
    assert f"poolsweep cancel {run_id}" in ended.err
    goes_on(ann, project)
    assert ann.ended(run_id).counts[JobState.DELETED] == 2


# Trying again


def put(project: Project, pool: dict[str, Any], behaviour: str) -> str:
    """Put a pool there, or change how the cloud answers for it. Returns its id."""
    path = f"/_sandbox/pools/{project.project}?behaviour={behaviour}"
    project._call("PUT", path, pool)
    return str(pool["metadata"]["name"])


def failed_run(ann: Operator, project: Project, *pools: str, code: int = FAILURES) -> str:
    """A run over pools of which some fail. Returns its id."""
    ended = ann.run("delete", "--project", project.project, *pools, "--yes")
    assert ended.code == code, ended.err
    (line,) = [line for line in ended.lines if line.startswith("Look again with: ")]
    return line.split()[-1]


def failed_job(pool: Pool) -> Job:
    """A job that was made for a pool as it is, and failed."""
    demanded = Precondition.of(pool)
    record = NewJob("p", pool.pool_id, created=demanded.created, fingerprint=demanded.fingerprint)
    return replace(Job.parse("r", 0, record.record()), state=JobState.FAILED)


def test_only_the_failed_jobs_are_tried_again_as_a_new_run(ann: Operator, project: Project) -> None:
    documents = [document(tags={"expires-at": PAST}) for _ in range(2)]
    broken = [put(project, each, "doomed") for each in documents]
    run_id = failed_run(ann, project, *broken, *project.add(2))
    for each in documents:
        put(project, each, "normal")
    before = len(project.deletes())
    preview = ann.run("retry", run_id)
    assert preview.code == 0
    assert "2 to delete, 0 to keep, 0 not there" in preview.out
    assert preview.lines[-1] == "Preview only: nothing was deleted. Add --yes to delete."
    assert len(project.deletes()) == before
    started = ann.run("retry", run_id, "--yes", "--detach")
    assert started.code == 0, started.err
    (again,) = started.lines
    run = ann.ended(again)
    assert (run.source, run.reason, run.total) == ("cli", f"retry of {run_id}", 2)
    assert ann.outcomes(again) == {"deleted": set(broken)}
    assert sorted(project.deletes()[before:]) == sorted(broken)
    nothing = ann.run("retry", again, "--yes")
    assert (nothing.code, nothing.out) == (0, "")
    assert f"No job of run {again} failed" in nothing.err


def test_a_job_whose_record_is_damaged_is_not_tried_again_and_keeps_no_other_from_it(
    ann: Operator, project: Project
) -> None:
    documents = [document(tags={"expires-at": PAST}) for _ in range(2)]
    broken = [put(project, each, "doomed") for each in documents]
    run_id = failed_run(ann, project, *broken)
    ann.ask(lambda redis: redis.hset(keys.jobs(run_id), "0", "no record"))
    preview = ann.run("retry", run_id)
    assert preview.code == FAILURES
    assert "Left out, since their records are damaged: 1 jobs." in preview.err
    assert "1 to delete, 0 to keep, 0 not there" in preview.out
    ann.ask(lambda redis: redis.hset(keys.jobs(run_id), "1", "no record"))
    nothing = ann.run("retry", run_id, "--yes")
    assert (nothing.code, nothing.out) == (FAILURES, "")
    assert f"No other job of run {run_id} failed" in nothing.err


def test_a_pool_that_is_not_as_the_run_chose_it_is_kept(ann: Operator, project: Project) -> None:
    retagged, remade, plain = (document(tags={"expires-at": PAST}) for _ in range(3))
    pools = [put(project, each, "doomed") for each in (retagged, remade, plain)]
    run_id = failed_run(ann, project, *pools)
    tags = tags_text({"expires-at": PAST, "owner": "ann"})
    retagged["metadata"]["annotations"]["os.modelarts/tms.tags"] = tags
    remade["metadata"]["creationTimestamp"] = "2024-02-02T00:00:00Z"
    for each in (retagged, remade, plain):
        put(project, each, "normal")
    ended = ann.run("retry", run_id, "--yes", "--reason", "once more")
    assert ended.code == HELD, ended.err
    assert project.there() == set(pools[:2])
    for pool, why in zip(pools[:2], ("tags changed", "another incarnation"), strict=True):
        (line,) = [line for line in ended.lines if f" {pool} " in line]
        assert " keep " in line
        assert f"changed since the run chose it: {why}" in line
    assert "once more" in {run.reason for run in ann.runs().values()}


def test_a_parent_stays_with_a_sub_pool_that_changed() -> None:
    parent = document(subpools=1)
    child = document(parent=parent["metadata"]["name"])
    pools = [Pool.parse(each) for each in (parent, child)]
    jobs = {pool.pool_id: failed_job(pool) for pool in pools}

    def going() -> set[str]:
        there = [Facts(Pool.parse(each), nodes=[]) for each in (parent, child)]
        found = select(there, as_chosen(jobs), datetime.now(UTC))
        return {each.pool.pool_id for each in found if each.delete}

    assert going() == set(jobs)
    child["metadata"]["annotations"]["os.modelarts/description"] = "in use again"
    assert going() == set()


@pytest.mark.parametrize(("fingerprint", "stays"), [(ABSENT, True), ("", False)])
def test_a_pool_that_was_not_there_stays_and_one_that_nothing_was_demanded_of_does_not(
    fingerprint: str, stays: bool
) -> None:
    pool = Pool.parse(document())
    job = replace(failed_job(pool), fingerprint=fingerprint)
    there = [Facts(pool, nodes=[])]
    (found,) = select(there, as_chosen({pool.pool_id: job}), datetime.now(UTC))
    assert found.delete != stays
    if stays:
        assert found.reason == "it was not there when the run chose it"


BUSY = [{"type": "train", "status": "Running", "name": "job-1"}]
SELECTED = ("--expired", "--max-percent", "100")


def by_policy(ann: Operator, project: Project) -> tuple[str, ...]:
    path = ann.writes({"lab": project}, expired={"brakes": {"max_percent": 100}})
    return ("sweep", path, "--yes")


def by_selector(_ann: Operator, project: Project) -> tuple[str, ...]:
    return ("delete", "--project", project.project, *SELECTED, "--yes")


def tried(ann: Operator, *command: str) -> str:
    """The id of a run of which all jobs fail."""
    ended = ann.run(*command)
    assert ended.code == FAILURES, ended.out + ended.err
    (line,) = [line for line in ended.lines if line.startswith("Look again with: ")]
    return line.split()[-1]


@pytest.mark.parametrize("way", [by_policy, by_selector])
def test_a_pool_that_was_not_named_stays_if_it_has_become_busy_since(
    ann: Operator, project: Project, way: Callable[[Operator, Project], tuple[str, ...]]
) -> None:
    documents = [document(tags={"expires-at": PAST}) for _ in range(2)]
    busy, plain = (put(project, each, "doomed") for each in documents)
    first = tried(ann, *way(ann, project))
    again = tried(ann, "retry", first, "--yes")
    told = ann.runs()
    for run_id in (first, again):
        assert (told[run_id].policy, bool(told[run_id].selector)) == (
            ("expired", False) if way is by_policy else ("", True)
        )
    for each in documents:
        put(project, each, "normal")
    project.change(busy, workloads=BUSY)
    # The retry of a retry is no run by name either.
    held = ann.run("retry", again, "--yes")
    assert held.code == HELD, held.out + held.err
    (line,) = [line for line in held.lines if f" {busy} " in line]
    assert " keep " in line
    assert "it is in use by job-1" in line
    assert project.there() == {busy}
    assert plain in project.deletes()
    forced = ann.run("retry", again, "--yes", "--allow-busy")
    assert forced.code == 0, forced.out + forced.err
    assert project.there() == set()


def test_a_pool_that_was_named_may_be_busy_when_it_is_tried_again(
    ann: Operator, project: Project
) -> None:
    given = document(tags={"expires-at": PAST})
    pool = put(project, given, "doomed")
    run_id = failed_run(ann, project, pool)
    put(project, given, "normal")
    project.change(pool, workloads=BUSY)
    ended = ann.run("retry", run_id, "--yes", PLAN_MAX_AGE_S="0.001")
    assert ended.code == 0, ended.out + ended.err
    assert project.there() == set()


def test_a_shared_pool_that_was_selected_stays_unless_it_is_said(
    ann: Operator, project: Project
) -> None:
    given = document(tags={"expires-at": PAST}, shared=True)
    pool = put(project, given, "doomed")
    run_id = tried(ann, *by_selector(ann, project), "--allow-shared")
    put(project, given, "normal")
    held = ann.run("retry", run_id, "--yes")
    assert held.code == HELD, held.out + held.err
    assert "it is shared or public" in held.out
    assert project.there() == {pool}
    ended = ann.run("retry", run_id, "--yes", "--allow-shared")
    assert ended.code == 0, ended.out + ended.err
    assert project.there() == set()


@pytest.mark.parametrize("way", [by_policy, by_selector])
def test_an_old_plan_of_pools_that_were_not_named_is_refused(
    ann: Operator, project: Project, way: Callable[[Operator, Project], tuple[str, ...]]
) -> None:
    put(project, document(tags={"expires-at": PAST}), "doomed")
    run_id = tried(ann, *way(ann, project))
    before = len(project.calls("GET"))
    ended = ann.run("retry", run_id, "--yes", PLAN_MAX_AGE_S="0.001")
    assert (ended.code, ended.out) == (REFUSED, "")
    sentence = one_sentence(ended)
    assert sentence.startswith(f"poolsweep: RUN: {run_id} was planned ")
    assert "longer than POOLSWEEP_PLAN_MAX_AGE_S=0.001 allows; accepted: a newer run" in sentence
    assert len(project.calls("GET")) == before
    assert len(project.deletes()) == 1


def test_a_run_that_has_not_ended_is_not_tried_again(ann: Operator, project: Project) -> None:
    run_id = detached(ann, project, *project.add(1))
    ended = ann.run("retry", run_id, "--yes")
    assert ended.code == REFUSED
    assert one_sentence(ended) == (
        f"poolsweep: RUN: {run_id} is running; accepted: a run that has ended."
    )
    goes_on(ann, project)
    ann.ended(run_id)
