"""Commands that begin with their modules loaded, which is most of what a short command does.

A process of the test process' own imports the modules of all commands once, and forks for each
command. What runs is the same program in a process of its own, with its own environment, streams,
session and exit code. How it is loaded is tried out by the tests that start it as a shell does;
so is what depends on it: how it writes to a terminal, and the metrics of what goes on.
"""

from __future__ import annotations

import functools
import gc
import importlib
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import IO, TYPE_CHECKING, Final

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

ROOT: Final = Path(__file__).parents[1]
WITHIN_S: Final = 60.0
"""A command that takes longer is killed."""
FOR_TERMINALS: Final = {"COLUMNS", "LINES", "FORCE_COLOR"}
"""Variables that some modules read when they are loaded."""


def run(
    arguments: Sequence[str], environment: Mapping[str, str], stdin: IO[str] | None = None
) -> tuple[int, str, str]:
    """What `poolsweep ...` comes to by itself.

    Args:
        arguments: of the command.
        environment: all of its variables.
        stdin: what it reads; None: nothing.

    Returns:
        Its exit status, and what it wrote to its standard output and its standard error.

    Raises:
        TimeoutError: it did not end, and was killed.
    """
    ours, theirs = socket.socketpair(type=socket.SOCK_SEQPACKET)
    with (
        ours,
        Path(os.devnull).open() as nothing,
        tempfile.TemporaryFile("w+") as out,
        tempfile.TemporaryFile("w+") as err,
    ):
        with theirs:
            passed = [each.fileno() for each in (theirs, stdin or nothing, out, err)]
            socket.send_fds(_nursery(), [json.dumps([*arguments]).encode()], passed)
        ours.settimeout(WITHIN_S)
        ours.sendall(json.dumps({**environment}).encode())
        pid = int(ours.recv(16))
        try:
            code = int(ours.recv(16))
        except TimeoutError:
            os.kill(pid, signal.SIGKILL)
            raise
        for stream in (out, err):
            stream.seek(0)
        return code, out.read(), err.read()


@functools.cache
def _nursery() -> socket.socket:
    """Where to ask for a command. Who answers ends with this process."""
    ours, theirs = socket.socketpair(type=socket.SOCK_SEQPACKET)
    with theirs:
        subprocess.Popen(
            [sys.executable, "-c", "from tests.nursery import tend; tend()"],
            stdin=theirs.fileno(),
            stdout=subprocess.DEVNULL,
            cwd=ROOT,
            env={name: value for name, value in os.environ.items() if name not in FOR_TERMINALS},
            start_new_session=True,
        )
    return ours


def tend() -> None:
    """Fork for each command that is asked for on standard input. Returns in the forked ones too."""
    from scheduler.cli.commands import COMMANDS

    for place in ("scheduler.cli.trouble", *COMMANDS.values()):
        importlib.import_module(place.partition(":")[0])
    gc.freeze()  # a collection would touch, and so copy, all that the forked ones share
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    with socket.socket(fileno=os.dup(0)) as asked:
        while True:
            text, descriptors, *_ = socket.recv_fds(asked, 1 << 20, 4)
            if not text:
                return
            if os.fork() == 0:
                asked.close()
                _guard(json.loads(text), *descriptors)
                return
            for each in descriptors:
                os.close(each)


def _guard(arguments: list[str], conversation: int, *streams: int) -> None:
    """Wait for the command, and say what it came to. Returns in the command alone, at its end."""
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    with socket.socket(fileno=conversation) as asker:
        environment = json.loads(asker.recv(1 << 20))
        if pid := os.fork():
            _, status = os.waitpid(pid, 0)
            asker.sendall(str(os.waitstatus_to_exitcode(status)).encode())
            os._exit(0)
        os.setsid()
        asker.sendall(str(os.getpid()).encode())
    for number, stream in enumerate(streams):
        os.dup2(stream, number)
        os.close(stream)
    os.environ.clear()
    os.environ.update(environment)
    sys.argv = [str(Path(sys.executable).with_name("poolsweep")), *arguments]
    from scheduler.cli import main

    main()
