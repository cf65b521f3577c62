"""`poolsweep token`: a new token for a client of the intake."""

from __future__ import annotations

import sys

from scheduler.intake.clients import new_token


def token() -> None:
    """Make a token for a client of the intake: shown once, and kept nowhere."""
    secret, digest = new_token()
    sys.stdout.write(
        f"The token, for the client; it is not shown again:\n\n  {secret}\n\n"
        "Its SHA-256, for the clients' file (POOLSWEEP_CLIENTS_FILE), under the client:\n\n"
        f"    tokens:\n      - {digest}\n"
    )
