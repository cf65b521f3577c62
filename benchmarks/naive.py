"""What a user would write first: one Celery task for each pool, and its result to Redis.

Run as `celery -A benchmarks.naive worker`; the benchmark of throughput compares with it.
"""

from __future__ import annotations

import os
import threading

import requests
from celery import Celery

_local = threading.local()


def make_app(url: str) -> Celery:
    """A Celery app with its broker and its results in one Redis.

    Args:
        url: the server.
    """
    return Celery("naive", broker=url, backend=url, set_as_current=False)


app = make_app(os.environ.get("NAIVE_REDIS_URL", "redis://localhost"))


@app.task(name="naive.delete")  # type: ignore[untyped-decorator]
def delete(url: str, token: str) -> int:
    """Delete one pool. Returns the HTTP status."""
    if not hasattr(_local, "session"):
        _local.session = requests.Session()  # even a first version would keep its connections
    answer = _local.session.delete(url, headers={"X-Auth-Token": token}, timeout=30)
    answer.raise_for_status()
    return int(answer.status_code)
