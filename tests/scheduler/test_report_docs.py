"""docs/reports.md, done step by step as a reader would."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from scheduler import children
from worker import embedded_redis

PAGE = (Path(__file__).parents[2] / "docs/reports.md").read_text()
MAILER = """#!/bin/sh
printf '%s\\n' "$@" > mailed.arguments
cat > mailed.text
"""


@pytest.mark.timeout(180)
def test_the_examples_of_reports_work(tmp_path: Path) -> None:
    lines = ["set -euo pipefail"]
    for kind, text in re.findall(r"^```(yaml|sh|text)\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL):
        if kind == "yaml":
            (tmp_path / text.splitlines()[0].removeprefix("# ")).write_text(text)
        elif kind == "text":
            assert "sh nightly.sh" in text
        elif "mutt" in text:
            (tmp_path / "nightly.sh").write_text(text)
            lines.append("sh nightly.sh")
        elif "poolsweep sandbox" not in text:
            lines += [line for line in text.splitlines() if "POOLSWEEP_ENDPOINT" not in line]
    mailer = tmp_path / "bin/mutt"
    mailer.parent.mkdir()
    mailer.write_text(MAILER)
    mailer.chmod(0o755)
    with (
        embedded_redis.join(tmp_path / "state"),  # started once, not by each command
        children.sandbox(["--pools", "60", "--delete-seconds", "0.3"], tmp_path / "sb") as cloud,
    ):
        done = subprocess.run(
            ["/bin/bash", "-c", "\n".join(lines)],
            cwd=tmp_path,
            env={
                "PATH": f"{mailer.parent}:{Path(sys.executable).parent}:{os.environ['PATH']}",
                "HOME": str(tmp_path),
                "POOLSWEEP_STATE_DIR": str(tmp_path / "state"),
                "POOLSWEEP_ENDPOINT": cloud["url"],
                "POOLSWEEP_RATE_LIMIT": "200",
                "POOLSWEEP_VERIFY_INTERVAL_S": "1",
            },
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=150,
            check=False,
        )
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"

    jobs = [json.loads(line) for line in (tmp_path / "jobs.jsonl").read_text().splitlines()]
    assert jobs
    week = json.loads((tmp_path / "week.json").read_text())
    assert week["jobs"] == len(jobs)
    assert week["freed"]["unsized"] == 0
    assert sum(week["freed"]["nodes"].values()) > len(jobs)
    for name in ("week.html", "nightly.html"):
        assert (tmp_path / name).read_text().endswith("</html>\n")
    arguments = (tmp_path / "mailed.arguments").read_text().splitlines()
    assert arguments[arguments.index("-a") + 1] == "nightly.html"
    assert arguments[-1] == "ops@example.com"
    assert "# Runs from " in (tmp_path / "mailed.text").read_text()
    for name in ("kept.csv", "runs.csv", "jobs.md"):
        assert (tmp_path / name).read_text(), name
