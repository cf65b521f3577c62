"""What the user asked for cannot be done, in one sentence."""

from __future__ import annotations

import typer
from pydantic import ValidationError


class UsageError(ValueError):
    """The text is one sentence naming the field, its value and what is accepted."""


class UnreachableError(RuntimeError):
    """What a command works with does not answer; the text is one sentence."""


def usage_sentence(error: typer.TyperException) -> str:
    """One sentence for what typer refuses, which it would show as a box of several lines.

    Args:
        error: a missing argument, an unknown option, a value out of range, and the like.
    """
    cause = error.__cause__
    if isinstance(error, typer.BadParameter) and isinstance(cause, ValidationError):
        fault = cause.errors(include_url=False)[0]
        field = (error.param.get_error_hint() if error.param else "").replace("'", "")
        message = fault["msg"].removeprefix("Value error, ").rstrip(".")
        if repr(fault["input"]) in message:
            return f"{field}: {message}."
        return f"{field}: {fault['input']!r} is not accepted: {message[:1].lower()}{message[1:]}."
    context = getattr(error, "ctx", None)
    command = context.command_path if context else "poolsweep"
    sentence = error.format_message().rstrip(".")
    return f"{sentence}; see `{command} --help` for what is accepted."
