"""Mark and wait: what a policy with a grace marks, what is due when, and what somebody keeps."""

from __future__ import annotations

import json
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Any

import pytest

from scheduler.marks import Vetoes
from tests.cli.conftest import one_sentence
from tests.sweep.conftest import HELD, PAST, REFUSED, passes

if TYPE_CHECKING:
    from tests.sweep.conftest import Operator, Project

pytestmark = pytest.mark.usefixtures("worker")
LONG_AGO = datetime(2024, 1, 1, tzinfo=UTC)
BRAKES = {"max_percent": 100}


def marks(ann: Operator, project: Project) -> dict[str, dict[str, Any]]:
    """What `poolsweep marks --json` tells of a project, by pool."""
    ended = ann.run("marks", "--json")
    assert ended.code == 0, ended.err
    return {
        mark["pool_name"]: mark
        for mark in json.loads(ended.out)
        if mark["project_id"] == project.project
    }


def swept(ann: Operator, path: str) -> str:
    """What a sweep says that goes well."""
    ended = ann.run("sweep", path, "--yes")
    assert ended.code == 0, ended.out + ended.err
    return ended.out


def test_a_policy_with_a_grace_marks_first_and_deletes_what_still_matches_when_it_is_over(
    ann: Operator, project: Project
) -> None:
    going, retagged, renewed, vetoed = project.add(4)
    path = ann.writes({"lab": project}, expired={"grace": "2s", "brakes": BRAKES})
    before = datetime.now(UTC)
    assert "4 pools are marked now; see `poolsweep marks`" in swept(ann, path)
    assert project.written() == set()
    first = marks(ann, project)
    assert first.keys() == {going, retagged, renewed, vetoed}
    for mark in first.values():
        marked, due = map(datetime.fromisoformat, (mark["marked_at"], mark["due_at"]))
        assert before <= marked <= datetime.now(UTC)
        assert due - marked == timedelta(seconds=2)
        assert (mark["policy"], mark["reason"]) == ("expired", f"expired: expires-at={PAST}")
    shown = ann.run("marks")
    for name, mark in first.items():
        (line,) = [line for line in shown.lines if name in line]
        assert f"{mark['due_at'][:16].replace('T', ' ')}Z" in line

    project.retag(retagged, **{"expires-at": PAST, "owner": "ann"})
    project.retag(renewed, owner="ann")
    keep = ("keep", vetoed, "--project", project.project, "--until", "2h", "--reason", "in use")
    kept = ann.run(*keep)
    assert kept.code == 0, kept.err
    assert f"{vetoed} at {project.url}: " in kept.out
    assert "in use" in kept.out
    passes(max(datetime.fromisoformat(mark["due_at"]) for mark in first.values()))
    said = swept(ann, path)
    assert "1 pools are marked now" in said
    assert project.deletes() == [going]
    second = ann.marks(project)
    # What went just now is found to be gone by the next sweep.
    assert second.keys() - {going} == {retagged}, "not what is kept or does not match any more"
    assert second[retagged].marked_at > datetime.fromisoformat(first[retagged]["due_at"])

    by_name = ann.run("delete", "--project", project.project, vetoed, "--yes")
    assert by_name.code == HELD
    assert "keeps it until" in by_name.out
    assert "in use" in by_name.out
    released = ann.run("keep", vetoed, "--project", project.project, "--release")
    assert released.lines == [f"{vetoed}: kept no longer"]
    passes(second[retagged].due_at)
    swept(ann, path)
    assert project.deletes() == [going, retagged]
    assert ann.marks(project).keys() - {retagged} == {vetoed}, "marked anew once nobody keeps it"
    assert project.there() == {renewed, vetoed}


def test_a_grace_that_is_not_over_deletes_nothing_however_often_it_is_swept(
    ann: Operator, project: Project
) -> None:
    pools = project.add(2)
    path = ann.writes({"lab": project}, expired={"grace": "1h", "brakes": BRAKES})
    swept(ann, path)
    first = ann.marks(project)
    # A shorter grace is for what is marked from now on.
    path = ann.writes({"lab": project}, expired={"grace": "1s", "brakes": BRAKES})
    said = swept(ann, path)
    assert "marked now" not in said
    assert ann.marks(project) == first
    assert first.keys() == set(pools)
    assert project.written() == set()
    assert {run["total"] for run in ann.runs_in(project)} == {0}


def test_a_veto_that_makes_no_sense_is_refused(ann: Operator, project: Project) -> None:
    (pool,) = project.add()
    there = ("--project", project.project)
    until = {
        "yesterday": "accepted",
        "2020-01-01": "has passed",
        "99999999d": "accepted",
    }
    commands = [("keep", pool, *there, "--until", each) for each in until]
    *bad, nobody = ann.together(
        *commands,
        ("keep", pool, *there, "--release"),
    )
    for ended, said in zip(bad, until.values(), strict=True):
        assert ended.code == REFUSED
        assert said in one_sentence(ended)
    assert (nobody.code, nobody.lines) == (0, [f"{pool}: nobody kept it"])
    vetoes = ann.ask(lambda redis: Vetoes(redis, project.url).of(project.project, LONG_AGO))
    assert vetoes == {}, "nothing is kept"
