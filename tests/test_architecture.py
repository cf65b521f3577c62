"""The code is built as docs/architecture.md says and its picture shows."""

from __future__ import annotations

import ast
import re
from pathlib import Path
from xml.etree import ElementTree as ET

import pytest

ROOT = Path(__file__).parent.parent
PAGE = (ROOT / "docs/architecture.md").read_text()
PICTURE = ROOT / "docs/architecture.svg"
ROOMS = ("worker", "scheduler", "sandbox")
SVG = "{http://www.w3.org/2000/svg}"

# What each room may import of the others; the sandbox is run as a process of its own.
ALLOWED = {"worker": set[str](), "scheduler": {"worker"}, "sandbox": set[str]()}


def modules(room: str) -> list[Path]:
    found = sorted((ROOT / room).rglob("*.py"))
    assert found
    return found


def imports(path: Path) -> set[str]:
    """The modules that a module imports, wherever in it; also those only for types."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{path}: imports are absolute"
            found.add(node.module or "")
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


@pytest.mark.parametrize("room", ROOMS)
def test_a_room_imports_only_what_it_may(room: str) -> None:
    others = ({*ROOMS, "tests", "benchmarks"} - {room}) - ALLOWED[room]
    crossing = {
        f"{path.relative_to(ROOT)} imports {name}"
        for path in modules(room)
        for name in imports(path)
        if name.partition(".")[0] in others
    }
    assert crossing == set()


def test_nothing_but_the_command_line_knows_the_command_line() -> None:
    crossing = {
        path.relative_to(ROOT)
        for room in ROOMS
        for path in modules(room)
        if "cli" not in path.parts
        and any(name.startswith("scheduler.cli") for name in imports(path))
    }
    assert crossing == set()


@pytest.mark.parametrize(
    "path",
    [
        "scheduler/selection.py",
        "scheduler/brakes.py",
        "scheduler/matchers.py",
        "scheduler/nights.py",
        "worker/modelarts/answers.py",
        "worker/modelarts/precondition.py",
        "worker/retry.py",
        "worker/breaker.py",
    ],
)
def test_what_decides_does_no_input_or_output(path: str) -> None:
    tools = {"asyncio", "aiohttp", "celery", "socket", "subprocess", "pathlib", "os"}
    used = {name for name in imports(ROOT / path) if name.partition(".")[0] in tools}
    # Of redis-py one pure function is used: how long to wait.
    redis = {name for name in imports(ROOT / path) if name.partition(".")[0] == "redis"}
    assert used | {name for name in redis if not name.startswith("redis.backoff")} == set()


@pytest.mark.parametrize("room", ROOMS)
def test_every_module_says_in_a_line_what_it_is_for(room: str) -> None:
    silent = [
        str(path.relative_to(ROOT))
        for path in modules(room)
        if path.name not in {"__init__.py", "__main__.py"}
        and not (ast.get_docstring(ast.parse(path.read_text())) or "").partition("\n")[0]
    ]
    assert silent == []


def test_every_package_of_the_rooms_is_told_of() -> None:
    packages = {str(path.parent.relative_to(ROOT)) for room in ROOMS for path in modules(room)} - {
        "worker",
        "scheduler",
    }
    named = set(re.findall(r"\]\(\.\./([\w/]+)\)", PAGE))
    assert {each for each in packages if not any(each.startswith(name) for name in named)} == set()


def test_every_file_on_the_page_exists() -> None:
    links = re.findall(r"\]\(\.\./((?:worker|scheduler|sandbox)/?[\w./]*)\)", PAGE)
    assert len(links) > 30
    assert [link for link in links if not (ROOT / link).exists()] == []
    for text, link in re.findall(r"\[([\w/]+\.py)\]\(\.\./([\w/]+\.py)\)", PAGE):
        assert link.endswith(text)


def test_the_picture_shows_files_that_exist() -> None:
    picture = ET.parse(PICTURE).getroot()  # noqa: S314 - our own file
    texts = [each for each in picture.iter(f"{SVG}text") if each.get("class") == "file"]
    named = re.findall(r"[\w/]+(?:\.py)?", " ".join(each.text or "" for each in texts))
    files = [name for name in named if "." in name or "/" in name]
    assert len(files) > 15
    places = [ROOT, *(ROOT / each for each in ("worker", "scheduler", "scheduler/intake"))]
    places += [ROOT / "worker/modelarts", ROOT / "scheduler/review"]
    assert [name for name in files if not any((place / name).exists() for place in places)] == []


def test_the_picture_can_be_read_without_being_seen() -> None:
    picture = ET.parse(PICTURE).getroot()  # noqa: S314 - our own file
    assert picture.find(f"{SVG}title") is not None
    described = picture.find(f"{SVG}desc")
    assert described is not None
    assert len(described.text or "") > 100
    assert "architecture.svg" in PAGE
