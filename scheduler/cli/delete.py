"""`poolsweep delete`: pools by name, from a list or by a selector, previewed first."""

from __future__ import annotations

import asyncio
import json
import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from scheduler.cli.errors import UsageError
from scheduler.cli.on_demand import Terms, brakes_of, carry_out, one_endpoint, plan_over
from scheduler.cli.projects import project_id
from scheduler.cli.selector import selector
from scheduler.cli.session import open_ledger, say
from scheduler.pool_list import LARGEST, Form, form_of, parse
from scheduler.selection import matching, named
from scheduler.sweep import Office, plan_project
from worker.modelarts import validate_pool_name
from worker.projects import Directory
from worker.settings import settings

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from scheduler.matchers import Matcher
    from scheduler.pool_list import ProjectOf
    from scheduler.selection import Rules

    Names = Mapping[str, Sequence[str]]

STDIN = "-"

Yes = Annotated[bool, typer.Option("--yes", help="Do not ask: for programs.")]
Verify = Annotated[
    bool, typer.Option(help="Wait until the pools are seen to be gone, or end when accepted.")
]
Wait = Annotated[
    bool,
    typer.Option(
        "--wait/--detach", help="Follow the run to its end, or print its id and leave it to others."
    ),
]


def delete(
    pools: Annotated[
        list[str] | None,
        typer.Argument(metavar="POOL", help="Pool ids (metadata.name), or project/pool."),
    ] = None,
    source: Annotated[
        str | None,
        typer.Option("--from", metavar="FILE", help="A list of pools; - is standard input."),
    ] = None,
    form: Annotated[
        Form | None, typer.Option("--format", help="How the list is written, if it is not plain.")
    ] = None,
    project: Annotated[
        list[str] | None,
        typer.Option(help="A project, by id or by its name in the projects file; repeatable."),
    ] = None,
    tag: Annotated[
        list[str] | None, typer.Option(metavar="KEY[=VALUE]", help="With this tag; repeatable.")
    ] = None,
    older_than: Annotated[
        str | None, typer.Option(metavar="DURATION", help="Created so long ago, such as 30d.")
    ] = None,
    name: Annotated[
        str | None, typer.Option(metavar="GLOB", help="Whose name or id fits, such as 'tmp-*'.")
    ] = None,
    expired: Annotated[
        bool, typer.Option("--expired", help="Whose tag expires-at has passed.")
    ] = False,
    idle: Annotated[
        str | None, typer.Option(metavar="DURATION", help="Seen without workloads for so long.")
    ] = None,
    match: Annotated[
        str | None, typer.Option(metavar="YAML", help="Any matcher, as policies have it.")
    ] = None,
    allow_busy: Annotated[
        bool, typer.Option("--allow-busy", help="By selector: pools with running workloads too.")
    ] = False,
    allow_shared: Annotated[
        bool, typer.Option("--allow-shared", help="By selector: shared and public pools too.")
    ] = False,
    max_deletions: Annotated[
        int | None, typer.Option(min=0, help="More deletions than this: none is made.")
    ] = None,
    max_percent: Annotated[
        float | None,
        typer.Option(min=0, max=100, help="A larger share of a project's pools: none goes."),
    ] = None,
    max_failures: Annotated[
        int | None, typer.Option(min=0, help="More failures than this: the rest stops.")
    ] = None,
    max_failure_percent: Annotated[
        float | None, typer.Option(min=0, max=100, help="A larger share failed: the rest stops.")
    ] = None,
    reason: Annotated[str, typer.Option(help="Why, for the record.")] = "",
    yes: Yes = False,
    verify: Verify = True,
    wait: Wait = True,
) -> None:
    """Delete pools by name, from a list or by a selector: shown first, then asked.

    Exit codes: 0 all gone, 1 some failed, 2 the request cannot be used, 3 braked or refused,
    4 Redis or the cloud cannot be reached.
    """
    chosen = selector(
        tags=tag or (),
        older_than=older_than,
        name=name,
        expired=expired,
        idle=idle,
        match=match,
    )
    directory = Directory.of(settings())
    projects = list(dict.fromkeys(project_id(directory, text) for text in project or ()))
    names: Names | None = None
    if chosen is None:
        names = _names(pools or (), source, form, directory, projects)
        if not names:
            say("Nothing to delete: the list names no pools.")
            return
    elif pools or source is not None:
        raise UsageError(
            "POOL, --from: pools are named and selected at once; accepted: either names or a "
            "selector such as --tag."
        )
    elif not projects:
        raise UsageError("--project: not given; accepted: the projects to select pools in.")
    count = None if names is None else sum(map(len, names.values()))
    terms = Terms(
        brakes=brakes_of(
            count,
            max_deletions=max_deletions,
            max_percent=max_percent,
            max_failures=max_failures,
            max_failure_percent=max_failure_percent,
        ),
        named=names is not None,
        reason=reason,
        yes=yes,
        verify=verify,
        wait=wait,
        selector="" if chosen is None else _record(chosen, projects),
    )
    if chosen is None:
        code = asyncio.run(_delete_named(directory, names or {}, terms))
    else:
        rules = matching(chosen, allow_busy=allow_busy, allow_shared=allow_shared)
        code = asyncio.run(_delete_selected(directory, projects, rules, terms))
    if code:
        raise typer.Exit(code)


async def _delete_named(directory: Directory, names: Names, terms: Terms) -> int:
    async with open_ledger(directory.settings) as (redis, ledger):
        office = Office(directory, redis, ledger)
        one_endpoint(office, list(names))
        now = datetime.now(UTC)
        plans = await plan_over(
            list(names),
            lambda project: plan_project(
                office, project, named(names[project]), now, named=names[project]
            ),
        )
        return await carry_out(office, plans, terms)


async def _delete_selected(
    directory: Directory, projects: Sequence[str], rules: Rules, terms: Terms
) -> int:
    async with open_ledger(directory.settings) as (redis, ledger):
        office = Office(directory, redis, ledger)
        one_endpoint(office, projects)
        now = datetime.now(UTC)
        plans = await plan_over(projects, lambda project: plan_project(office, project, rules, now))
        return await carry_out(office, plans, terms)


def _record(chosen: Matcher, projects: Sequence[str]) -> str:
    """What pools are chosen by in each project, as the ledger holds it."""
    form = chosen.model_dump(mode="json", by_alias=True, exclude_unset=True)
    return json.dumps(dict.fromkeys(projects, form), ensure_ascii=False)


def _names(
    pools: Sequence[str],
    source: str | None,
    form: Form | None,
    directory: Directory,
    projects: Sequence[str],
) -> Names:
    """The pools that are named, by project: each once."""
    if not pools and source is None:
        raise UsageError(
            "POOL: no pools are named or selected; accepted: pool ids, --from FILE, or a selector "
            "such as --tag; see `poolsweep delete --help`."
        )

    def project_of(text: str) -> str:
        if not text:
            if len(projects) == 1:
                return projects[0]
            raise ValueError("no project is named; accepted: project/pool, or one --project")
        found = directory.find(text)
        if projects and found not in projects:
            raise ValueError(f"project {text!r} is not among those of --project")
        return found

    found: dict[str, dict[str, None]] = {}
    for text in pools:
        project, _, pool = text.rpartition("/")
        try:
            pool = validate_pool_name(pool)
            found.setdefault(project_of(project), {})[pool] = None
        except ValueError as error:
            raise UsageError(f"POOL {text!r}: {error}") from None
    if source is not None:
        for project, listed in _listed(source, form, project_of).items():
            found.setdefault(project, {}).update(dict.fromkeys(listed))
    return {project: list(each) for project, each in found.items()}


def _listed(source: str, form: Form | None, project_of: ProjectOf) -> Mapping[str, Iterable[str]]:
    name = "standard input" if source == STDIN else source
    try:
        if source == STDIN:
            raw = sys.stdin.buffer.read(LARGEST + 1)
        else:
            with Path(source).open("rb") as file:
                raw = file.read(LARGEST + 1)
    except OSError as error:
        raise UsageError(
            f"--from: {name} cannot be read: {error.strerror}; accepted: a file, or - for standard "
            "input."
        ) from None
    file_name = "" if source == STDIN else source
    found = parse(raw, form or form_of(file_name, raw), project_of)
    if said := found.sentences(name):
        raise UsageError("--from: " + "\n".join(said))
    return found.pools
