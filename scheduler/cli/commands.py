"""The commands, and how they end: trouble is told in one sentence, without a traceback.

A command's module is imported when the command is called or its help is shown, since all of them
together take most of a second: the pattern of "lazy loading" in Click's documentation.
"""

from __future__ import annotations

import os
import pkgutil
import signal
import sys
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer
from typer.core import TyperCommand, TyperGroup
from typer.main import get_group

from scheduler.cli.outcome import EXIT_INTERRUPTED, EXIT_PIPE, EXIT_USAGE
from worker.garbage import collect_seldom

if TYPE_CHECKING:
    from types import FrameType

_INTERRUPTS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)

PANELS = {
    "Delete pools": {
        "delete": "scheduler.cli.delete:delete",
        "plan": "scheduler.cli.policies:plan",
        "sweep": "scheduler.cli.policies:sweep",
        "retry": "scheduler.cli.retry:retry",
    },
    "See what happened": {
        "runs": "scheduler.cli.results:runs",
        "watch": "scheduler.cli.watch:watch",
        "results": "scheduler.cli.results:results",
        "report": "scheduler.cli.report:report",
        "requests": "scheduler.cli.requests:requests",
        "schedule": "scheduler.cli.schedule:schedule",
        "marks": "scheduler.cli.vetoes:marks",
    },
    "Hold things back": {
        "pause": "scheduler.cli.control:pause",
        "resume": "scheduler.cli.control:resume",
        "cancel": "scheduler.cli.control:cancel",
        "keep": "scheduler.cli.vetoes:keep",
    },
    "Run it as a service": {
        "worker": "scheduler.cli.worker:worker",
        "scheduler": "scheduler.cli.schedule:scheduler",
        "intake": "scheduler.cli.intake:intake",
        "review": "scheduler.cli.review:review",
    },
    "Set it up, and try it out": {
        "policy": "scheduler.cli.policy_files:policy_app",
        "token": "scheduler.cli.token:token",
        "sandbox": "sandbox.command:sandbox",
        "demo": "scheduler.cli.demo:demo",
    },
}
"""Where each command is, a function or an app of several, in the order of the help."""
COMMANDS = {name: where for panel in PANELS.values() for name, where in panel.items()}
EXAMPLES = {
    "delete": (
        "poolsweep delete --project PROJECT POOL POOL",
        "poolsweep delete --project PROJECT --from pools.txt",
        "poolsweep delete --project PROJECT --tag env=dev --older-than 30d",
    ),
    "plan": (
        "poolsweep plan policies.yaml --only nightly --kept",
        "poolsweep plan policies.yaml --json > plan.json",
    ),
    "sweep": (
        "poolsweep sweep policies.yaml --only nightly",
        "poolsweep sweep policies.yaml --plan plan.json",
    ),
    "retry": ('poolsweep retry RUN --reason "the lock is gone"',),
    "results": (
        "poolsweep results RUN --outcome failed",
        "poolsweep results RUN --kept",
        "poolsweep results RUN --csv > jobs.csv",
    ),
    "report": (
        "poolsweep report RUN",
        "poolsweep report --since 7d --prices prices.yaml",
        "poolsweep report --since 7d --html week.html",
    ),
    "pause": ('poolsweep pause --project PROJECT --reason "a migration"',),
    "keep": (
        'poolsweep keep POOL --project PROJECT --until 30d --reason "still training"',
        "poolsweep keep POOL --project PROJECT --release",
    ),
}
"""How commands are called that have several ways to be."""


class _LazyGroup(TyperGroup):
    def __init__(self, **attributes: Any) -> None:
        super().__init__(**attributes)
        # The names are enough for typer to find and to suggest a command.
        self.commands.update((name, TyperCommand(name)) for name in COMMANDS)

    def get_command(self, ctx: object, cmd_name: str) -> Any:
        """The command with this name, imported now; None: there is none."""
        if cmd_name not in COMMANDS:
            return None
        found = pkgutil.resolve_name(COMMANDS[cmd_name])
        examples = EXAMPLES.get(cmd_name, ())
        holder = typer.Typer()
        (panel,) = (title for title, commands in PANELS.items() if cmd_name in commands)
        if isinstance(found, typer.Typer):
            holder.add_typer(found, name=cmd_name, rich_help_panel=panel)
        else:
            holder.command(
                cmd_name,
                help=_unwrapped(found.__doc__ or ""),
                epilog="\n\n".join(("For example:", *examples)) if examples else None,
                rich_help_panel=panel,
            )(found)
        return get_group(holder).commands[cmd_name]


def _unwrapped(text: str) -> str:
    """A docstring with each paragraph on one line, so that it is wrapped to the terminal alone."""
    return "\n\n".join(" ".join(part.split()) for part in text.split("\n\n"))


app = typer.Typer(
    name="poolsweep",
    cls=_LazyGroup,
    help="Delete ModelArts resource pools in bulk: previewed, rate limited, retried, recorded.",
    context_settings={"help_option_names": ["-h", "--help"]},
)


@app.callback(invoke_without_command=True)
def _root(
    context: typer.Context,
    show_version: Annotated[
        bool, typer.Option("--version", help="Show the version and exit.")
    ] = False,
) -> None:
    if show_version:
        # Only this needs it, and it takes as long as typer.
        from importlib.metadata import version

        sys.stdout.write(f"poolsweep {version('poolsweep')}\n")
        raise typer.Exit
    if context.invoked_subcommand is None:
        typer.echo(context.get_help())
        raise typer.Exit(EXIT_USAGE)
    _heed_interrupts()


def _heed_interrupts() -> None:
    """Ends the command in order when it is interrupted, from now on, when it is loaded."""
    if signal.getsignal(signal.SIGINT) is not signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    for number in (signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, _interrupt)


def run() -> NoReturn:
    """Run the command line and exit."""
    collect_seldom()
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
    except Exception as error:
        # It imports what every command can raise: not before something was raised.
        from scheduler.cli.trouble import code_of, sentence_of

        sentence = sentence_of(error)
        if sentence is None:
            raise
        sys.stderr.write(f"poolsweep: {sentence}\n")
        return code_of(error)
    return int(code)
