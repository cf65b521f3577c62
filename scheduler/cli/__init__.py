"""The `poolsweep` command.

Exit codes: 0 done, 1 a run had failures, 2 the request or the configuration cannot be used,
130 interrupted, 141 the reader of the output has gone (as a shell reports it of other programs).
"""

from __future__ import annotations

import os
import signal
from typing import NoReturn

EXIT_INTERRUPTED = 130


def main() -> NoReturn:
    """Run the command line and exit."""
    # Loading takes most of a second. An interrupt has nothing to clean up then, and raised inside
    # an import it would show a traceback. One that is ignored, as in a shell's background, stays
    # ignored.
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, lambda *_: os._exit(EXIT_INTERRUPTED))
    from scheduler.cli.commands import run

    run()
