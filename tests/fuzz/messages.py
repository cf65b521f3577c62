"""Messages of Celery's as they lie in Redis, also such as no version sends."""

from __future__ import annotations

import base64
import json
import uuid
from typing import TYPE_CHECKING, Any

from hypothesis import strategies as st

from tests.fuzz.mutation import as_bytes, broken_bytes, broken_json
from tests.modelarts.pool_documents import json_values, keys

if TYPE_CHECKING:
    from hypothesis.strategies import SearchStrategy

OPTIONS = {"callbacks": None, "errbacks": None, "chain": None, "chord": None}


def envelope(task: str, queue: str, arguments: dict[str, Any]) -> dict[str, Any]:
    """A message that carries a task.

    Args:
        task: its name.
        queue: where it lies.
        arguments: its keyword arguments.
    """
    task_id = str(uuid.uuid4())
    content = json.dumps([[], arguments, OPTIONS]).encode()
    return {
        "body": base64.b64encode(content).decode(),
        "content-encoding": "utf-8",
        "content-type": "application/json",
        "headers": {"lang": "py", "task": task, "id": task_id, "retries": 0, "eta": None},
        "properties": {
            "correlation_id": task_id,
            "delivery_mode": 2,
            "delivery_info": {"exchange": "", "routing_key": queue},
            "priority": 0,
            "body_encoding": "base64",
            "delivery_tag": str(uuid.uuid4()),
        },
    }


def with_other_arguments(task: str, queue: str, arguments: dict[str, Any]) -> SearchStrategy[bytes]:
    """Messages as Celery sends them, with arguments that the task does not have or expect."""
    odd = st.dictionaries(keys(), json_values(), max_size=3)
    like = broken_json(arguments).filter(lambda given: isinstance(given, dict))
    more = st.builds(lambda given: arguments | given, odd)
    return (odd | like | more).map(lambda given: as_bytes(envelope(task, queue, given)))


def broken(task: str, queue: str, arguments: dict[str, Any]) -> SearchStrategy[bytes]:
    """What is hardly a message of Celery's any more, or none."""
    whole = envelope(task, queue, arguments)

    def carrying(body: bytes) -> bytes:
        return as_bytes(whole | {"body": base64.b64encode(body).decode()})

    bodies = broken_json([[], arguments, OPTIONS]).map(as_bytes) | st.binary(max_size=40)
    return st.one_of(
        bodies.map(carrying),
        broken_json(whole).map(as_bytes),
        broken_bytes(as_bytes(whole)),
        st.binary(max_size=40),
        json_values().map(as_bytes),
    )
