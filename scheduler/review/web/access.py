"""Who may look, and at what.

With a clients' file, whoever has a client's token sees the runs whose projects are all its own.
Without one there is nobody to tell apart: the page is for this machine alone, and sees everything.
"""

from __future__ import annotations

import base64
import binascii
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from scheduler.intake import problems
from scheduler.intake.addresses import Host, is_loopback
from scheduler.intake.problems import ProblemError
from scheduler.intake.request import Way

if TYPE_CHECKING:
    from collections.abc import Sequence

    from aiohttp import web

    from scheduler.intake.clients import Client, Clients
    from worker.ledger import Run

_BEARER = re.compile(r"(?i:bearer) +([!-~]+)")
_BASIC = re.compile(r"(?i:basic) +([A-Za-z0-9+/=]+)")
_BY_A_PROXY: Final = ("Forwarded", "X-Forwarded-For", "X-Forwarded-Host", "X-Real-IP", "Via")
# A browser asks for a name and a password; a program has a bearer token.
_CHALLENGE: Final = 'Basic realm="poolsweep", charset="UTF-8", Bearer realm="poolsweep"'


@dataclass(frozen=True, slots=True)
class Viewer:
    """Somebody who looks.

    Attributes:
        name: the client's name; empty: whoever is at this machine.
        projects: the projects that are shown; None: all.
    """

    name: str = ""
    projects: frozenset[str] | None = None

    @classmethod
    def of(cls, client: Client) -> Viewer:
        """A client of the intake, as one who looks."""
        return cls(client.name, frozenset(client.projects))

    def sees(self, *project_ids: str) -> bool:
        """Whether what is about these projects, one at least, is shown."""
        if self.projects is None:
            return True
        return bool(project_ids) and self.projects.issuperset(project_ids)

    def sees_run(self, run: Run) -> bool:
        """Whether a run is shown: all of it, or nothing of it. One that names no project, since it
        is not planned yet, is its own client's."""
        if run.projects:
            return self.sees(*run.projects)
        return self.projects is None or run.client == self.name


def admit(request: web.Request, clients: Clients | None) -> Viewer:
    """Who asks.

    Args:
        request: the request.
        clients: the clients as they are now; None: the page is for this machine alone.

    Raises:
        ProblemError: nobody who may look, or a host that is not this machine.
    """
    if clients is None:
        check_local(request.headers.getall("Host", []))
        if any(name in request.headers for name in _BY_A_PROXY):
            # Whoever is behind it is not at this machine.
            raise ProblemError(problems.FORBIDDEN, "for others, give the page a clients' file")
        return Viewer()
    client = clients.authenticate(token_of(request.headers.getall("Authorization", [])))
    if client is None:
        raise _unauthenticated("the token is not known, or is no longer")
    if Way.HTTP not in client.ways:
        raise ProblemError(problems.FORBIDDEN, f"client {client.name} may not ask by {Way.HTTP}")
    return Viewer.of(client)


def check_local(hosts: Sequence[str]) -> None:
    """See that a page for this machine alone is called by a name of this machine.

    Another page's script cannot read what is answered here, unless its own name is made to lead
    here (DNS rebinding); it then asks for that name.

    Args:
        hosts: the values of the header `Host`.

    Raises:
        ProblemError: it is called by another name, or by none.
    """
    try:
        (text,) = hosts
        if is_loopback(Host.parse(text).name):
            return
    except ValueError:
        pass
    raise ProblemError(
        problems.FORBIDDEN,
        "Host: without a clients' file this page is for this machine alone; accepted: localhost, "
        "127.0.0.1 and [::1]",
    )


def token_of(given: Sequence[str]) -> str:
    """The token that a request brings: as a bearer (RFC 6750) or as a password (RFC 7617).

    Args:
        given: the values of the header `Authorization`.

    Raises:
        ProblemError: there is none, or more than one.
    """
    text = given[0] if len(given) == 1 else ""
    if match := _BEARER.fullmatch(text):
        return match[1]
    if match := _BASIC.fullmatch(text):
        try:
            _, colon, password = base64.b64decode(match[1], validate=True).partition(b":")
            if colon:
                return password.decode()
        except (binascii.Error, UnicodeDecodeError):
            pass
    raise _unauthenticated("accepted: a client's token as the password, with any user name")


def _unauthenticated(detail: str) -> ProblemError:
    headers = {"WWW-Authenticate": _CHALLENGE}
    return ProblemError(problems.UNAUTHENTICATED, detail, headers=headers)
