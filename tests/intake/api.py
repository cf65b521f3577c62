"""The intake's HTTP API, served on this machine for the tests: everything behind it is real."""

from __future__ import annotations

import contextlib
import json
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from aiohttp import ClientSession, web
from pydantic import SecretStr

from scheduler.intake import clients as clients_file
from scheduler.intake.clients import Clients, new_token
from scheduler.intake.desk import Desk, order_of
from scheduler.intake.http import Bounds, Parts, make_app
from scheduler.intake.requests import Filed, Requests
from scheduler.intake.serving import make_runner
from worker.ledger import Ledger, NewJob
from worker.limiter import Limiter, Quota
from worker.projects import Directory
from worker.settings import Settings

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Mapping, Sequence

    from redis.asyncio import Redis

PROJECTS = tuple(f"{digit}123456789abcdef0123456789abcdef" for digit in "abcdef")
POOL = "pool-0123456789abcdef0123456789abcdef"
ENDPOINT = "https://modelarts.example.com"
OFTEN = {"rate_limit": 10_000, "rate_burst": 10_000}


def body(*pools: str, project: str = PROJECTS[0], **changes: Any) -> dict[str, Any]:
    """A request for pools by name."""
    return {"targets": [{"project_id": project, "pools": list(pools or (POOL,))}], **changes}


class Api:
    """An API that is served, and what is behind it.

    Attributes:
        url: where.
        tokens: the token of each client.
        clients: the clients as they are now.
        missing: what the process says it lacks.
    """

    def __init__(self, redis: Redis, bounds: Bounds | None = None) -> None:
        self.redis = redis
        self.bounds = bounds or Bounds()
        self.ledger = Ledger(redis)
        self.requests = Requests(redis)
        self.tokens: dict[str, str] = {}
        self.missing: list[str] = []
        self.url = ""
        self._quotas: dict[str, Quota] = {}
        self.allow(ci={}, other={})

    def allow(self, **clients: dict[str, Any]) -> None:
        """Write the clients' file anew. Whoever was a client before keeps the token."""
        entries = {}
        for name, given in clients.items():
            token, _ = new_token()
            digest = clients_file.token_hash(self.tokens.setdefault(name, token))
            entry = {"tokens": [digest], "projects": list(PROJECTS), **OFTEN}
            entries[name] = entry | given
        self.clients: Clients = clients_file.parse(json.dumps({"clients": entries}))
        self._quotas.clear()
        self._quotas.update(self.clients.quotas)

    def parts(self) -> Parts:
        """What the API is made of."""
        settings = Settings(endpoint=ENDPOINT, token=SecretStr("unused"))
        return Parts(
            desk=Desk(self.requests, self.ledger, Directory(settings, {})),
            ledger=self.ledger,
            clients=lambda: self.clients,
            limiter=Limiter(self.redis, endpoint="intake", rate=0, burst=1, own=self._quotas),
            missing=self._missing,
            bounds=self.bounds,
        )

    async def _missing(self) -> Sequence[str]:
        return self.missing

    async def start(self, run_id: str, pools: int) -> None:
        """Have a queued run go on: what the planning does once it has found the pools."""
        (waiting,) = [each for each in await self.requests.waiting() if each.run_id == run_id]
        filed = Filed.parse(run_id, waiting.record)
        order = order_of(filed)
        await self.ledger.create(order.new_run(run_id, filed.request.projects), maker="test")
        jobs = [NewJob(PROJECTS[0], f"pool-{number:032d}") for number in range(pools)]
        await self.ledger.add(run_id, jobs, maker="test")
        assert await self.ledger.start(run_id, pools, maker="test")


@dataclass(frozen=True, slots=True)
class Answer:
    """An answer, read to its end."""

    status: int
    headers: Mapping[str, str]
    body: bytes

    @property
    def document(self) -> Any:
        """What its JSON says."""
        assert self.headers["Content-Type"].startswith("application/")
        return json.loads(self.body)

    @property
    def refusal(self) -> tuple[int, str]:
        """The status and the name of the problem that it is (RFC 9457)."""
        assert self.headers["Content-Type"] == "application/problem+json"
        assert self.document["status"] == self.status
        assert self.document["title"]
        assert self.document["detail"]
        kind = self.document["type"]
        assert kind.startswith("urn:poolsweep:problem:")
        return self.status, kind.rpartition(":")[2]


class Caller:
    """Another system, with its token.

    Args:
        api: where it calls.
        session: its connections.
        name: which client it is.
    """

    def __init__(self, api: Api, session: ClientSession, name: str = "ci") -> None:
        self.api = api
        self.session = session
        self.name = name

    @property
    def head(self) -> dict[str, str]:
        """The header that says who calls."""
        return {"Authorization": f"Bearer {self.api.tokens[self.name]}"}

    async def call(self, method: str, path: str, *, headers: Any, data: Any = None) -> Answer:
        """Whatever is asked."""
        url = self.api.url + path
        async with self.session.request(method, url, data=data, headers=headers) as answer:
            return Answer(answer.status, answer.headers.copy(), await answer.read())

    async def get(self, path: str, **headers: str) -> Answer:
        """Look at something. Underscores in the headers' names mean hyphens."""
        return await self.call("GET", path, headers=self.head | _named(headers))

    async def post(
        self, path: str, document: Any = None, *, raw: bytes | None = None, **headers: str
    ) -> Answer:
        """Ask for something."""
        head = self.head | _named(headers)
        data = raw if raw is not None or document is None else json.dumps(document).encode()
        if data is not None:
            head.setdefault("Content-Type", "application/json")
        return await self.call("POST", path, headers=head, data=data)

    async def request(self, document: Any, key: str | None = None) -> Answer:
        """Send a request, with an idempotency key if one is given."""
        if key is None:
            return await self.post("/v1/runs", document)
        return await self.post("/v1/runs", document, Idempotency_Key=key)

    async def asks(self, *pools: str, key: str | None = None, **changes: Any) -> str:
        """Send a request that is accepted. Returns the run's id."""
        answer = await self.request(body(*pools, **changes), key)
        assert answer.status == 202, answer.body
        return str(answer.document["run_id"])


def _named(headers: dict[str, str]) -> dict[str, str]:
    return {name.replace("_", "-"): value for name, value in headers.items()}


@contextlib.asynccontextmanager
async def serving(redis: Redis, bounds: Bounds | None = None) -> AsyncIterator[Api]:
    """Serve the API on a free port for the time of the `with` block."""
    api = Api(redis, bounds)
    runner = make_runner(make_app(api.parts()), bounds=api.bounds, shutdown_s=2)
    await runner.setup()
    try:
        site = web.TCPSite(runner, "127.0.0.1", 0, backlog=1024)
        await site.start()
        host, port = runner.addresses[0][:2]
        api.url = f"http://{host}:{port}"
        yield api
    finally:
        await runner.cleanup()
