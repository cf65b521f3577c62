"""What may stand in a request's URL: endpoints, project ids, pool names."""

from __future__ import annotations

import ipaddress
import re
import unicodedata
from dataclasses import dataclass
from typing import Final
from urllib.parse import unquote

from yarl import URL

_BASE_URL: Final = re.compile(
    r"""(?ix) [a-z][a-z0-9+.-]* :// (?: \w[\w.-]* | \[[0-9a-f:.]+\] ) (?: :[0-9]{1,5} )?
    (?: [/?\#] .* )?""",
    re.DOTALL,
)
PROJECT_ID: Final = "^[A-Za-z0-9][A-Za-z0-9_-]{0,63}$"
"""A regular expression of project ids, as JSON Schema takes it too."""
POOL_NAME: Final = "^[a-z][a-z0-9-]{34,61}[a-z0-9]$"
"""One of pool ids (metadata.name)."""


@dataclass(frozen=True, slots=True)
class Endpoint:
    """The base URL of an API: scheme, host and port, nothing more.

    Attributes:
        url: without a slash at the end.
    """

    url: str

    @classmethod
    def parse(cls, text: str, *, insecure_http: bool = False) -> Endpoint:
        """Read a base URL.

        Args:
            text: what the user gave.
            insecure_http: whether http is accepted for a host that is not this machine.

        Raises:
            ValueError: one sentence saying what is wrong and what is accepted.
        """
        accepted = "accepted: https://host or https://host:port"
        text = text.strip()
        # Before anything else: no message below may repeat a password, or a token in a query.
        if "@" in unicodedata.normalize("NFKC", unquote(text)):
            raise ValueError(f"a URL with credentials in it is not taken; {accepted}")
        shown = repr(re.split(r"[?#]", text)[0])
        try:
            url = URL(text)
            host, port = url.host, url.port
        except ValueError:
            raise ValueError(f"{shown} is not a URL; {accepted}") from None
        if (
            not _BASE_URL.fullmatch(text)
            or url.scheme not in {"http", "https"}
            or not host
            or not port
        ):
            raise ValueError(f"{shown} is not a URL with a scheme and a host; {accepted}")
        if url.path not in {"", "/"} or url.query_string or url.fragment:
            raise ValueError(f"{shown} has more than a scheme, a host and a port; {accepted}")
        if url.scheme == "http" and not insecure_http and not _is_loopback(host):
            raise ValueError(
                f"{shown} is not encrypted; {accepted}, and http only for this machine or with "
                "POOLSWEEP_INSECURE_HTTP=true"
            )
        return cls(str(url.origin()))


def _is_loopback(host: str) -> bool:
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def validate_project_id(text: str) -> str:
    """A project id as it may stand in a path.

    Huawei Cloud's are 32 hex characters; other clouds with this API differ, so letters, digits,
    hyphens and underscores are taken.

    Raises:
        ValueError: one sentence saying what is wrong and what is accepted.
    """
    if not re.fullmatch(PROJECT_ID, text):
        raise ValueError(
            f"Project id {text!r} is not one; accepted: 1 to 64 letters, digits, hyphens and "
            "underscores, such as 0123456789abcdef0123456789abcdef."
        )
    return text


def validate_pool_name(text: str) -> str:
    """A pool's id (metadata.name) as it may stand in a path.

    Raises:
        ValueError: one sentence saying what is wrong and what is accepted.

    Source: the API document, DELETE, pool_name.
    """
    if not re.fullmatch(POOL_NAME, text):
        raise ValueError(
            f"Pool id {text!r} is not one; accepted: the pool's metadata.name, 36 to 63 lowercase "
            "letters, digits and hyphens, starting with a letter and not ending with a hyphen."
        )
    return text
