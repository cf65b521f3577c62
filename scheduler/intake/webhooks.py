"""Completion webhooks: a client names a URL in its request, which is told of the run's end.

Only hosts that the clients' file names are called, at addresses that are public unless it says
otherwise, and the connection goes to the very address that was looked at: a name that changes its
address in between (DNS rebinding) gains nothing. What is sent is what `scheduler.notices`
describes. `braked` comes when a brake holds a run, which is its end, or stops one midway: then its
end follows.
"""

from __future__ import annotations

import re
import socket
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal
from urllib.parse import quote, unquote

import aiohttp
from aiohttp.abc import AbstractResolver, ResolveResult
from yarl import URL

from scheduler.intake.addresses import Host, canonical_host, is_loopback, may_be_called
from scheduler.policy import Occasion
from worker.settings import SettingsError

if TYPE_CHECKING:
    from collections.abc import Callable

    from scheduler.intake.clients import Client, Clients

ROOM = "webhooks"
"""Where in Redis they lie."""
LONGEST_URL = 2_000
ENDS = (Occasion.BRAKED, Occasion.FINISHED, Occasion.FAILED)
NOT_PUBLIC = (
    "host {host} is at no address that may be called; accepted: public addresses, and others only "
    "with webhooks.allow_private"
)


def check(url: str, client: Client) -> str | None:
    """Why a URL may not be told of a client's runs: pure.

    Args:
        url: what a request asks for.
        client: whose request it is.

    Returns:
        Why not, in a sentence that says nothing of the URL but its host; None: it may.
    """
    rules = client.webhooks
    if rules is None:
        return f"client {client.name} may name no webhook"
    if len(url) > LONGEST_URL:
        return f"it is longer than {LONGEST_URL} characters"
    if not all("!" <= character <= "~" for character in url):
        return "it has characters that a URL has not; accepted: ASCII without spaces, %-encoded"
    try:
        parsed = URL(url)
        host, port = parsed.raw_host, parsed.port
    except ValueError:
        return "it is not a URL; accepted: https://host/path"
    if parsed.scheme not in {"https", "http"} or not host or not port:
        return "it is not a URL with a host; accepted: https://host/path"
    if "@" in re.split(r"[/?#]", url.partition("://")[2])[0]:
        return "it has credentials in it; accepted: a URL without"
    if "#" in url:
        return "it has a fragment, which is never sent; accepted: a URL without"
    try:
        name = canonical_host(host)
    except ValueError as error:
        return f"its host is not taken; {error}"
    if not rules.allows(name, parsed):
        hosts = ", ".join(map(str, rules.hosts))
        return (
            f"{Host(name, port)} is not where client {client.name} may be told; accepted: {hosts}"
        )
    if parsed.scheme == "http" and not is_loopback(name):
        return "it is not encrypted; accepted: https://…, and http://… only for this machine"
    if _is_address(name) and not may_be_called(name, private=rules.allow_private):
        return NOT_PUBLIC.format(host=name)
    return None


def _is_address(host: str) -> bool:
    return ":" in host or host.rpartition(".")[2].isdecimal()


def webhook_channel(client_name: str, url: str) -> str:
    """The channel by which a client's URL is told.

    Only what comes before the colon, the client's name, is shown in logs.

    Args:
        client_name: the client.
        url: one that `check` has let pass.
    """
    return f"{client_name}:{quote(url, safe='')}"


@dataclass(frozen=True, slots=True)
class Webhook:
    """A URL that is told of the ends of a client's runs.

    Attributes:
        client_name: the client, as it was when it asked.
        client: the client as it is now; None: it is known no longer.
        url: where; it may hold a secret.
    """

    client_name: str
    client: Client | None
    url: str
    format: Literal["json"] = "json"
    on: tuple[Occasion, ...] = ENDS

    def __repr__(self) -> str:
        return f"Webhook({self.client_name})"

    def read(self) -> tuple[URL, str | None]:
        """The URL, and the key that its client's webhooks are signed with, if there is one.

        Raises:
            SettingsError: it may not be called any more, or the key is not there.
        """
        if self.client is None or self.client.webhooks is None:
            raise SettingsError(f"Client {self.client_name} may name no webhook any more.")
        if why := check(self.url, self.client):
            raise SettingsError(f"The webhook may not be called: {why}.")
        key = self.client.webhooks.secret
        return URL(self.url), None if key is None else key.read().get_secret_value()


class Webhooks:
    """The channels that `webhook_channel` names, for an outbox.

    Args:
        clients: the clients as they are now.
    """

    def __init__(self, clients: Callable[[], Clients]) -> None:
        self._clients = clients

    def get(self, name: str, /) -> Webhook | None:
        """A channel; None: the name is none of a webhook's."""
        client_name, colon, url = name.partition(":")
        if not colon:
            return None
        return Webhook(client_name, self._clients().by_name(client_name), unquote(url))


class GuardedResolver(AbstractResolver):
    """Looks up where a host is, and leaves out the addresses that may not be called.

    aiohttp connects to what it is given and looks nothing up again. It asks no resolver about
    hosts that are addresses already: those are for `Webhook.read` to check.

    Args:
        clients: the clients as they are now.
        inner: looks up; None: the system's way.
    """

    def __init__(
        self, clients: Callable[[], Clients], *, inner: AbstractResolver | None = None
    ) -> None:
        self._clients = clients
        self._inner = inner

    async def resolve(
        self, host: str, port: int = 0, family: socket.AddressFamily = socket.AF_UNSPEC
    ) -> list[ResolveResult]:
        """The addresses of a host that may be called.

        Raises:
            SettingsError: it has none.
            OSError: it cannot be looked up.
        """
        if self._inner is None:
            self._inner = aiohttp.DefaultResolver()  # it wants a running loop
        found = await self._inner.resolve(host, port, family)
        try:
            private = self._clients().may_be_private(canonical_host(host))
        except ValueError:
            private = False
        allowed = [each for each in found if may_be_called(each["host"], private=private)]
        if not allowed:
            raise SettingsError(NOT_PUBLIC.format(host=host))
        return allowed

    async def close(self) -> None:
        """Close the inner resolver."""
        if self._inner is not None:
            await self._inner.close()
