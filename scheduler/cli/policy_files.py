"""`poolsweep policy`: policy files checked, without what carries them out."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated

import typer

from scheduler import policy
from scheduler.cli.errors import UsageError
from scheduler.cli.session import say
from worker.settings import settings

policy_app = typer.Typer(help="Check policies, or print their schema.", no_args_is_help=True)

File = Annotated[
    Path | None,
    typer.Argument(
        metavar="POLICIES", help="The policy file; without it, POOLSWEEP_POLICIES_FILE."
    ),
]


@policy_app.command()
def check(path: File = None) -> None:
    """Validate a policy file: every mistake at once, each with its line."""
    path = policies_path(path)
    found = policy.load(path)
    counts = f"policies: {len(found.policies)}, projects: {len(found.projects)}"
    say(f"{path}: no mistake; {counts}")


@policy_app.command()
def schema() -> None:
    """Print the JSON Schema of policy files, for editors."""
    sys.stdout.write(json.dumps(policy.json_schema(), indent=1) + "\n")


def policies_path(given: Path | None) -> Path:
    """The policy file to use.

    Raises:
        UsageError: none is named.
    """
    path = given or settings().policies_file
    if path is None:
        raise UsageError(
            "POLICIES: no policy file is named; accepted: a path, here or in "
            "POOLSWEEP_POLICIES_FILE."
        )
    return path
