"""The wheel and the source distribution: whole, the same, and enough without a checkout."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import sysconfig
import tarfile
import tomllib
import zipfile
from email.parser import Parser
from importlib.metadata import distribution, packages_distributions
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

if TYPE_CHECKING:
    from email.message import Message

ROOT = Path(__file__).parent.parent
ROOMS = ("worker", "scheduler", "sandbox")


class Packages(NamedTuple):
    """What was built: a wheel and a source distribution of the checkout, and a wheel of that."""

    wheel: Path
    sdist: Path
    second_wheel: Path


def done(*command: str | Path, cwd: Path, **environment: str) -> str:
    """What a command writes; it must succeed."""
    kept = {name: value for name, value in os.environ.items() if name[:10] != "POOLSWEEP_"}
    kept.pop("PYTHONPATH", None)
    ended = subprocess.run(
        command,
        cwd=cwd,
        env=kept | environment,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
    )
    assert ended.returncode == 0, f"{command}\n{ended.stdout}\n{ended.stderr}"
    return ended.stdout


@pytest.fixture(scope="module")
def packages(tmp_path_factory: pytest.TempPathFactory) -> Packages:
    folder = tmp_path_factory.mktemp("packages")
    build = (sys.executable, "-m", "hatchling", "build", "--directory")
    done(*build, folder / "first", cwd=ROOT)
    (wheel,), (sdist,) = (folder / "first").glob("*.whl"), (folder / "first").glob("*.tar.gz")
    with tarfile.open(sdist) as archive:
        archive.extractall(folder / "unpacked", filter="data")
    (source,) = (folder / "unpacked").iterdir()
    done(*build, folder / "second", "--target", "wheel", cwd=source)
    (second,) = (folder / "second").glob("*.whl")
    return Packages(wheel, sdist, second)


@pytest.fixture(scope="module")
def installed(packages: Packages, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The programs of an environment of its own with the wheel in it.

    What poolsweep depends on is borrowed from the environment that the tests run in.
    """
    folder = tmp_path_factory.mktemp("installed")
    done(sys.executable, "-m", "venv", "--without-pip", "environment", cwd=folder)
    python = folder / "environment/bin/python"
    pip = (sys.executable, "-m", "pip", "--python", python, "--disable-pip-version-check")
    done(*pip, "install", "--quiet", "--no-deps", "--no-index", packages.wheel, cwd=folder)
    (site,) = (folder / "environment/lib").glob("python3*/site-packages")
    (site / "borrowed.pth").write_text(sysconfig.get_path("purelib") + "\n")
    return python.parent


def contents(wheel: Path) -> dict[str, bytes]:
    with zipfile.ZipFile(wheel) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


def metadata(wheel: Path) -> Message:
    (text,) = (each for name, each in contents(wheel).items() if name.endswith("/METADATA"))
    return Parser().parsestr(text.decode())


def test_every_file_of_the_rooms_is_in_the_wheel_and_nothing_else(packages: Packages) -> None:
    ours = {
        str(path.relative_to(ROOT))
        for room in ROOMS
        for path in (ROOT / room).rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    assert {Path(name).suffix for name in ours} >= {".py", ".lua", ".typed"}
    assert {f"{room}/py.typed" for room in ROOMS} <= ours
    packed = {name for name in contents(packages.wheel) if ".dist-info/" not in name}
    assert packed == ours


def test_the_source_distribution_makes_the_same_wheel(packages: Packages) -> None:
    assert contents(packages.second_wheel) == contents(packages.wheel)


def test_the_source_distribution_has_what_a_contributor_needs(packages: Packages) -> None:
    with tarfile.open(packages.sdist) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    assert names >= {
        "CHANGELOG.md",
        "CONTRIBUTING.md",
        "Dockerfile",
        "Makefile",
        "README.md",
        "constraints.txt",
        "docker-compose.yml",
        "examples/policies.yaml",
        "tests/conftest.py",
    }
    assert not {name for name in names if re.search(r"(^|/)(\.venv|\.env|__pycache__)(/|$)", name)}


def test_the_metadata_is_that_of_the_project(packages: Packages) -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    told = metadata(packages.wheel)
    assert (told["Name"], told["Version"]) == ("poolsweep", project["version"])
    assert told["Requires-Python"] == project["requires-python"]
    assert told["License-Expression"] == project["license"]
    assert told.get_payload() == (ROOT / "README.md").read_text()
    needed = [each for each in told.get_all("Requires-Dist") or [] if "extra ==" not in each]
    assert len(needed) == len(project["dependencies"])


def test_the_changelog_begins_with_this_version() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    versions = re.findall(r"^## \[?([0-9][^\] ]*)", (ROOT / "CHANGELOG.md").read_text(), re.M)
    assert versions[0] == project["version"]


def needed(name: str, extras: frozenset[str], found: dict[str, set[str]]) -> dict[str, set[str]]:
    """The distributions that one needs, with those that they need: each with its extras."""
    name = canonicalize_name(name)
    if extras <= found.setdefault(name, set()) and found[name]:
        return found
    found[name] |= extras | {""}
    for text in distribution(name).requires or []:
        wish = Requirement(text)
        if wish.marker is None or any(wish.marker.evaluate({"extra": e}) for e in found[name]):
            needed(wish.name, frozenset(wish.extras), found)
    return found


def brought(wheel: Path) -> dict[str, set[str]]:
    """The distributions that the wheel brings along here: each with its extras."""
    found: dict[str, set[str]] = {}
    for text in metadata(wheel).get_all("Requires-Dist") or []:
        wish = Requirement(text)
        if wish.marker is None or wish.marker.evaluate({"extra": ""}):
            needed(wish.name, frozenset(wish.extras), found)
    return found


def test_whatever_the_wheel_brings_along_is_pinned(packages: Packages) -> None:
    """By the first Python 3.11 too, which needs more than later ones: Debian's is an early one."""
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    pinned = {canonicalize_name(line.partition("==")[0]) for line in lines}
    wanted = set()
    for name, extras in brought(packages.wheel).items():
        for wish in map(Requirement, distribution(name).requires or []):
            here = [{"extra": extra, "python_full_version": "3.11.0"} for extra in extras]
            if wish.marker is None or any(map(wish.marker.evaluate, here)):
                wanted.add(canonicalize_name(wish.name))
    assert wanted - {"setuptools"} <= pinned  # which is there already: venv brings it


def test_nothing_is_used_that_the_wheel_does_not_ask_for(
    packages: Packages, installed: Path
) -> None:
    modules = sorted(
        name.removesuffix(".py").removesuffix("/__init__").replace("/", ".")
        for name in contents(packages.wheel)
        if name.endswith(".py") and not name.endswith("__main__.py")
    )
    program = f"""
import contextlib, importlib, sys
for name in {modules}:
    with contextlib.suppress(SystemExit):  # what Celery runs ends here, for want of settings
        importlib.import_module(name)
print(*{{name.partition(".")[0] for name in sys.modules}})
"""
    used = set(done(installed / "python", "-c", program, cwd=installed).split())
    assert used >= {*ROOMS, "celery", "kombu", "aiohttp"}
    asked_for = brought(packages.wheel)
    places = packages_distributions()
    missing = {
        module
        for module in used & places.keys() - {*ROOMS}
        if not {canonicalize_name(each) for each in places[module]} & asked_for.keys()
    }
    assert missing == set()


def test_the_installed_command_works_without_the_checkout(
    installed: Path, packages: Packages, tmp_path: Path
) -> None:
    program = f"import {', '.join(ROOMS)}; print({', '.join(f'{each}.__file__' for each in ROOMS)})"
    for path in done(installed / "python", "-c", program, cwd=tmp_path).split():
        assert Path(path).is_relative_to(installed.parent)
    version = metadata(packages.wheel)["Version"]
    told = done(installed / "poolsweep", "--version", cwd=tmp_path)
    assert told == f"poolsweep {version}\n"
    # Sandbox, worker and Redis are processes of their own; the ledger's scripts run.
    state = {"HOME": str(tmp_path), "POOLSWEEP_STATE_DIR": str(tmp_path / "state")}
    told = done(installed / "poolsweep", "demo", "--pools", "20", cwd=tmp_path, **state)
    assert re.search(r"│ deleted +│ +[1-9]", told)
    log = (tmp_path / "state/logs/worker.log").read_text()
    assert '"job_moved"' in log
    assert str(ROOT / "worker") not in log
