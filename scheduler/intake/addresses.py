"""Hosts and the addresses that they may be at: pure.

A request names a URL that this machine then calls, so it could be made to call what only this
machine can reach (server-side request forgery, CWE-918).
"""

from __future__ import annotations

import ipaddress
import re
from dataclasses import dataclass

_ACCEPTED = "accepted: a host name or an IP address, with or without :port, and nothing else"
_WITH_PORT = re.compile(r"(?:\[(?P<six>[^\[\]]*)\]|(?P<name>[^:\[\]]*))(?::(?P<port>[0-9]{1,5}))?")
_BARE_SIX = re.compile(r"[0-9A-Fa-f:.]+")
_LABEL = r"[a-z0-9_](?:[a-z0-9_-]{0,61}[a-z0-9_])?"
_NAME = re.compile(rf"(?:{_LABEL}\.)*{_LABEL}")
_NUMBER = re.compile(r"[0-9]+|0x[0-9a-f]*")
_LONGEST_NAME = 253

_UNICAST = ipaddress.IPv6Network("2000::/3")
"""All that has been given out of IPv6 for use across the Internet."""
_NAT64 = ipaddress.IPv6Network("64:ff9b::/96")
_NEVER_PUBLIC = [
    ipaddress.ip_network(text)
    for text in (
        "192.0.0.0/24",  # protocol assignments, and the metadata service of a cloud
        "192.88.99.0/24",  # 6to4 relays
        "168.63.129.16/32",  # services of a cloud for its own machines
        "2001::/23",  # protocol assignments, Teredo among them
        "2001:db8::/32",
        "2002::/16",  # 6to4: an IPv4 address is in it
        "3fff::/20",
    )
]
"""Not for the Internet, whatever the standard library says of it."""


@dataclass(frozen=True, slots=True)
class Host:
    """A host, and perhaps one of its ports.

    Attributes:
        name: as `canonical_host` gives it.
        port: None: the usual one.
    """

    name: str
    port: int | None = None

    @classmethod
    def parse(cls, text: str) -> Host:
        """Read `name`, `name:port`, or the same with an IP address; IPv6 with a port in brackets.

        Raises:
            ValueError: one sentence saying what is accepted.
        """
        if text.count(":") > 1 and _BARE_SIX.fullmatch(text):
            return cls(canonical_host(text))
        if not (found := _WITH_PORT.fullmatch(text)):
            raise ValueError(_ACCEPTED)
        port = None if found["port"] is None else int(found["port"])
        if port is not None and not 1 <= port <= 65_535:
            raise ValueError("accepted: ports from 1 to 65535")
        if found["six"] is not None and ":" not in found["six"]:
            raise ValueError("accepted: IPv6 addresses in brackets, and nothing else")
        return cls(canonical_host(found["name"] or found["six"] or ""), port)

    def __str__(self) -> str:
        if self.port is None:
            return self.name
        return f"[{self.name}]:{self.port}" if ":" in self.name else f"{self.name}:{self.port}"


def canonical_host(text: str) -> str:
    """A host as it is compared: a name in lower case, or an address in its usual spelling.

    Args:
        text: as it stands in a URL, without brackets.

    Raises:
        ValueError: it is neither; the other spellings that some systems take for an address, such
            as 2130706433, 0x7f.1 and 0177.0.0.1, are not taken. One sentence says what is.

    Source: RFC 6943, section 3.1.1 (the spellings); WHATWG, URL Standard, "ends in a number".
    """
    name = text.lower()
    try:
        if ":" in name:
            if "%" in name:
                raise ValueError
            return str(ipaddress.IPv6Address(name))
        if _NUMBER.fullmatch(name.removesuffix(".").rpartition(".")[2]):
            return str(ipaddress.IPv4Address(name))
    except ValueError:
        raise ValueError(
            "accepted: IPv4 addresses as four decimal numbers, IPv6 addresses without a zone"
        ) from None
    if len(name) > _LONGEST_NAME or not _NAME.fullmatch(name):
        raise ValueError(
            "accepted: host names of letters, digits, hyphens, underscores and dots (other scripts "
            "in their xn-- form), without a dot at the end"
        )
    return name


def is_loopback(host: str) -> bool:
    """Whether a host, as `canonical_host` gives it, is this machine by its very name."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def may_be_called(text: str, *, private: bool) -> bool:
    """Whether an address is one host's, and on the Internet.

    Args:
        text: the address.
        private: whether it may also be private, of this machine, link-local, and the like.

    Source: IANA's registries of special-purpose addresses; RFC 6052 (NAT64).
    """
    try:
        address = _unwrapped(ipaddress.ip_address(text))
    except ValueError:
        return False
    if address.is_unspecified or address.is_multicast or _is_reserved(address):
        return False
    return private or _is_public(address)


_Address = ipaddress.IPv4Address | ipaddress.IPv6Address


def _unwrapped(address: _Address) -> _Address:
    """The IPv4 address that an IPv6 address stands for, if it does where packets go by it."""
    if isinstance(address, ipaddress.IPv4Address):
        return address
    if address.ipv4_mapped is not None:
        return address.ipv4_mapped
    if address in _NAT64:
        return ipaddress.IPv4Address(int(address) & 0xFFFF_FFFF)
    return address


def _is_reserved(address: _Address) -> bool:
    # For IPv6 the library calls most of the space so, loopback among it.
    return isinstance(address, ipaddress.IPv4Address) and address.is_reserved


def _is_public(address: _Address) -> bool:
    if isinstance(address, ipaddress.IPv6Address) and address not in _UNICAST:
        return False
    return address.is_global and not any(address in network for network in _NEVER_PUBLIC)
