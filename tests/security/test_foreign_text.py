"""Text from outside: names that lead elsewhere, escapes, markup."""

from __future__ import annotations

import io
import json
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

import pytest
from pydantic import SecretStr
from rich.console import Console

from sandbox.config import SandboxConfig
from sandbox.server import running_sandbox
from scheduler import policy
from scheduler.intake.request import RequestError, read_request
from scheduler.marks import Mark
from scheduler.pool_list import Form, parse
from scheduler.review import tables
from scheduler.selection import Decision
from tests.modelarts.pool_documents import FULL, TAGS, pool_id, with_value
from tests.security.conftest import EVIL
from worker.ledger import Job, JobState, Kept
from worker.modelarts import (
    Endpoint,
    Pool,
    Precondition,
    Token,
    validate_pool_name,
    validate_project_id,
)
from worker.modelarts.auth import make_authenticator
from worker.modelarts.client import ClientOptions, ModelArtsClient
from worker.yaml_source import YamlError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from rich.console import RenderableType

PROJECT = "0123456789abcdef0123456789abcdef"
POOL = pool_id("pool")
ELSEWHERE = [
    f"../{POOL}",
    f"..%2f{POOL}",
    f"{POOL}/tags",
    f"{POOL}%2ftags",
    f"{POOL}?x=1",
    f"{POOL}#x",
    f"{POOL}\r\nX-Evil: 1",
    f"{POOL}\x00",
    f"{POOL}\u2028",
    POOL.replace("o", "\u043e"),  # Cyrillic
    POOL.replace("l", "\uff4c"),  # full width
    f"\u202e{POOL}",
    POOL.upper(),
]


def by_a_list(name: str) -> None:
    def only(text: str) -> str:
        return validate_project_id(text or PROJECT)

    for form, text in (
        (Form.LINES, name),
        (Form.CSV, f'pool_name\n"{name}"\n'),
        (Form.JSON, json.dumps([name])),
    ):
        found = parse(text.encode(), form, only)
        # What stands around a name may be taken off, as with a comment.
        for pool in (each for pools in found.pools.values() for each in pools):
            assert pool != name
            assert validate_pool_name(pool) == pool


def by_a_request(name: str) -> None:
    document = {"targets": [{"project_id": PROJECT, "pools": [name]}]}
    with pytest.raises(RequestError):
        read_request(json.dumps(document))


def by_a_command(name: str) -> None:
    with pytest.raises(ValueError, match="accepted:"):
        validate_pool_name(name)


@pytest.mark.parametrize("way", [by_a_list, by_a_request, by_a_command])
@pytest.mark.parametrize("name", ELSEWHERE, ids=ascii)
def test_no_way_in_takes_a_name_that_leads_elsewhere(name: str, way: Callable[[str], None]) -> None:
    way(name)


@pytest.mark.parametrize(
    "project", ["..", "a/b", "a%2fb", "a\r\nb", "a\x00", "a?b", "\u0430" * 32, PROJECT + "\n"]
)
def test_no_way_in_takes_a_project_that_leads_elsewhere(project: str) -> None:
    text = json.dumps({"projects": {"p": {"id": project}}, "policies": {}})
    with pytest.raises(YamlError):
        policy.parse(text)
    with pytest.raises(RequestError):
        read_request(json.dumps({"targets": [{"project_id": project, "pools": [POOL]}]}))


async def test_a_pool_whose_id_leads_elsewhere_is_left_alone() -> None:
    """It is set aside as one that cannot be read, and the others are planned for."""
    async with running_sandbox(SandboxConfig(pools=1)) as sandbox:
        (honest,) = sandbox.cloud.projects[sandbox.project_id]
        for name in ELSEWHERE:
            document = with_value("metadata.name", name)
            sandbox.cloud.add(sandbox.project_id, document)
        credentials = Token(SecretStr(sandbox.config.token))
        authenticator = make_authenticator(credentials, None)
        options = ClientOptions()
        async with ModelArtsClient(Endpoint(sandbox.url), authenticator, options) as client:
            listing = await client.list_pools(sandbox.project_id)
        assert [pool.pool_id for pool in listing.pools] == [honest]
        assert len(listing.unreadable) >= len(ELSEWHERE)


# On a terminal

MARKUP = "[red]no[/red][link=http://x]click[/link][/][bold"
NOW = datetime(2026, 1, 2, tzinfo=UTC)


def texts(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Where in a document there are texts."""
    if isinstance(value, str):
        yield path
    elif isinstance(value, dict | list):
        for key, part in value.items() if isinstance(value, dict) else enumerate(value):
            yield from texts(part, (*path, key))


def odd_pool(text: str) -> Pool:
    """A pool with a text wherever it has one, also in its tags."""
    raw = json.loads(json.dumps(FULL))
    for path in list(texts(raw)):
        part = raw
        for key in path[:-1]:
            part = part[key]
        part[path[-1]] = text
    raw["metadata"]["annotations"][TAGS] = json.dumps({text: text})
    return Pool.parse(raw)


def shown(table: RenderableType, width: int) -> str:
    """What a terminal gets, but for the colours of our own."""
    out = io.StringIO()
    Console(file=out, width=width, force_terminal=True, color_system=None).print(table)
    return out.getvalue()


def every_table(text: str) -> list[RenderableType]:
    """All tables that show something from outside."""
    pool = odd_pool(text)
    job = Job(
        run_id="run",
        number=0,
        project_id=PROJECT,
        pool_name=text,
        display_name=text,
        created="",
        fingerprint="",
        chosen=text,
        check_nodes=False,
        state=JobState.FAILED,
        reason=text,
        due_ms=0,
        blocked_ms=0,
        done_ms=0,
        attempts=(),
    )
    mark = Mark(PROJECT, text, text, "expired", Precondition.of(pool), NOW, NOW, text)
    return [
        tables.decisions([Decision(pool, delete=False, reason=text)], NOW),
        tables.kept([Decision(pool, delete=False, reason=text)]),
        tables.kept_pools([Kept(PROJECT, text, text, text)]),
        tables.jobs([job]),
        tables.failures([job]),
        tables.marks([mark]),
    ]


@pytest.mark.parametrize("width", [80, 2_000])
def test_a_terminal_is_shown_no_markup_and_no_escapes_of_others(width: int) -> None:
    for table in every_table(MARKUP):
        seen = shown(table, width)
        assert "\x1b" not in seen
        # It is there as it was written, though perhaps broken into lines.
        assert "[red]" in seen
        assert "[bold" in seen


@pytest.mark.parametrize("width", [80, 2_000])
def test_a_terminal_gets_no_control_character_of_a_pool(width: int) -> None:
    for table in every_table(EVIL):
        seen = shown(table, width)
        assert all(character.isprintable() or character == "\n" for character in seen)
