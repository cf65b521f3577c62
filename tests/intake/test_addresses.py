"""Which hosts are told apart, and which addresses are on the Internet."""

from __future__ import annotations

import ipaddress
import socket

import pytest
from hypothesis import given
from hypothesis import strategies as st

from scheduler.intake.addresses import Host, canonical_host, is_loopback, may_be_called

NOT_PUBLIC = [
    "0.0.0.0/8",
    "10.0.0.0/8",
    "100.64.0.0/10",
    "127.0.0.0/8",
    "169.254.0.0/16",
    "172.16.0.0/12",
    "192.0.0.0/24",
    "192.0.2.0/24",
    "192.88.99.0/24",
    "192.168.0.0/16",
    "198.18.0.0/15",
    "198.51.100.0/24",
    "203.0.113.0/24",
    "224.0.0.0/4",
    "240.0.0.0/4",
    "::/96",
    "::ffff:0:0:0/96",
    "64:ff9b:1::/48",
    "100::/64",
    "2001::/32",
    "2001:2::/48",
    "2001:10::/28",
    "2001:20::/28",
    "2001:db8::/32",
    "2002::/16",
    "3fff::/20",
    "5f00::/16",
    "fc00::/7",
    "fe80::/10",
    "fec0::/10",
    "ff00::/8",
]
"""IANA's special-purpose registries, and what once was in them."""
FOUR_IN_SIX = ["::ffff:0:0", "64:ff9b::"]
"""Where IPv4 addresses lie within IPv6."""


@st.composite
def within(draw: st.DrawFn, networks: list[str]) -> str:
    network = ipaddress.ip_network(draw(st.sampled_from(networks)))
    return str(network[draw(st.integers(0, network.num_addresses - 1))])


def in_six(four: str, prefix: str) -> str:
    return str(ipaddress.IPv6Address(prefix) + int(ipaddress.IPv4Address(four)))


@given(within(NOT_PUBLIC))
def test_no_special_address_is_public(address: str) -> None:
    assert not may_be_called(address, private=False)


@given(within([each for each in NOT_PUBLIC if ":" not in each]), st.sampled_from(FOUR_IN_SIX))
def test_none_is_public_in_the_clothes_of_ipv6(address: str, prefix: str) -> None:
    assert not may_be_called(in_six(address, prefix), private=False)


@given(st.ip_addresses(v=4), st.sampled_from(FOUR_IN_SIX), st.booleans())
def test_an_ipv4_address_within_ipv6_is_judged_as_itself(
    address: ipaddress.IPv4Address, prefix: str, private: bool
) -> None:
    four = str(address)
    assert may_be_called(in_six(four, prefix), private=private) is may_be_called(
        four, private=private
    )


@pytest.mark.parametrize(
    "address",
    [
        "1.1.1.1",
        "93.184.215.14",
        "192.0.1.1",
        "2606:4700::1111",
        "2a00:1450::1",
        "64:ff9b::101:101",
    ],
)
def test_addresses_on_the_internet_are_public(address: str) -> None:
    assert may_be_called(address, private=False)


@pytest.mark.parametrize(
    "address",
    [
        "169.254.169.254",
        "100.100.100.200",
        "168.63.129.16",
        "192.0.0.192",
        "fd00:ec2::254",
        "::ffff:169.254.169.254",
        "fe80::1%eth0",
        "::1",
    ],
)
def test_where_clouds_tell_machines_their_secrets_is_not_public(address: str) -> None:
    assert not may_be_called(address, private=False)


@pytest.mark.parametrize("address", ["127.0.0.1", "10.1.2.3", "::1", "fd00::1", "fe80::1%eth0"])
def test_a_private_address_may_be_called_if_that_is_allowed(address: str) -> None:
    assert may_be_called(address, private=True)


@given(within(["0.0.0.0/32", "::/128", "224.0.0.0/4", "ff00::/8", "240.0.0.0/4"]))
def test_what_is_no_hosts_address_may_never_be_called(address: str) -> None:
    assert not may_be_called(address, private=True)


@given(st.text(max_size=40))
def test_what_is_no_address_may_never_be_called(text: str) -> None:
    try:
        ipaddress.ip_address(text)
    except ValueError:
        assert not may_be_called(text, private=True)


# Hosts


@pytest.mark.parametrize(
    ("text", "name", "port"),
    [
        ("hooks.example.com", "hooks.example.com", None),
        ("Hooks.Example.COM:8443", "hooks.example.com", 8443),
        ("localhost:1", "localhost", 1),
        ("xn--bcher-kva.example", "xn--bcher-kva.example", None),
        ("10.0.0.5:80", "10.0.0.5", 80),
        ("::1", "::1", None),
        ("[0:0::1]:65535", "::1", 65535),
        ("[2001:DB8::A]", "2001:db8::a", None),
    ],
)
def test_a_host_is_read_in_its_usual_spelling(text: str, name: str, port: int | None) -> None:
    host = Host.parse(text)
    assert host == Host(name, port)
    assert Host.parse(str(host)) == host


@pytest.mark.parametrize(
    "text",
    [
        "",
        ":80",
        "a b",
        "a..b",
        ".a",
        "a.",
        "-a",
        "a-.b",
        "*.example.com",
        "bücher.example",
        "hooks。example.com",
        "user@host",
        "https://hooks.example.com",
        "host/path",
        "host:0",
        "host:65536",
        "host:",
        "host:http",
        "host:²",
        "[::1",
        "[host]",
        "[]",
        "[127.0.0.1]",
        "::1]",
        "fe80::1%eth0",
        "1:2",
        "a" * 64,
        "a." * 127 + "a",
    ],
)
def test_what_is_no_host_is_refused_in_a_sentence_that_says_what_is_one(text: str) -> None:
    with pytest.raises(ValueError, match=r"^accepted: "):
        Host.parse(text)


@pytest.mark.parametrize(
    "text",
    ["2130706433", "0x7f000001", "0x7f.1", "0177.0.0.1", "127.1", "1.2.3.4.", "1.2.3.256", "a.0x"],
)
def test_other_spellings_of_addresses_are_refused(text: str) -> None:
    with pytest.raises(ValueError, match="four decimal numbers"):
        canonical_host(text)


@st.composite
def spellings(draw: st.DrawFn) -> str:
    """Numbers with dots between them, as the C library reads addresses."""
    forms = st.sampled_from(["{}", "0{:o}", "0x{:x}", "0X{:X}", "00{}"])
    parts = draw(st.lists(st.integers(0, 260) | st.integers(0, 2**32), min_size=1, max_size=5))
    return ".".join(draw(forms).format(part) for part in parts) + draw(st.sampled_from(["", "."]))


@given(spellings() | st.ip_addresses().map(str) | within(["::/96", "::ffff:0:0/96"]))
def test_what_the_system_takes_for_an_address_is_one_or_is_refused(text: str) -> None:
    try:
        found = socket.getaddrinfo(text, 80, flags=socket.AI_NUMERICHOST)
    except (OSError, UnicodeError):
        return
    try:
        host = canonical_host(text)
    except ValueError:
        return
    assert ipaddress.ip_address(host) == ipaddress.ip_address(found[0][4][0])


@given(st.text(alphabet=st.characters(max_codepoint=0x3FF), max_size=30))
def test_a_canonical_host_stays_as_it_is(text: str) -> None:
    try:
        host = canonical_host(text)
    except ValueError:
        return
    assert canonical_host(host) == host
    assert host.isascii()


def test_this_machine_is_known_by_its_own_names_only() -> None:
    assert all(map(is_loopback, ["localhost", "127.0.0.1", "127.9.9.9", "::1"]))
    assert not any(map(is_loopback, ["example.com", "10.0.0.1", "localhost.example.com", "::2"]))
