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

from worker import embedded_redis, ledger_facts, metrics
from worker.broker import make_app, sender
from worker.cancellation import cancel
from worker.deletion import Deleter
from worker.executor import Executor, Site
from worker.feed import Feed
from worker.health import Health, answers
from worker.inventory import Inventory
from worker.ledger import Ledger
from worker.modelarts_client import make_client, make_limiter
from worker.pause import PauseWatch, pauses
from worker.projects import Directory
from worker.reconciler import Reconciler, live_workers
from worker.recorder import Recorder
from worker.redis_connection import connect
from worker.retry import RetryPolicy
from worker.settings import Settings, settings
from worker.verifier import Verifier

if TYPE_CHECKING:
    from collections.abc import Coroutine, Sequence

    from prometheus_client import Metric

    from worker.breaker import Breakers
    from worker.limiter import Limiter
    from worker.modelarts.client import ModelArtsClient

STOP_TIMEOUT_S = 5.0

_draining, _drain = os.pipe()
"""Readable from when on this worker takes nothing new. A pipe, because forked children must see it
too, and because a signal handler may write to it."""

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
        self._reconciling: list[asyncio.Task[None]] = []
        self._watching: asyncio.Task[None] | None = None
        self._redis = connect(config)
        self._pause = PauseWatch(self._redis)
        self._clients: list[ModelArtsClient] = []
        self._reconcilers: list[Reconciler] = []
        self._limits: list[tuple[str, Limiter, Breakers]] = []
        self._resend_s = config.resend_s
        self._has_drained = False
        self._serving: asyncio.Task[None] | None = None
        self._health = Health(
            config,
            "worker",
            redis_answers=lambda: answers(self._redis.ping),
            missing=self._missing,
            found=self._found,
        )
        directory = Directory.of(config)
        ledger = Ledger(self._redis, retention_days=config.retention_days)
        self._executor = Executor(
            sites={
                endpoint: self._site(directory, endpoint, ledger)
                for endpoint in directory.endpoints
            },
            ledger=ledger,
            pause=self._pause,
            settings=config,
        )
        self._loop.call_soon(self._loop.add_reader, _draining, self._give_back)
        self._loop.call_soon(self._watch)
        self._thread.start()

    def _site(self, directory: Directory, endpoint: str, ledger: Ledger) -> Site:
        config = directory.settings
        recorder = Recorder(ledger, observe=metrics.OutcomeCounter(endpoint))
        client = make_client(
            directory, self._redis, endpoint, observe=metrics.CallCounter(endpoint)
        )
        limiter = make_limiter(directory, self._redis, endpoint)
        feed = Feed(ledger, sender(make_app(config, [endpoint]), endpoint), config)
        verifier = Verifier(
            client=client,
            limiter=limiter,
            ledger=ledger,
            recorder=recorder,
            deadline_s=config.verify_deadline_s,
        )
        reconciler = Reconciler(
            redis=self._redis,
            endpoint=endpoint,
            ledger=ledger,
            feed=feed,
            verifier=verifier,
            settings=config,
            pause=self._pause,
        )
        deleter = Deleter(
            client=client,
            inventory=Inventory(client, limiter, max_age_s=config.precondition_max_age_s),
            limiter=limiter,
            recorder=recorder,
            pause=self._pause,
            policy=RetryPolicy(
                max_attempts=config.max_attempts,
                max_total_s=config.max_retry_s,
                base_s=config.backoff_base_s,
                cap_s=config.backoff_cap_s,
            ),
            in_flight=config.in_flight,
            # A quarter of what the process can hold is always for others.
            longest_line=config.worker_batches * config.batch_size * 3 // 4,
            inline_wait_s=config.inline_wait_s,
            blocked_wait_s=config.verify_interval_s,
            verify_deadline_s=config.verify_deadline_s,
            plan_max_age_s=config.plan_max_age_s,
        )
        self._clients.append(client)
        self._reconcilers.append(reconciler)
        self._limits.append((endpoint, limiter, deleter.breakers))
        return Site(deleter, feed, recorder)

    def _watch(self) -> None:
        self._watching = self._loop.create_task(self._pause.run())

    def execute(self, run_id: str, numbers: Sequence[int]) -> None:
        """Execute a batch on the loop, and wait for its end."""
        self._run(self._executor.execute(run_id, numbers))

    def reconcile(self) -> None:
        """Start the periodic work, and say how this process is to whoever asks."""

        async def start() -> None:
            self._serving = asyncio.create_task(self._health.run())
            self._reconciling = [asyncio.create_task(each.run()) for each in self._reconcilers]

        self._run(start())

    def _give_back(self) -> None:
        self._loop.remove_reader(_draining)
        log.info("draining")
        self._has_drained = True
        self._executor.drain()
        self._stop_reconcilers()

    async def _missing(self, _: bool) -> list[str]:
        """What this worker lacks to do its work, besides Redis."""
        missing = ["the worker is stopping"] if self._has_drained else []
        missing += [
            f"the reconciler of {each.endpoint} gives no sign of life"
            for each in self._reconcilers
            if not each.is_alive
        ]
        return missing

    async def _found(self, redis_up: bool) -> list[Metric]:
        """What this worker finds when it is asked.

        Raises:
            RedisError: Redis does not answer any more.
        """
        leads = metrics.gauge(
            "reconciler_leads", "1 if this process reconciles the endpoint, else 0.", "endpoint"
        )
        on = (await pauses(self._redis)).values() if redis_up else None
        facts = ledger_facts.LedgerFacts(self._redis, resend_s=self._resend_s)
        for each in self._reconcilers:
            leads.add_metric([each.endpoint], each.leads)
            if redis_up and each.leads:
                count = await live_workers(self._redis, each.endpoint)
                await facts.read(each.endpoint, workers=count)
        return [
            leads,
            *metrics.of_limits(self._limits),
            *ledger_facts.of_pauses(on),
            *facts.metrics,
        ]

    def _stop_reconcilers(self) -> None:
        for reconciler in self._reconcilers:
            reconciler.stop()

    def stop(self) -> None:
        """Leave Redis and the API in good order, and end the loop."""
        with contextlib.suppress(RedisError, TimeoutError):
            # A loop that is held up must not hold up the end of the process.
            self._run(self._close(), timeout_s=3 * STOP_TIMEOUT_S)
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(timeout=STOP_TIMEOUT_S)

    async def _close(self) -> None:
        async with asyncio.timeout(2 * STOP_TIMEOUT_S):
            if self._reconciling:
                self._stop_reconcilers()
                await asyncio.wait(self._reconciling, timeout=STOP_TIMEOUT_S)
            others = [task for task in (self._watching, self._serving) if task]
            await cancel(*self._reconciling, *others)
            for client in self._clients:
                await client.aclose()
            await self._redis.aclose()

    def _run(self, work: Coroutine[None, None, None], timeout_s: float | None = None) -> None:
        asyncio.run_coroutine_threadsafe(work, self._loop).result(timeout_s)


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


def drain() -> None:
    """Have the batches under way, in this process and its children, give back what they can.

    Safe in a signal handler.
    """
    os.write(_drain, b".")


def stop() -> None:
    """End this process's parts and leave the embedded Redis."""
    global _process
    if _process is not None and _process.pid == os.getpid():
        _process.stop()
        _process = None
    _membership.close()
