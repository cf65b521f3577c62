"""What has been read of a pool so far: its document, and what takes further calls."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import StrEnum
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from datetime import datetime

    from worker.modelarts import Pool
    from worker.modelarts.activity import UsageSeries
    from worker.modelarts.schema import Node, Workload


class Fact(StrEnum):
    """What only a further call tells about a pool."""

    NODES = "nodes"
    WORKLOADS = "workloads"
    USAGE = "usage"


@dataclass(frozen=True, slots=True)
class Facts:
    """A pool and what has been read of it. None: not read yet.

    Attributes:
        pool: its document.
        nodes: its nodes.
        workloads: what runs or ran in it.
        usage: its utilisation by metric.
        idle_since: when it was first seen without a workload, and every time since.
        unreadable: the facts that could not be read, each with the reason; they are doubts.
    """

    pool: Pool
    nodes: Sequence[Node] | None = None
    workloads: Sequence[Workload] | None = None
    usage: Mapping[str, UsageSeries] | None = None
    idle_since: datetime | None = None
    unreadable: Mapping[Fact, str] = field(default_factory=dict)
