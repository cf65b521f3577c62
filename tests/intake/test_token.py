"""`poolsweep token` makes a token that works once its line is in the clients' file."""

from __future__ import annotations

import re
import subprocess
import sys

from scheduler.intake import clients

FILE = "clients:\n  ci:\n    projects: [a]\n"


def made() -> str:
    """What the command says."""
    command = [sys.executable, "-m", "scheduler.cli", "token"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
    assert not done.stderr
    return done.stdout


def test_the_token_is_the_clients_whose_entry_has_the_lines() -> None:
    said = made()
    (token,) = re.findall(r"^ +(pst_\S+)$", said, re.MULTILINE)
    lines = said[said.index("    tokens:") :]
    client = clients.parse(FILE + lines).authenticate(token)
    assert client is not None
    assert client.name == "ci"
    assert token not in lines


def test_every_token_is_another() -> None:
    assert made() != made()
