"""What poolsweep does needs no more than docs/security.md says: of the cloud, Redis, the system."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import redis as sync_redis
import yaml
from redis.backoff import NoBackoff
from redis.retry import Retry

from tests.security.conftest import ACL_FILE, NOWHERE, ROOT

if TYPE_CHECKING:
    from tests.security.conftest import Scene

DOCUMENT = (ROOT / "docs" / "security.md").read_text()
OPERATION = re.compile(r"^\| `(GET|POST|DELETE) (/\S+)` \| `([\w:]+)`", re.MULTILINE)
GRANTED = frozenset(re.findall(r"\+([a-z|]+)", ACL_FILE.read_text().splitlines()[1]))


def documented() -> dict[tuple[str, str], str]:
    """The calls that the page lists, each with its action."""
    return {(method, path): action for method, path, action in OPERATION.findall(DOCUMENT)}


def operation(method: str, path: str) -> tuple[str, str]:
    """A call as the page lists it."""
    plain = re.sub(r"/[0-9a-f]{32}/", "/{project_id}/", path.partition("?")[0])
    return method, re.sub(r"/pools/[^/]+", "/pools/{pool_name}", plain)


# The cloud


def test_every_call_to_the_cloud_is_one_that_is_documented(scene: Scene) -> None:
    made = {operation(*call) for call in scene.journal}
    assert made == set(documented())


def test_the_policy_allows_the_documented_actions_and_nothing_else() -> None:
    policy = json.loads((ROOT / "examples" / "iam-policy.json").read_text())
    assert policy["Version"] == "1.1"
    (statement,) = policy["Statement"]
    assert statement["Effect"] == "Allow"
    actions = set(documented().values()) - {"none"}
    assert set(statement["Action"]) == actions
    assert not [each for each in actions if "*" in each]


# Redis


def test_the_whole_way_needs_no_more_of_redis_than_the_example_grants(scene: Scene) -> None:
    # CLIENT SETINFO, by which libraries tell their names, is let be when it is refused.
    others = [each for each in scene.refused_by_redis if each["object"] != "client"]
    assert not others


METHOD = re.compile(r"\b(?:_?redis|pipe|pipeline|client)\.([a-z_]+)\(")
NO_COMMANDS = {"aclose", "execute", "from_pool", "get_retry", "join", "lock", "monitor", "pipeline"}
NO_COMMANDS |= {"parse_response", "register_script", "set_retry", "url"}
NO_COMMANDS |= {"renew_credentials", "delete_pool", "show_pool"}
NO_COMMANDS |= {"list_pools", "list_nodes", "list_documents", "list_workloads"}
IN_A_SCRIPT = re.compile(r"redis\.p?call\('([A-Z]+)'")


def test_every_command_in_the_code_is_granted() -> None:
    used = set()
    for path in (*ROOT.glob("worker/**/*"), *ROOT.glob("scheduler/**/*")):
        if path.suffix == ".lua":
            used |= {each.lower() for each in IN_A_SCRIPT.findall(path.read_text())}
        elif path.suffix == ".py" and path.name != "embedded_redis.py":
            used |= set(METHOD.findall(path.read_text())) - NO_COMMANDS
    # XGROUP CREATE and the like are methods of their own.
    commands = {each.split("_")[0] for each in used - {"delete"}} | {"del"}
    assert {"zadd", "xreadgroup", "hgetall", "time"} <= commands
    assert commands <= GRANTED


def test_nothing_that_governs_the_server_is_granted() -> None:
    dangerous = {
        "acl",
        "config",
        "debug",
        "eval",
        "flushall",
        "flushdb",
        "keys",
        "migrate",
        "module",
    }
    dangerous |= {"monitor", "replicaof", "restore", "scan", "script", "shutdown", "slaveof"}
    assert "-@all" in ACL_FILE.read_text()
    assert not GRANTED & (dangerous | {"client"})


def test_the_default_user_may_do_nothing(scene: Scene) -> None:
    with (
        sync_redis.Redis(
            unix_socket_path=str(scene.redis.socket), retry=Retry(NoBackoff(), 0)
        ) as client,
        pytest.raises(sync_redis.AuthenticationError),
    ):
        client.ping()


@pytest.mark.parametrize(
    "command",
    [
        ("GET", "another:key"),
        ("SET", "another:key", "1"),
        ("EVALSHA", "0" * 40, "1", "another:key"),
        ("PUBLISH", "another:channel", "hello"),
        ("PSUBSCRIBE", "*"),
        ("FLUSHALL",),
        ("CONFIG", "GET", "requirepass"),
        ("KEYS", "*"),
        ("EVAL", "return 1", "0"),
    ],
    ids=lambda command: " ".join(command[:2]),
)
def test_the_user_of_poolsweep_stays_in_its_place(scene: Scene, command: tuple[str, ...]) -> None:
    with (
        sync_redis.Redis(
            unix_socket_path=str(scene.redis.socket),
            username="poolsweep",
            password=scene.secrets.redis_password,
        ) as client,
        pytest.raises(sync_redis.exceptions.NoPermissionError),
    ):
        client.execute_command(*command)


@pytest.mark.parametrize(
    "command",
    [
        ("XRANGE", "poolsweep:requests", "-", "+"),
        ("XADD", "poolsweep:{runs}:index", "*", "a", "b"),
        ("GET", "poolsweep:{scheduler}:leader"),
        ("LPUSH", "poolsweep:broker:requests", "{}"),
    ],
    ids=lambda command: " ".join(command[:2]),
)
def test_whoever_sends_by_the_stream_may_do_nothing_else(
    scene: Scene, command: tuple[str, ...]
) -> None:
    with (
        sync_redis.Redis(
            unix_socket_path=str(scene.redis.socket),
            username="portal",
            password=scene.secrets.stream_password,
        ) as client,
        pytest.raises(sync_redis.exceptions.NoPermissionError),
    ):
        client.execute_command(*command)


# The system


def test_nothing_is_written_where_a_container_forbids_it(scene: Scene) -> None:
    assert not list(scene.read_only.iterdir())
    assert not NOWHERE.exists()
    # Each writes to what it was given as its output, and to no other file.
    assert {Path(each).parent for each in scene.opened} == {scene.logs}


COMPOSE = yaml.safe_load((ROOT / "docker-compose.yml").read_text())
DOCKERFILE = (ROOT / "Dockerfile").read_text()


@pytest.mark.parametrize("name", COMPOSE["services"])
def test_every_container_is_as_narrow_as_it_can_be(name: str) -> None:
    service: dict[str, Any] = COMPOSE["services"][name]
    assert service["read_only"] is True
    assert service["cap_drop"] == ["ALL"]
    assert "cap_add" not in service
    assert service["security_opt"] == ["no-new-privileges:true"]
    assert not service.get("privileged")
    for key in ("network_mode", "pid", "ipc", "userns_mode"):
        assert service.get(key) != "host"
    for volume in service["volumes"]:
        assert "docker.sock" not in volume
        assert volume.endswith(":ro") or volume.split(":")[0] in COMPOSE["volumes"]
    # Nobody but this machine is let in to anything.
    assert all(port.startswith("127.0.0.1:") for port in service.get("ports", []))
    if "build" not in service:
        assert service["user"] not in {"root", "0"}


def test_the_image_runs_as_a_user_without_a_home_or_a_shell() -> None:
    lines = DOCKERFILE.splitlines()
    (user,) = [line.split()[1] for line in lines if line.startswith("USER ")]
    assert user not in {"root", "0"}
    assert lines.index(f"USER {user}") > max(
        number for number, line in enumerate(lines) if line.startswith(("COPY", "RUN", "ADD"))
    )
    assert f"useradd --system --home-dir {NOWHERE} --shell /usr/sbin/nologin {user}" in DOCKERFILE
    assert not re.search(r"\b(curl|wget|sudo|chmod)\b|^ADD ", DOCKERFILE, re.MULTILINE)


def test_no_secret_is_built_into_the_image() -> None:
    ignored = (ROOT / ".dockerignore").read_text().splitlines()
    assert ignored[0] == "*"  # only what is named is sent to the builder
    assert not [line for line in ignored if line.startswith("!") and (".env" in line)]
    assert not re.search(r"^(ENV|ARG) .*(TOKEN|PASSWORD|SK|SECRET)", DOCKERFILE, re.MULTILINE)
