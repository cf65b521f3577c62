"""The worked examples in docs/, done step by step as a reader would."""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from scheduler import children
from scheduler.cli import outcome
from tests.cli.conftest import eventually

if TYPE_CHECKING:
    from collections.abc import Iterator

ROOT = Path(__file__).parent.parent
POLICIES, ON_DEMAND, README = (
    (ROOT / path).read_text() for path in ("docs/policies.md", "docs/on-demand.md", "README.md")
)
KNOWN_KEY = {"ak": "SANDBOXACCESSKEY", "sk": "sandbox-secret-key"}
POOL = "POOL"


def blocks(text: str) -> list[tuple[str, str]]:
    """What a page has the reader write or run: the kind of each block, and the block."""
    return re.findall(r"^```(yaml|sh|text)\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)


class Reader:
    """Does what the page says, in a folder and with a state directory of its own."""

    def __init__(self, folder: Path, cloud: dict[str, str]) -> None:
        self.folder = folder
        self.environment = {
            "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
            "HOME": str(folder),
            "POOLSWEEP_STATE_DIR": str(folder / "state"),
            "POOLSWEEP_ENDPOINT": cloud["url"],
            "POOLSWEEP_AK": cloud["ak"],
            "POOLSWEEP_SK": cloud["sk"],
            "POOLSWEEP_RATE_LIMIT": "200",
            "POOLSWEEP_VERIFY_INTERVAL_S": "1",
        }

    def does(self, command: str) -> str:
        """Run one command line to its end; it must succeed."""
        done = subprocess.run(
            ["/bin/bash", "-c", command],
            cwd=self.folder,
            env=self.environment,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
        assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
        return done.stdout

    def starts(self, command: str) -> subprocess.Popen[bytes]:
        """Run one command line that goes on until it is stopped."""
        log = (self.folder / "log").open("ab")
        return subprocess.Popen(
            shlex.split(command), cwd=self.folder, env=self.environment, stdout=log, stderr=log
        )


@pytest.fixture
def reader(tmp_path: Path) -> Iterator[Reader]:
    with children.sandbox(["--pools", "60", "--delete-seconds", "0.3"], tmp_path / "sb") as cloud:
        yield Reader(tmp_path, cloud)


@pytest.mark.parametrize("page", [POLICIES, ON_DEMAND], ids=["policies", "on-demand"])
def test_the_cloud_to_try_it_on_has_the_key_that_is_given(reader: Reader, page: str) -> None:
    for name, value in KNOWN_KEY.items():
        assert reader.environment[f"POOLSWEEP_{name.upper()}"] == value
        assert value in page


@pytest.mark.timeout(180)
def test_the_worked_example_of_policies_works(reader: Reader) -> None:
    swept = None
    for kind, text in blocks(POLICIES):
        if kind == "yaml":
            (reader.folder / "policies.yaml").write_text(text)
            continue
        for line in text.splitlines():
            if "poolsweep sandbox" in line or line.startswith("export ") or not line:
                continue
            if line.startswith("poolsweep scheduler"):
                scheduler = reader.starts(line)
                try:
                    eventually(
                        lambda: json.loads(reader.does("poolsweep schedule policies.yaml --json"))[
                            "leader"
                        ]
                    )
                finally:
                    scheduler.terminate()
                try:
                    assert scheduler.wait(30) == 0
                finally:
                    scheduler.kill()
            elif line.endswith("poolsweep worker"):
                assert "POOLSWEEP_PROJECTS_FILE=policies.yaml" in line
                reader.environment["POOLSWEEP_PROJECTS_FILE"] = "policies.yaml"
            elif POOL in line.split():
                reader.does(line.replace(POOL, f"kept-{'0' * 32}"))
            else:
                out = reader.does(line)
                if "poolsweep sweep" in line:
                    swept = out
    assert swept is not None
    assert re.search(r"│ deleted +│ +[1-9]", swept)
    assert json.loads((reader.folder / "plan.json").read_text())["plans"]


@pytest.mark.timeout(180)
def test_the_worked_example_of_pools_that_are_to_go_now_works(reader: Reader) -> None:
    counts = []
    for kind, text in blocks(ON_DEMAND):
        if kind != "sh":
            name = text.splitlines()[0].removeprefix("# ")
            (reader.folder / name).write_text(text)
        elif "POOLSWEEP_PROJECTS_FILE=projects.yaml" in text:
            reader.environment["POOLSWEEP_PROJECTS_FILE"] = "projects.yaml"
        elif "poolsweep sandbox" not in text:
            out = reader.does("set -e\n" + text)
            counts += re.findall(r"^([0-9]+) to delete, .* ([0-9]+) not there", out, re.MULTILINE)
    # The preview, the same for real, the list, and the one by name: each names what is there.
    assert counts == [("4", "0"), ("4", "0"), ("2", "0"), ("1", "0")]
    runs = json.loads(reader.does("poolsweep runs --json"))
    assert [(run["total"], run["counts"]) for run in runs] == [
        (total, {"deleted": total}) for total in (3, 1, 2, 4)
    ]
    assert runs[-1]["reason"] == "team moved"
    went = (reader.folder / "went.csv").read_text()
    assert went.count(",deleted,") == 3


def test_every_selector_that_is_told_of_is_one(reader: Reader) -> None:
    table = ON_DEMAND.partition("| flag | selects pools |")[2].partition("\n\n")[0]
    flags = re.findall(r"`(--[^`]+)`", table)
    assert len(flags) == 7
    for flag in flags:
        out = reader.does(f"poolsweep delete --project 0123456789abcdef0123456789abcdef {flag}")
        assert "Preview only: nothing was deleted." in out


@pytest.mark.parametrize("page", [README, ON_DEMAND], ids=["README", "on-demand"])
def test_the_exit_codes_are_those_that_there_are(page: str) -> None:
    section = page.partition("## Exit codes")[2].partition("\n## ")[0]
    told = set(map(int, re.findall(r"^\| `([0-9]+)` \|", section, re.MULTILINE)))
    there = {value for name, value in vars(outcome).items() if name.startswith("EXIT_")}
    assert told == there - {outcome.EXIT_PIPE}
