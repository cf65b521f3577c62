"""The simulated cloud over HTTP."""

from __future__ import annotations

import asyncio
import contextlib
import hmac
import itertools
import json
import random
import secrets
import time
from collections import defaultdict, deque
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING

from aiohttp import web
from pydantic import ValidationError

from sandbox.cloud import NOT_FOUND, Cloud, Reply, SandboxPool, refusal
from sandbox.config import Faults, SandboxConfig
from sandbox.fleet import Behaviour, Category
from sandbox.signing import Keys, signature_fault

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence

    Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]

JOURNAL = 200_000
HANG_S = 120.0
LISTED_AT_ONCE = 100


@dataclass(slots=True)
class Call:
    """A call that arrived, in the order of arrival.

    Attributes:
        at: seconds of the event loop's clock.
        method, path, pool: what it was; pool is empty for others.
        status: what was answered; 0: nothing, or nothing yet.
    """

    at: float
    method: str
    path: str
    pool: str
    status: int = 0


@dataclass(frozen=True, slots=True)
class _Token:
    project_id: str
    ends: datetime


class SandboxServer:
    """The routes, and what stands before them: journal, faults, sign-in, quota."""

    def __init__(self, config: SandboxConfig) -> None:
        self.config = config
        self.faults = config.faults
        clock = asyncio.get_running_loop().time
        self._clock = clock
        self.cloud = Cloud(config, clock)
        self.calls: deque[Call] = deque(maxlen=JOURNAL)
        self._tokens: dict[str, _Token] = {}
        self._keys = Keys(config.ak, config.sk)
        self._rng = random.Random(config.seed + 2)  # noqa: S311 - made to be repeatable
        self._recent: defaultdict[str, deque[float]] = defaultdict(deque)
        self._request_ids = itertools.count(1)

    def application(self) -> web.Application:
        """The application to serve."""
        app = web.Application(middlewares=[self._answer], client_max_size=1 << 20)
        project = "/v2/{project}/pools"
        app.router.add_get(project, self._list)
        app.router.add_get(project + "/{pool}", self._show)
        app.router.add_delete(project + "/{pool}", self._delete)
        app.router.add_get(project + "/{pool}/nodes", self._nodes)
        app.router.add_get(project + "/{pool}/workloads", self._workloads)
        app.router.add_get(project + "/{pool}/monitor", self._monitor)
        app.router.add_get("/v1/{project}/pools/tags", self._all_tags)
        app.router.add_get("/v1/{project}/pools/{pool}/tags", self._tags)
        app.router.add_post("/v3/auth/tokens", self._issue_token)
        app.router.add_get("/_sandbox/state", self._state)
        app.router.add_get("/_sandbox/calls", self._journal)
        app.router.add_post("/_sandbox/faults", self._set_faults)
        app.router.add_post("/_sandbox/tokens/revoke", self._revoke)
        app.router.add_post("/_sandbox/pools/{project}/{pool}", self._change)
        app.router.add_delete("/_sandbox/pools/{project}/{pool}", self._vanish)
        app.router.add_put("/_sandbox/pools/{project}", self._add)
        return app

    # What stands before the routes

    @web.middleware
    async def _answer(self, request: web.Request, handler: Handler) -> web.StreamResponse:
        if request.path.startswith("/_sandbox/"):
            return await handler(request)
        pool = request.match_info.get("pool", "")
        call = Call(self._clock(), request.method, request.raw_path, pool)
        self.calls.append(call)
        if self.faults.latency_ms:
            await asyncio.sleep(self.faults.latency_ms / 1000)
        response = await self._before(request) or await self._routed(request, handler)
        call.status = response.status
        response.headers["X-Request-Id"] = f"sandbox-{next(self._request_ids):012d}"
        return response

    async def _routed(self, request: web.Request, handler: Handler) -> web.StreamResponse:
        try:
            return await handler(request)
        except web.HTTPException as error:
            if error.status not in {404, 405}:
                raise
            text = "The API does not exist or has not been published in the environment"
            return _response(refusal(404, "APIG.0101", text))

    async def _before(self, request: web.Request) -> web.Response | None:
        faults, drawn = self.faults, self._rng.random()
        if drawn < faults.reset_rate:
            if request.transport:
                request.transport.abort()
            raise ConnectionResetError
        if (drawn := drawn - faults.reset_rate) < faults.hang_rate:
            await asyncio.sleep(HANG_S)
        if (drawn := drawn - faults.hang_rate) < faults.rate_5xx:
            status = self._rng.choice((500, 502, 503))
            return _response(refusal(status, "ModelArts.50000001", "injected fault"))
        if drawn - faults.rate_5xx < faults.rate_429:
            return _response(refusal(429, "APIG.0308", "injected throttling", 1))
        project = request.match_info.get("project")
        if project is None:
            return None
        if self.config.auth and (fault := await self._sign_in_fault(request, project)):
            return _response(refusal(401, "APIG.0301", f"Incorrect IAM authentication: {fault}"))
        if project not in self.cloud.projects:
            return _response(refusal(403, "ModelArts.50010001", "no access to this project"))
        if self._over_quota(project):
            return _response(refusal(429, "APIG.0308", "the throttling threshold is reached", 1))
        return None

    def _over_quota(self, project: str) -> bool:
        if not self.faults.quota:
            return False
        now, recent = self._clock(), self._recent[project]
        whole = max(1, int(self.faults.quota))
        window_s = whole / self.faults.quota  # a second, or what makes the calls whole
        while recent and recent[0] <= now - window_s:
            recent.popleft()
        if len(recent) >= whole + self.faults.quota_burst:
            return True
        recent.append(now)
        return False

    async def _sign_in_fault(self, request: web.Request, project: str) -> str:
        if given := request.headers.get("X-Auth-Token"):
            if hmac.compare_digest(given.encode(errors="replace"), self.config.token.encode()):
                return ""
            token = self._tokens.get(given)
            if token is None or token.ends <= datetime.now(UTC):
                return "the token is unknown, revoked or has ended"
            return "" if token.project_id == project else "the token is for another project"
        expected = self.config.security_token
        if expected is not None and request.headers.get("X-Security-Token") != expected:
            return "the security token is missing or wrong"
        path, _, query = request.raw_path.partition("?")
        body = await request.read()
        return signature_fault(self._keys, request.method, path, query, request.headers, body)

    # The API

    async def _list(self, request: web.Request) -> web.Response:
        pools = self.cloud.list(request.match_info["project"])
        if request.query:
            pools = [pool for pool in pools if _is_wanted(pool, request.query)]
        # In parts, so that a list of thousands holds up no other call.
        return web.Response(body=_list_parts(pools), content_type="application/json")

    async def _show(self, request: web.Request) -> web.Response:
        pool = self.cloud.find(request.match_info["project"], request.match_info["pool"])
        return _response(Reply(200, pool.text) if pool else _not_found())

    async def _delete(self, request: web.Request) -> web.Response:
        return _response(
            self.cloud.delete(request.match_info["project"], request.match_info["pool"])
        )

    async def _nodes(self, request: web.Request) -> web.Response:
        pool = self.cloud.find(request.match_info["project"], request.match_info["pool"])
        if not pool:
            return _response(_not_found())
        prepaid = pool.member.category in {Category.PREPAID, Category.PREPAID_NODES}
        annotations = {"os.modelarts/billing.mode": "1" if prepaid else "0"}
        items = [
            {"kind": "Node", "metadata": {"name": f"node-{number}", "annotations": annotations}}
            for number in range(pool.node_count)
        ]
        return web.json_response({"kind": "NodeList", "apiVersion": "v2", "items": items})

    async def _workloads(self, request: web.Request) -> web.Response:
        pool = self.cloud.find(request.match_info["project"], request.match_info["pool"])
        if not pool:
            return _response(_not_found())
        try:
            offset = int(request.query.get("offset", "0"))
            limit = int(request.query.get("limit", "500"))
        except ValueError:
            offset = limit = -1
        if offset < 0 or not 1 <= limit <= 500:
            return _response(refusal(400, "ModelArts.50010001", "offset or limit is out of range"))
        page = pool.workloads[offset : offset + limit]
        return web.json_response({"total": len(pool.workloads), "items": page})

    async def _monitor(self, request: web.Request) -> web.Response:
        pool = self.cloud.find(request.match_info["project"], request.match_info["pool"])
        if not pool:
            return _response(_not_found())
        period_ms = int(request.query.get("period", "60")) * 1000
        minutes = int(request.query.get("time_range", "-1.-1.60").rpartition(".")[2])
        statistic = request.query.get("statistics", "maximum")
        end = round(time.time() * 1000) // period_ms * period_ms
        times = range(end - minutes * 60_000, end + 1, period_ms)
        metrics = [
            {
                "metric": {"dimensions": [], "metricName": name, "namespace": "PAAS.AGGR"},
                "dataPoints": [
                    {
                        "timestamp": at,
                        "unit": "Percent",
                        "statistics": [{"statistic": statistic, "value": value}],
                    }
                    for at in times
                ],
            }
            for name, value in pool.usage.items()
        ]
        return web.json_response({"metrics": metrics})

    async def _tags(self, request: web.Request) -> web.Response:
        pool = self.cloud.find(request.match_info["project"], request.match_info["pool"])
        if not pool:
            return _response(_not_found())
        tags = _readable_tags(pool)
        return web.json_response({"tags": [{"key": k, "value": v} for k, v in tags.items()]})

    async def _all_tags(self, request: web.Request) -> web.Response:
        values: defaultdict[str, set[str]] = defaultdict(set)
        for pool in self.cloud.list(request.match_info["project"]):
            for key, value in _readable_tags(pool).items():
                values[key].add(value)
        return web.json_response(
            {"tags": [{"key": key, "values": sorted(found)} for key, found in values.items()]}
        )

    async def _issue_token(self, request: web.Request) -> web.Response:
        try:
            auth = (await request.json())["auth"]
            user = auth["identity"]["password"]["user"]
            project = auth["scope"]["project"]["id"]
            given = (user["name"], user["password"], user["domain"]["name"])
        except (ValueError, KeyError, TypeError):
            return _response(refusal(400, "IAM.0001", "the request is not understood"))
        config = self.config
        if given != (config.iam_user, config.iam_password, config.iam_domain):
            return _response(refusal(401, "IAM.0101", "the username or password is wrong"))
        if project not in self.cloud.projects:
            return _response(refusal(403, "IAM.0003", "no access to this project"))
        value = f"MIIsandbox{secrets.token_urlsafe(40)}"
        ends = datetime.now(UTC) + timedelta(seconds=config.token_seconds)
        self._tokens[value] = _Token(project, ends)
        body = {"token": {"expires_at": ends.isoformat().replace("+00:00", "Z")}}
        return web.json_response(body, status=201, headers={"X-Subject-Token": value})

    # For those who watch and steer the sandbox

    async def _state(self, _: web.Request) -> web.Response:
        cloud = self.cloud
        return web.json_response(
            {
                name: {
                    "project_id": project_id,
                    "category": pool.member.category,
                    "behaviour": pool.member.behaviour,
                    "there": cloud.is_there(pool),
                    "deletes": pool.deletes,
                    "accepted": pool.accepted,
                }
                for project_id, pools in cloud.projects.items()
                for name, pool in pools.items()
            }
        )

    async def _journal(self, request: web.Request) -> web.Response:
        try:
            since = float(request.query.get("since", "-inf"))
        except ValueError:
            return web.json_response({"error": "since is no number of seconds"}, status=400)
        return web.json_response(
            [
                [call.at, call.method, call.path, call.pool, call.status]
                for call in self.calls
                if call.at > since
            ]
        )

    async def _set_faults(self, request: web.Request) -> web.Response:
        try:
            self.faults = Faults(**{**self.faults.model_dump(), **await request.json()})
        except (ValidationError, ValueError, TypeError) as error:
            return web.json_response({"error": str(error)}, status=400)
        return web.json_response(self.faults.model_dump())

    async def _revoke(self, _: web.Request) -> web.Response:
        self._tokens.clear()
        return web.json_response({})

    async def _change(self, request: web.Request) -> web.Response:
        pool = self.cloud.find(request.match_info["project"], request.match_info["pool"])
        if not pool:
            return _response(_not_found())
        change = await request.json()
        for part, values in (("labels", pool.labels), ("annotations", pool.annotations)):
            if part in change:
                pool.change("metadata", {part: {**values, **change[part]}})
        if "creationTimestamp" in change:
            pool.change("metadata", {"creationTimestamp": change["creationTimestamp"]})
        if "phase" in change:
            pool.change("status", {"phase": change["phase"]})
        pool.workloads = change.get("workloads", pool.workloads)
        pool.usage = change.get("usage", pool.usage)
        return _response(Reply(200, pool.text))

    async def _vanish(self, request: web.Request) -> web.Response:
        pool = self.cloud.find(request.match_info["project"], request.match_info["pool"])
        if pool:
            pool.gone_at = self._clock()
        return web.json_response({})

    async def _add(self, request: web.Request) -> web.Response:
        project = request.match_info["project"]
        if project not in self.cloud.projects:
            return web.json_response({"error": "no such project"}, status=404)
        try:
            category = Category(request.query.get("category", Category.UNTAGGED))
            behaviour = Behaviour(request.query.get("behaviour", Behaviour.NORMAL))
        except ValueError as error:
            return web.json_response({"error": str(error)}, status=400)
        pool = self.cloud.add(project, await request.json(), category, behaviour)
        return _response(Reply(201, pool.text))


def _is_wanted(pool: SandboxPool, query: Mapping[str, str]) -> bool:
    """Whether a list with this query shows a pool."""
    state = "creating" if pool.phase == "Creating" else "created"
    if query.get("status", state) not in {state, ""}:
        return False
    workspace = query.get("workspaceId")
    if workspace and pool.labels.get("os.modelarts/workspace.id", "0") != workspace:
        return False
    pairs = [pair.split("=", 1) for pair in query.get("labelSelector", "").split(",")]
    return all(pool.labels.get(pair[0]) == pair[1] for pair in pairs if len(pair) > 1)


async def _list_parts(pools: Sequence[SandboxPool]) -> AsyncIterator[bytes]:
    yield b'{"kind": "PoolList", "apiVersion": "v2", "metadata": {}, "items": ['
    for start in range(0, len(pools), LISTED_AT_ONCE):
        some = b", ".join(pool.text for pool in pools[start : start + LISTED_AT_ONCE])
        yield b", " + some if start else some
        await asyncio.sleep(0)
    yield b"]}"


def _response(reply: Reply) -> web.Response:
    response = web.Response(
        status=reply.status,
        body=reply.body,
        content_type="text/html" if reply.html else "application/json",
    )
    if reply.retry_after_s is not None:
        response.headers["Retry-After"] = str(reply.retry_after_s)
    return response


def _not_found() -> Reply:
    return refusal(404, NOT_FOUND, "pool not found")


def _readable_tags(pool: SandboxPool) -> dict[str, str]:
    try:
        raw = json.loads(pool.annotations["os.modelarts/tms.tags"])
        return {tag["key"]: tag["value"] for tag in raw} if isinstance(raw, list) else dict(raw)
    except (KeyError, ValueError, TypeError):
        return {}


@dataclass(frozen=True, slots=True)
class RunningSandbox:
    """A sandbox that serves.

    Attributes:
        url: where.
        server: its state, to look at and to steer.
    """

    url: str
    server: SandboxServer

    @property
    def cloud(self) -> Cloud:
        """The simulated cloud."""
        return self.server.cloud

    @property
    def config(self) -> SandboxConfig:
        """What it is like."""
        return self.server.config

    @property
    def project_id(self) -> str:
        """Its first project."""
        return self.config.project_ids[0]


@contextlib.asynccontextmanager
async def running_sandbox(config: SandboxConfig, port: int = 0) -> AsyncIterator[RunningSandbox]:
    """Serve on this machine for the time of the `with` block.

    Args:
        config: what the cloud is like.
        port: the loopback port; 0: a free one.

    Raises:
        OSError: the port cannot be had.
    """
    server = SandboxServer(config)
    runner = web.AppRunner(server.application(), access_log=None, shutdown_timeout=0.1)
    await runner.setup()
    try:
        site = web.TCPSite(runner, "127.0.0.1", port, backlog=1024)
        await site.start()
        host, bound = runner.addresses[0][:2]
        yield RunningSandbox(f"http://{host}:{bound}", server)
    finally:
        await runner.cleanup()
