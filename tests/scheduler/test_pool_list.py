"""A list is read whole or not at all, and every bad line is told with its number."""

from __future__ import annotations

import csv
import io
import json
from typing import TYPE_CHECKING

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from scheduler.pool_list import (
    LONGEST_LINE,
    MOST_TOLD,
    POOL_KEYS,
    Form,
    PoolList,
    form_of,
    parse,
)
from scheduler.review.records import COLUMNS, write_csv, write_json
from worker.ledger import Job, JobState, Run

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Sequence

A, B, C = (f"pool-{letter}-{'0' * 30}" for letter in "abc")
HERE, THERE = "project-here", "project-there"

patient = settings(deadline=None, max_examples=100)


def project_of(text: str) -> str:
    """Entries that name no project are in one; only two are known."""
    if text not in {"", HERE, THERE}:
        raise ValueError(f"project {text!r} is not known")
    return text or HERE


def read(text: str | bytes, form: Form) -> PoolList:
    return parse(text.encode() if isinstance(text, str) else text, form, project_of)


def pools(found: PoolList) -> dict[str, list[str]]:
    assert found.faults == {}
    return {project: list(each) for project, each in found.pools.items()}


LISTS = {
    "lines": (Form.LINES, f"{A}\n{THERE}/{B}\n{A}\n{C}\n"),
    "lines with comments, blanks and indents": (
        Form.LINES,
        f"# yesterday's\n\n  {A}\n\t{THERE}/{B}   # ann's\n   \n{C}",
    ),
    "lines from a Windows editor": (Form.LINES, f"\ufeff{A}\r\n{THERE}/{B}\r\n{C}\r\n"),
    "CSV": (Form.CSV, f"pool_name,project_id\n{A},\n{B},{THERE}\n{C},{HERE}\n"),
    "CSV from a spreadsheet": (
        Form.CSV,
        (
            '\ufeff"Name","Pool_ID","Project_ID"\r\n'
            f'"a, b","{A}",\r\n"x\ny",{B},{THERE}\r\n,{C}\r\n\r\n'
        ),
    ),
    "a JSON list": (Form.JSON, json.dumps([A, f"{THERE}/{B}", C])),
    "a JSON list of objects": (
        Form.JSON,
        json.dumps(
            [{"pool_name": A, "x": [1, {"y": None}]}, {"id": B, "project_id": THERE}, {"pool": C}],
            indent=2,
        ),
    ),
    "a JSON object with pools": (
        Form.JSON,
        json.dumps({"at": {"pools": []}, "pools": [A, {"pool_id": B, "project_id": THERE}, C]}),
    ),
    "an intake's request": (
        Form.JSON,
        json.dumps(
            {
                "targets": [
                    {"project_id": HERE, "pools": [A, {"id": C, "project_id": HERE}]},
                    {"pools": [f"{THERE}/{B}", A], "project_id": THERE},
                ],
                "reason": "spring",
            }
        ).replace(f', "{A}"]', "]"),
    ),
    "an intake's request over lines": (
        Form.JSON,
        json.dumps(
            {
                "reason": "spring",
                "targets": [
                    {"pools": [B], "project_id": THERE},
                    {"project_id": None, "pools": [A]},
                    {"jobs": [C]},
                ],
            },
            indent=1,
        ),
    ),
    "JSON Lines": (Form.JSON, f'"{A}"\n{{"pool_name": "{B}", "project_id": "{THERE}"}}\n\n"{C}"\n'),
    "JSON from a Windows editor": (
        Form.JSON,
        "\ufeff" + json.dumps([A, f"{THERE}/{B}", C], indent=1).replace("\n", "\r\n"),
    ),
}


@pytest.mark.parametrize("name", LISTS)
def test_a_list_is_read_in_order_with_duplicates_folded(name: str) -> None:
    form, text = LISTS[name]
    assert pools(read(text, form)) == {HERE: [A, C], THERE: [B]}


@pytest.mark.parametrize("name", LISTS)
def test_the_form_is_seen_by_how_a_list_begins(name: str) -> None:
    form, text = LISTS[name]
    assert form_of("", text.encode()) is form


@pytest.mark.parametrize(
    ("name", "form"),
    [
        ("a.CSV", Form.CSV),
        ("a.json", Form.JSON),
        ("a.jsonl", Form.JSON),
        ("a.ndjson", Form.JSON),
        ("a.csv.txt", Form.LINES),
    ],
)
def test_the_name_of_a_file_tells_its_form_before_its_content_does(name: str, form: Form) -> None:
    for text in ("[]", "a,b\n", f"{A}\n", ""):
        assert form_of(name, text.encode()) is form


@pytest.mark.parametrize("key", POOL_KEYS)
def test_every_name_of_the_column_is_taken_and_the_plainest_wins(key: str) -> None:
    assert pools(read(f"x,{key}\n1,{A}\n", Form.CSV)) == {HERE: [A]}
    assert pools(read(json.dumps([{key: A}]), Form.JSON)) == {HERE: [A]}
    if key != "pool_name":
        assert pools(read(f"{key},pool_name\n{B},{A}\n", Form.CSV)) == {HERE: [A]}
        assert pools(read(json.dumps([{key: B, "pool_name": A}]), Form.JSON)) == {HERE: [A]}


@pytest.mark.parametrize("form", Form)
def test_an_empty_list_names_nothing_and_is_no_mistake(form: Form) -> None:
    empty = {
        Form.LINES: ["", "\n \n", "# nothing\n"],
        Form.CSV: ["", "\n\n", "pool_name\n", f"{','.join(COLUMNS)}\r\n"],
        Form.JSON: ["", " \n", "[]", "[ ]", '{"pools": []}', '{"jobs": [\n]}\n'],
    }
    for text in empty[form]:
        assert pools(read(text, form)) == {}


CONTROLS = dict.fromkeys([1, 3, 4], "control")
FAULTS = {
    "no pool id": (Form.LINES, f"{A}\nTrain_Pool\n\n{B} {C}\n", {2: "Train_Pool", 4: B}),
    "nothing before the slash": (Form.LINES, f"/{A}\n", {1: "no project before"}),
    "nothing behind the slash": (Form.LINES, f"{HERE}/\n", {1: "is empty"}),
    "a project that is not accepted": (Form.LINES, f"{A}\nelsewhere/{B}\n", {2: "'elsewhere'"}),
    "a line that is too long": (Form.LINES, f"{A}\n{'x' * 5_000}\n", {2: f"{LONGEST_LINE}"}),
    "control characters": (
        Form.LINES,
        f"{A}\0\n{B}\n{C}\x1b[2J\n# \x07\n",
        CONTROLS,
    ),
    "an empty cell": (Form.CSV, f"pool_name,x\n{A},1\n,2\n", {3: "is empty"}),
    "a row that is too long": (Form.CSV, f"pool_name\n{A}\nx,{B}\n", {3: "2 cells"}),
    "a header without pools": (Form.CSV, f"name,project_id\nx,{HERE}\n", {1: "pool_name"}),
    "a header with a column twice": (Form.CSV, f"id,id\n{A},{B}\n", {1: "id twice"}),
    "a header with projects twice": (
        Form.CSV,
        f"id,project_id,project_id\n{A},{HERE},{THERE}\n",
        {1: "project_id twice"},
    ),
    "a quote within a cell": (Form.CSV, f'id\n"{A}"x\n{B}\nx\n', {2: "not CSV", 4: "'x'"}),
    "a quote that is never closed": (Form.CSV, f'id\n{A}\n"{B}\n{C}\n', {3: "not CSV"}),
    "a cell with control characters": (Form.CSV, f"id,x\n{A},\0\n", {2: "control"}),
    "an object without a pool": (Form.JSON, f'[\n"{A}",\n{{"name": "x"}}\n]', {3: "pool_name"}),
    "something else than an object": (Form.JSON, f'["{A}",\n7,\nnull]', {2: "a text", 3: "a text"}),
    "a pool that is no text": (Form.JSON, '[{"id": 7}]', {1: "no text"}),
    "a project that is no text": (Form.JSON, f'[{{"id": "{A}", "project_id": 7}}]', {1: "no text"}),
    "a list that does not end": (Form.JSON, f'["{A}",\n"{B}"\n', {3: "',' is missing"}),
    "a comma at the end": (Form.JSON, f'[\n"{A}",\n]', {3: "not JSON"}),
    "more after the end": (Form.JSON, f'["{A}"]\n["{B}"]', {2: "more follows"}),
    "a text that does not end": (Form.JSON, f'[\n"{A}', {2: "not JSON"}),
    "an object with two lists of which one is bad": (
        Form.JSON,
        f'{{"jobs": ["{A}"],\n"pools": ["x"]}}',
        {2: "'x'"},
    ),
    "a key that is no text": (Form.JSON, '{"x": 1,\n2: 3}', {2: "a key is no text"}),
    "numbers without end": (Form.JSON, f"[{'9' * 5_000}]", {1: "too long"}),
    "brackets without end": (Form.JSON, '{"x": ' + "[" * 100_000, {1: "nested"}),
    "a number alone": (Form.JSON, "7", {1: "a text"}),
    "JSON Lines of which some are bad": (
        Form.JSON,
        f'"{A}"\n{{"id": \n"{B}"\n7\n{{"id": "x"}}\n',
        {2: "not JSON", 4: "a text", 5: "'x'"},
    ),
    "an entry that is not in its object's project": (
        Form.JSON,
        (
            f'{{"pools": ["{A}",\n"{HERE}/{B}",\n{{"id": "{C}", "project_id": "{HERE}"}}],\n'
            f'"project_id": "{THERE}"}}'
        ),
        {2: f"{HERE!r} is not {THERE}", 3: f"{HERE!r} is not {THERE}"},
    ),
    "a target that is not in its request's project": (
        Form.JSON,
        f'{{"project_id": "{HERE}", "targets": [\n{{"project_id": "{THERE}", "pools": ["{A}"]}}]}}',
        {2: f"{THERE!r} is not {HERE}"},
    ),
    "an object in a project that is not accepted": (
        Form.JSON,
        f'{{"x": 1,\n"pools": ["{A}",\n"{B}"], "project_id": "elsewhere"}}',
        {1: "'elsewhere'"},
    ),
    "an object whose project is no text": (
        Form.JSON,
        f'{{"pools": ["{A}"], "project_id": 7}}',
        {1: "project_id is no text"},
    ),
    "targets that name no pools": (
        Form.JSON,
        f'{{"targets": [{{"pools": ["{A}"]}},\n{{"project_id": "{HERE}", "selector": {{}}}},\n7]}}',
        {2: "no list pools", 3: "a target is needed"},
    ),
    "targets within targets": (
        Form.JSON,
        '{"targets": [' * 400 + "]}" * 400,
        {1: "no list pools"},
    ),
    "a bad entry behind the lines of a list": (
        Form.JSON,
        f'{{"pools": [\n"{A}",\n"x"],\n"jobs": [\n"y"],\n"project_id": "{HERE}"}}\n7',
        {3: "'x'", 5: "'y'", 7: "more follows"},
    ),
    "an object of a plan's file": (Form.JSON, '{"plans": [{"pools": []}]}', {1: "pool_name"}),
}


@pytest.mark.parametrize("name", FAULTS)
def test_every_bad_line_is_told_with_its_number(name: str) -> None:
    form, text, expected = FAULTS[name]
    found = read(text, form)
    assert found.faults.keys() == expected.keys()
    for line, words in expected.items():
        assert words in found.faults[line]
        assert found.faults[line].isprintable()
    said = found.sentences("a list")
    assert len(said) == len(expected) + 1
    assert all(
        each.startswith(f"a list:{line}: ") for each, line in zip(said, expected, strict=False)
    )
    assert said[-1].startswith("accepted: ")


@pytest.mark.parametrize("form", Form)
def test_what_is_not_utf_8_is_told_by_its_lines(form: Form) -> None:
    lines = [f"{A}\n", "\xff\n", f"{B}\n", "\xe9\n"]
    if form is Form.CSV:
        lines[0] = "id\n"
    found = read("".join(lines).encode("latin-1"), form)
    assert {2, 4} <= found.faults.keys()
    assert {found.faults[line] for line in (2, 4)} == {"it is not UTF-8"}


def test_a_character_that_stands_for_broken_ones_is_one_itself() -> None:
    assert read(f"{A} # \ufffd\n", Form.LINES).faults == {}


@pytest.mark.parametrize("form", [Form.LINES, Form.CSV])
def test_of_many_bad_lines_the_first_are_told_and_the_others_counted(form: Form) -> None:
    found = read("id\n" * (form is Form.CSV) + "x\n" * 1_000, form)
    assert len(found.faults) == MOST_TOLD
    assert found.more == 1_000 - MOST_TOLD
    assert f"and {found.more} more lines" in found.sentences("x")


def test_more_pools_than_are_taken_are_refused_where_they_begin() -> None:
    raw = f"{A}\n".encode() * 1_000_001
    found = parse(raw, Form.LINES, project_of)
    assert found.faults == {1_000_001: "more than 1000000 pools are named"}


@pytest.mark.parametrize("first", [True, False])
def test_the_project_of_an_object_is_that_of_its_entries(first: bool) -> None:
    there = {"project_id": THERE}
    named = {"pools": [A, f"{THERE}/{B}", {"pool_name": C}]}
    for value in (there | named if first else named | there, {"targets": [named | there]}):
        for indent in (None, 1):
            text = json.dumps(value, indent=indent)
            assert form_of("", text.encode()) is Form.JSON
            assert pools(read(text, Form.JSON)) == {THERE: [A, B, C]}


# What `poolsweep results` writes


def job(number: int, pool: str, reason: str) -> Job:
    return Job(
        run_id="20260101-000000-abcdefabcd",
        number=number,
        project_id=THERE,
        pool_name=pool,
        display_name='=cmd|"/c calc"!A1',
        created="",
        fingerprint="",
        chosen="",
        check_nodes=False,
        state=JobState.FAILED,
        reason=reason,
        due_ms=0,
        blocked_ms=0,
        done_ms=0,
        attempts=(),
    )


async def jobs(found: Sequence[Job]) -> AsyncIterator[Job]:
    for each in found:
        yield each


names = st.from_regex(r"[a-z][a-z0-9-]{34,61}[a-z0-9]", fullmatch=True)
printable = st.text(st.characters(exclude_categories=["Cc", "Cs"]))


@patient
@given(st.lists(st.tuples(names, printable), max_size=5))
async def test_what_results_writes_is_read(given: list[tuple[str, str]]) -> None:
    made = [job(number, pool, reason) for number, (pool, reason) in enumerate(given)]
    expected = {THERE: list(dict.fromkeys(pool for pool, _ in given))} if given else {}
    fields = {"source": "cli", "endpoint": "x", "verify": "1", "state": "finished"}
    run = Run.parse("20260101-000000-abcdefabcd", fields | {"total": "1", "created_ms": "1"})
    document = io.StringIO()
    await write_json(run, jobs(made), document)
    text = document.getvalue()
    assert form_of("", text.encode()) is Form.JSON
    assert pools(read(text, Form.JSON)) == expected
    table = io.StringIO(newline="")
    await write_csv(jobs(made), table)
    raw = table.getvalue().encode(errors="replace")
    assert form_of("", raw) is Form.CSV
    assert pools(read(raw, Form.CSV)) == expected


# Anything at all


@patient
@given(st.lists(st.tuples(st.sampled_from(["", HERE, THERE]), names)))
def test_the_three_forms_say_the_same(entries: list[tuple[str, str]]) -> None:
    lines = "\n".join(f"{project}/{pool}" if project else pool for project, pool in entries)
    table = io.StringIO(newline="")
    csv.writer(table).writerows([("project_id", "pool_name"), *entries])
    objects = [{"pool_name": pool, "project_id": project or None} for project, pool in entries]
    expected = pools(read(lines, Form.LINES))
    assert pools(read(table.getvalue(), Form.CSV)) == expected
    assert pools(read(json.dumps(objects), Form.JSON)) == expected
    targets = [{"pools": [pool], "project_id": project or None} for project, pool in entries]
    assert pools(read(json.dumps({"targets": targets}), Form.JSON)) == expected
    assert pools(read("\n".join(map(json.dumps, objects)), Form.JSON)) == expected
    assert sum(map(len, expected.values())) <= len(entries)


@patient
@given(st.binary() | st.text().map(str.encode), st.sampled_from(Form))
def test_whatever_it_holds_a_list_is_read_or_refused(raw: bytes, form: Form) -> None:
    found = parse(raw, form, project_of)
    told = found.sentences("x")
    assert bool(told) == bool(found.faults)
    assert "\n" not in "".join(told)
    form_of("", raw)


@patient
@given(st.text(alphabet=f'[]{{}},:" \n{A[0]}1-x', max_size=60))
def test_broken_json_never_ends_in_anything_but_a_fault(text: str) -> None:
    try:
        json.loads(text)
        valid = True
    except ValueError:
        valid = False
    found = read(text, Form.JSON)
    if not valid and len(text.strip().splitlines()) == 1:
        assert found.faults
