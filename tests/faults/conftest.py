"""Faults on purpose: how many, by which seed, and what came of them."""

from __future__ import annotations

import os
import random
from collections import Counter

import pytest

SEED = "POOLSWEEP_FAULTS_SEED"
USUAL = 20261125
"""The seed of the usual test run, which is to say the same of the same code."""
_INJECTED = pytest.StashKey[Counter[str]]()


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("faults")
    group.addoption("--seed", type=int, help=f"The plan of faults to replay; else ${SEED}.")
    group.addoption("--faults", type=int, help="Go on with episodes until so many are injected.")


@pytest.fixture(scope="session")
def seed(pytestconfig: pytest.Config) -> int:
    """What the plans of faults are drawn from; printed with every episode."""
    given = pytestconfig.getoption("--seed", None)
    if given is None:
        given = os.environ.get(SEED)
    if given is None:
        many = pytestconfig.getoption("--faults", None) is not None
        return random.SystemRandom().getrandbits(32) if many else USUAL
    return int(given)


@pytest.fixture(scope="session")
def injected(pytestconfig: pytest.Config) -> Counter[str]:
    """How many faults of each kind were injected, by all episodes."""
    counts: Counter[str] = Counter()
    pytestconfig.stash[_INJECTED] = counts
    return counts


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    counts = terminalreporter.config.stash.get(_INJECTED, None)
    if counts:
        terminalreporter.section("faults injected")
        for kind, count in sorted(counts.items()):
            terminalreporter.line(f"{count:6}  {kind}")
        terminalreporter.line(f"{counts.total():6}  in all")
