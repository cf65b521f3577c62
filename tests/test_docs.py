"""The worked examples in docs/, done step by step as a reader would."""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
from contextlib import ExitStack
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from scheduler import children
from scheduler.cli import outcome
from tests.cli.conftest import eventually
from worker import embedded_redis

if TYPE_CHECKING:
    from collections.abc import Iterator

ROOT = Path(__file__).parent.parent
POLICIES, ON_DEMAND, QUICK_START, OPERATIONS, OUTCOMES, README = (
    (ROOT / path).read_text()
    for path in (
        "docs/policies.md",
        "docs/on-demand.md",
        "docs/quick-start.md",
        "docs/operations.md",
        "docs/outcomes.md",
        "README.md",
    )
)
KNOWN_KEY = {"ak": "SANDBOXACCESSKEY", "sk": "sandbox-secret-key"}
POOL = "POOL"
PROJECT = "0123456789abcdef0123456789abcdef"

LASTING = {"sandbox", "scheduler", "worker", "intake", "review"}
"""Commands that go on until they are stopped."""


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


@pytest.mark.parametrize(
    "page", [POLICIES, ON_DEMAND, QUICK_START], ids=["policies", "on-demand", "quick-start"]
)
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


def commands(page: str) -> list[str]:
    """The command lines of a page, without what is remarked behind them."""
    lines = "".join(text for kind, text in blocks(page) if kind == "sh").splitlines()
    return [line.partition("  # ")[0].rstrip() for line in lines if line and line[0] != "#"]


@pytest.mark.timeout(240)
def test_the_quick_start_works_and_so_does_what_to_do_afterwards(reader: Reader) -> None:
    """One reader goes through it, and then does what the other pages say of the runs there are."""
    with embedded_redis.join(reader.folder / "state"):
        _follow_the_quick_start(reader)
        done = set(commands(QUICK_START))
        runs = json.loads(reader.does("poolsweep runs --json"))
        # Both of the pool that was named, and of what the policy matched.
        assert [run["counts"].keys() for run in runs] == [{"deleted"}, {"deleted"}]
        run_id = runs[-1]["run_id"]
        (job,) = json.loads(reader.does(f"poolsweep results {run_id} --json"))["jobs"]
        waiting = ""
        (reader.folder / "pools.txt").write_text(f"{job['pool_name']}\n")
        for line in [*commands(OPERATIONS), *commands(OUTCOMES), *commands(README)]:
            if line in done or not line.startswith("poolsweep ") or line.split()[1] in LASTING:
                continue
            done.add(line)
            if line.startswith("poolsweep cancel"):
                line = line.replace("RUN", waiting)
            line = re.sub(r"\bRUN\b|<run id>", run_id, line)
            line = re.sub(r"\bPOOL\b|<pool id>", job["pool_name"], line)
            reader.does(line.replace("<project id>", PROJECT))
            if line.startswith("poolsweep pause"):
                # Made during the pause, it waits.
                waiting = reader.does(
                    f"poolsweep delete --project {PROJECT} --name 'llm-*' --yes --detach"
                ).strip()
        (held,) = (
            run
            for run in json.loads(reader.does("poolsweep runs --json"))
            if run["run_id"] == waiting
        )
        assert held["counts"].keys() == {"cancelled"}


def _follow_the_quick_start(reader: Reader) -> None:
    outputs = {}
    with ExitStack() as stack:
        for kind, text in blocks(QUICK_START):
            if kind == "yaml":
                (reader.folder / "policies.yaml").write_text(text)
                continue
            for line in text.splitlines():
                if not line or line.startswith(("export ", "python3 -m venv", "poolsweep sandbox")):
                    continue
                variable, _, command = line.rpartition("policies.yaml poolsweep")
                if line.split()[1] == "scheduler" or command == " worker":
                    if variable:
                        reader.environment[variable.rstrip("=")] = "policies.yaml"
                        line = "poolsweep worker"
                    stack.callback(_stop, reader.starts(line))
                else:
                    outputs[line.partition(" policies.yaml")[0]] = reader.does(line)
        eventually(
            lambda: json.loads(reader.does("poolsweep schedule policies.yaml --json"))["leader"]
        )
    assert outputs["poolsweep --version"] == f"poolsweep {version('poolsweep')}\n"
    previews = [each for line, each in outputs.items() if line.endswith("</dev/null")]
    assert len(previews) == 1
    assert "Preview only: nothing was deleted." in previews[0]
    assert re.search(r"│ deleted +│ +[1-9]", outputs["poolsweep sweep"])


def _stop(process: subprocess.Popen[bytes]) -> None:
    process.terminate()
    try:
        assert process.wait(30) == 0
    finally:
        process.kill()


def test_every_selector_that_is_told_of_is_one(reader: Reader) -> None:
    table = ON_DEMAND.partition("| flag | selects pools |")[2].partition("\n\n")[0]
    flags = re.findall(r"`(--[^`]+)`", table)
    assert len(flags) == 7
    for flag in flags:
        out = reader.does(f"poolsweep delete --project 0123456789abcdef0123456789abcdef {flag}")
        assert "Preview only: nothing was deleted." in out


def test_every_page_is_found_from_the_readme() -> None:
    listed = set(re.findall(r"\]\(docs/([\w-]+\.md)", README))
    assert {path.name for path in (ROOT / "docs").glob("*.md")} <= listed


@pytest.mark.parametrize("path", sorted(ROOT.glob("docs/*.md")), ids=lambda path: path.name)
def test_every_heading_that_is_linked_to_exists(path: Path) -> None:
    for target, anchor in re.findall(r"\]\(([\w./-]*)#([^)]+)\)", path.read_text()):
        page = (path.parent / target if target else path).read_text()
        headings = re.findall(r"^#+ (.+)$", page, re.MULTILINE)
        assert anchor in {
            re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings
        }, f"{target}#{anchor}"


@pytest.mark.parametrize("page", [README, ON_DEMAND], ids=["README", "on-demand"])
def test_the_exit_codes_are_those_that_there_are(page: str) -> None:
    section = page.partition("## Exit codes")[2].partition("\n## ")[0]
    told = set(map(int, re.findall(r"^\| `([0-9]+)` \|", section, re.MULTILINE)))
    there = {value for name, value in vars(outcome).items() if name.startswith("EXIT_")}
    assert told == there - {outcome.EXIT_PIPE}
