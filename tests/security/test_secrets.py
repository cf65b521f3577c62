"""Secrets of every kind are used all the way, at log level debug, and are seen nowhere."""

from __future__ import annotations

import base64
from typing import TYPE_CHECKING

import pytest

from tests.security.conftest import EVIL, Secrets, seen_in, spellings

if TYPE_CHECKING:
    from tests.security.conftest import Scene

NAMES = [name for name in Secrets.__dataclass_fields__ if name != "webhook"]
"""All but what a client puts into the URL of its webhook, which Redis holds until it is told."""


@pytest.mark.parametrize("name", NAMES)
def test_no_secret_is_in_anything_that_was_written(scene: Scene, name: str) -> None:
    secret = scene.secrets.all()[name]
    files = [path for part in ("logs", "tmp", "redis") for path in (scene.folder / part).rglob("*")]
    texts = [path.read_bytes().decode(errors="replace") for path in files if path.is_file()]
    assert len(texts) >= 8  # logs, the append-only file, and Redis' users
    for where in (texts, scene.outputs, scene.redis_while_running, scene.redis_afterwards):
        assert where
        assert not seen_in(where, secret)


@pytest.mark.parametrize("name", [*NAMES, "webhook"])
def test_no_secret_is_in_the_command_line_of_a_process(scene: Scene, name: str) -> None:
    assert any("scheduler.cli\nworker" in each for each in scene.commands)
    assert not seen_in(scene.commands, scene.secrets.all()[name])


def test_the_secrets_were_used(scene: Scene) -> None:
    secrets = scene.secrets
    assert {f"/hook/{secrets.webhook}", f"/{secrets.channel}"} <= set(scene.receiver.paths)
    assert ("POST", "/v3/auth/tokens") in scene.journal
    for project in (scene.by_iam, scene.by_token, scene.by_key):
        assert "DELETE" in {method for method, path in scene.journal if project.project in path}
    with scene.redis.looker() as client:
        assert any(each["username"] == "poolsweep" for each in scene.refused_by_redis)
        assert client.acl_getuser("poolsweep")["passwords"]


@pytest.mark.parametrize("secret", ["abc", "abcd", "abcde", "s3cret-one", "s3cret-two!"])
def test_a_secret_is_found_wherever_it_is(secret: str) -> None:
    for before in range(4):
        text = base64.b64encode(b"x" * before + secret.encode() + b"yz").decode()
        assert any(each in text for each in spellings(secret))
    assert seen_in(["nothing", f"a {secret}"], secret)
    assert not seen_in(["nothing"], secret)


def test_a_clients_webhook_is_in_no_log(scene: Scene) -> None:
    logs = [path.read_text() for path in scene.logs.iterdir()]
    assert not seen_in([*logs, *scene.outputs], scene.secrets.webhook)


def test_a_clients_webhook_is_not_in_redis_once_it_has_been_told(scene: Scene) -> None:
    assert not seen_in(scene.redis_afterwards, scene.secrets.webhook)


def test_no_name_from_the_cloud_breaks_a_line_of_a_log(scene: Scene) -> None:
    for name, process in scene.processes.items():
        lines = process.text.splitlines()
        assert len(lines) > 20, name
        # Each line is one object, and none of a name's own is among them.
        assert len(process.events()) == len(lines) == len(process.text.split("\n")) - 1
        assert not process.events("forged")
        assert process.output == ""
        assert all(line.isprintable() for line in lines)


def test_no_name_from_the_cloud_reaches_an_export_as_it_is(scene: Scene) -> None:
    assert "forged" in EVIL
    assert [text for text in scene.outputs if "forged" in text]
    for text in scene.outputs:
        assert all(line.isprintable() for line in text.split("\n"))


def test_no_message_but_json_is_taken_and_none_is_executed(scene: Scene) -> None:
    assert not scene.pwned.exists()
    refused = scene.processes["intake"].events("message_refused")
    for kind in ("pickle", "yaml"):
        assert any(kind in each["reason"] for each in refused)
        assert f"untrusted content of type {kind}" in scene.processes["worker"].text
