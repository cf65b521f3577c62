"""Processes that live no longer than the command that started them."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence
    from pathlib import Path

STOP_TIMEOUT_S = 30.0


class ChildError(RuntimeError):
    """A process did not start; the text is one sentence for the user."""


@contextlib.contextmanager
def child(
    module: str, arguments: Sequence[str], *, env: Mapping[str, str], log: Path, talks: bool = False
) -> Iterator[subprocess.Popen[str]]:
    """Run a module of ours as a process for the time of the `with` block.

    The process ends when its standard input does, so that it cannot outlive this one, however
    this one ends; it is in a session of its own, so that Ctrl-C reaches only this one, which then
    stops it in order.

    Args:
        module: what to run with `python -m`; it must know `--exit-with-stdin`.
        arguments: its arguments.
        env: variables set for it beyond this process's own.
        log: the file that takes what it prints.
        talks: whether its standard output is for the caller to read instead.
    """
    log.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    with (
        log.open("a") as output,
        subprocess.Popen(
            [sys.executable, "-m", module, *arguments, "--exit-with-stdin"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE if talks else output,
            stderr=output,
            env={**os.environ, **env},
            start_new_session=True,
            text=True,
        ) as process,
    ):
        try:
            yield process
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
    with child("sandbox", ["--port", "0", *arguments], env={}, log=log, talks=True) as process:
        line = process.stdout.readline() if process.stdout else ""
        if not line:
            raise ChildError(f"The sandbox did not start; its log is {log}.")
        yield json.loads(line)


@contextlib.contextmanager
def worker(env: Mapping[str, str], log: Path) -> Iterator[subprocess.Popen[str]]:
    """A Celery worker. It may still be starting when the block begins."""
    with child("scheduler.cli", ["worker"], env=env, log=log) as process:
        yield process
