"""A TCP proxy between the workers and the API, which fails as networks do."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import struct
from dataclasses import dataclass
from enum import StrEnum
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

CHUNK = 65_536


class Break(StrEnum):
    """How the network is broken."""

    CUT = "cut"
    """Every connection is reset, and no new one lives."""
    DEAF = "deaf"
    """Requests are accepted and go nowhere."""
    MUTE = "mute"
    """Requests arrive, and their answers get lost."""
    STALL = "stall"
    """An answer begins, and does not go on."""


@dataclass(eq=False, slots=True)
class _Link:
    """A connection from a client to the API."""

    client: asyncio.StreamWriter
    api: asyncio.StreamWriter
    broken: bool = False

    def reset(self) -> None:
        for writer in (self.client, self.api):
            with contextlib.suppress(OSError, AttributeError):
                # Closing is a reset then, and no orderly end.
                linger = struct.pack("ii", 1, 0)
                sock = writer.get_extra_info("socket")
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
            writer.transport.abort()


class Proxy:
    """Forwards to one port of this machine.

    What a broken network has swallowed is never delivered later: a connection that lost something
    is reset when the break ends.

    Attributes:
        url: where it listens.
    """

    def __init__(self) -> None:
        self.url = ""
        self._port = 0
        self._links: set[_Link] = set()
        self._break: Break | None = None
        self._hits = 0

    @contextlib.asynccontextmanager
    async def serving(self, port: int) -> AsyncIterator[Proxy]:
        """Forward to a port for the time of the `with` block."""
        self._port = port
        server = await asyncio.start_server(self._connected, "127.0.0.1", 0, backlog=1024)
        self.url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
        try:
            yield self
        finally:
            server.close()
            self._reset(self._links)

    async def broken(self, how: Break, seconds: float) -> int:
        """Break the network for a while. Returns how many connections noticed; 0 if it was broken
        already."""
        if self._break is not None:
            return 0
        self._break, self._hits = how, 0
        if how is Break.CUT:
            self._hits += self._reset(self._links)
        try:
            await asyncio.sleep(seconds)
        finally:
            self._break = None
            self._reset({link for link in self._links if link.broken})
        return self._hits

    @staticmethod
    def _reset(links: set[_Link]) -> int:
        for link in list(links):
            link.reset()
        return len(links)

    async def _connected(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        if self._break is Break.CUT:
            self._hits += 1
            writer.transport.abort()
            return
        try:
            back, api = await asyncio.open_connection("127.0.0.1", self._port)
        except OSError:
            writer.transport.abort()
            return
        link = _Link(writer, api)
        self._links.add(link)
        try:
            await asyncio.gather(self._requests(link, reader), self._answers(link, back))
        except OSError:
            link.reset()
        finally:
            self._links.discard(link)
            writer.close()
            api.close()

    async def _requests(self, link: _Link, reader: asyncio.StreamReader) -> None:
        while data := await reader.read(CHUNK):
            if self._break is Break.DEAF:
                self._breaks(link)
            if link.broken:
                continue
            link.api.write(data)
        link.api.close()

    async def _answers(self, link: _Link, reader: asyncio.StreamReader) -> None:
        while data := await reader.read(CHUNK):
            if self._break in {Break.MUTE, Break.STALL} and not link.broken:
                self._breaks(link)
                if self._break is Break.STALL:
                    link.client.write(data[: len(data) // 2])
            if link.broken:
                continue
            link.client.write(data)
        link.client.close()

    def _breaks(self, link: _Link) -> None:
        self._hits += not link.broken
        link.broken = True
