"""The `poolsweep` command; see `scheduler.cli.outcome` for its exit codes."""

from __future__ import annotations

import os
import signal
from typing import NoReturn

from scheduler.cli.outcome import EXIT_INTERRUPTED


def main() -> NoReturn:
    """Run the command line and exit."""
    # Loading takes a while. An interrupt has nothing to clean up then, and raised inside
    # an import it would show a traceback. One that is ignored, as in a shell's background, stays
    # ignored.
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, lambda *_: os._exit(EXIT_INTERRUPTED))
    from scheduler.cli.commands import run

    run()
