"""Whatever lies in the queue or the stream of the intake: it goes on, and nothing comes again."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from tests.fuzz.messages import broken, with_other_arguments
from tests.intake.conftest import QUEUE, TASK, Intake, Place, a_place, asks
from tests.modelarts.pool_documents import json_values
from tests.sweep.conftest import Sandbox, eventually, serving
from worker.broker import KEY_PREFIX
from worker.ledger import keys

if TYPE_CHECKING:
    from collections.abc import Iterator


@pytest.fixture(scope="module")
def sandbox() -> Iterator[Sandbox]:
    with serving() as running:
        yield running


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory, sandbox: Sandbox) -> Iterator[Place]:
    with a_place(tmp_path_factory.mktemp("place"), sandbox) as found:
        yield found


@pytest.fixture(scope="module")
def intake(place: Place) -> Iterator[Intake]:
    started = place.intake()
    try:
        yield started.ready()
    finally:
        started.kill()


ARGUMENTS: dict[str, Any] = {
    "request": {"targets": [{"project_id": "0" * 32, "pools": [f"pool-{'0' * 32}"]}]},
    "client": "nobody",
    "idempotency_key": "k",
}
TEXT = st.text(st.characters(codec="utf-8"), max_size=30)
ENTRIES = st.dictionaries(
    st.sampled_from(["request", "client", "idempotency_key"]) | TEXT, TEXT, min_size=1, max_size=4
) | st.fixed_dictionaries({"client": st.just("ci"), "request": json_values().map(repr) | TEXT})


# A process that has fallen tells nothing more, so there is no use in looking for less to fell it.
@settings(max_examples=3, phases=[Phase.generate], suppress_health_check=list(HealthCheck))
@given(st.data())
def test_the_intake_outlives_whatever_comes_and_takes_what_is_good(
    place: Place, intake: Intake, sandbox: Sandbox, data: st.DataObject
) -> None:
    junk = broken(TASK, QUEUE, ARGUMENTS) | with_other_arguments(TASK, QUEUE, ARGUMENTS)
    messages = data.draw(st.lists(junk, min_size=40, max_size=40))
    entries = data.draw(st.lists(ENTRIES, min_size=20, max_size=20))
    project = sandbox.project()
    before = len(place.rejected())
    with place.server.client() as client:
        client.lpush(KEY_PREFIX + QUEUE, *messages)
        for entry in entries:
            client.xadd(keys.STREAM, dict(entry))
    place.send(client="ci", request=asks(project, *project.add(1)))
    assert place.run_in(project).total == 1
    eventually(place.nothing_left)
    # None is an unknown client's request, so each leaves a note and no run.
    assert len(place.rejected()) == min(100, before + len(messages) + len(entries))
    assert intake.is_ready()
