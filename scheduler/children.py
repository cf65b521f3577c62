"""Processes that live no longer than the command that started them."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence
    from pathlib import Path

STOP_TIMEOUT_S = 30.0


class ChildError(RuntimeError):
    """A process did not start, or ended too soon; the text is one sentence for the user."""


@dataclass(frozen=True, slots=True)
class Child:
    """A process that was started.

    Attributes:
        name: what it is, for the user.
        process: it.
        log: the file that takes what it prints.
    """

    name: str
    process: subprocess.Popen[str]
    log: Path

    def check(self) -> None:
        """See that it lives.

        Raises:
            ChildError: it has ended.
        """
        if self.process.poll() is not None:
            raise ChildError(
                f"The {self.name} has ended by itself (exit status {self.process.returncode}); "
                f"its log is {self.log}."
            )


@contextlib.contextmanager
def child(
    name: str,
    module: str,
    arguments: Sequence[str],
    *,
    env: Mapping[str, str],
    log: Path,
    talks: bool = False,
) -> Iterator[Child]:
    """Run a module of ours as a process for the time of the `with` block.

    The process ends when its standard input does, so that it cannot outlive this one, however
    this one ends; it is in a session of its own, so that Ctrl-C reaches only this one, which then
    stops it in order.

    Args:
        name: what it is, for the user.
        module: what to run with `python -m`; it must know `--exit-with-stdin`.
        arguments: its arguments.
        env: variables set for it beyond this process's own.
        log: the file that takes what it prints.
        talks: whether its standard output is for the caller to read instead.

    Raises:
        ChildError: it cannot be started, or its log cannot be written.
    """
    with contextlib.ExitStack() as stack:
        try:
            log.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            output = stack.enter_context(log.open("a"))
            process = subprocess.Popen(
                [sys.executable, "-m", module, *arguments, "--exit-with-stdin"],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE if talks else output,
                stderr=output,
                env={**os.environ, **env},
                start_new_session=True,
                text=True,
            )
        except OSError as error:
            raise ChildError(
                f"The {name} cannot be started with its log in {log}: {error.strerror}; accepted: "
                "a POOLSWEEP_STATE_DIR that you can write to."
            ) from None
        stack.enter_context(process)
        try:
            yield Child(name, process, log)
        finally:
            process.terminate()
            try:
                process.wait(STOP_TIMEOUT_S)
            except subprocess.TimeoutExpired:
                process.kill()


@contextlib.contextmanager
def sandbox(arguments: Sequence[str], log: Path) -> Iterator[dict[str, Any]]:
    """A sandbox on a free loopback port. Yields what it says when it is ready.

    Raises:
        ChildError: it does not start.
    """
    options = ["--port", "0", *arguments]
    with child("sandbox", "sandbox", options, env={}, log=log, talks=True) as started:
        line = started.process.stdout.readline() if started.process.stdout else ""
        if not line:
            raise ChildError(f"The sandbox did not start; its log is {log}.")
        yield json.loads(line)


@contextlib.contextmanager
def worker(env: Mapping[str, str], log: Path) -> Iterator[Child]:
    """A Celery worker. It may still be starting when the block begins.

    Raises:
        ChildError: it cannot be started.
    """
    with child("worker", "scheduler.cli", ["worker"], env=env, log=log) as started:
        yield started
