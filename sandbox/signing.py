"""Checks AK/SK signatures for real: signs the received request again with the official SDK."""

from __future__ import annotations

import hmac
import re
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import TYPE_CHECKING
from urllib.parse import parse_qsl

from huaweicloudsdkcore.sdk_request import SdkRequest
from huaweicloudsdkcore.signer.signer import Signer

if TYPE_CHECKING:
    from collections.abc import Mapping

MAX_SKEW_S = 15 * 60
_AUTHORIZATION = re.compile(
    r"SDK-HMAC-SHA256 Access=(?P<ak>[^,]+), SignedHeaders=(?P<names>[^,]+), Signature=[0-9a-f]{64}"
)


@dataclass(frozen=True)
class Keys:
    """An access key and its secret."""

    ak: str
    sk: str = field(repr=False)


def signature_fault(
    keys: Keys, method: str, path: str, query: str, headers: Mapping[str, str], body: bytes
) -> str:
    """What is wrong with a request's signature; empty: nothing.

    Args:
        keys: those that it must be made with.
        method, path, query, headers, body: the request as it came, path and query still quoted.
    """
    given = headers.get("Authorization", "")
    parts = _AUTHORIZATION.fullmatch(given)
    if not parts or parts["ak"] != keys.ak:
        return "no signature with a known access key"
    names = parts["names"].split(";")
    if "x-sdk-date" not in names or "host" not in names or any(n not in headers for n in names):
        return "the signature does not cover the date and the host"
    try:
        date = datetime.strptime(headers["X-Sdk-Date"], "%Y%m%dT%H%M%SZ").replace(tzinfo=UTC)
    except ValueError:
        return "X-Sdk-Date is not a date"
    if abs((datetime.now(UTC) - date).total_seconds()) > MAX_SKEW_S:
        return "X-Sdk-Date is too far from now"
    request = SdkRequest(
        method=method,
        schema="http",
        host=headers["Host"],
        resource_path=path,
        query_params=parse_qsl(query, keep_blank_values=True),
        header_params={name: headers[name] for name in names},
        body=body,
    )
    expected = Signer(keys).sign(request).header_params["Authorization"]
    return "" if hmac.compare_digest(expected, given) else "the signature does not match"
