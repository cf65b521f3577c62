"""`poolsweep plan` shows what would become of every pool and changes nothing; `policy` checks."""

from __future__ import annotations

import json
import re
from typing import TYPE_CHECKING

import jsonschema
import pytest

from tests.cli.conftest import CONTROL, ESCAPE, one_sentence
from tests.sweep.conftest import FUTURE, PAST, PROTECT, REFUSED

if TYPE_CHECKING:
    from pathlib import Path

    from tests.sweep.conftest import Operator, Project

COUNT = re.compile(r" +(\d+)  (\S.*)")
PRICES = """\
currency: EUR
per_node_hour:
  "modelarts.vm.*": 0.5
"""


@pytest.fixture
def kept(project: Project) -> dict[str, str]:
    """Pools of the project that no policy may delete, and why."""
    return {
        project.add(tags={"expires-at": FUTURE})[0]: f"not expired: expires-at={FUTURE}",
        project.add(tags={})[0]: "no tag expires-at",
        project.add(tags={"expires-at": "soon"})[0]: "its expiry is unknown",
        project.add(tags={"expires-at": PAST, PROTECT: "yes"})[0]: "protected by the tag",
        project.add(billing="1")[0]: "it is prepaid",
        project.add(shared=True)[0]: "it is shared or public",
    }


def test_a_plan_lists_what_goes_with_its_reason_and_what_that_frees(
    ann: Operator, project: Project, kept: dict[str, str], tmp_path: Path
) -> None:
    going = [*project.add(3), *project.add(flavor="modelarts.bm.gpu.8a100", nodes=2)]
    (parent,) = project.add()
    (inside,) = project.add(parent=parent)
    prices = tmp_path / "prices.yaml"
    prices.write_text(PRICES)
    path = ann.writes({"lab": project}, expired={})
    ended = ann.run("plan", path, "--kept", "--prices", str(prices))
    assert (ended.code, ended.err) == (0, "")
    assert not CONTROL.search(ended.out)
    rows = {name: [line for line in ended.lines if f" {name} " in line] for name in project.there()}
    documents = project.documents()
    assert set(rows) == {*going, parent, inside, *kept}
    for name, lines in rows.items():
        (line,) = lines
        assert documents[name]["metadata"]["labels"]["os.modelarts/name"] in line
        assert re.search(r" \d+ d ", line), "its age"
        (nodes,) = documents[name]["spec"]["resources"]
        assert f"{nodes['count']} x {nodes['flavor']}" in line
        assert (" keep " if name in kept else " delete ") in line
        assert kept.get(name, f"expired: expires-at={PAST}") in line
    places = [next(n for n, line in enumerate(ended.lines) if f" {each} " in line) for each in rows]
    order = dict(zip(rows, places, strict=True))
    assert order[inside] < order[parent], "sub-pools go before the pool that they lie in"
    # The nodes of the logical pool are its parent's.
    assert (
        f"Delete 6 of {len(rows)} pools; frees 2 x modelarts.bm.gpu.8a100, 8 x modelarts.vm.cpu.4ud"
        ", 240 node-hours a day, 96.00 EUR a day"
    ) in ended.lines
    assert "for want of a price: modelarts.bm.gpu.8a100" in ended.out
    assert "nothing was deleted" in ended.lines[-1]
    assert project.written() == set()
    assert ann.runs_in(project) == []


def test_a_plan_counts_what_stays_by_reason_on_a_terminal_of_80_columns(
    ann: Operator, project: Project, kept: dict[str, str]
) -> None:
    (going,) = project.add()
    (vetoed,) = project.add()
    keep = ("keep", vetoed, "--project", project.project, "--until", "2150-12-31T18:30Z")
    assert ann.run(*keep).code == 0
    path = ann.writes({"lab": project}, expired={"grace": "2d"})
    ended = ann.run_on_terminal("plan", path, columns=80)
    assert ended.code == 0
    lines = ESCAPE.sub("", ended.out).splitlines()
    assert max(map(len, lines)) <= 80
    assert [name for name in project.there() if name in ended.out] == [going]
    counts = {x[2].strip(): int(x[1]) for x in map(COUNT.match, lines) if x}
    assert sum(counts.values()) == len(kept) + 1
    assert any(why.endswith("keeps it until 2150-12-31T18:30Z") for why in counts)
    assert "Its grace is 2d: a pool is marked first" in " ".join(lines)


def test_a_plan_as_json_tells_of_every_pool(
    ann: Operator, project: Project, kept: dict[str, str]
) -> None:
    going = project.add(2, nodes=5)
    path = ann.writes({"lab": project}, expired={}, never={"match": {"name": "nothing-*"}})
    plan = ann.saved_plan(path, "--only", "expired")
    (each,) = plan["plans"]
    assert (each["policy"], each["project_id"]) == ("expired", project.project)
    assert each["endpoint"] == project.url
    assert each["pools_in_project"] == len(kept) + 2
    told = {pool["pool_name"]: pool for pool in each["pools"]}
    assert {name for name, pool in told.items() if pool["decision"] == "delete"} == set(going)
    assert told.keys() == {*going, *kept}
    for name, why in kept.items():
        assert told[name]["decision"] == "keep"
        assert why in told[name]["reason"]
    assert each["frees"] == {
        "pools": 2,
        "nodes": {"modelarts.vm.cpu.4ud": 10},
        "node_hours_per_day": 240,
        "money_per_day": None,
        "currency": None,
    }
    assert project.written() == set()


def test_what_cannot_be_planned_is_told_in_one_sentence(
    ann: Operator, project: Project, tmp_path: Path
) -> None:
    path = ann.writes({"lab": project}, expired={})
    prices = tmp_path / "prices.yaml"
    prices.write_text("currency: euro\nper_node_hour: {}\n")
    unknown, priced = ann.together(
        ("plan", path, "--only", "expried"),
        ("plan", path, "--prices", str(prices)),
    )
    assert "there is no policy 'expried'; accepted: expired" in one_sentence(unknown)
    assert priced.err.count("prices.yaml:") == 2, "both mistakes, each with its line"
    for ended in (unknown, priced):
        assert (ended.code, ended.out) == (REFUSED, "")


MISTAKEN = """\
projects:
  lab: {id: not hexadecimal!}
policies:
  expired:
    projects: [lab, labb]
    match:
      all:
        - expried: {}
        - older_than: 5 fortnights
    brakes: {max_percent: 140}
    schedule: "0 25 * * *"
    graze: 1d
"""
MISTAKES = {
    2: "id",
    5: "labb",
    8: "utilisation is needed",
    9: "fortnights",
    10: "140",
    11: "25",
    12: "graze",
}


def test_a_check_tells_every_mistake_with_its_line(ann: Operator) -> None:
    ann.policies.write_text(MISTAKEN)
    ended = ann.run("policy", "check", str(ann.policies))
    assert (ended.code, ended.out) == (REFUSED, "")
    found = {int(line): said for line, said in re.findall(r"policies\.yaml:(\d+)(.*)", ended.err)}
    assert found.keys() == MISTAKES.keys()
    assert {line: word for line, word in MISTAKES.items() if word in found[line]} == MISTAKES
    assert "Traceback" not in ended.err


def test_a_file_without_mistakes_passes_the_check_and_fits_the_schema(
    ann: Operator, project: Project
) -> None:
    match = {"all": [{"older_than": "3d"}, {"not": {"name": "keep-*"}}]}
    path = ann.writes({"lab": project}, old={"match": match, "grace": "1d"})
    check, schema = ann.together(("policy", "check", path), ("policy", "schema"))
    assert check.code == schema.code == 0
    assert check.lines == [f"{path}: no mistake; policies: 1, projects: 1"]
    told = json.loads(schema.out)
    jsonschema.Draft202012Validator.check_schema(told)
    written = json.loads(ann.policies.read_text())
    jsonschema.validate(written, told)
    written["policies"]["old"]["graze"] = "1d"
    with pytest.raises(jsonschema.ValidationError, match="graze"):
        jsonschema.validate(written, told)
