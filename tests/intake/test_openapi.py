"""The OpenAPI document is true: schemathesis sends what it allows, and what it does not."""

from __future__ import annotations

import asyncio
import contextlib
import copy
import itertools
import json
import re
import threading
from collections import Counter, defaultdict
from typing import TYPE_CHECKING, Any

import jsonschema
import pytest
import schemathesis
from redis.asyncio import Redis
from schemathesis.config import SchemathesisConfig
from schemathesis.engine import events, from_schema

from scheduler.intake import openapi
from scheduler.intake.http import make_app
from scheduler.intake.problems import KINDS, METHOD_NOT_ALLOWED
from scheduler.intake.request import validate
from tests.intake.api import ENDPOINT, Api, serving
from worker.modelarts.names import PROJECT_ID

if TYPE_CHECKING:
    from collections.abc import Iterator

pytestmark = pytest.mark.timeout(300)

MANY = [f"{number:032x}" for number in range(100)]
REFUSED = [400, 401, 403, 404, 405, 406, 409, 413, 415, 422, 428, 429, "5xx"]


class Server:
    """The API on a loop in a thread of its own, since schemathesis waits for its answers."""

    def __init__(self, redis_url: str) -> None:
        self._redis_url = redis_url
        self._up = threading.Event()
        self._thread = threading.Thread(target=lambda: asyncio.run(self._serve()))
        self._loop: asyncio.AbstractEventLoop
        self._stop: asyncio.Event
        self.api: Api

    def __enter__(self) -> Api:
        self._thread.start()
        assert self._up.wait(10)
        return self.api

    def __exit__(self, *_: object) -> None:
        self._loop.call_soon_threadsafe(self._stop.set)
        self._thread.join(20)
        assert not self._thread.is_alive()

    async def _serve(self) -> None:
        self._loop, self._stop = asyncio.get_running_loop(), asyncio.Event()
        redis = Redis.from_url(self._redis_url, decode_responses=True)
        await redis.flushdb()
        async with serving(redis) as self.api:
            self.api.allow(ci={"projects": MANY})
            self._up.set()
            while not self._stop.is_set():
                # Nothing plans here, and whoever watches a run waits for its end.
                for run in await self.api.ledger.active(ENDPOINT):
                    await self.api.ledger.cancel(run.run_id)
                with contextlib.suppress(TimeoutError):
                    await asyncio.wait_for(self._stop.wait(), 0.05)
        await redis.aclose()


@pytest.fixture
def api(redis_url: str) -> Iterator[Api]:
    with Server(redis_url) as running:
        yield running


class InWords:
    """The rules that the document has in words, since no JSON Schema can tell them."""

    def __init__(self) -> None:
        self._numbers = itertools.count()

    def apply(self, case: schemathesis.Case[Any]) -> None:
        """Keep what is sent within them; what breaks the schema still does."""
        projects = iter(MANY)
        for part in _objects(case.body):
            if _is(PROJECT_ID, part.get("project_id")):
                part["project_id"] = next(projects, part["project_id"])
            if _is(r"\s*[0-9]{1,6} ?(s|m|min|h|d|w)\s*", part.get("over")):
                part["over"] = "7d"
            if _is(r"\s*0+ ?(s|m|min|h|d|w)\s*", part.get("default")):
                part["default"] = "7d"
            if isinstance(part.get("regex"), str) and part["regex"]:
                part["regex"] = "tmp-.*"
        if case.headers and _is(openapi.KEY, key := case.headers.get("Idempotency-Key")):
            case.headers["Idempotency-Key"] = f"{next(self._numbers)}{key}"[:255]


def _objects(value: Any) -> Iterator[dict[str, Any]]:
    if isinstance(value, dict):
        yield value
    if isinstance(value, dict | list):
        for each in list(value.values()) if isinstance(value, dict) else value:
            yield from _objects(each)


def _is(pattern: str, value: Any) -> bool:
    return isinstance(value, str) and re.fullmatch(pattern, value) is not None


@pytest.fixture
def in_words() -> Iterator[None]:
    rules = InWords()

    def before_call(context: Any, case: schemathesis.Case[Any], kwargs: Any) -> None:
        rules.apply(case)

    schemathesis.hook(before_call)
    yield
    schemathesis.hooks.GLOBAL_HOOK_DISPATCHER.unregister(before_call)


async def test_the_document_names_every_route_and_nothing_else(redis_client: Redis) -> None:
    routes = {
        (route.resource.canonical, route.method.lower())
        for route in make_app(Api(redis_client).parts()).router.routes()
        if route.resource is not None
    }
    described = {
        (path, method)
        for path, operations in openapi.document()["paths"].items()
        for method in operations
        if method != "parameters"
    }
    assert routes == described


def test_the_document_names_every_kind_of_problem() -> None:
    text = json.dumps(openapi.document()["paths"])
    # A method that is not accepted is no operation.
    for kind in set(KINDS) - {METHOD_NOT_ALLOWED}:
        assert f"({kind.name})" in text


def test_the_defaults_in_the_document_are_what_it_accepts() -> None:
    schemas = openapi.document()["components"]["schemas"]
    resolver = {"$ref": "#/components/schemas/Request", "components": {"schemas": schemas}}
    selector = {
        name: part["default"]
        for name, part in schemas["UtilisationOptions"]["properties"].items()
        if "default" in part
    } | {"of": "gpu", "below": 5}
    document = {"targets": [{"project_id": "a", "selector": {"utilisation": selector}}]}
    jsonschema.Draft202012Validator(resolver).validate(document)
    assert validate(document)


class Findings:
    """What came of all that schemathesis tried, with every check that it has.

    Attributes:
        wrong: what is not as the document says.
        answered: by operation, the statuses that were answered.
        phases: what was done.
    """

    def __init__(self, api: Api, document: dict[str, Any] | None = None, **given: Any) -> None:
        config = SchemathesisConfig.from_dict(
            {
                "seed": 20261124,
                "request-timeout": 20,
                "base-url": api.url,
                "auth": {"openapi": {"token": {"bearer": api.tokens["ci"]}}},
                "checks": {"negative_data_rejection": {"expected-statuses": REFUSED}},
                "generation": {"deterministic": True, "max-examples": 40},
                **given,
            }
        )
        if document is None:
            schema = schemathesis.openapi.from_url(f"{api.url}/v1/openapi.json", config=config)
        else:
            schema = schemathesis.openapi.from_dict(document, config=config)
        self.wrong: list[str] = []
        self.answered: dict[str, Counter[int]] = defaultdict(Counter)
        self.phases: set[str] = set()
        for event in from_schema(schema).execute():
            if isinstance(event, events.NonFatalError):
                self.wrong.append(f"{event.label}: {event.info}")
            elif isinstance(event, events.FatalError):
                self.wrong.append(repr(event.exception))
            elif isinstance(event, events.ScenarioFinished):
                self.phases.add(str(event.phase))
                self._look_at(event.recorder)

    def _look_at(self, recorder: Any) -> None:
        for case_id, node in recorder.cases.items():
            if response := recorder.find_response(case_id=case_id):
                self.answered[node.value.operation.label][response.status_code] += 1
        self.wrong += [
            f"{check.failure_info.failure}\n{check.failure_info.code_sample}"
            for checks in recorder.checks.values()
            for check in checks
            if check.failure_info is not None
        ]


def only(phase: str, **options: Any) -> dict[str, Any]:
    """The configuration in which nothing but one phase is done."""
    return {
        name: {"enabled": name == phase, **(options if name == phase else {})}
        for name in ("examples", "coverage", "fuzzing", "stateful")
    }


@pytest.mark.usefixtures("in_words")
def test_random_requests_are_answered_as_the_document_says(api: Api) -> None:
    found = Findings(api, phases=only("fuzzing"))
    assert not found.wrong, "\n\n".join(found.wrong[:5])
    assert found.phases == {"fuzzing"}
    # What else came depends on the dice; at the bounds, below, every answer is asked for.
    assert found.answered["POST /v1/runs"][202]
    assert set(found.answered["GET /v1/runs/{run_id}/jobs"]) >= {400, 404}


@pytest.mark.usefixtures("in_words")
def test_requests_that_follow_from_answers_are_answered_as_the_document_says(api: Api) -> None:
    found = Findings(api, phases=only("stateful", **{"max-steps": 5}))
    assert not found.wrong, "\n\n".join(found.wrong[:5])
    for operation in ("", "/jobs", "/events"):
        assert found.answered[f"GET /v1/runs/{{run_id}}{operation}"][200]


@pytest.mark.usefixtures("in_words")
def test_what_lies_at_the_bounds_is_answered_as_the_document_says(api: Api) -> None:
    # Every combination of the matchers' bounds would be thousands of requests.
    document = copy.deepcopy(openapi.document())
    selectors = document["components"]["schemas"]["Target"]["properties"]["selector"]
    selectors["anyOf"][0]["oneOf"] = [
        each for each in selectors["anyOf"][0]["oneOf"] if each["$ref"].endswith(("/Ttl", "/Type"))
    ]
    found = Findings(api, document, phases=only("coverage"))
    assert not found.wrong, "\n\n".join(found.wrong[:5])
    assert set(found.answered["POST /v1/runs"]) >= {202, 400, 401, 405, 415, 422}
    assert set(found.answered["GET /v1/runs/{run_id}"]) >= {401, 404, 405}
    assert set(found.answered["GET /v1/runs/{run_id}/jobs"]) >= {400, 401, 404}
    assert found.answered["GET /readyz"][200]
