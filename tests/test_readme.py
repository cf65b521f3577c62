"""The README and the deployment say what the code does."""

from __future__ import annotations

import re
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest
import yaml

from scheduler.cli.commands import COMMANDS
from tests.cli.conftest import eventually
from tests.faults.rig import free_port
from worker.settings import ENV_PREFIX, Settings

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
ROW = re.compile(r"^\| `POOLSWEEP_(\w+)` \| (.*?) \| (.+) \|$", re.MULTILINE)


def documented() -> dict[str, str]:
    """The variables in the README's table, with their defaults."""
    return {name: default for name, default, _ in ROW.findall(README)}


def test_every_setting_is_documented_and_nothing_else() -> None:
    assert list(documented()) == sorted(documented(), key=list(documented()).index)
    assert set(documented()) == {name.upper() for name in Settings.model_fields}


@pytest.mark.parametrize("name", Settings.model_fields)
def test_a_documented_default_is_the_default(name: str) -> None:
    default = Settings.model_fields[name].default
    said = documented()[name.upper()]
    if isinstance(default, bool):
        assert said == f"`{str(default).lower()}`"
    elif isinstance(default, int | float):
        assert said == f"`{default:g}`"
    elif isinstance(default, str):
        assert said == f"`{default}`"
    else:
        assert not said.startswith("`"), "what has no fixed default is described, not quoted"


PAGES = [
    *(path.name for path in sorted(ROOT.glob("*.md"))),
    *(f"docs/{path.name}" for path in sorted(ROOT.glob("docs/*.md"))),
]


def test_every_command_is_told_of() -> None:
    text = "".join((ROOT / path).read_text() for path in PAGES)
    assert {name for name in COMMANDS if f"poolsweep {name}" not in text} == set()


@pytest.mark.parametrize("path", PAGES)
def test_every_command_that_is_named_exists(path: str) -> None:
    text = (ROOT / path).read_text()
    code = re.findall(r"^```.*?^```$", text, re.MULTILINE | re.DOTALL)
    inline = re.findall(r"`([^`\n]+)`", re.sub(r"^```.*?^```$", "", text, flags=re.M | re.S))
    used = set(re.findall(r"^(?:\w+=\S+ )*poolsweep ([a-z]+)", "\n".join([*code, *inline]), re.M))
    assert used <= set(COMMANDS)
    for module in set(re.findall(r"python3? -m ([a-z_.]+)", text)) - {"venv"}:
        assert (ROOT / f"{module.replace('.', '/')}.py").exists(), module
    for target in re.findall(r"\]\(([^)#]+)\)", text):
        if "://" not in target:
            assert ((ROOT / path).parent / target).exists(), target


# docker-compose.yml


def compose() -> dict[str, Any]:
    document: dict[str, Any] = yaml.safe_load((ROOT / "docker-compose.yml").read_text())
    return document


def test_the_deployment_has_a_lasting_redis_that_is_waited_for() -> None:
    redis = compose()["services"]["redis"]
    assert "--appendonly" in redis["command"]
    assert redis["healthcheck"]["test"] == ["CMD", "redis-cli", "ping"]
    (volume,) = redis["volumes"]
    assert volume.split(":")[0] in compose()["volumes"]
    assert redis["command"][redis["command"].index("--appendfsync") + 1] == "always"
    for name in ("worker", "scheduler", "intake", "review"):
        waits_for = compose()["services"][name]["depends_on"]
        assert waits_for == {"redis": {"condition": "service_healthy"}}


@pytest.mark.parametrize("name", ["worker", "scheduler", "intake", "review"])
def test_a_service_runs_a_command_with_settings_that_exist(name: str) -> None:
    service = compose()["services"][name]
    assert service["command"][0] == name
    assert name in COMMANDS
    for variable in service["environment"]:
        assert variable.removeprefix(ENV_PREFIX).lower() in Settings.model_fields


def test_the_files_that_the_deployment_starts_from_are_there() -> None:
    copied = re.findall(
        r"^#   cp (?:-r )?(\S+)", (ROOT / "docker-compose.yml").read_text(), re.MULTILINE
    )
    assert len(copied) == 2
    assert [path for path in copied if not (ROOT / path).exists()] == []


def given_by_compose(name: str, url: str, ports: dict[str, str]) -> dict[str, str]:
    """A service's environment, with the examples as `.env` and as the folder of configuration."""
    lines = (ROOT / "examples/poolsweep.env").read_text().splitlines()
    filled_in = dict(line.split("=", 1) for line in lines if re.match(r"\w", line))
    filled_in |= {"POOLSWEEP_AK": "an-access-key", "POOLSWEEP_SK": "its-secret"}
    environment = {}
    for variable, value in compose()["services"][name]["environment"].items():
        text = re.sub(r"\$\{(\w+):-(.*?)\}", lambda m: filled_in.get(m[1]) or m[2], str(value))
        text = text.replace("redis://redis:6379/0", url)
        text = text.replace("/etc/poolsweep", str(ROOT / "examples/deployment"))
        environment[variable] = ports.get(text, text)
    return environment


@pytest.mark.parametrize("name", ["worker", "scheduler", "intake", "review"])
def test_a_service_comes_up_with_the_example_files(
    name: str, redis_url: str, tmp_path: Path
) -> None:
    service = compose()["services"][name]
    ports = {port: str(free_port()) for port in ("9464", "8080", "8081")}
    *_, program = service["healthcheck"]["test"]
    program = re.sub(r"(?<=127\.0\.0\.1:)\d+", lambda m: ports[m[0]], program)

    def healthy() -> bool:
        command = [sys.executable, "-c", program]
        return subprocess.run(command, capture_output=True, check=False).returncode == 0

    log = tmp_path / "log"
    with log.open("wb") as out:
        process = subprocess.Popen(
            [Path(sys.executable).with_name("poolsweep"), *service["command"]],
            cwd="/",
            env=given_by_compose(name, redis_url, ports),
            stdout=out,
            stderr=out,
        )
    try:
        eventually(lambda: process.poll() is not None or healthy())
        assert process.poll() is None, log.read_text()
        process.terminate()
        assert process.wait(30) == 0
    finally:
        process.kill()


def test_the_image_is_a_plain_install_that_runs_as_nobody_special() -> None:
    lines = (ROOT / "Dockerfile").read_text()
    assert "pip install --no-cache-dir --constraint constraints.txt ." in lines
    assert 'ENTRYPOINT ["poolsweep"]' in lines
    assert re.search(r"^USER (?!root)\w+$", lines, re.MULTILINE)


@pytest.mark.parametrize("name", ["constraints.txt", "pyproject.toml"])
def test_no_address_of_a_download_is_pinned(name: str) -> None:
    text = (ROOT / name).read_text()
    assert "://" not in text
    assert "--hash" not in text


def canonical(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def test_every_dependency_is_pinned() -> None:
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    pinned = {canonical(line.split("==")[0]) for line in lines}
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    wanted = [*project["dependencies"], *project["optional-dependencies"]["dev"]]
    names = [re.match(r"[A-Za-z0-9._-]+", requirement) for requirement in wanted]
    assert {canonical(name[0]) for name in names if name} <= pinned
