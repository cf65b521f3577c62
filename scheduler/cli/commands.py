"""The commands, and how they end: trouble is told in one sentence, without a traceback."""

from __future__ import annotations

import os
import signal
import sys
from importlib.metadata import version
from typing import TYPE_CHECKING, Annotated, NoReturn

import typer
from redis.exceptions import RedisError

from sandbox.command import sandbox
from scheduler.children import ChildError
from scheduler.cli import EXIT_INTERRUPTED
from scheduler.cli.control import cancel, pause, resume
from scheduler.cli.delete import delete
from scheduler.cli.demo import demo
from scheduler.cli.errors import UsageError, usage_sentence
from scheduler.cli.policies import plan, policy_app, sweep
from scheduler.cli.results import results, runs
from scheduler.cli.schedule import schedule, scheduler
from scheduler.cli.vetoes import keep, marks
from scheduler.cli.worker import worker
from scheduler.plan_file import PlanFileError
from worker.embedded_redis import EmbeddedRedisError
from worker.ledger import RunNotFoundError
from worker.modelarts import ApiError, AuthError
from worker.settings import SettingsError
from worker.yaml_source import YamlError

if TYPE_CHECKING:
    from types import FrameType

EXIT_USAGE = 2
EXIT_PIPE = 128 + signal.SIGPIPE
_INTERRUPTS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)

app = typer.Typer(
    name="poolsweep",
    help="Delete ModelArts resource pools in bulk: previewed, rate limited, retried, recorded.",
    context_settings={"help_option_names": ["-h", "--help"]},
)
for command in (
    delete,
    plan,
    sweep,
    results,
    runs,
    cancel,
    pause,
    resume,
    marks,
    keep,
    schedule,
    scheduler,
    worker,
    sandbox,
    demo,
):
    app.command()(command)
app.add_typer(policy_app, name="policy")


@app.callback(invoke_without_command=True)
def _root(
    context: typer.Context,
    show_version: Annotated[
        bool, typer.Option("--version", help="Show the version and exit.")
    ] = False,
) -> None:
    if show_version:
        sys.stdout.write(f"poolsweep {version('poolsweep')}\n")
        raise typer.Exit
    if context.invoked_subcommand is None:
        typer.echo(context.get_help())
        raise typer.Exit(EXIT_USAGE)


def run() -> NoReturn:
    """Run the command line and exit."""
    if signal.getsignal(signal.SIGINT) is not signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    for number in (signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, _interrupt)
    try:
        try:
            code = _invoke()
        finally:
            # All is cleaned up: the interpreter's own end shows a traceback if interrupted.
            for number in _INTERRUPTS:
                signal.signal(number, signal.SIG_IGN)
    except KeyboardInterrupt:
        code = EXIT_INTERRUPTED
    sys.exit(code)


def _interrupt(_number: int, frame: FrameType | None) -> None:
    """Ends the command as Ctrl-C does: in order, with what it started."""
    handler = signal.getsignal(signal.SIGINT)
    if not callable(handler):
        raise KeyboardInterrupt
    handler(signal.SIGINT, frame)


def _invoke() -> int:
    try:
        code = app(standalone_mode=False) or 0
        sys.stdout.flush()
    except (SystemExit, BrokenPipeError) as end:
        if isinstance(end, SystemExit) and end.code != 1:
            return int(end.code or 0)  # a worker's
        # typer and rich exit so when the reader of a pipe has gone. What is still buffered for it
        # must not fail once more when the interpreter ends.
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, sys.stdout.fileno())
        return EXIT_PIPE
    except typer.TyperException as error:
        return _fail(usage_sentence(error))
    except RedisError as error:
        return _fail(f"Redis cannot be used: {error}")
    except (
        UsageError,
        SettingsError,
        EmbeddedRedisError,
        RunNotFoundError,
        ApiError,
        AuthError,
        ChildError,
        PlanFileError,
        YamlError,
    ) as error:
        return _fail(str(error))
    return int(code)


def _fail(sentence: str) -> int:
    sys.stderr.write(f"poolsweep: {sentence}\n")
    return EXIT_USAGE
