"""What a process counts of its own for Prometheus, and the page that it shows.

All processes' counters may be summed. No project is a label of what is counted for each call, and
no pool of anything. What is read in Redis instead: ledger_facts.py.
"""

from __future__ import annotations

import os
import platform
from importlib.metadata import version
from typing import TYPE_CHECKING, Final

from prometheus_client import CollectorRegistry, Counter, Histogram, ProcessCollector
from prometheus_client.core import GaugeMetricFamily
from prometheus_client.multiprocess import MultiProcessCollector

from worker.ledger import keys

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from prometheus_client import Metric

    from worker.breaker import Breakers
    from worker.ledger import Move
    from worker.limiter import Limiter
    from worker.modelarts import Answer

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


class CallCounter:
    """Counts and times calls of the API: what `ModelArtsClient` is to be observed by.

    Args:
        endpoint: the base URL of the API.
    """

    def __init__(self, endpoint: str) -> None:
        self._endpoint = endpoint
        self._counters: dict[tuple[str, object], Counter] = {}
        self._timers = {method: CALL_S.labels(endpoint, method) for method in ("DELETE", "GET")}

    def __call__(self, answer: Answer) -> None:
        """Count one call.

        Args:
            answer: what came of it.
        """
        key = (answer.method, answer.status or answer.failure)
        try:
            counter = self._counters[key]
        except KeyError:
            counter = self._counters[key] = self._counter(answer)
        counter.inc()
        self._timers[answer.method].observe(answer.duration_s)

    def _counter(self, answer: Answer) -> Counter:
        if answer.status is None:
            named = ("none", str(answer.failure))
        elif 100 <= answer.status < 600:
            named = (f"{answer.status // 100}xx", str(answer.status))
        else:  # what is no status of HTTP has no end of values
            named = ("other", "other")
        return CALLS.labels(self._endpoint, answer.method, *named)


class OutcomeCounter:
    """Counts the outcomes of jobs: what `Recorder` is to be observed by.

    Args:
        endpoint: the base URL of the API that the jobs are at.
    """

    def __init__(self, endpoint: str) -> None:
        self._outcomes = {name: JOBS.labels(endpoint, name) for name in keys.OUTCOMES}

    def __call__(self, move: Move) -> None:
        """Count one move, if it leads to an outcome.

        Args:
            move: one that the ledger has made.
        """
        if outcome := self._outcomes.get(move.target):
            outcome.inc()


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
