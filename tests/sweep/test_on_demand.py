"""`poolsweep delete` as somebody calls it by hand, for many pools: selected, or from a list."""

from __future__ import annotations

import json
import re
from typing import TYPE_CHECKING

import pytest

from tests.cli.conftest import ESCAPE, User, one_sentence
from tests.sweep.conftest import (
    FAILURES,
    FUTURE,
    HELD,
    PAST,
    REFUSED,
    Operator,
    Project,
    settings_for,
)
from worker import pause
from worker.ledger import JobState
from worker.projects import Directory
from worker.projects import Project as Entry
from worker.settings import Settings

if TYPE_CHECKING:
    from pathlib import Path

    from tests.sweep.conftest import Sandbox

pytestmark = pytest.mark.usefixtures("worker")
ALL = ("--max-percent", "100")


def absent(number: int) -> str:
    return f"gone-{number:032x}"


def listed(*pools: tuple[Project, str]) -> str:
    """Pools as lines of CSV."""
    return "pool_name,project_id\n" + "".join(f"{pool},{at.project}\n" for at, pool in pools)


# By selector


def test_a_selector_over_two_projects_makes_one_run_of_what_fits_all_its_flags(
    ann: Operator, project: Project, other: Project
) -> None:
    going = [*project.add(2, title="tmp-a"), *other.add(1, title="tmp-b")]
    project.add(2, title="keep")
    young, tagged = project.add(1, title="tmp-c", tags={}), other.add(2, title="tmp-d", tags={})
    path = ann.writes({"lab": project, "plant": other}, unused={})
    ended = ann.run(
        *("delete", "--project", "lab", "--project", other.project),
        *("--expired", "--name", "tmp-*", "--older-than", "30d", "--yes", "--reason", "spring"),
        *ALL,
        POLICIES_FILE=path,
    )
    assert ended.code == 0, ended.out + ended.err
    assert {*project.deletes(), *other.deletes()} == set(going)
    assert {*young, *tagged} <= project.there() | other.there()
    (run,) = [each for each in ann.runs().values() if project.project in each.projects]
    assert set(run.projects) == {project.project, other.project}
    assert (run.source, run.reason, run.policy, run.total) == ("cli", "spring", "", 3)
    for selector in json.loads(run.selector).values():
        assert [list(each) for each in selector["all"]] == [["older_than"], ["name"], ["expired"]]
    told = ann.run("results", run.run_id, "--kept")
    assert "no tag expires-at" in told.out
    assert all(pool in told.out for pool in young)


def test_tags_and_any_matcher_select_too(ann: Operator, project: Project) -> None:
    going = project.add(1, tags={"env": "dev", "team": "a"})
    project.add(1, tags={"env": "prod", "team": "a"})
    project.add(1, tags={"env": "dev"})
    small = "{flavor: '*.4ud'}"
    project.add(1, tags={"env": "dev", "team": "a"}, flavor="modelarts.bm.gpu.8a100")
    ended = ann.run(
        *("delete", "--project", project.project, "--tag", "env=dev", "--tag", "team"),
        *("--match", small, "--yes"),
    )
    assert ended.code == 0, ended.out + ended.err
    assert project.deletes() == going


def test_a_selector_is_held_by_the_policies_brakes_unless_flags_say_otherwise(
    ann: Operator, project: Project, other: Project
) -> None:
    pools = [*project.add(3), *other.add(3)]
    other.add(4, tags={"expires-at": FUTURE})
    both = ("delete", "--expired", "--project", project.project, "--project", other.project)
    preview, share, count = ann.together(
        both, (*both, "--yes"), (*both, *ALL, "--max-deletions", "5", "--yes")
    )
    assert preview.code == 0
    assert "A brake holds this: 3 deletions are 100.0% of project" in preview.out
    assert "max_percent=50" in share.out
    assert "Braked, nothing was deleted: 6 deletions are more than max_deletions=5" in count.out
    for held in (share, count):
        assert held.code == HELD
        run_id = held.lines[-1].removeprefix("It is recorded as run ")
        assert ann.runs()[run_id].state == "braked"
    assert project.written() | other.written() == set()
    ended = ann.run(*both, *ALL, "--yes")
    assert ended.code == 0, ended.out + ended.err
    assert {*project.deletes(), *other.deletes()} == set(pools)


def test_a_selector_waits_for_no_other_run_of_its_project(ann: Operator, project: Project) -> None:
    pools = project.add(2)
    ann.pauses(project)
    command = ("delete", "--project", project.project, "--expired", "--yes", *ALL)
    first = ann.run(*command, "--detach")
    assert first.code == 0, first.err
    (run_id,) = first.lines
    again = ann.run(*command)
    assert again.code == HELD
    assert f"run {run_id} of the same project has not ended" in again.out
    ann.ask(lambda redis: pause.resume(redis, project.project))
    assert ann.ended(run_id).counts[JobState.DELETED] == 2
    assert sorted(project.deletes()) == sorted(pools)


def test_busy_and_shared_pools_are_selected_only_if_it_is_said(
    ann: Operator, project: Project
) -> None:
    (shared,), (plain,) = project.add(shared=True), project.add()
    project.add(3, tags={})
    command = ("delete", "--project", project.project, "--expired", "--yes")
    assert ann.run(*command).code == 0
    assert project.deletes() == [plain]
    assert ann.run(*command, "--allow-shared", "--allow-busy").code == 0
    assert project.deletes() == [plain, shared]


# From a list


def test_a_list_names_pools_of_several_projects_and_every_pool_once(
    ann: Operator, project: Project, other: Project, tmp_path: Path
) -> None:
    here, there = project.add(2), other.add(1)
    path = tmp_path / "pools.csv"
    path.write_text(
        listed(*[(project, pool) for pool in here], (other, there[0]), (project, here[0]))
    )
    ended = ann.run("delete", f"{other.project}/{there[0]}", "--from", str(path), "--yes")
    assert ended.code == 0, ended.out + ended.err
    assert sorted([*project.deletes(), *other.deletes()]) == sorted([*here, *there])
    assert "3 to delete, 0 to keep, 0 not there, in 2 projects" in ended.out


def test_standard_input_is_a_list_too_in_whichever_form(ann: Operator, project: Project) -> None:
    one, two, three = project.add(3)
    command = ("delete", "--project", project.project, "--from", "-")
    for text in (
        f"# mine\n{one}\n{two}\n{three}\n",
        f"id\n{one}\n{two}\n{three}\n",
        json.dumps([one, two, {"pool_name": three}]),
    ):
        ended = ann.run_with(text, *command)
        assert ended.code == 0, ended.err
        assert "3 to delete, 0 to keep, 0 not there" in ended.out
        assert ended.lines[-1] == "Preview only: nothing was deleted. Add --yes to delete."
    as_lines = ann.run_with(json.dumps([one]), *command, "--format", "lines")
    assert "standard input:1: " in as_lines.err
    assert project.written() == set()


def test_what_an_intake_takes_is_a_list_of_which_every_pool_is_in_its_project(
    ann: Operator, project: Project, other: Project
) -> None:
    here, there = project.add(1), other.add(2)
    one = {"project_id": other.project, "pools": there}
    both = {"targets": [{"project_id": project.project, "pools": here}, one]}
    refused = ann.run_with(
        json.dumps(one), "delete", "--project", project.project, "--from", "-", "--yes"
    )
    assert (refused.code, refused.out) == (REFUSED, "")
    assert f"project '{other.project}' is not among those of --project" in refused.err
    ended = ann.run_with(json.dumps(both), "delete", "--from", "-", "--yes")
    assert ended.code == 0, ended.err
    assert "3 to delete, 0 to keep, 0 not there, in 2 projects" in ended.out
    assert (project.there(), other.there()) == (set(), set())


def test_a_list_with_bad_lines_is_refused_whole_before_anything_is_called(
    ann: Operator, project: Project
) -> None:
    (pool,) = project.add()
    before = set(ann.runs())
    text = f"{pool}\nTrain_Pool\n\nelsewhere/{pool}\n" + "x\n" * 30
    ended = ann.run_with(text, "delete", "--project", project.project, "--from", "-", "--yes")
    assert (ended.code, ended.out) == (REFUSED, "")
    assert "standard input:2: 'Train_Pool' is no pool id" in ended.err
    assert "standard input:4: project 'elsewhere' is not among those of --project" in ended.err
    assert "and 12 more lines" in ended.err
    assert len(ended.err.splitlines()) == 22
    assert project.calls("GET") == []
    assert set(ann.runs()) == before


def test_an_empty_list_is_nothing_to_delete(ann: Operator, project: Project) -> None:
    ended = ann.run_with("pool_name\n", "delete", "--from", "-", "--yes")
    assert (ended.code, ended.err) == (0, "")
    assert ended.out == "Nothing to delete: the list names no pools.\n"


def test_a_hundred_thousand_names_become_one_run(
    tmp_path: Path, sandbox: Sandbox, project: Project
) -> None:
    """With a Redis of its own, where no worker waits for them."""
    settings = settings_for(sandbox, "")
    del settings["REDIS_URL"]
    eve = User(tmp_path, settings)
    path = tmp_path / "names.txt"
    path.write_text("".join(f"{absent(number)}\n" for number in range(100_000)) * 2)
    command = ("delete", "--project", project.project, "--from", str(path), "--yes", "--detach")
    ended = eve.run(*command)
    assert ended.code == 0, ended.err
    (run_id,) = ended.lines
    run = eve.runs()[run_id]
    assert (run.total, run.state) == (100_000, "running")
    assert "0 to delete, 0 to keep, 100000 not there" in ended.err
    assert "… and 99980 more that are not there" in ended.err
    assert len(ended.err.splitlines()) < 40


def test_a_preview_of_many_pools_is_bounded(ann: Operator, project: Project) -> None:
    project.add(130)
    kept = project.add(25, tags={"expires-at": PAST, "poolsweep/protect": "yes"})
    ended = ann.run("delete", "--project", project.project, "--expired")
    rows = [line for line in ended.lines if " delete " in line]
    assert len(rows) == 100
    assert "… and 30 more to delete" in ended.lines
    assert "130 to delete, 25 to keep, 0 not there; frees 260 x" in ended.out
    assert not any(pool in ended.out for pool in kept)
    assert " 25  it is protected by the tag poolsweep/protect" in ended.out


# What is refused, and what fails


def test_named_pools_that_must_stay_keep_no_other_and_are_told_by_the_exit_code(
    ann: Operator, project: Project
) -> None:
    pools = project.add(2)
    (protected,) = project.add(tags={"poolsweep/protect": "yes"})
    (prepaid,) = project.add(billing="1")
    named = ("delete", "--project", project.project, *pools, protected, prepaid)
    unasked = ann.run(*named)
    assert unasked.code == 0
    ended = ann.run(*named, "--yes")
    assert ended.code == HELD, ended.out + ended.err
    assert sorted(project.deletes()) == sorted(pools)
    for pool, why in ((protected, "protected by the tag"), (prepaid, "prepaid")):
        (line,) = [line for line in ended.lines if f" {pool} " in line]
        assert why in line
    (doomed,) = project.add(behaviour="doomed")
    failed = ann.run("delete", "--project", project.project, doomed, protected, "--yes")
    assert failed.code == FAILURES


def test_half_of_many_named_pools_failing_stops_the_rest_and_less_does_not(
    ann: Operator, project: Project, other: Project
) -> None:
    good, bad = project.add(30), project.add(25, behaviour="doomed")
    worse = other.add(60, behaviour="doomed")
    some, most = ann.together(
        ("delete", "--project", project.project, *good, *bad, "--yes"),
        ("delete", "--project", other.project, *worse, "--yes"),
    )
    assert some.code == FAILURES, some.err
    assert project.there() == set(bad)
    assert most.code == HELD, most.err
    assert "max_failure_percent=50" in most.out
    assert len(set(other.deletes())) < 60


def test_projects_at_different_endpoints_are_refused(
    ann: Operator, project: Project, other: Project
) -> None:
    far = {"id": other.project, "endpoint": "http://127.0.0.1:9"}
    path = ann.writes({"lab": project, "far": far}, unused={})
    ended = ann.run(
        *("delete", "--project", "lab", "--project", "far", "--expired", "--yes"),
        POLICIES_FILE=path,
    )
    assert ended.code == REFUSED
    sentence = one_sentence(ended)
    assert project.url in sentence
    assert "http://127.0.0.1:9" in sentence
    assert project.calls("GET") == []


def test_a_project_is_found_by_its_name_or_its_id() -> None:
    directory = Directory(Settings(), {"lab": Entry(id="0123"), "0456": Entry(id="0789")})
    assert [directory.find(text) for text in ("lab", "0123", "0456", "0789", "abc")] == [
        *("0123", "0123", "0789", "0789", "abc")
    ]
    with pytest.raises(ValueError, match="'a/b' is not one; accepted"):
        directory.find("a/b")


# On a terminal


def test_only_the_count_or_the_projects_id_is_a_yes(ann: Operator, project: Project) -> None:
    named, counted, *others = project.add(6)
    command = ("delete", "--project", project.project)
    for answer in ("yes\n", "y\n", "\n", "\x04"):
        stopped = ann.run_on_terminal(*command, *others, answer=answer)
        assert stopped.code == HELD
        assert "Stopped: nothing was deleted." in stopped.out
    interrupted = ann.run_on_terminal(*command, *others, interrupt_at="to stop.")
    assert interrupted.code == 130
    assert "Traceback" not in interrupted.out
    assert project.written() == set()
    by_id = ann.run_on_terminal(*command, named, answer=f"{project.project}\n")
    assert by_id.code == 0, by_id.out
    by_count = ann.run_on_terminal(*command, counted, answer="1\n")
    assert by_count.code == 0, by_count.out
    assert f"This deletes 1 pool for good. Type 1 or the project's id, {project.project}," in (
        ESCAPE.sub("", by_count.out)
    )
    assert project.deletes() == [named, counted]


def test_over_several_projects_only_the_count_is_a_yes(
    ann: Operator, project: Project, other: Project
) -> None:
    (here,), (there,) = project.add(), other.add()
    command = ("delete", f"{project.project}/{here}", f"{other.project}/{there}")
    stopped = ann.run_on_terminal(*command, answer=f"{project.project}\n")
    assert stopped.code == HELD
    assert project.written() == set()
    agreed = ann.run_on_terminal(*command, answer="2\n")
    assert agreed.code == 0, agreed.out
    assert (project.deletes(), other.deletes()) == ([here], [there])


def test_a_terminal_shows_how_far_a_run_is_and_how_long_it_takes(
    ann: Operator, project: Project
) -> None:
    pools = project.add(5)
    ended = ann.run_on_terminal("delete", "--project", project.project, *pools, "--yes", columns=80)
    assert ended.code == 0, ended.out
    shown = [line for line in re.split(r"[\r\n]+", ESCAPE.sub("", ended.out)) if "Run 2" in line]
    assert re.fullmatch(r"Run \S+ ━+ +0% -/s 0:00:\d\d, -:--:-- left", shown[0])
    assert re.fullmatch(r"Run \S+ ━+ 100% [\d.]+/s 0:\d\d:\d\d", shown[-1])
    assert max(map(len, shown)) <= 80
