"""A policy file is read whole or refused with every error at once, each with its line."""

# ruff: noqa: E501 - sentences are compared whole
from __future__ import annotations

import json
from datetime import time, timedelta
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jsonschema import Draft202012Validator

from scheduler import policy
from scheduler.policy import Occasion, PolicyFile
from scheduler.selection import rules_of
from worker.yaml_source import YamlError, parse_yaml, read_yaml

EXAMPLES = Path(__file__).parents[2] / "examples"
SCHEMA = Draft202012Validator(policy.json_schema())

GOOD = """\
version: 1
projects:
  research:
    id: 0123456789abcdef0123456789abcdef
policies:
  stale:
    projects: [research]
    match: {expired: {}}
notifications:
  ops:
    url: {env: OPS_URL}
"""


def with_line(number: int, line: str) -> str:
    """The good file with another line in place of one, from 1; empty: without it."""
    lines = GOOD.splitlines()
    lines[number - 1 : number] = [line] if line else []
    return "\n".join(lines)


def with_more(*lines: str) -> str:
    """The good file with more fields of its policy, the first in line 9."""
    kept = GOOD.splitlines()
    kept[8:8] = [f"    {line}" for line in lines]
    return "\n".join(kept)


def said(text: str) -> list[str]:
    """What is wrong with a policy file; nothing, if it is accepted."""
    try:
        policy.parse(text, "file")
    except YamlError as error:
        return error.sentences
    return []


# What is accepted


def test_a_small_file_is_accepted_and_the_rest_is_as_documented() -> None:
    found = policy.parse(GOOD)
    stale = found.policies["stale"]
    assert (stale.protect, stale.grace, stale.schedule) == (None, None, None)
    assert (stale.allow_busy, stale.allow_shared) == (False, False)
    assert (stale.brakes.max_deletions, stale.brakes.max_percent) == (50, 50)
    assert (stale.brakes.max_failures, stale.brakes.max_failure_percent) == (20, 50)
    assert (stale.brakes.quiet, stale.notify) == ([], [])
    assert (stale.zone.key, stale.catch_up) == ("UTC", timedelta(hours=6))
    assert found.notifications["ops"].on == list(Occasion)


def test_a_full_policy_is_read_as_it_is_written() -> None:
    text = with_more(
        "description: what it is for",
        "protect: {name: 'demo-*'}",
        "allow_busy: true",
        "allow_shared: false",
        "grace: 3d",
        "schedule: '30 2 * * mon-fri'",
        "timezone: Asia/Shanghai",
        "catch_up: 90m",
        "notify: [ops]",
        "brakes:",
        "  max_deletions: 0",
        "  max_percent: 12.5",
        "  quiet:",
        "    - {days: [sat, sun]}",
        "    - {from: 22:00, to: 06:00}",
        "    - {from: '08:00', to: '24:00'}",
    )
    found = policy.parse(text).policies["stale"]
    assert found.grace == timedelta(days=3)
    assert found.zone.key == "Asia/Shanghai"
    assert (found.brakes.max_deletions, found.brakes.max_percent) == (0, 12.5)
    windows = [(each.days, each.start, each.end) for each in found.brakes.quiet]
    every = ["mon", "tue", "wed", "thu", "fri", "sat", "sun"]
    assert windows == [
        (["sat", "sun"], time(0), time(0)),
        (every, time(22), time(6)),
        (every, time(8), time(0)),
    ]
    assert not list(SCHEMA.iter_errors(parse_yaml(text, "x").data))


@pytest.mark.parametrize("name", ["a", "0", "a-b_c", "x" * 63])
def test_names_are_of_small_letters_digits_hyphens_and_underscores(name: str) -> None:
    # A name of digits alone is in quotes, since without them it is a number.
    assert not said(with_line(6, f"  '{name}':"))


@pytest.mark.parametrize("schedule", ["0 2 * * *", "*/15 * * * *", "0 0 29 2 *", "30 0 2 * * *"])
def test_schedules_have_five_fields_or_six(schedule: str) -> None:
    assert not said(with_more(f"schedule: '{schedule}'"))


def test_utilisation_is_asked_for_as_far_back_as_any_matcher_looks() -> None:
    def window(match: str, protect: str) -> timedelta:
        text = with_line(8, f"    match: {match}\n    protect: {protect}")
        return rules_of(policy.parse(text).policies["stale"]).window

    def below(over: str) -> str:
        return f"{{utilisation: {{of: gpu, below: 5, over: {over}}}}}"

    assert window("{expired: }", "{name: x}") == timedelta(hours=1)
    assert window(below("7d"), "{name: x}") == timedelta(days=7)
    assert window(f"{{all: [{below('2d')}, {{any: [{below('9d')}]}}]}}", "{ttl: }").days == 9
    assert window(below("2d"), f"{{not: {{not: {below('3d')}}}}}") == timedelta(days=3)


def test_every_example_is_accepted_and_fits_the_published_schema() -> None:
    path = EXAMPLES / "policies.yaml"
    found = policy.load(path)
    assert {"expired", "dev-ttl", "idle", "asleep", "leftovers"} <= found.policies.keys()
    assert not list(SCHEMA.iter_errors(read_yaml(path).data))


# What is refused, each with its line


@pytest.mark.parametrize(
    ("number", "line", "sentence"),
    [
        (1, "version: 2", "1: version: 2 is not accepted: input should be 1"),
        (
            1,
            "versoin: 1",
            "1: versoin: there is no such field; accepted: notifications, policies, projects, version",
        ),
        (2, "project:", "1: projects: it is missing"),
        (
            4,
            "    id: a b",
            "4: projects.research.id: 'a b' is not accepted: project id 'a b' is not one; accepted: 1 to 64 letters, digits, hyphens and underscores, such as 0123456789abcdef0123456789abcdef.",
        ),
        (
            4,
            "    id: 12345678901234567890123456789012",
            "4: projects.research.id: 12345678901234567890123456789012 is not accepted: a text is needed; put it in quotes",
        ),
        (
            4,
            "    ID: x",
            "4: projects.research.ID: there is no such field; accepted: credentials, endpoint, id, insecure_http, rate_burst, rate_limit",
        ),
        (
            3,
            "  Research:",
            "3: projects.Research: 'Research' is not accepted: string should match pattern '^[a-z0-9][a-z0-9_-]{0,62}$'",
        ),
        (6, "  3:", "6: policies: a key is not text; put it in quotes"),
        (
            7,
            "    projects: research",
            "7: policies.stale.projects: 'research' is not accepted: a list is needed",
        ),
        (
            7,
            "    projects: []",
            "7: policies.stale.projects: it must not be empty",
        ),
        (
            7,
            "    projects: [reserch]",
            "7: policies.stale.projects[0]: 'reserch' is not accepted: there is no such name under projects; accepted: research",
        ),
        (
            7,
            "    projects:\n      - research\n      - 5",
            "9: policies.stale.projects[1]: 5 is not accepted: a text is needed; put it in quotes",
        ),
        (
            7,
            "    projects: [research, research]",
            "7: policies.stale.projects: research: there twice",
        ),
        (7, "", "6: policies.stale.projects: it is missing"),
        (8, "", "6: policies.stale.match: it is missing"),
        (
            8,
            "    match:",
            "8: policies.stale.match: null is not accepted: a map with exactly one of all, any, not, expired, ttl, older_than, tags, name, workspace, type, scope, flavor, billing, phase, driver, idle, utilisation is needed",
        ),
        (
            10,
            "  ops:\n    format: xml",
            "11: notifications.ops.format: 'xml' is not accepted: input should be 'json' or 'slack'",
        ),
        (
            10,
            "  ops:\n    on: [finish]",
            "11: notifications.ops.on[0]: 'finish' is not accepted: input should be 'marked', 'started', 'braked', 'finished' or 'failed'",
        ),
        (
            11,
            "    url: {env: A, file: b}",
            "11: notifications.ops.url: exactly one of env and file is needed",
        ),
        (
            11,
            "    url: {env: A-B}",
            "11: notifications.ops.url.env: string should match pattern '^[A-Za-z_][A-Za-z0-9_]*$'",
        ),
        (
            11,
            "    url: {environment: A}",
            "11: notifications.ops.url: there is no such field; accepted: env, file",
        ),
        (11, "    format: json", "10: notifications.ops.url: it is missing"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_an_error_names_line_field_value_and_what_is_accepted(
    number: int, line: str, sentence: str
) -> None:
    assert f"file:{sentence}" in said(with_line(number, line))


@pytest.mark.parametrize(
    ("line", "sentence"),
    [
        (
            "max_deletion: 3",
            "max_deletion: there is no such field; accepted: allow_busy, allow_shared, brakes, catch_up, description, grace, match, notify, projects, protect, schedule, timezone",
        ),
        ("description:", "description: null is not accepted: a text is needed; put it in quotes"),
        ("description: 5", "description: 5 is not accepted: a text is needed; put it in quotes"),
        ("protect:", "protect: null is not accepted: it is empty; leave it out, or say what holds"),
        (
            "protect: [{name: x}]",
            "protect: a map with exactly one of all, any, not, expired, ttl, older_than, tags, name, workspace, type, scope, flavor, billing, phase, driver, idle, utilisation is needed",
        ),
        ("grace:", "grace: null is not accepted: it is empty; leave it out, or say what holds"),
        (
            "grace: 3",
            "grace: 3 is not accepted; accepted: a number and a unit, such as 90m, 12h, 7d or 2w",
        ),
        (
            "grace: soon",
            "grace: 'soon' is not a duration; accepted: a number and a unit, such as 90m, 12h, 7d or 2w",
        ),
        (
            "allow_busy: maybe",
            "allow_busy: 'maybe' is not accepted: input should be a valid boolean, unable to interpret input",
        ),
        ("allow_shared:", "allow_shared: null is not accepted: input should be a valid boolean"),
        ("brakes:", "brakes: null is not accepted: a map is needed"),
        (
            "brakes: {max_deletions: -1}",
            "brakes.max_deletions: -1 is not accepted: input should be greater than or equal to 0",
        ),
        (
            "brakes: {max_deletions: many}",
            "brakes.max_deletions: 'many' is not accepted: input should be a valid integer, unable to parse string as an integer",
        ),
        (
            "brakes: {max_percent: 101}",
            "brakes.max_percent: 101 is not accepted: input should be less than or equal to 100",
        ),
        (
            "brakes: {max_percent: .nan}",
            "brakes.max_percent: nan is not accepted: input should be a finite number",
        ),
        (
            "brakes: {max_percent: 30%}",
            "brakes.max_percent: '30%' is not accepted: input should be a valid number, unable to parse string as a number",
        ),
        (
            "brakes: {max_failures: .inf}",
            "brakes.max_failures: inf is not accepted: input should be a finite number",
        ),
        ("brakes: {quiet: }", "brakes.quiet: null is not accepted: a list is needed"),
        (
            "brakes: {quiet: [{days: []}]}",
            "brakes.quiet[0].days: it must not be empty",
        ),
        (
            "brakes: {quiet: [{days: [monday]}]}",
            "brakes.quiet[0].days[0]: 'monday' is not accepted: input should be 'mon', 'tue', 'wed', 'thu', 'fri', 'sat' or 'sun'",
        ),
        (
            "brakes: {quiet: [{start: 22:00}]}",
            "brakes.quiet[0].start: there is no such field; accepted: days, from, to",
        ),
        # Eight seconds past midnight, for a lenient reader.
        (
            "brakes: {quiet: [{from: 8}]}",
            "brakes.quiet[0].from: 8 is not accepted; accepted: a time such as 08:00",
        ),
        (
            "brakes: {quiet: [{from: 8:00}]}",
            "brakes.quiet[0].from: '8:00' is not accepted; accepted: a time such as 08:00",
        ),
        (
            "brakes: {quiet: [{from: 24:00}]}",
            "brakes.quiet[0].from: '24:00' is not accepted; accepted: a time such as 08:00",
        ),
        (
            "brakes: {quiet: [{to: 24:01}]}",
            "brakes.quiet[0].to: '24:01' is not accepted; accepted: a time such as 08:00",
        ),
        # Such a time cannot be compared with one that has no zone.
        (
            "brakes: {quiet: [{to: '08:00Z'}]}",
            "brakes.quiet[0].to: '08:00Z' is not accepted; accepted: a time such as 08:00",
        ),
        (
            "schedule: daily",
            "schedule: 'daily' is not accepted: wrong number of fields; accepted: five cron fields, such as 0 2 * * *, or six with seconds first",
        ),
        (
            "schedule: 0 25 * * *",
            "schedule: '0 25 * * *' is not accepted: bad hour; accepted: five cron fields, such as 0 2 * * *, or six with seconds first",
        ),
        (
            "schedule: '0 0 30 2 *'",
            "schedule: '0 0 30 2 *' is not accepted: bad day-of-month; accepted: five cron fields, such as 0 2 * * *, or six with seconds first",
        ),
        (
            "schedule: '0 0 */31 2 1#5'",
            "schedule: '0 0 */31 2 1#5' is not accepted: it never comes; accepted: five cron fields, such as 0 2 * * *, or six with seconds first",
        ),
        ("schedule: 5", "schedule: 5 is not accepted: a text is needed; put it in quotes"),
        (
            "timezone: Berlin",
            "timezone: 'Berlin' is not accepted: no such time zone; accepted: a name such as UTC or Europe/Berlin",
        ),
        (
            "timezone: ../UTC",
            "timezone: '../UTC' is not accepted: no such time zone; accepted: a name such as UTC or Europe/Berlin",
        ),
        (
            "timezone: Europe",
            "timezone: 'Europe' is not accepted: no such time zone; accepted: a name such as UTC or Europe/Berlin",
        ),
        ("timezone: 2", "timezone: 2 is not accepted: a text is needed; put it in quotes"),
        ("timezone:", "timezone: null is not accepted: a text is needed; put it in quotes"),
        # Nobody looks at the clock so often, so that every night would be missed.
        ("catch_up: 5s", "catch_up: '5s' is not accepted: 1m or more is accepted"),
        ("catch_up: 0h", "catch_up: '0h' is not accepted: 1m or more is accepted"),
        (
            "notify: [dev]",
            "notify[0]: 'dev' is not accepted: there is no such name under notifications; accepted: ops",
        ),
        ("notify: ops", "notify: 'ops' is not accepted: a list is needed"),
        ("notify: [ops, ops]", "notify: ops: there twice"),
    ],
    ids=lambda value: value,
)
def test_an_error_in_a_policy_names_line_field_value_and_what_is_accepted(
    line: str, sentence: str
) -> None:
    assert said(with_more(line)) == [f"file:9: policies.stale.{sentence}"]


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("", "1: the document: null is not accepted: a map is needed"),
        ("- a\n- b", "1: the document: a map is needed"),
        ("just text", "1: the document: 'just text' is not accepted: a map is needed"),
        (
            "projects: {a: {id: x}}\npolicies: {}",
            "2: policies: it must not be empty",
        ),
        ("projects: [a]\npolicies: {}", "1: projects: a map is needed"),
    ],
)
def test_a_document_of_another_shape_is_refused(text: str, sentence: str) -> None:
    assert f"file:{sentence}" in said(text)


def test_a_project_id_that_is_there_twice_is_refused() -> None:
    text = with_line(4, "    id: x\n  again:\n    id: x")
    assert said(text) == ["file:2: projects: project id x: there twice"]


def test_all_errors_are_told_at_once_in_the_order_of_their_lines() -> None:
    text = """\
projects:
  a: {id: "?"}
policies:
  one:
    projects: [b]
    match: {nme: x}
    grace: 5
  two:
    projects: [a]
    match: {all: [{older_than: old}, {tags: {}}]}
    timezone: Mars
  three:
    match: {name: {regex: "("}}
"""
    lines = [int(sentence.split(":")[1]) for sentence in said(text)]
    assert lines == [2, 5, 6, 7, 10, 10, 11, 12, 13]


def test_an_error_in_a_merged_part_is_told_where_it_is_written() -> None:
    text = with_line(8, "    match: &match {expired: {}}\n    brakes: &b\n      max_percent: 101\n")
    text = text.replace(
        "notifications:",
        "  other:\n    projects: [research]\n    match: *match\n    brakes: {<<: *b}\nnotifications:",
    )
    assert said(text) == [
        f"file:10: policies.{name}.brakes.max_percent: 101 is not accepted: "
        "input should be less than or equal to 100"
        for name in ("other", "stale")
    ]


def test_a_value_is_told_as_it_is_written_but_not_at_any_length() -> None:
    (sentence,) = said(with_more(f"timezone: {'x' * 100_000}"))
    assert "'xxx" in sentence
    assert len(sentence) < 300
    (sentence,) = said(with_more(f"grace: {'x' * 100_000}"))
    assert len(sentence) < 700
    (sentence,) = said(with_more('timezone: "a\\nb\\e[31m"'))
    assert "\n" not in sentence
    assert "\x1b" not in sentence


SECRETS = [
    (4, "    id: x\n    credentials: hunter2"),
    (4, "    id: x\n    credentials: [hunter2]"),
    (4, "    id: x\n    credentials: {hunter2: }"),
    (4, "    id: x\n    credentials: {token: hunter2}"),
    (4, "    id: x\n    credentials: {token: {hunter2}}"),
    (4, "    id: x\n    credentials: {token: {env: hunter-2}}"),
    (4, "    id: x\n    credentials: {token: {env: 42}, hunter2: x}"),
    (4, "    id: x\n    credentials: {ak: {env: A}, sk: {hunter2: 1, hunter2: 2}}"),
    (4, "    id: x\n    credentials: {sk: hunter2}"),
    (4, "    id: x\n    credentials: {iam: {user: [hunter2], password: hunter2}}"),
    (4, "    id: x\n    credentials: {iam: hunter2}"),
    (4, "    id: x\n    token: hunter2"),
    (4, "    id: x\n    endpoint: https://me:hunter2@modelarts.example.com"),
    (4, "    id: x\n    endpoint: me:hunter2@modelarts.example.com"),
    (4, "    id: x\n    endpoint: https://modelarts.example.com/?token=hunter2"),
    (10, "  ops: https://hooks.example.com/hunter2"),
    (11, "    url: https://hooks.example.com/hunter2"),
    (11, "    url: {env: https://hooks.example.com/hunter2}"),
    (11, "    url: {https://hooks.example.com/hunter2}"),
    (11, "    url: {env: A}\n    secret: hunter2"),
    (11, "    url: {env: A}\n    secret: *hunter2"),
    (11, "    url: {env: A}\n    secret: !hunter2 x"),
    (11, "    url: {env: A}\n    secret: {env: A, value: hunter2}"),
    (11, "    url: {env: A}\n    secret: {file: [hunter2]}"),
    (9, "notifications: https://hooks.example.com/hunter2"),
    (8, "    match: {ttl: }\n    notify: [https://hooks.example.com/hunter2]"),
]


@pytest.mark.parametrize(("number", "line"), SECRETS)
def test_a_secret_in_the_file_is_refused_and_never_repeated(number: int, line: str) -> None:
    found = said(with_line(number, line))
    assert found
    assert "hunter" not in "\n".join(found)


# The published schema


def test_the_schema_is_one_and_can_be_published() -> None:
    Draft202012Validator.check_schema(policy.json_schema())
    assert json.loads(json.dumps(policy.json_schema())) == policy.json_schema()


def test_every_default_in_the_schema_is_one_that_it_accepts_itself() -> None:
    schema = policy.json_schema()
    checked = 0
    for name, part in schema["$defs"].items():
        for field, about in part.get("properties", {}).items():
            # An optional part without a value is left out, not written as null.
            if about.get("default") is not None:
                checked += 1
                scoped = {**about, "$defs": schema["$defs"]}
                assert Draft202012Validator(scoped).is_valid(about["default"]), (name, field)
    assert checked > 15


LEAVES: list[Any] = [
    {"expired": None},
    {"expired": True},
    {"expired": {}},
    {"expired": {"tag": "until"}},
    {"ttl": None},
    {"ttl": {"default": "7d"}},
    {"ttl": {"tag": "life", "default": "forever"}},
    {"older_than": " 90 min "},
    {"tags": "env"},
    {"tags": {"key": "env", "exists": False}},
    {"tags": {"key": "env", "equals": "", "on": "nodes"}},
    {"tags": {"key": "env", "one_of": ["a", "b"], "on": "labels"}},
    {"tags": {"key": "env", "glob": "a*", "on": "annotations"}},
    {"name": "tmp-*"},
    {"name": {"regex": "tmp-[0-9]+", "of": "name"}},
    {"name": {"glob": "tmp-*", "of": "id"}},
    {"workspace": "0"},
    {"workspace": ["0", "a"]},
    {"type": "Dedicate"},
    {"scope": "Train"},
    {"scope": ["Infer", "Notebook"]},
    {"flavor": "modelarts.*"},
    {"flavor": ["a", "b*"]},
    {"billing": "postpaid"},
    {"phase": "Error"},
    {"phase": ["Error", "Abnormal"]},
    {"driver": {"gpu": "535.*"}},
    {"driver": {"npu": "23*", "gpu": None}},
    {"idle": "2d"},
    {"utilisation": {"of": "gpu", "below": 5}},
    {"utilisation": {"of": "npu", "below": 0.5, "over": "30d"}},
]
BROKEN: list[Any] = [
    {},
    None,
    "expired",
    [],
    {"expired": {}, "ttl": {}},
    {"expird": {}},
    {"expired": {"tags": "x"}},
    {"older_than": 7},
    {"older_than": "7D"},
    {"ttl": {"default": 7}},
    {"tags": {}},
    {"tags": ""},
    {"name": ""},
    {"type": "Physical"},
    {"scope": "Training"},
    {"scope": []},
    {"billing": "free"},
    {"driver": {"cpu": "1"}},
    {"utilisation": {"of": "tpu", "below": 5}},
    {"utilisation": {"of": "gpu", "below": 0}},
    {"all": []},
    {"any": {"ttl": None}},
    {"not": None},
]
leaves = st.sampled_from(LEAVES)
trees = st.recursive(
    leaves,
    lambda inner: (
        st.builds(lambda each: {"not": each}, inner)
        | st.builds(
            lambda key, each: {key: each},
            st.sampled_from(["all", "any"]),
            st.lists(inner, min_size=1, max_size=3),
        )
    ),
    max_leaves=6,
)


def file_with(match: Any) -> dict[str, Any]:
    return {
        "projects": {"research": {"id": "x"}},
        "policies": {"stale": {"projects": ["research"], "match": match}},
    }


@settings(deadline=None)
@given(trees)
def test_what_is_accepted_fits_the_schema(match: Any) -> None:
    PolicyFile.model_validate(file_with(match))
    assert SCHEMA.is_valid(file_with(match))


@settings(deadline=None, max_examples=60)
@given(trees, st.sampled_from(BROKEN), st.sampled_from(["all", "any", "not", ""]))
def test_what_is_refused_does_not_fit_the_schema(match: Any, broken: Any, inside: str) -> None:
    part = {inside: broken if inside == "not" else [match, broken]} if inside else broken
    assert said(json.dumps(file_with(part)))
    assert not SCHEMA.is_valid(file_with(part))


@pytest.mark.parametrize("name", ["Big", "", "a b", "-a", "x" * 64])
def test_a_name_that_is_refused_does_not_fit_the_schema(name: str) -> None:
    document = file_with({"ttl": None})
    for part in ("projects", "policies"):
        (inside,) = document[part].values()
        renamed = {**document, part: {name: inside}}
        assert said(json.dumps(renamed))
        assert not SCHEMA.is_valid(renamed)


@pytest.mark.parametrize("leaf", LEAVES, ids=json.dumps)
def test_every_form_of_every_matcher_is_accepted_and_fits_the_schema(leaf: Any) -> None:
    assert not said(json.dumps(file_with(leaf)))
    assert SCHEMA.is_valid(file_with(leaf))


odd = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=5) | leaves,
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(["a", "match", "all", "any", "not", "projects", "brakes", "id"]), inner
        )
    ),
)


@settings(deadline=None, max_examples=50)
@given(st.dictionaries(st.sampled_from(["version", "projects", "policies"]), odd))
def test_any_document_is_accepted_or_refused_with_lines(document: Any) -> None:
    text = json.dumps(document, indent=1)
    assert all(0 < int(each.split(":")[1]) <= text.count("\n") + 1 for each in said(text))
