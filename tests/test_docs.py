"""The worked example in docs/policies.md, done step by step as a reader would."""

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
from tests.cli.conftest import eventually

if TYPE_CHECKING:
    from collections.abc import Iterator

TEXT = (Path(__file__).parent.parent / "docs" / "policies.md").read_text()
BLOCKS = re.findall(r"^```(yaml|sh)\n(.*?)^```$", TEXT, re.MULTILINE | re.DOTALL)
KNOWN_KEY = {"ak": "SANDBOXACCESSKEY", "sk": "sandbox-secret-key"}
POOL = "POOL"


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


def test_the_cloud_to_try_it_on_has_the_key_that_is_given(reader: Reader) -> None:
    for name, value in KNOWN_KEY.items():
        assert reader.environment[f"POOLSWEEP_{name.upper()}"] == value
        assert value in TEXT


@pytest.mark.timeout(180)
def test_the_worked_example_works(reader: Reader) -> None:
    swept = None
    for kind, text in BLOCKS:
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
