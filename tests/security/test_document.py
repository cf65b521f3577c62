"""docs/security.md names the test that shows each line, and the tests are there."""

from __future__ import annotations

import re

import pytest

from tests.security.conftest import ROOT

DOCUMENT = (ROOT / "docs" / "security.md").read_text()
THREATS = DOCUMENT.partition("## Threats")[2].partition("\n\n**What is left.**")[0]
ROWS = [line for line in THREATS.splitlines() if line.startswith("| ")][1:]


TEST = re.compile(r"^(?:async )?def (test_\w+)\(", re.MULTILINE)


def all_tests() -> set[str]:
    """The names of all tests."""
    paths = ROOT.glob("tests/**/test_*.py")
    return {name for path in paths for name in TEST.findall(path.read_text())}


def test_every_test_that_is_named_is_there() -> None:
    named = set(re.findall(r"`(test_\w+)`", DOCUMENT))
    assert len(named) > 60
    assert not named - all_tests()


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.split("|")[1].strip(" *"))
def test_every_threat_has_a_guard_and_a_test(row: str) -> None:
    _, threat, guard, shown, _ = row.split("|")
    assert threat.strip()
    assert guard.strip()
    assert re.findall(r"`test_\w+`", shown)


def test_every_example_that_is_named_is_there() -> None:
    named = re.findall(r"\(\.\./(examples/[^)]+)\)", DOCUMENT)
    assert {"examples/iam-policy.json", "examples/redis-users.acl"} <= set(named)
    for each in named:
        assert (ROOT / each).exists()
