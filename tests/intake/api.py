"""The intake's HTTP API, served on this machine for the tests: everything behind it is real."""

from __future__ import annotations

import contextlib
import json
from typing import TYPE_CHECKING, Any

from aiohttp import ClientResponse, ClientSession, web
from pydantic import SecretStr

from scheduler.intake import clients as clients_file
from scheduler.intake.clients import Clients, new_token
from scheduler.intake.desk import Desk
from scheduler.intake.http import Bounds, Parts, make_app
from scheduler.intake.requests import Requests
from scheduler.intake.serving import make_runner
from worker.ledger import Ledger, NewJob
from worker.limiter import Limiter, Quota
from worker.projects import Directory
from worker.settings import Settings

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Sequence

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
        run = await self.ledger.run(run_id)
        from worker.ledger import NewRun

        await self.ledger.create(
            NewRun(
                run_id=run_id,
                source=run.source,  # type: ignore[arg-type]
                endpoint=run.endpoint,
                client=run.client,
                projects=run.projects,
            ),
            maker="test",
        )
        jobs = [NewJob(PROJECTS[0], f"pool-{number:032d}") for number in range(pools)]
        await self.ledger.add(run_id, jobs, maker="test")
        assert await self.ledger.start(run_id, pools, maker="test")


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

    async def get(self, path: str, **headers: str) -> ClientResponse:
        """An answer, read to its end."""
        async with self.session.get(self.api.url + path, headers=self.head | headers) as answer:
            await answer.read()
            return answer

    async def post(
        self, path: str, document: Any = None, *, raw: bytes | None = None, **headers: str
    ) -> ClientResponse:
        """An answer, read to its end. Underscores in the headers' names mean hyphens."""
        given = {name.replace("_", "-"): value for name, value in headers.items()}
        data = raw if raw is not None else None if document is None else json.dumps(document)
        if data is not None:
            given.setdefault("Content-Type", "application/json")
        head = self.head | given
        async with self.session.post(self.api.url + path, data=data, headers=head) as answer:
            await answer.read()
            return answer

    async def asks(self, *pools: str, key: str | None = None, **changes: Any) -> str:
        """Send a request that is accepted. Returns the run's id."""
        head = {} if key is None else {"Idempotency_Key": key}
        answer = await self.post("/v1/runs", body(*pools, **changes), **head)
        assert answer.status == 202, await answer.text()
        return str((await answer.json())["run_id"])


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


async def refusal(answer: ClientResponse) -> tuple[int, str]:
    """The status and the name of a problem, which is one as RFC 9457 has it."""
    assert answer.content_type == "application/problem+json"
    document = json.loads(await answer.read())
    assert document["status"] == answer.status
    assert document["title"]
    assert document["detail"]
    kind = document["type"]
    assert kind.startswith("urn:poolsweep:problem:")
    return answer.status, kind.rpartition(":")[2]
