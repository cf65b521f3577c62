"""Every brake, by command and worker: what it holds is recorded, and nothing is deleted."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import pytest

from tests.sweep.conftest import FAILURES, FUTURE, HELD
from worker import pause

if TYPE_CHECKING:
    from tests.sweep.conftest import Operator, Project

pytestmark = pytest.mark.usefixtures("worker")
ALL_DAY = [{"from": "00:00", "to": "24:00"}]


def test_a_run_that_a_brake_holds_deletes_nothing_and_says_why(
    ann: Operator, project: Project
) -> None:
    project.add(60, title="old", tags={})
    project.add(2, title="new", tags={})
    few = {"match": {"name": "new-*"}}
    held: dict[str, dict[str, Any]] = {
        # The defaults: 50 deletions, and half of a project.
        "defaults": {"match": {"name": "*"}},
        "half": {"match": {"name": "old-*"}, "brakes": {"max_deletions": 100}},
        "two": {**few, "brakes": {"max_deletions": 1}},
        "share": {**few, "brakes": {"max_percent": 3}},
        "quiet": {**few, "brakes": {"quiet": ALL_DAY}, "timezone": "Asia/Tokyo"},
    }
    why = {
        "defaults": "62 deletions are more than max_deletions=50 allows",
        "half": (
            "60 deletions are 96.8% of the project's 62 pools, more than max_percent=50 allows"
        ),
        "two": "2 deletions are more than max_deletions=1 allows",
        "share": "2 deletions are 3.2% of the project's 62 pools, more than max_percent=3 allows",
        "quiet": "in Asia/Tokyo, in the quiet window from 00:00 to 00:00 on mon, tue, wed",
    }
    for each in held.values():
        each["allow_busy"] = True  # saves reads
    ended = ann.run("sweep", ann.writes({"lab": project}, **held), "--yes")
    assert ended.code == HELD, ended.err
    assert project.written() == set()
    runs = {run["policy"]: run for run in ann.runs_in(project)}
    assert runs.keys() == why.keys()
    for name, run in runs.items():
        assert (run["state"], run["total"], run["counts"]) == ("braked", 0, {})
        assert run["braked_at"]
        assert why[name] in run["note"]
        assert f"Braked, nothing was deleted: {run['note']}" in ended.lines
        assert f"It is recorded as run {run['run_id']}" in ended.lines
    told = ann.results(runs["two"]["run_id"])
    assert told["jobs"] == []
    assert told["run"] == runs["two"]
    listed = json.loads(ann.run("runs", "--json").out)
    assert [run for run in listed if run["projects"] == [project.project]] == ann.runs_in(project)
    shown = ann.run("results", runs["two"]["run_id"])
    assert runs["two"]["note"] in shown.out


def test_a_run_in_which_too_much_fails_stops_and_leaves_the_rest(
    ann: Operator, project: Project, other: Project
) -> None:
    for each in (project, other):
        each.add(60, behaviour="doomed")
        each.add(20)
    never = {"max_deletions": 100, "max_percent": 100, "max_failure_percent": 100}
    path = ann.writes(
        {"lab": project, "plant": other},
        count={"projects": ["lab"], "allow_busy": True, "brakes": never | {"max_failures": 4}},
        share={
            "projects": ["plant"],
            "allow_busy": True,
            "brakes": never | {"max_failures": 100, "max_failure_percent": 30},
        },
    )
    ended = ann.run("sweep", path, "--yes")
    assert ended.code == HELD, ended.err
    for each, brake in ((project, "max_failures=4"), (other, "max_failure_percent=30")):
        (run,) = ann.runs_in(each)
        assert run["braked_at"]
        assert brake in run["note"]
        assert run["note"] in ended.lines, "it says so"
        told = ann.outcomes(run["run_id"])
        assert set(told) <= {"failed", "deleted", "cancelled"}
        assert len(told["failed"]) > 4
        assert len(told["cancelled"]) >= 10, "most of the run was stopped"
        assert not told["cancelled"] & set(each.deletes())
        assert sum(map(len, told.values())) == 80
        assert each.there() == told["failed"] | told["cancelled"]


def test_failures_that_no_brake_forbids_make_the_command_fail(
    ann: Operator, project: Project
) -> None:
    project.add(3)
    (doomed,) = project.add(behaviour="doomed")
    project.add(4, tags={"expires-at": FUTURE})
    ended = ann.run("sweep", ann.writes({"lab": project}, expired={}), "--yes")
    assert ended.code == FAILURES, ended.err
    assert f"    {doomed}" in ended.lines
    (run,) = ann.runs_in(project)
    assert (run["braked_at"], run["counts"]) == (None, {"deleted": 3, "failed": 1})


def test_a_project_has_one_run_at_a_time(ann: Operator, project: Project, other: Project) -> None:
    first, second = project.add(2), other.add(2)
    for each in (project, other):
        each.add(2, tags={})
    path = ann.writes(
        {"lab": project, "plant": other},
        lab={"projects": ["lab"]},
        again={"projects": ["lab"], "match": {"older_than": "1d"}, "brakes": {"max_percent": 100}},
        plant={"projects": ["plant"]},
    )
    ann.pauses(project)
    run_id = ann.run("sweep", path, "--yes", "--detach", "--only", "lab").lines[-1]
    held = ann.run("sweep", path, "--yes", "--only", "again", "--only", "plant")
    assert held.code == HELD
    assert f"run {run_id} of the same project has not ended" in held.out
    assert set(other.deletes()) == set(second), "another project is not held"
    assert project.written() == set()
    ann.ask(lambda redis: pause.resume(redis, project.project))
    assert ann.ended(run_id).done == 2
    assert set(project.deletes()) == set(first)
    assert [run["state"] for run in ann.runs_in(project)] == ["braked", "finished"]
