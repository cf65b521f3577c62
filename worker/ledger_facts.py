"""What is told to Prometheus of the ledger: facts that are read in Redis when somebody asks.

The one worker that reconciles an endpoint tells its facts, so that no sum counts them twice.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections import Counter as Tally
from typing import TYPE_CHECKING, Any, Final

from worker.ledger import JobState, RunState, keys, schema
from worker.metrics import gauge
from worker.pause import EVERYTHING

if TYPE_CHECKING:
    from collections.abc import Iterable

    from prometheus_client import Metric
    from redis.asyncio import Redis

    from worker.pause import Pause

RECENT_S: Final = 86_400
"""Runs that were made so long ago, and those that have not ended, are told of by their state."""
RUNS_AT_ONCE: Final = 200
MOST_RUNS: Final = 10_000
"""No more runs than this are read for an answer: the latest."""

OPEN_STATES: Final = (JobState.PENDING, JobState.LEASED, JobState.ACCEPTED)


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
            if where != endpoint or (written and schema.is_newer(written)):
                continue
            with contextlib.suppress(ValueError):  # a damaged run is left alone
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
