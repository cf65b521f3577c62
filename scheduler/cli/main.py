"""The commands, and how trouble is told: one sentence, no traceback."""

from __future__ import annotations

import sys
from typing import NoReturn

import typer
from redis.exceptions import RedisError

from sandbox.command import sandbox
from scheduler.children import ChildError
from scheduler.cli.delete import delete
from scheduler.cli.demo import demo
from scheduler.cli.errors import UsageError
from scheduler.cli.results import results, runs
from scheduler.cli.worker import worker
from worker.embedded_redis import EmbeddedRedisError
from worker.ledger import RunNotFoundError
from worker.modelarts import ApiError, AuthError
from worker.settings import SettingsError

EXIT_USAGE = 2
EXIT_INTERRUPTED = 130

app = typer.Typer(
    name="poolsweep",
    help="Delete ModelArts resource pools in bulk: previewed, rate limited, retried, recorded.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
for command in (delete, results, runs, worker, sandbox, demo):
    app.command()(command)


def main() -> NoReturn:
    """Run the command line and exit."""
    try:
        app()
    except KeyboardInterrupt:
        sys.exit(EXIT_INTERRUPTED)
    except RedisError as error:
        _fail(f"Redis cannot be used: {error}")
    except (
        UsageError,
        SettingsError,
        EmbeddedRedisError,
        RunNotFoundError,
        ApiError,
        AuthError,
        ChildError,
    ) as error:
        _fail(str(error))
    sys.exit(0)


def _fail(sentence: str) -> NoReturn:
    sys.stderr.write(f"poolsweep: {sentence}\n")
    sys.exit(EXIT_USAGE)
