"""Sends as many requests as one process can, pipelined, and prints how many were answered a second.

`python -m benchmarks.shout URL PATH TOKEN SECONDS`: a load that costs next to nothing, to find out
what a server could serve.
"""

from __future__ import annotations

import asyncio
import sys
import time
from urllib.parse import urlsplit

CONNECTIONS = 20
AHEAD = 10
"""Requests sent before the first is answered, on each connection."""


async def _shout(host: str, port: int, request: bytes, until: float) -> int:
    reader, writer = await asyncio.open_connection(host, port)
    answered = 0
    writer.write(request * AHEAD)
    while time.monotonic() < until:
        data = await reader.read(65_536)
        count = data.count(b"HTTP/1.1 ")
        answered += count
        writer.write(request * count)
    writer.close()
    return answered


async def main(url: str, path: str, token: str, seconds: float) -> float:
    """Answers a second."""
    parts = urlsplit(url)
    head = f"DELETE {path} HTTP/1.1\r\nHost: {parts.netloc}\r\nX-Auth-Token: {token}\r\n\r\n"
    until = time.monotonic() + seconds
    shouts = (
        _shout(parts.hostname or "", parts.port or 80, head.encode(), until)
        for _ in range(CONNECTIONS)
    )
    return sum(await asyncio.gather(*shouts)) / seconds


if __name__ == "__main__":
    url, path, token, seconds = sys.argv[1:]
    sys.stdout.write(f"{asyncio.run(main(url, path, token, float(seconds)))}\n")
