"""How a process is: `/healthz`, `/readyz` and `/metrics`, served by the event loop that works.

An answer of `/healthz` is the proof that the loop turns. Whoever asks sees numbers, project ids and
policies' names, and may change nothing.
"""

from __future__ import annotations

import asyncio
import json
from typing import TYPE_CHECKING, Final

import structlog
from aiohttp import web
from prometheus_client.exposition import CONTENT_TYPE_LATEST, generate_latest
from redis.exceptions import RedisError

from worker import metrics

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Sequence

    from prometheus_client import Metric

    from worker.settings import Settings

PING_S: Final = 2.0
READ_S: Final = 5.0
AGAIN_S: Final = 5.0
"""A port that is in use, as while another worker ends, is tried again after so long."""
_HEADERS: Final = {"Cache-Control": "no-store", "X-Content-Type-Options": "nosniff"}

log = structlog.get_logger(__name__)


class Readiness:
    """Whether a process is ready, told to the log when that changes.

    Args:
        missing: what the process lacks to do its work, a sentence for each; empty: nothing.
    """

    def __init__(self, missing: Callable[[], Awaitable[Sequence[str]]]) -> None:
        self._missing = missing
        self._was_ready: bool | None = None

    async def look(self) -> Sequence[str]:
        """What is missing now."""
        missing = await self._missing()
        if (is_ready := not missing) is not self._was_ready:
            self._was_ready = is_ready
            if is_ready:
                log.info("process_ready")
            else:
                log.warning("process_not_ready", reason="; ".join(missing))
        return missing


async def answers(ask: Callable[[], Awaitable[object]]) -> bool:
    """Whether Redis answers now.

    Args:
        ask: asks it something that costs nothing.
    """
    try:
        async with asyncio.timeout(PING_S):
            await ask()
    except (RedisError, TimeoutError, OSError):
        return False
    return True


class Health:
    """Serves how a process is.

    Args:
        config: where to listen; without a port nothing is served.
        role: what the process is: `worker`, `scheduler` or `intake`.
        redis_answers: whether Redis answers now.
        missing: what the process lacks to do its work besides Redis, a sentence for each; it is
            told whether Redis answers.
        found: what it tells of what it finds now; it is told whether Redis answers.
        readiness: where else it is asked for; None: nowhere.
    """

    def __init__(
        self,
        config: Settings,
        role: str,
        *,
        redis_answers: Callable[[], Awaitable[bool]],
        missing: Callable[[bool], Awaitable[Sequence[str]]],
        found: Callable[[bool], Awaitable[list[Metric]]],
        readiness: Readiness | None = None,
    ) -> None:
        self._host = config.metrics_host
        self._port = config.metrics_port
        self._role = role
        self._redis_answers = redis_answers
        self._missing = missing
        self._found = found
        self._readiness = readiness or Readiness(self._all_missing)

    async def run(self) -> None:
        """Serve until cancelled. A port that is in use is waited for, and said so once."""
        if self._port is None:
            return
        app = web.Application()
        app.router.add_get("/healthz", self._healthz)
        app.router.add_get("/readyz", self._readyz)
        app.router.add_get("/metrics", self._metrics)
        runner = web.AppRunner(app, access_log=None, shutdown_timeout=PING_S)
        await runner.setup()
        try:
            await self._listen(runner, self._port)
            host, port = runner.addresses[0][:2]
            log.info("metrics_served", host=host, port=port)
            await asyncio.Event().wait()
        finally:
            await runner.cleanup()

    async def _listen(self, runner: web.AppRunner, port: int) -> None:
        told = False
        while True:
            site = web.TCPSite(runner, self._host, port)
            try:
                return await site.start()
            except OSError as error:
                await site.stop()
                if not told:
                    told = True
                    log.error(
                        "metrics_not_served",
                        reason=f"POOLSWEEP_METRICS_HOST, POOLSWEEP_METRICS_PORT: {self._host}:"
                        f"{port} cannot be listened on: {error.strerror}; the process works "
                        "without, and tries again; accepted: an address of this machine with a "
                        "port that is free, one for each process, 0 for any",
                    )
                await asyncio.sleep(AGAIN_S)

    async def _all_missing(self) -> list[str]:
        up = await self._redis_answers()
        missing: list[str] = []
        try:
            async with asyncio.timeout(READ_S):
                missing += await self._missing(up)
        except (RedisError, TimeoutError):
            up = False
        return missing if up else [*missing, "Redis does not answer"]

    async def _healthz(self, _: web.Request) -> web.Response:
        return _json({"status": "ok"})

    async def _readyz(self, _: web.Request) -> web.Response:
        if missing := await self._readiness.look():
            return _json({"status": "not ready", "missing": list(missing)}, status=503)
        return _json({"status": "ok"})

    async def _metrics(self, _: web.Request) -> web.Response:
        up, missing = await asyncio.gather(self._redis_answers(), self._readiness.look())
        found: list[Metric] = []
        try:
            async with asyncio.timeout(READ_S):
                found = await self._found(up)
        except (RedisError, TimeoutError) as error:
            log.warning("metrics_incomplete", reason=str(error) or type(error).__name__)
            up = False
        state = metrics.of_the_process(self._role, redis_up=up, ready=not missing)
        page = metrics.Page([*state, *found])
        headers = {**_HEADERS, "Content-Type": CONTENT_TYPE_LATEST}
        return web.Response(body=generate_latest(page), headers=headers)


def _json(body: dict[str, object], *, status: int = 200) -> web.Response:
    text = json.dumps(body).encode()
    return web.Response(status=status, body=text, content_type="application/json", headers=_HEADERS)
