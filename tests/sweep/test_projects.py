"""Projects with an endpoint, credentials and limits of their own; secrets that stay secret."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

import pytest

from scheduler.marks import Vetoes
from tests.cli.conftest import one_sentence
from tests.sweep.conftest import QUICK, REFUSED, Operator, Project, Sandbox, serving, working
from worker import embedded_redis

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from redis.asyncio import Redis

TOKEN = "t0p-secret-of-the-north"
AK, SK = "ACCESSKEYOFTHESOUTH", "s3cret-key-of-the-south"
RATE = 20


@pytest.fixture(scope="module")
def north() -> Iterator[Sandbox]:
    with serving(token=TOKEN, ak="NOBODY", sk="nothing") as running:
        yield running


@pytest.fixture(scope="module")
def south() -> Iterator[Sandbox]:
    with serving(token="nothing", ak=AK, sk=SK) as running:
        yield running


@pytest.fixture
def dan(tmp_path: Path) -> Iterator[Operator]:
    """Somebody with a Redis of his own, no endpoint and no credentials but his projects'."""
    with embedded_redis.join(tmp_path / "state") as server:
        secrets = tmp_path / "secrets"
        secrets.mkdir()
        (secrets / "sk").write_text(f"{SK}\n")
        settings = QUICK | {"RATE_LIMIT": "0", "REDIS_URL": server.url}
        settings |= {"TEST_NORTH_TOKEN": TOKEN, "TEST_SOUTH_AK": AK}
        yield Operator(tmp_path, settings, policies=tmp_path / "policies.yaml")


def projects_of(dan: Operator, north: Project, south: Project) -> dict[str, Any]:
    """The two projects as a policy file has them."""
    return {
        "north": {
            "id": north.project,
            "endpoint": north.url,
            "credentials": {"token": {"env": "POOLSWEEP_TEST_NORTH_TOKEN"}},
        },
        "south": {
            "id": south.project,
            "endpoint": south.url,
            "credentials": {
                "ak": {"env": "POOLSWEEP_TEST_SOUTH_AK"},
                "sk": {"file": str(dan.state_dir / "secrets" / "sk")},
            },
            "rate_limit": RATE,
            "rate_burst": 1,
        },
    }


async def _everything(redis: Redis) -> str:
    """All that is in Redis."""
    keys = [key async for key in redis.scan_iter()]
    return str([(key, await _value(redis, key)) for key in keys])


async def _value(redis: Redis, key: Any) -> Any:
    match await redis.type(key):
        case "string":
            return await redis.get(key)
        case "hash":
            return await redis.hgetall(key)
        case "set":
            return await redis.smembers(key)
        case "zset":
            return await redis.zrange(key, 0, -1)
        case "list":
            return await redis.lrange(key, 0, -1)
        case "none":
            return None  # it has gone since it was found
        case other:
            raise AssertionError(f"{key!r} is a {other!r}")


def test_a_project_is_paused_by_its_id_whatever_the_files_say(
    dan: Operator, south: Sandbox, tmp_path: Path
) -> None:
    project = south.project().project
    broken = tmp_path / "broken.yaml"
    broken.write_text("projects: [broken")
    for command, told in (("pause", f"Project {project} is paused"), ("resume", "Nothing is")):
        ended = dan.run(command, "--project", project, PROJECTS_FILE=str(broken))
        assert (ended.code, ended.err) == (0, "")
        assert told in ended.out
    named = dan.run("pause", "--project", "south", PROJECTS_FILE=str(broken))
    assert named.code == 2
    assert "broken.yaml" in named.err


def test_a_project_is_paused_and_its_pools_are_kept_by_its_name_in_the_file(
    dan: Operator, north: Sandbox, south: Sandbox
) -> None:
    up, down = north.project(), south.project()
    path = dan.writes(projects_of(dan, up, down), expired={})
    (pool,) = down.add()

    def said(*command: str) -> str:
        ended = dan.run(*command, "--project", "south", POLICIES_FILE=path)
        assert ended.code == 0, ended.err
        return ended.out

    assert f"Project {down.project} is paused" in said("pause")
    assert "paused" not in said("resume").replace("Nothing is paused", "")
    assert f"{pool} at {south.url}: " in said("keep", pool)

    async def kept(redis: Redis) -> bool:
        return pool in await Vetoes(redis, south.url).of(down.project, datetime.now(UTC))

    assert dan.ask(kept)


def test_projects_at_two_endpoints_are_swept_by_one_worker_each_in_its_own_way(
    dan: Operator, north: Sandbox, south: Sandbox
) -> None:
    up, down = north.project(), south.project()
    cold, warm = up.add(8), down.add(8)
    (vetoed,) = down.add()
    path = dan.writes(
        projects_of(dan, up, down), expired={"allow_busy": True, "brakes": {"max_percent": 100}}
    )
    said = dan.run("keep", vetoed, "--project", down.project, POLICIES_FILE=path)
    assert f"{vetoed} at {south.url}: " in said.out, "where the policy looks"
    with working(dan, north.url, south.url, PROJECTS_FILE=path):
        ended = dan.run("sweep", path, "--yes", LOG_LEVEL="debug")
        assert ended.code == 0, ended.out + ended.err
        text = dan.ask(_everything)
    assert set(up.deletes()) == set(cold)
    assert set(down.deletes()) == set(warm)
    assert (up.there(), down.there()) == (set(), {vetoed})
    assert {run.endpoint for run in dan.runs().values()} == {north.url, south.url}
    # With nothing saved up, calls of a limited project are never closer together than this.
    times = sorted(at for at, _ in down.calls("DELETE"))
    assert times[-1] - times[0] >= (len(times) - 2) / RATE
    logs = "".join(log.read_text() for log in dan.state_dir.glob("*.log"))
    assert cold[0] in logs
    assert cold[0] in text
    for secret in (TOKEN, SK):
        assert secret not in text
        assert secret not in logs
        assert secret not in ended.out + ended.err


def test_a_secret_that_is_missing_is_told_in_one_sentence(
    dan: Operator, north: Sandbox, south: Sandbox
) -> None:
    up, down = north.project(), south.project()
    up.add()
    path = dan.writes(projects_of(dan, up, down), expired={"projects": ["south"]})
    (dan.state_dir / "secrets" / "sk").unlink()
    plan = dan.run("plan", path)
    worker = dan.run("worker", PROJECTS_FILE=path)
    for ended in (plan, worker):
        said = one_sentence(ended)
        assert str(dan.state_dir / "secrets" / "sk") in said
        assert "cannot be read" in said
        assert ended.code == REFUSED
        assert TOKEN not in ended.out + ended.err
        assert AK not in ended.out + ended.err
    assert up.written() | down.written() == set()


def test_a_secret_in_the_file_itself_is_refused_and_not_repeated(
    dan: Operator, north: Sandbox, south: Sandbox
) -> None:
    up, down = north.project(), south.project()
    projects = projects_of(dan, up, down)
    projects["north"]["credentials"] = {"token": TOKEN}
    projects["south"]["credentials"]["sk"] = {"env": "X", "value": SK}
    path = dan.writes(projects, expired={})
    check, worker = dan.together(("policy", "check", path), ("worker",), PROJECTS_FILE=path)
    for ended in (check, worker):
        assert ended.code == REFUSED
        assert "a secret is not written here; accepted: {env: NAME} or {file: PATH}" in ended.err
        assert "policies.yaml:" in ended.err
        assert TOKEN not in ended.out + ended.err
        assert SK not in ended.out + ended.err
        assert "Traceback" not in ended.err
