"""A file that is read again when it changes: here of policies."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import pytest

from scheduler import policy as policies
from scheduler.file_watch import FileWatch
from tests.nightly.conftest import policy
from worker.yaml_source import YamlError

if TYPE_CHECKING:
    from pathlib import Path

    from scheduler.policy import PolicyFile


def text(*names: str) -> str:
    projects = {"research": {"id": "0123456789abcdef0123456789abcdef"}}
    named = {name: policy("research") for name in names}
    return json.dumps({"projects": projects, "policies": named})


@pytest.fixture
def path(tmp_path: Path) -> Path:
    made = tmp_path / "policies.yaml"
    made.write_text(text("one"))
    return made


def watching(path: Path) -> FileWatch[PolicyFile]:
    return FileWatch(path, policies.load)


def in_force(watch: FileWatch[PolicyFile]) -> list[str]:
    return sorted(watch.current.policies)


def looks(watch: FileWatch[PolicyFile]) -> list[bool]:
    return [watch.look() for _ in range(4)]


def test_a_file_that_stays_is_read_once(path: Path) -> None:
    assert looks(watching(path)) == [False] * 4


def test_a_change_is_taken_up_once_it_has_been_still_for_a_look(path: Path) -> None:
    watch = watching(path)
    path.write_text(text("one", "two"))
    assert looks(watch) == [False, True, False, False]
    assert in_force(watch) == ["one", "two"]


def test_a_file_that_is_still_being_written_is_left_alone(path: Path) -> None:
    watch = watching(path)
    whole = text("one", "two")
    with path.open("w") as file:
        for character in whole:
            file.write(character)
            file.flush()
            assert not watch.look()
            assert in_force(watch) == ["one"]
    assert looks(watch) == [True, False, False, False]
    assert in_force(watch) == ["one", "two"]


def test_a_file_put_in_its_place_by_renaming_is_seen(path: Path) -> None:
    watch = watching(path)
    other = path.with_suffix(".new")
    other.write_text(text("two"))
    other.rename(path)
    assert any(looks(watch))
    assert in_force(watch) == ["two"]


def test_a_link_that_points_elsewhere_now_is_seen(path: Path) -> None:
    one, two = path.with_name("one"), path.with_name("two")
    path.rename(one)
    two.write_text(text("two"))
    path.symlink_to(one)
    watch = watching(path)
    path.unlink()
    path.symlink_to(two)
    assert any(looks(watch))
    assert in_force(watch) == ["two"]


def test_a_file_with_mistakes_keeps_the_old_ones_and_says_so_once(path: Path) -> None:
    watch = watching(path)
    path.write_text(text("one").replace('"name"', '"nmae"'))
    assert not watch.look()
    with pytest.raises(YamlError):
        watch.look()
    assert looks(watch) == [False] * 4
    assert in_force(watch) == ["one"]
    assert "policies.one.match" in watch.rejected


def test_a_file_that_is_mended_is_taken_up_and_nothing_is_rejected_any_more(path: Path) -> None:
    watch = watching(path)
    path.write_text("policies: [")
    assert not watch.look()
    with pytest.raises(YamlError):
        watch.look()
    path.write_text(text("two"))
    assert any(looks(watch))
    assert (in_force(watch), watch.rejected) == (["two"], "")


def test_a_deleted_file_keeps_the_old_ones_and_its_return_is_seen(path: Path) -> None:
    watch = watching(path)
    kept = path.with_name("kept")
    path.rename(kept)
    assert not watch.look()
    with pytest.raises(YamlError):
        watch.look()
    assert in_force(watch) == ["one"]
    assert str(path) in watch.rejected
    kept.rename(path)  # the very same file
    assert any(looks(watch))
    assert watch.rejected == ""


def test_a_file_with_mistakes_is_no_file_to_start_with(path: Path) -> None:
    path.write_text(text("one").replace("research", "elsewhere", 1))
    with pytest.raises(YamlError):
        watching(path)


def test_what_is_read_is_up_to_whoever_watches(tmp_path: Path) -> None:
    path = tmp_path / "number"
    path.write_text("1")
    watch = FileWatch(path, lambda file: int(file.read_text()))
    path.write_text("22")
    assert any(watch.look() for _ in range(2))
    assert watch.current == 22
