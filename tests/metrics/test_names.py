"""The alerts, the dashboard and the documentation speak of metrics that there are."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import yaml

from tests.metrics.conftest import get

if TYPE_CHECKING:
    from tests.metrics.conftest import Deployment

ROOT = Path(__file__).parents[2]
ALERTS = ROOT / "examples/prometheus/alerts.yaml"
SCRAPE = ROOT / "examples/prometheus/prometheus.yaml"
DASHBOARD = ROOT / "examples/grafana/poolsweep.json"
DOCUMENT = (ROOT / "docs/monitoring.md").read_text()
UNIT_TESTS = Path(__file__).parent / "alerts_test.yaml"
NAME = re.compile(r"\b(?:poolsweep|process)_[a-z0-9_]+\b")
PARTS = {"histogram": ("_bucket", "_sum", "_count"), "counter": ("",), "gauge": ("",)}


def rules() -> list[dict[str, Any]]:
    (group,) = yaml.safe_load(ALERTS.read_text())["groups"]
    found: list[dict[str, Any]] = group["rules"]
    return found


def expressions() -> list[str]:
    """Each query of the dashboard."""
    document = json.loads(DASHBOARD.read_text())
    found = [target["expr"] for panel in document["panels"] for target in panel["targets"]]
    return [*found, *(each["query"] for each in document["templating"]["list"])]


def exported(deployment: Deployment) -> dict[str, str]:
    """What is told, by any process: the type of each name."""
    pages = [get(process, "/metrics")[1] for process in deployment.processes.values()]
    found: dict[str, str] = {}
    for text in pages:
        found |= dict(re.findall(r"^# TYPE (\S+) (\S+)$", text, re.MULTILINE))
    return {name: kind for name, kind in found.items() if not name.endswith("_created")}


def samples(deployment: Deployment) -> set[str]:
    """The names that a query may use."""
    return {
        name + part for name, kind in exported(deployment).items() for part in PARTS.get(kind, ())
    }


def test_every_metric_of_the_alerts_and_of_the_dashboard_is_told(deployment: Deployment) -> None:
    there = samples(deployment)
    for expression in [*(rule["expr"] for rule in rules()), *expressions()]:
        assert set(NAME.findall(expression)) <= there, expression


def test_every_label_of_the_alerts_is_one_that_the_metric_has(deployment: Deployment) -> None:
    text = "".join(get(process, "/metrics")[1] for process in deployment.processes.values())
    for rule in rules():
        for name, matchers in re.findall(r"(poolsweep_\w+)\{([^}]*)\}", rule["expr"]):
            for label, given in re.findall(r'(\w+)=~?"([^"]*)"', matchers):
                values = set(re.findall(rf'^{name}\{{.*?\b{label}="([^"]*)"', text, re.MULTILINE))
                assert values, (name, label)
                known = set(given.split("|"))
                assert values & known or label == "state", (name, label, given)


def test_every_metric_that_is_told_is_documented_and_no_other(deployment: Deployment) -> None:
    rows = re.findall(r"^\| `(poolsweep_\w+)` \| (\w+) \| (.+?) \| .+ \|$", DOCUMENT, re.MULTILINE)
    ours = {n: k for n, k in exported(deployment).items() if n.startswith("poolsweep_")}
    assert {name: kind for name, kind, _ in rows} == ours
    assert len(rows) == len(ours)


def test_the_labels_of_every_metric_are_documented(deployment: Deployment) -> None:
    text = "".join(get(process, "/metrics")[1] for process in deployment.processes.values())
    rows = re.findall(r"^\| `(poolsweep_\w+)` \| \w+ \| (.+?) \| .+ \|$", DOCUMENT, re.MULTILINE)
    checked = 0
    for name, units in rows:
        found = re.findall(rf"^{name}(?:_count)?\{{(.*)\}} ", text, re.MULTILINE)
        labels = {label for each in found for label in re.findall(r'(\w+)="', each)}
        if found:
            checked += 1
            assert labels == set(re.findall(r"`(\w+)`", units)), name
    assert checked > 15


def test_every_alert_is_documented_and_no_other() -> None:
    told = re.findall(r"^\| `(Poolsweep\w+)` \|", DOCUMENT, re.MULTILINE)
    assert told == [rule["alert"] for rule in rules()]


def test_every_event_that_is_documented_is_logged_somewhere() -> None:
    table = DOCUMENT.partition("| event | fields | when |")[2]
    events = [
        name
        for row in re.findall(r"^\| (`[^|]+) \|", table, re.MULTILINE)
        for name in re.findall(r"`(\w+)`", row.split(" | ")[0])
    ]
    assert len(events) > 15
    sources = "".join(
        path.read_text() for room in ("worker", "scheduler") for path in (ROOT / room).rglob("*.py")
    )
    for event in events:
        assert f'"{event}"' in sources, event


PROMTOOL = shutil.which("promtool")


@pytest.mark.skipif(
    PROMTOOL is None, reason="promtool is not there: it is in the Debian package prometheus"
)
@pytest.mark.parametrize(
    "arguments",
    [("check", "rules", ALERTS), ("check", "config", SCRAPE), ("test", "rules", UNIT_TESTS)],
    ids=["rules", "scrape", "when they fire"],
)
def test_promtool_accepts_them(arguments: tuple[str | Path, ...]) -> None:
    done = subprocess.run(
        [str(PROMTOOL), *map(str, arguments)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
