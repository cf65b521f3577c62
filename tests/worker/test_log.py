"""Logs: JSON lines from everybody, complete for each job, and never a secret."""

from __future__ import annotations

import io
import json
import logging
import signal
import warnings
from typing import TYPE_CHECKING, Any

import pytest
import structlog
from hypothesis import HealthCheck, given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from pydantic import SecretStr

from tests.worker.conftest import Runs, environment, settings_for
from worker import log
from worker.ledger import JobState
from worker.settings import Settings

if TYPE_CHECKING:
    from collections.abc import Iterator

    from redis.asyncio import Redis

    from tests.worker.conftest import Cloud, RedisServer, Workers

SECRET_FIELDS = ("token", "ak", "sk", "security_token", "iam_password")


@pytest.fixture(autouse=True)
def _leave_logging_as_it_was() -> Iterator[None]:
    root = logging.getLogger()
    before, level = root.handlers[:], root.level
    yield
    root.handlers[:] = before
    root.setLevel(level)
    logging.captureWarnings(False)
    structlog.reset_defaults()


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def lines(stream: io.StringIO) -> list[dict[str, Any]]:
    return [json.loads(line) for line in stream.getvalue().splitlines()]


def test_logs_of_libraries_and_warnings_are_json_lines_too() -> None:
    stream = io.StringIO()
    log.configure(Settings(), stream)
    structlog.get_logger("worker.tests").info("job_moved", state=JobState.DELETED, job_id="r/1")
    logging.getLogger("celery.worker").warning("from %s\nwith %d lines", "Celery", 2)
    logging.getLogger("aiohttp.client").error("from aiohttp", exc_info=ValueError("why"))
    warnings.warn("take care", stacklevel=1)
    ours, celerys, aiohttps, warning = lines(stream)
    assert (ours["event"], ours["state"], ours["job_id"]) == ("job_moved", "deleted", "r/1")
    assert (ours["level"], ours["logger"]) == ("info", "worker.tests")
    assert celerys["event"] == "from Celery\nwith 2 lines"
    assert "ValueError: why" in aiohttps["exception"]
    assert "take care" in warning["event"]
    for line in (ours, celerys, aiohttps, warning):
        assert {"event", "level", "logger", "timestamp"} <= line.keys()


def test_a_terminal_gets_text_unless_json_is_asked_for() -> None:
    for log_format, is_json in (("auto", False), ("console", False), ("json", True)):
        stream = Terminal()
        log.configure(Settings(log_format=log_format), stream)
        structlog.get_logger("x").warning("hello")
        assert stream.getvalue().startswith("{") == is_json
    file = io.StringIO()
    log.configure(Settings(log_format="console"), file)
    structlog.get_logger("x").warning("hello")
    assert "hello" in file.getvalue()
    assert not file.getvalue().startswith("{")


def test_what_is_below_the_level_is_not_logged() -> None:
    stream = io.StringIO()
    log.configure(Settings(log_level="warning"), stream)
    structlog.get_logger("x").info("quiet")
    logging.getLogger("y").info("quiet")
    structlog.get_logger("x").warning("loud")
    assert [line["event"] for line in lines(stream)] == ["loud"]


@hypothesis_settings(
    max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None
)
@given(
    field=st.sampled_from(SECRET_FIELDS),
    rest=st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=30),
    log_format=st.sampled_from(["json", "console"]),
)
def test_no_secret_is_in_a_line_however_it_got_there(
    field: str, rest: str, log_format: str
) -> None:
    secret = f"s3cret-{rest}"
    stream = io.StringIO()
    settings: Any = {field: SecretStr(secret), "log_format": log_format}
    log.configure(Settings(**settings), stream)
    logger = structlog.get_logger("x")
    logger.info("in a value", value=secret, other=[secret])
    logger.info(f"in the event {secret}", settings=repr(Settings(**settings)))
    logging.getLogger("library").warning("in an argument: %s and %r", secret, secret)
    try:
        raise ValueError(secret)
    except ValueError:
        logger.exception("in_an_exception")
    assert "s3cret" not in stream.getvalue()
    assert log.MASK in stream.getvalue()


@pytest.mark.parametrize(
    "url",
    [
        "redis://:p%40ss-word@redis.example.com:6379/0",
        "rediss://user:p%40ss-word@redis.example.com",
        "redis://redis.example.com/0?password=p%40ss-word",
    ],
)
def test_of_a_redis_url_only_the_password_is_masked(url: str) -> None:
    stream = io.StringIO()
    log.configure(Settings(redis_url=SecretStr(url)), stream)
    structlog.get_logger("x").info("cannot connect", url=url, password="p@ss-word")
    assert "ss-word" not in stream.getvalue()
    assert "redis.example.com" in stream.getvalue()


async def test_every_line_of_a_worker_is_json_and_every_event_of_a_job_says_which(
    cloud: Cloud, redis: Redis, server: RedisServer, workers: Workers
) -> None:
    project = cloud.project(10, gone=1, doomed=1)
    settings = settings_for(
        cloud,
        server.url,
        log_level="debug",
        token=None,
        iam_endpoint=cloud.url,
        iam_user="sandbox-user",
        iam_password=SecretStr(cloud.sandbox.config.iam_password),
        iam_domain="sandbox-domain",
    )
    runs = Runs(redis, settings)
    worker = workers.start(environment(settings))
    await workers.ready(worker)
    run_id = await runs.make(project.jobs())
    await runs.ended(run_id)
    worker.send(signal.SIGTERM)
    assert await worker.ended() == 0
    assert worker.output == ""
    events = worker.events()
    assert len(events) == len(worker.text.splitlines())
    assert all({"event", "level", "logger", "timestamp"} <= event.keys() for event in events)
    loggers = {event["logger"].partition(".")[0] for event in events}
    assert {"worker", "celery"} <= loggers
    of_jobs = [event for event in events if event["event"] in {"job_moved", "retry"}]
    jobs = {job.job_id: job for job in await runs.jobs(run_id)}
    for event in of_jobs:
        job = jobs[event["job_id"]]
        assert event["run_id"] == run_id
        assert (event["project_id"], event["pool_name"]) == (job.project_id, job.pool_name)
    ends = {event["job_id"]: event["state"] for event in of_jobs if "state" in event}
    assert ends == {job_id: job.state for job_id, job in jobs.items()}
    for secret in (cloud.sandbox.config.iam_password, "MIIsandbox", cloud.sandbox.config.token):
        assert secret not in worker.text
