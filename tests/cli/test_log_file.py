"""The log of a command: in a file, whole, and never in the way of the command."""

from __future__ import annotations

import json
import stat
from typing import TYPE_CHECKING, Any

import pytest

from scheduler.cli import log_file
from scheduler.cli.log_file import LogFile
from tests.cli.conftest import Cloud, User

if TYPE_CHECKING:
    from pathlib import Path


def lines(text: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in text.splitlines() if line.startswith("{")]


def choose(cloud: Cloud) -> tuple[str, ...]:
    """A command that tries to delete more than its brake lets it: it makes a run, and no call."""
    return ("delete", "--project", cloud.project, "--name", "*", "--max-deletions", "0", "--yes")


def test_a_command_logs_to_a_file_of_its_user_and_to_no_stream(
    cloud: Cloud, tmp_path: Path
) -> None:
    ann = User(tmp_path, cloud.settings)
    first, second = ann.run(*choose(cloud)), ann.run_on_terminal(*choose(cloud))
    assert (first.code, second.code) == (3, 3)
    assert first.err == f"Started the embedded Redis in {tmp_path}\n"
    assert "pool_chosen" not in first.out + second.out
    file = tmp_path / "logs/commands.log"
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    made = [line for line in lines(file.read_text()) if line["event"] == "run_made"]
    assert [line["run_id"] for line in made] == sorted(ann.runs())
    assert {line["state"] for line in made} == {"braked"}


def test_where_the_file_cannot_be_written_the_log_goes_to_standard_error(
    cloud: Cloud, tmp_path: Path
) -> None:
    ann = User(tmp_path, cloud.settings)
    tmp_path.joinpath("logs").write_text("no folder")
    ended = ann.run(*choose(cloud))
    assert ended.code == 3
    assert "run_made" in {line["event"] for line in lines(ended.err)}
    # On a terminal it would bury what is shown.
    ended = ann.run_on_terminal(*choose(cloud))
    assert ended.code == 3
    assert "No log is kept" in ended.out
    assert "run_made" not in ended.out


def test_a_command_that_does_nothing_to_pools_leaves_no_log(user: User) -> None:
    assert user.run("runs").code == 0
    assert not (user.state_dir / "logs").exists()


def test_a_file_that_has_grown_large_makes_room_for_a_new_one(tmp_path: Path) -> None:
    path = tmp_path / "logs" / log_file.NAME
    path.parent.mkdir()
    with path.open("wb") as file:
        file.truncate(log_file.LARGEST + 1)
    for text in ("one\n", "two\n"):
        file_again = LogFile(path)
        file_again.write(text)
        file_again.flush()
    assert path.read_text() == "one\ntwo\n"
    assert path.with_suffix(".log.1").stat().st_size == log_file.LARGEST + 1


@pytest.mark.parametrize("count", [1, 1_000])
def test_a_full_disk_stops_no_command(count: int, tmp_path: Path) -> None:
    path = tmp_path / "full.log"
    path.symlink_to("/dev/full")
    file = LogFile(path)
    for _ in range(count):
        file.write("x" * 100 + "\n")
        file.flush()
