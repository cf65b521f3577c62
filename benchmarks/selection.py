"""How many pools a second are decided about: `python -m benchmarks.selection`.

Makes pools as the API would list them, of which everything has been read, and decides about them
by a policy of eight matchers; prints how long reading the documents and deciding took.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import time
from datetime import UTC, datetime, timedelta
from typing import Any

from scheduler import policy
from scheduler.facts import Facts
from scheduler.selection import rules_of, select
from worker.modelarts import Pool

NOW = datetime(2026, 10, 1, tzinfo=UTC)
POLICIES = """
projects:
  p: {id: 0123456789abcdef0123456789abcdef}
policies:
  stale:
    projects: [p]
    match:
      all:
        - type: Dedicate
        - flavor: ["modelarts.*.gpu.*", "modelarts.*.npu.*", "modelarts.vm.cpu.*"]
        - older_than: 3d
        - tags: {key: env, one_of: [dev, test]}
        - any:
            - expired: {tag: expires-at}
            - ttl: {default: 7d}
        - not: {name: {regex: "prod-.*|.*-keep"}}
    protect:
      name: "demo-*"
"""


def _document(number: int) -> dict[str, Any]:
    identity = hashlib.sha256(str(number).encode()).hexdigest()
    name = ("train-atlas", "notebook", "prod-infer", "demo")[number % 4]
    created = NOW - timedelta(hours=number % 1_000)
    expiry = (NOW + timedelta(hours=number % 500 - 250)).isoformat()
    tags = {"env": ("dev", "test", "prod")[number % 3], "expires-at": expiry, "team": "vision"}
    flavor = ("modelarts.bm.gpu.8a100", "modelarts.vm.cpu.4ud")[number % 2]
    return {
        "apiVersion": "v2",
        "kind": "Pool",
        "metadata": {
            "name": f"{name}-{number}-{identity[:32]}",
            "creationTimestamp": f"{created:%Y-%m-%dT%H:%M:%SZ}",
            "labels": {"os.modelarts/name": f"{name}-{number}", "os.modelarts/workspace.id": "0"},
            "annotations": {
                "os.modelarts/billing.mode": "0",
                "os.modelarts/tms.tags": json.dumps(
                    [{"key": key, "value": value} for key, value in tags.items()]
                ),
            },
        },
        "spec": {
            "type": "Dedicate",
            "scope": ["Train", "Infer"],
            "resources": [{"flavor": flavor, "count": 2}],
        },
        "status": {
            "phase": "Running",
            "resources": {"available": [{"flavor": flavor, "count": 2}]},
        },
    }


def _measure(sizes: list[int]) -> None:
    rules = rules_of(policy.parse(POLICIES).policies["stale"])
    print(f"{'pools':>9}  {'deletions':>9}  {'read/s':>9}  {'decided/s':>9}")  # noqa: T201
    for size in sizes:
        documents = [_document(number) for number in range(size)]
        started = time.perf_counter()
        facts = [Facts(Pool.parse(raw), nodes=[], workloads=[]) for raw in documents]
        read = time.perf_counter()
        decisions = select(facts, rules, NOW)
        decided = time.perf_counter()
        deletions = sum(decision.delete for decision in decisions)
        print(  # noqa: T201
            f"{size:>9,}  {deletions:>9,}  {size / (read - started):>9,.0f}  "
            f"{size / (decided - read):>9,.0f}"
        )


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("pools", type=int, nargs="*", default=[1_000, 10_000, 100_000])
    _measure(parser.parse_args().pools)


if __name__ == "__main__":
    main()
