"""The `poolsweep` command.

Exit codes: 0 done, 1 a run had failures, 2 the request or the configuration cannot be used,
130 interrupted.
"""

from scheduler.cli.main import app, main

__all__ = ["app", "main"]
