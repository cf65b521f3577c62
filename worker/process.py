"""What one worker process owns: an event loop that lives as long as it, and all that runs there.

Celery calls tasks from threads (or from forked children); each hands its batch to the loop of its
process and waits.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import threading
from typing import TYPE_CHECKING

import structlog
from redis.exceptions import RedisError

from worker import embedded_redis
from worker.broker import make_app, sender
from worker.deletion import Deleter
from worker.executor import Executor
from worker.feed import Feed
from worker.inventory import Inventory
from worker.ledger import Ledger
from worker.limiter import Limiter
from worker.modelarts_client import make_client
from worker.reconciler import Reconciler
from worker.recorder import Recorder
from worker.redis_connection import connect
from worker.retry import RetryPolicy
from worker.settings import Settings, settings
from worker.verifier import Verifier

if TYPE_CHECKING:
    from collections.abc import Coroutine

log = structlog.get_logger(__name__)


class WorkerProcess:
    """The parts of a worker process, put together on a loop in a thread of its own.

    Args:
        config: the settings.
    """

    def __init__(self, config: Settings) -> None:
        self.pid = os.getpid()
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="loop", daemon=True)
        self._reconciling: asyncio.Task[None] | None = None
        endpoint = config.api_endpoint.url
        self._redis = connect(config)
        self._client = make_client(config, self._redis)
        limiter = Limiter(
            self._redis, endpoint=endpoint, rate=config.rate_limit, burst=config.burst
        )
        ledger = Ledger(self._redis, retention_days=config.retention_days)
        recorder = Recorder(ledger)
        feed = Feed(ledger, sender(make_app(config)), config)
        self._executor = Executor(
            endpoint=endpoint,
            ledger=ledger,
            recorder=recorder,
            feed=feed,
            settings=config,
            deleter=Deleter(
                client=self._client,
                inventory=Inventory(self._client, limiter, max_age_s=config.precondition_max_age_s),
                limiter=limiter,
                recorder=recorder,
                policy=RetryPolicy(
                    max_attempts=config.max_attempts,
                    max_total_s=config.max_retry_s,
                    base_s=config.backoff_base_s,
                    cap_s=config.backoff_cap_s,
                ),
                in_flight=config.in_flight,
                inline_wait_s=config.inline_wait_s,
                blocked_wait_s=config.verify_interval_s,
                verify_deadline_s=config.verify_deadline_s,
            ),
        )
        self._reconciler = Reconciler(
            redis=self._redis,
            endpoint=endpoint,
            ledger=ledger,
            feed=feed,
            settings=config,
            verifier=Verifier(
                client=self._client,
                limiter=limiter,
                ledger=ledger,
                recorder=recorder,
                deadline_s=config.verify_deadline_s,
            ),
        )
        self._thread.start()

    def execute(self, run_id: str, numbers: list[int]) -> None:
        """Execute a batch on the loop, and wait for its end."""
        self._run(self._executor.execute(run_id, numbers))

    def reconcile(self) -> None:
        """Start the periodic work."""

        async def start() -> None:
            self._reconciling = asyncio.create_task(self._reconciler.run())

        self._run(start())

    def drain(self) -> None:
        """Have the batches under way give back what they can; safe in a signal handler."""
        self._loop.call_soon_threadsafe(self._executor.drain)

    def stop(self) -> None:
        """Leave Redis and the API in good order, and end the loop."""
        with contextlib.suppress(RedisError, TimeoutError):
            self._run(self._close())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(timeout=5)

    async def _close(self) -> None:
        if self._reconciling:
            self._reconciling.cancel()
            await asyncio.wait({self._reconciling})
            await self._reconciler.leave()
        await self._client.aclose()
        await self._redis.aclose()

    def _run(self, work: Coroutine[None, None, None]) -> None:
        asyncio.run_coroutine_threadsafe(work, self._loop).result()


_process: WorkerProcess | None = None
_lock = threading.Lock()
_membership = contextlib.ExitStack()


def current() -> WorkerProcess:
    """This process's parts, put together on first use; a forked child gets its own."""
    global _process
    with _lock:
        if _process is None or _process.pid != os.getpid():
            _process = WorkerProcess(settings())
        return _process


def join_redis() -> None:
    """Use the embedded Redis for as long as this process lives, if none is configured."""
    config = settings()
    if config.redis_url is None:
        server = _membership.enter_context(embedded_redis.join(config.state_dir))
        log.info("embedded_redis", url=server.url, started=server.started)


def stop() -> None:
    """End this process's parts and leave the embedded Redis."""
    global _process
    if _process is not None and _process.pid == os.getpid():
        _process.stop()
        _process = None
    _membership.close()
