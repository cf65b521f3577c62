"""What a process counts for Prometheus, and what of the ledger is told to it.

Counters are of this process, and all processes' may be summed. What is a fact of the ledger is read
when somebody asks, and told by the one worker that reconciles the endpoint, so that no sum counts
it twice. No project is a label of what is counted for each call, and no pool of anything.
"""

from __future__ import annotations

import asyncio
import os
import platform
from collections import Counter as Tally
from importlib.metadata import version
from typing import TYPE_CHECKING, Any, Final

from prometheus_client import CollectorRegistry, Counter, Histogram, ProcessCollector
from prometheus_client.core import GaugeMetricFamily
from prometheus_client.multiprocess import MultiProcessCollector

from worker.ledger import JobState, RunState, keys, schema
from worker.modelarts.answers import parse_error_body
from worker.modelarts.client import SMALL_BODY, ModelArtsClient
from worker.pause import EVERYTHING
from worker.recorder import Recorder

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

    from prometheus_client import Metric
    from redis.asyncio import Redis

    from worker.breaker import Breakers
    from worker.ledger import Ledger, Move
    from worker.limiter import Limiter
    from worker.modelarts import Answer
    from worker.modelarts.answers import ErrorBody
    from worker.pause import Pause

RECENT_S: Final = 86_400
"""Runs that were made so long ago, and those that have not ended, are told of by their state."""
RUNS_AT_ONCE: Final = 200
MOST_RUNS: Final = 10_000
"""No more runs than this are read for an answer: the latest."""

CHILDREN: Final = "PROMETHEUS_MULTIPROC_DIR"
"""The variable that names a folder where a process and its children count together: how
prometheus-client has it."""

REGISTRY: Final = CollectorRegistry()
PROCESS: Final = ProcessCollector(registry=None)

JOBS = Counter(
    "poolsweep_jobs",
    "Jobs that this process brought to an outcome.",
    ["endpoint", "outcome"],
    registry=REGISTRY,
)
CALLS = Counter(
    "poolsweep_api_calls",
    "Calls of the ModelArts API, by HTTP status; without an answer, by what went wrong.",
    ["endpoint", "method", "class", "status"],
    registry=REGISTRY,
)
CALL_S = Histogram(
    "poolsweep_api_call_seconds",
    "Seconds that a call of the ModelArts API took, answered or not.",
    ["endpoint", "method"],
    buckets=(0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30),
    registry=REGISTRY,
)
THROTTLED = Counter(
    "poolsweep_throttled",
    "Answers 429 that the shared limiter was told of.",
    ["endpoint"],
    registry=REGISTRY,
)
SLOT_WAIT_S = Histogram(
    "poolsweep_limiter_wait_seconds",
    "Seconds that a call waited for its slot of the shared rate limit.",
    ["endpoint"],
    buckets=(0.005, 0.025, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60),
    registry=REGISTRY,
)
CLAIMED = Counter(
    "poolsweep_jobs_claimed", "Jobs that this process leased.", ["endpoint"], registry=REGISTRY
)
GIVEN_BACK = Counter(
    "poolsweep_jobs_given_back",
    "Jobs that this process gave back before they were finished.",
    ["endpoint"],
    registry=REGISTRY,
)
EXPIRED = Counter(
    "poolsweep_leases_expired",
    "Jobs whose lease ran out, which this process took back from a lost worker.",
    ["endpoint"],
    registry=REGISTRY,
)

OPEN_STATES: Final = (JobState.PENDING, JobState.LEASED, JobState.ACCEPTED)


class MeteredClient(ModelArtsClient):
    """A client each of whose calls is counted and timed.

    Args:
        client: the client whose calls it makes.
    """

    def __init__(self, client: ModelArtsClient) -> None:
        super().__init__(client._endpoint, client._authenticator, client._options)
        self._counters: dict[tuple[str, object], Counter] = {}
        self._timers = {
            method: CALL_S.labels(client.endpoint, method) for method in ("DELETE", "GET")
        }

    async def _call(
        self,
        method: str,
        project_id: str,
        path: str,
        limit: int = SMALL_BODY,
        parse: Callable[[bytes], ErrorBody] = parse_error_body,
        before: Callable[[], None] | None = None,
    ) -> tuple[Answer, dict[str, Any] | None]:
        found = await super()._call(method, project_id, path, limit, parse, before)
        answer = found[0]
        key = (method, answer.status or answer.failure)
        try:
            counter = self._counters[key]
        except KeyError:
            counter = self._counters[key] = self._counter(answer)
        counter.inc()
        self._timers[method].observe(answer.duration_s)
        return found

    def _counter(self, answer: Answer) -> Counter:
        if answer.status is None:
            named = ("none", str(answer.failure))
        elif 100 <= answer.status < 600:
            named = (f"{answer.status // 100}xx", str(answer.status))
        else:  # what is no status of HTTP has no end of values
            named = ("other", "other")
        return CALLS.labels(self.endpoint, answer.method, *named)


class CountingRecorder(Recorder):
    """A recorder that counts the outcomes which it brings jobs to.

    Args:
        ledger: where moves go.
        endpoint: the base URL of the API that the jobs are at.
    """

    def __init__(self, ledger: Ledger, endpoint: str) -> None:
        super().__init__(ledger)
        self._outcomes = {name: JOBS.labels(endpoint, name) for name in keys.OUTCOMES}

    async def record(self, run_id: str, move: Move) -> bool:
        """Make one move; see `Recorder.record`."""
        made = await super().record(run_id, move)
        if made and (outcome := self._outcomes.get(move.target)):
            outcome.inc()
        return made


class Page:
    """The metrics of one answer: what was counted, and what was found just now.

    Args:
        found: what was found.
    """

    def __init__(self, found: Iterable[Metric]) -> None:
        self._found = list(found)

    def collect(self) -> Iterator[Metric]:
        """All of them, as prometheus-client wants them."""
        yield from PROCESS.collect()
        if folder := os.environ.get(CHILDREN):
            counted = MultiProcessCollector(None, folder)  # type: ignore[no-untyped-call]
            yield from counted.collect()  # type: ignore[no-untyped-call]
        else:
            yield from REGISTRY.collect()
        yield from self._found


def gauge(name: str, text: str, *labels: str) -> GaugeMetricFamily:
    """A gauge of what was found just now, without samples yet."""
    return GaugeMetricFamily(f"poolsweep_{name}", text, labels=labels)


def of_the_process(role: str, *, redis_up: bool, ready: bool) -> list[Metric]:
    """What every process tells of itself.

    Args:
        role: `worker`, `scheduler` or `intake`.
        redis_up: whether Redis answered just now.
        ready: whether it is ready.
    """
    build = gauge("build_info", "1; what runs here.", "version", "python", "role")
    build.add_metric([version("poolsweep"), platform.python_version(), role], 1)
    up = gauge("redis_up", "1 if Redis answered this process just now, else 0.")
    up.add_metric([], redis_up)
    is_ready = gauge("ready", "1 if /readyz says that this process is ready, else 0.")
    is_ready.add_metric([], ready)
    return [build, up, is_ready]


def of_limits(parts: Iterable[tuple[str, Limiter, Breakers]]) -> list[Metric]:
    """What a worker knows of the rate limits and of outages.

    Args:
        parts: for each endpoint, its limiter and its circuit breakers.
    """
    labels = ("endpoint", "project_id")
    rate = gauge(
        "limiter_rate",
        "Calls a second that the shared rate limit gave a project when this process last asked.",
        *labels,
    )
    breaker = gauge(
        "circuit_breaker_open",
        "1 while this process makes no calls to a project because too many failed, else 0.",
        *labels,
    )
    for endpoint, limiter, breakers in parts:
        for project_id, calls_a_second in limiter.rates().items():
            rate.add_metric([endpoint, project_id], calls_a_second)
        for project_id, is_open in breakers.states().items():
            breaker.add_metric([endpoint, project_id], is_open)
    return [rate, breaker]


def of_pauses(pauses: Iterable[Pause] | None) -> list[Metric]:
    """The state of the kill switch.

    Args:
        pauses: those that are on; None: nobody knows at present.
    """
    paused = gauge("paused", "Pauses that are on, by what they stop.", "scope")
    since = gauge(
        "paused_since_timestamp_seconds",
        "Unix time since when the oldest pause is on; no sample: none is.",
    )
    if pauses is not None:
        on = list(pauses)
        counts = Tally("everything" if each.scope == EVERYTHING else "project" for each in on)
        for scope in ("everything", "project"):
            paused.add_metric([scope], counts[scope])
        if on:
            since.add_metric([], min(each.at_ms for each in on) / 1000)
    return [paused, since]


class LedgerFacts:
    """What of an endpoint's runs in the ledger is told: read when it is asked for.

    Args:
        redis: a connection that decodes responses.
        resend_s: seconds after which a job that was sent counts as lost.
    """

    def __init__(self, redis: Redis, *, resend_s: float) -> None:
        self._redis = redis
        self._resend_ms = resend_s * 1000
        self._jobs = gauge(
            "unfinished_jobs", "Jobs of the runs that have not ended.", "endpoint", "state"
        )
        self._oldest = gauge(
            "oldest_pending_job_seconds",
            "Seconds since the start of the oldest run that still has pending jobs; 0: none has.",
            "endpoint",
        )
        self._queue = gauge(
            "queue_age_seconds",
            "Seconds that the job which is due for longest has waited for a worker; 0: none waits.",
            "endpoint",
        )
        self._runs = gauge(
            "runs", "Runs that have not ended or were made in 24 h, by state.", "endpoint", "state"
        )
        self._braked = gauge(
            "braked_runs",
            "Those of the runs that a brake held, or stopped midway because of failures.",
            "endpoint",
        )
        self._outcomes = gauge(
            "recent_jobs", "Jobs of these runs, by state or outcome.", "endpoint", "state"
        )
        self._workers = gauge("workers", "Worker processes that serve the endpoint.", "endpoint")

    @property
    def metrics(self) -> list[Metric]:
        """All of them."""
        return [
            self._jobs,
            self._oldest,
            self._queue,
            self._runs,
            self._braked,
            self._outcomes,
            self._workers,
        ]

    async def read(self, endpoint: str, *, workers: int) -> None:
        """Read an endpoint's.

        Args:
            endpoint: the base URL of the API.
            workers: the worker processes that serve it.

        Raises:
            RedisError: Redis does not answer.
        """
        now_ms, runs = await self._read_runs(endpoint)
        states, jobs, unfinished = Tally[str](), Tally[str](), Tally[str]()
        braked, oldest_ms = 0, now_ms
        running = []
        for run_id, (state, braked_ms, started_ms, counts) in runs.items():
            states[state] += 1
            braked += bool(braked_ms) or state == RunState.BRAKED
            if started_ms:  # the jobs of others, such as a dry run's, come to nothing
                jobs.update(counts)
            if state == RunState.RUNNING:
                running.append((run_id, started_ms))
                unfinished.update({name: counts.get(name, 0) for name in OPEN_STATES})
                if counts.get(JobState.PENDING, 0):
                    oldest_ms = min(oldest_ms, started_ms)
        for run_state in RunState:
            self._runs.add_metric([endpoint, run_state], states[run_state])
        for job_state in JobState:
            self._outcomes.add_metric([endpoint, job_state], jobs[job_state])
        for open_state in OPEN_STATES:
            self._jobs.add_metric([endpoint, open_state], unfinished[open_state])
        waiting_ms = now_ms - await self._due_since(running, now_ms)
        self._braked.add_metric([endpoint], braked)
        self._oldest.add_metric([endpoint], (now_ms - oldest_ms) / 1000)
        self._queue.add_metric([endpoint], max(0, waiting_ms) / 1000)
        self._workers.add_metric([endpoint], workers)

    async def _read_runs(
        self, endpoint: str
    ) -> tuple[int, dict[str, tuple[str, int, int, dict[str, int]]]]:
        """The server's clock, and of each run its state, ms of its brake and start, and counts."""
        seconds, micros = await self._redis.time()
        now_ms = int(seconds) * 1000 + int(micros) // 1000
        async with self._redis.pipeline(transaction=False) as pipe:
            pipe.smembers(keys.active(endpoint))
            pipe.zrevrangebyscore(
                keys.INDEX, "+inf", now_ms - RECENT_S * 1000, start=0, num=MOST_RUNS
            )
            active, recent = await pipe.execute()
        ids = sorted({*active, *recent})
        fields = ["endpoint", "state", schema.FIELD, "braked_ms", "started_ms"]
        fields += [f"jobs:{state}" for state in JobState]
        found: list[Any] = []
        for start in range(0, len(ids), RUNS_AT_ONCE):
            async with self._redis.pipeline(transaction=False) as pipe:
                for run_id in ids[start : start + RUNS_AT_ONCE]:
                    pipe.hmget(keys.run(run_id), fields)
                found += await pipe.execute()
            await asyncio.sleep(0)  # the calls of this loop go first
        runs: dict[str, tuple[str, int, int, dict[str, int]]] = {}
        for run_id, values in zip(ids, found, strict=True):
            where, state, written, braked_ms, started_ms, *counts = values
            if where == endpoint and not (written and schema.is_newer(written)):
                jobs = {str(each): int(n or 0) for each, n in zip(JobState, counts, strict=True)}
                runs[run_id] = (state, int(braked_ms or 0), int(started_ms or 0), jobs)
        return now_ms, runs

    async def _due_since(self, running: list[tuple[str, int]], now_ms: int) -> float:
        """Since when (ms) the job that waits for longest is due; a new run's are from its start."""
        async with self._redis.pipeline(transaction=False) as pipe:
            for run_id, _ in running:
                pipe.zrange(keys.waiting(run_id), 0, 0, withscores=True)
                pipe.zrange(keys.sent(run_id), 0, 0, withscores=True)
            found = await pipe.execute()
        since: list[float] = [now_ms]
        for (_, started_ms), waiting, sent in zip(running, found[::2], found[1::2], strict=True):
            since += [max(due_ms, started_ms) for _, due_ms in waiting]
            since += [max(lost_ms - self._resend_ms, started_ms) for _, lost_ms in sent]
        return min(since)
