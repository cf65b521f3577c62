"""`poolsweep sweep`: asked first, or exactly a saved plan; a pool that has changed since stays."""

from __future__ import annotations

import copy
import hashlib
import json
import os
import pty
from datetime import datetime, timedelta
from typing import TYPE_CHECKING, Any

import pytest

from tests.cli.conftest import QUESTION, Command, Ended, one_sentence
from tests.sweep.conftest import FUTURE, HELD, PAST, REFUSED, document
from worker import pause

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from tests.sweep.conftest import Operator, Project

pytestmark = pytest.mark.usefixtures("worker")
FITTING = {"brakes": {"max_percent": 100}}


def asked(ann: Operator, path: str, answer: bytes) -> Ended:
    """A sweep at a terminal whose user answers the question, or presses Ctrl-C."""
    leader, follower = pty.openpty()
    environment = ann.environment() | {"TERM": "xterm-256color"}
    command = Command(("sweep", path), environment, stdin=follower, stdout=follower)
    os.close(follower)
    written = b""
    while QUESTION not in written:
        written += os.read(leader, 65_536)
    if answer:
        os.write(leader, answer)
    else:
        command.interrupt(group=True)
    while True:
        try:
            written += os.read(leader, 65_536)
        except OSError:  # the command has closed it
            break
    ended = command.end()
    os.close(leader)
    return Ended(ended.code, written.decode(), ended.err)


def test_a_sweep_asks_and_only_the_number_of_pools_is_a_yes(
    ann: Operator, project: Project
) -> None:
    pools = project.add(3)
    path = ann.writes({"lab": project}, expired=FITTING)
    unasked = ann.run("sweep", path)
    assert unasked.code == 0
    assert unasked.lines[-1] == "Preview only: nothing was deleted. Add --yes to delete."
    stopped = asked(ann, path, b"yes\n")
    assert stopped.code == HELD
    assert "Stopped: nothing was deleted." in stopped.out
    interrupted = asked(ann, path, b"")
    assert interrupted.code == 130
    assert "Traceback" not in interrupted.err
    assert project.written() == set()
    assert ann.runs_in(project) == []
    agreed = asked(ann, path, b"3\n")
    assert agreed.code == 0, agreed.err
    assert sorted(project.deletes()) == sorted(pools)
    assert project.there() == set()


def test_a_sweep_records_what_went_and_what_stayed_each_with_the_reason(
    ann: Operator, project: Project
) -> None:
    going, staying = project.add(3), project.add(2, tags={"expires-at": FUTURE})
    (prepaid,) = project.add(billing="1")
    path = ann.writes({"lab": project}, expired={**FITTING, "description": "the old ones"})
    ended = ann.run("sweep", path, "--yes")
    assert ended.code == 0, ended.err
    assert set(project.deletes()) == set(going)
    (run,) = ann.runs_in(project)
    assert (run["policy"], run["reason"], run["state"]) == ("expired", "the old ones", "finished")
    assert run["counts"] == {"deleted": 3}
    text, kept = ann.together(
        ("results", run["run_id"], "--kept"), ("results", run["run_id"], "--kept", "--json")
    )
    told = {each["pool_name"]: each["reason"] for each in json.loads(kept.out)}
    assert told.keys() == {*staying, prepaid}
    assert told[prepaid].startswith("it is prepaid")
    assert {told[each] for each in staying} == {f"not expired: expires-at={FUTURE}"}
    for name, why in told.items():
        (line,) = [line for line in text.lines if name in line]
        assert why in line
    jobs = ann.jobs(run["run_id"])
    assert {name: (job.state, job.chosen) for name, job in jobs.items()} == dict.fromkeys(
        going, ("deleted", f"expired: expires-at={PAST}")
    )


def test_two_policies_over_one_project_are_carried_out_one_after_the_other(
    ann: Operator, project: Project
) -> None:
    old, named = project.add(4), project.add(2, tags={}, title="scratch")
    project.add(2, tags={})
    path = ann.writes(
        {"lab": project}, expired=FITTING, scratch={**FITTING, "match": {"name": "scratch*"}}
    )
    ended = ann.run("sweep", path, "--yes")
    assert ended.code == 0, ended.out + ended.err
    assert set(project.deletes()) == {*old, *named}
    second, first = ann.runs_in(project)
    assert (first["policy"], second["policy"]) == ("expired", "scratch")
    assert first["finished_at"] <= second["created_at"]


# Saved plans


def digested(plan: dict[str, Any]) -> dict[str, Any]:
    """A plan file with the digest that fits it."""
    text = json.dumps(plan["plans"], sort_keys=True, ensure_ascii=True, separators=(",", ":"))
    return plan | {"sha256": hashlib.sha256(text.encode()).hexdigest()}


def test_a_saved_plan_is_carried_out_exactly(
    ann: Operator, project: Project, tmp_path: Path
) -> None:
    planned, _ = project.add(3), project.add(3, tags={})
    path = ann.writes({"lab": project}, expired=FITTING, old={"match": {"older_than": "1d"}})
    saved = tmp_path / "plan.json"
    saved.write_text(ann.run("plan", path, "--json", "--only", "expired").out)
    project.add(2)  # would go too by now
    ended = ann.run("sweep", path, "--plan", str(saved), "--yes")
    assert ended.code == 0, ended.err
    assert "not in the saved plan" in ended.out
    assert set(project.deletes()) == set(planned)
    (run,) = ann.runs_in(project)
    assert run["policy"] == "expired"


def test_a_saved_plan_that_was_tampered_with_or_does_not_hold_any_more_is_refused(
    ann: Operator, project: Project, tmp_path: Path
) -> None:
    retagged, remade, *_ = project.add(4)
    (kept,) = project.add(tags={"expires-at": FUTURE})
    path = ann.writes({"lab": project}, expired=FITTING)
    plan = ann.saved_plan(path)

    def changed(change: Callable[[dict[str, Any]], None]) -> dict[str, Any]:
        other = copy.deepcopy(plan)
        change(other["plans"][0])
        return other

    def flip(one: dict[str, Any]) -> None:
        for pool in one["pools"]:
            if pool["pool_name"] == kept:
                pool["decision"] = "delete"

    def age(one: dict[str, Any]) -> None:
        planned = datetime.fromisoformat(one["planned_at"])
        one["planned_at"] = (planned - timedelta(minutes=61)).isoformat()

    elsewhere = "http://127.0.0.1:9"
    files = {
        "flipped": (changed(flip), "was changed after it was written"),
        "flipped-well": (digested(changed(flip)), f"{kept} is to be kept now"),
        "old": (digested(changed(age)), "not older than 1h"),
        "moved": (digested(changed(lambda one: one.update(endpoint=elsewhere))), elsewhere),
        "renamed": (digested(changed(lambda one: one.update(policy="expried"))), "'expried'"),
    }
    commands = []
    for name, (content, _) in files.items():
        (tmp_path / name).write_text(json.dumps(content))
        commands.append(("sweep", path, "--yes", "--plan", str(tmp_path / name)))
    found = dict(zip(files, ann.together(*commands), strict=True))
    (tmp_path / "whole").write_text(json.dumps(plan))
    project.retag(retagged, **{"expires-at": PAST, "owner": "ann"})
    project.change(remade, creationTimestamp="2024-02-02T00:00:00Z")
    late = ann.run("sweep", path, "--yes", "--plan", str(tmp_path / "whole"))
    for name, ended in found.items():
        assert files[name][1] in one_sentence(ended), name
        assert (ended.code, ended.out) == (REFUSED, ""), name
    assert late.code == REFUSED
    assert f"{retagged} has changed" in one_sentence(late)
    assert f"{remade} has changed" in one_sentence(late)
    assert project.written() == set()
    assert ann.runs_in(project) == []


# The precondition


def test_a_pool_that_changes_between_the_plan_and_its_call_is_skipped(
    ann: Operator, project: Project
) -> None:
    protected, renewed, vanished, *others = project.add(6)
    remade = document(tags={"expires-at": PAST})
    project._call("PUT", f"/_sandbox/pools/{project.project}", remade)
    name = remade["metadata"]["name"]
    path = ann.writes({"lab": project}, expired=FITTING)
    paused = ann.run("pause", "--project", project.project, "--reason", "a look at it")
    assert f"Project {project.project} is paused by" in paused.out
    ann.pauses(project)  # and every worker has seen it
    started = ann.run("sweep", path, "--yes", "--detach")
    assert started.code == 0, started.err
    run_id = started.lines[-1]
    project.protect(protected)
    project.retag(renewed, **{"expires-at": FUTURE})
    project.vanish(vanished)
    remade["metadata"]["creationTimestamp"] = "2024-03-03T00:00:00Z"
    project._call("PUT", f"/_sandbox/pools/{project.project}", remade)
    assert project.written() == set()
    assert ann.ask(lambda redis: pause.resume(redis, project.project))
    ann.ended(run_id)
    assert ann.outcomes(run_id) == {
        "skipped": {protected, renewed, name},
        "already_deleted": {vanished},
        "deleted": set(others),
    }
    reasons = {pool: job.reason for pool, job in ann.jobs(run_id).items()}
    assert "poolsweep/protect" in reasons[protected]
    assert FUTURE in reasons[renewed]
    assert "another incarnation, created 2024-03-03T00:00:00Z" in reasons[name]
    assert set(project.deletes()) == set(others)
