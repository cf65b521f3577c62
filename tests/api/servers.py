"""Small servers that show what arrives on the wire, and clients to call them with."""

from __future__ import annotations

import asyncio
import contextlib
import ssl
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from ipaddress import ip_address
from typing import TYPE_CHECKING, Any

from aiohttp import web
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from pydantic import SecretStr

from sandbox.fleet import Behaviour, Category
from worker.modelarts import Endpoint, Token
from worker.modelarts.auth import make_authenticator
from worker.modelarts.client import ClientOptions, ModelArtsClient

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable
    from pathlib import Path

    from multidict import CIMultiDictProxy
    from redis.asyncio import Redis

    from sandbox.server import RunningSandbox
    from worker.modelarts import Answer, Credentials

    Handler = Callable[[web.BaseRequest], Awaitable[web.StreamResponse]]
    Talk = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]

PROJECT = "0123456789abcdef0123456789abcdef"
POOL = "auto-pool-os-86c13962597848eeb29c5861153a391f"


@dataclass(frozen=True)
class Received:
    """A request as it came over the wire; `connection` is the peer's address."""

    method: str
    path: str
    headers: CIMultiDictProxy[str]
    body: bytes
    connection: Any


@dataclass
class RecordingServer:
    url: str
    received: list[Received] = field(default_factory=list)

    @property
    def connections(self) -> set[Any]:
        return {request.connection for request in self.received}


async def accepted(_: web.BaseRequest) -> web.StreamResponse:
    return web.json_response({"metadata": {"name": POOL}}, headers={"X-Request-Id": "request-7"})


@contextlib.asynccontextmanager
async def recording(
    handler: Handler = accepted, *, tls: ssl.SSLContext | None = None
) -> AsyncIterator[RecordingServer]:
    """An HTTP server that writes down what it gets and answers as the handler says."""
    server = RecordingServer("")

    async def answer(request: web.BaseRequest) -> web.StreamResponse:
        peer = request.transport.get_extra_info("peername") if request.transport else None
        body = await request.read()
        path = request.raw_path
        server.received.append(Received(request.method, path, request.headers, body, peer))
        return await handler(request)

    runner = web.ServerRunner(web.Server(answer), shutdown_timeout=0.1)
    await runner.setup()
    try:
        await web.TCPSite(runner, "127.0.0.1", 0, ssl_context=tls).start()
        scheme = "https" if tls else "http"
        server.url = f"{scheme}://127.0.0.1:{runner.addresses[0][1]}"
        yield server
    finally:
        await runner.cleanup()


@contextlib.asynccontextmanager
async def talking(talk: Talk) -> AsyncIterator[str]:
    """A TCP server that says what it likes; its URL."""
    server = await asyncio.start_server(talk, "127.0.0.1", 0)
    async with server:
        yield f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"


async def read_request(reader: asyncio.StreamReader) -> bytes:
    """One request without a body."""
    return await reader.readuntil(b"\r\n\r\n")


@contextlib.asynccontextmanager
async def calling(
    url: str,
    credentials: Credentials | None = None,
    redis: Redis | None = None,
    *,
    observe: Callable[[Answer], None] | None = None,
    **options: Any,
) -> AsyncIterator[ModelArtsClient]:
    """Our client."""
    authenticator = make_authenticator(credentials or Token(SecretStr("sandbox-token")), redis)
    async with ModelArtsClient(
        Endpoint.parse(url), authenticator, ClientOptions(**options), observe=observe
    ) as client:
        yield client


def deletable(sandbox: RunningSandbox) -> list[str]:
    """Pools of the first project whose deletion nothing stands against."""
    return [
        name
        for name, pool in sandbox.cloud.projects[sandbox.project_id].items()
        if pool.member.category in {Category.EXPIRED, Category.TAGGED}
        and pool.member.behaviour is Behaviour.NORMAL
    ]


def self_signed(directory: Path) -> ssl.SSLContext:
    """TLS for 127.0.0.1 with a certificate that nobody vouches for."""
    return CertificateAuthority(directory).serve_as("127.0.0.1")


class CertificateAuthority:
    """Vouches for servers; `file` is its own certificate, for those that trust it."""

    def __init__(self, directory: Path) -> None:
        self.file = directory / "authority.pem"
        self._directory = directory
        self._key = ec.generate_private_key(ec.SECP256R1())
        self._name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "authority")])
        certificate = (
            self._builder(self._name, self._key, timedelta(hours=1))
            .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
            .sign(self._key, hashes.SHA256())
        )
        self.file.write_bytes(certificate.public_bytes(serialization.Encoding.PEM))

    def serve_as(self, address: str, life: timedelta = timedelta(hours=1)) -> ssl.SSLContext:
        """TLS with a certificate for an address.

        Args:
            address: the IP address that it is for.
            life: until when from now; a negative one has ended.
        """
        key = ec.generate_private_key(ec.SECP256R1())
        name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, address)])
        certificate = (
            self._builder(name, key, life)
            .add_extension(
                x509.SubjectAlternativeName([x509.IPAddress(ip_address(address))]), critical=False
            )
            .sign(self._key, hashes.SHA256())
        )
        file = self._directory / "server.pem"
        file.write_bytes(
            key.private_bytes(
                serialization.Encoding.PEM,
                serialization.PrivateFormat.PKCS8,
                serialization.NoEncryption(),
            )
            + certificate.public_bytes(serialization.Encoding.PEM)
        )
        context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
        context.load_cert_chain(file)
        return context

    def _builder(
        self, name: x509.Name, key: ec.EllipticCurvePrivateKey, life: timedelta
    ) -> x509.CertificateBuilder:
        now = datetime.now(UTC)
        return (
            x509.CertificateBuilder()
            .subject_name(name)
            .issuer_name(self._name)
            .public_key(key.public_key())
            .serial_number(x509.random_serial_number())
            .not_valid_before(now - timedelta(days=1))
            .not_valid_after(now + life)
        )
