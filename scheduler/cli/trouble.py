"""What the user is told about an error, whichever command raised it."""

from __future__ import annotations

import typer
from redis.exceptions import RedisError

from scheduler.children import ChildError
from scheduler.cli.errors import UnreachableError, UsageError, usage_sentence
from scheduler.cli.outcome import EXIT_UNREACHABLE, EXIT_USAGE
from scheduler.plan_file import PlanFileError
from worker.embedded_redis import EmbeddedRedisError
from worker.ledger import RunNotFoundError
from worker.modelarts import ApiError, AuthError
from worker.settings import SettingsError
from worker.yaml_source import YamlError

_TOLD_AS_THEY_ARE = (
    UsageError,
    UnreachableError,
    SettingsError,
    EmbeddedRedisError,
    RunNotFoundError,
    ApiError,
    AuthError,
    ChildError,
    PlanFileError,
    YamlError,
)


def sentence_of(error: Exception) -> str | None:
    """One sentence for the user; None: the error is a defect of the program, not the user's.

    Args:
        error: what a command raised.
    """
    if isinstance(error, typer.TyperException):
        return usage_sentence(error)
    if isinstance(error, RedisError):
        return f"Redis cannot be used: {error}"
    return str(error) if isinstance(error, _TOLD_AS_THEY_ARE) else None


def code_of(error: Exception) -> int:
    """The exit code that goes with an error that the user is told: pure.

    Args:
        error: what a command raised.
    """
    match error:
        case UnreachableError() | RedisError():
            return EXIT_UNREACHABLE
        case ApiError() | AuthError() if error.temporary:
            return EXIT_UNREACHABLE
        case _:
            return EXIT_USAGE
