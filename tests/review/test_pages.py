"""The pages as they are sent: what they show, and what they must never let through."""

from __future__ import annotations

import json
import re
from datetime import UTC, datetime, timedelta
from html.parser import HTMLParser
from typing import TYPE_CHECKING

import pytest
from aiohttp import ClientSession
from redis.asyncio import Redis
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff

from scheduler.almanac import Almanac, Night, NightState
from scheduler.marks import Mark, Marks
from scheduler.review.web import overview, run_page
from scheduler.review.web.app import HEADERS
from tests.intake.api import ENDPOINT, PROJECTS
from tests.review.site import SCRIPT, Site, new_jobs, pool_name, serving
from worker import pause
from worker.ledger import JobState, Kept, NewJob, keys
from worker.ledger.schema import SCHEMA
from worker.limiter import AIM, Limiter
from worker.modelarts import Precondition

if TYPE_CHECKING:
    from collections.abc import Mapping

MARKS = ("good", "bad")
UNKNOWN_RUN = "20260101-000000-0123456789"


class _Page(HTMLParser):
    """What of a page's markup the tests ask after."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.text.append(data)

    def links(self, rel: str) -> list[str]:
        return [
            attributes["href"] or ""
            for tag, attributes in self.tags
            if tag == "a" and attributes.get("rel") == rel
        ]

    @property
    def said(self) -> str:
        return " ".join(" ".join(self.text).split())


async def page(session: ClientSession, path: str) -> _Page:
    async with session.get(path) as answer:
        assert answer.status == 200, await answer.text()
        return _Page(await answer.text())


# What is shown


async def test_the_overview_of_an_empty_ledger_says_so(session: ClientSession) -> None:
    said = (await page(session, "/")).said
    for sentence in ("No runs yet.", "not paused", "none is running", "No pool is marked."):
        assert sentence in said
    assert "none alive" in said, "the endpoint that is configured has no worker"


async def test_the_overview_tells_outcomes_by_day_to_the_eye_and_to_a_screen_reader(
    site: Site, session: ClientSession
) -> None:
    run_id = await site.run(new_jobs(5))
    await site.end(run_id, [JobState.DELETED] * 3 + [JobState.FAILED])
    seen = await page(session, "/")
    today = f"{datetime.now(UTC):%Y-%m-%d}"
    assert f"{today}: 3 deleted {today}: 1 failed {today}: 1 pending" in seen.said
    parts = [
        attributes["fill"] for tag, attributes in seen.tags if tag == "rect" if "y" in attributes
    ]
    assert parts == ["url(#p-deleted)", "url(#p-failed)", "url(#p-pending)"]
    # The same in the table: the day, its runs, deleted, failed, pending.
    assert re.search(rf"{today} 1 3 1 1 ", seen.said)
    assert run_id in seen.said
    assert f"{PROJECTS[0]} no limit, or no calls within the hour" in seen.said


async def test_the_overview_tells_pauses_marks_nights_rates_and_workers(
    site: Site, session: ClientSession
) -> None:
    run_id = await site.run(new_jobs(1))
    await pause.pause(site.redis, PROJECTS[0], by="jo", reason="an incident")
    now = datetime.now(UTC)
    marks = [
        Mark(
            project_id=PROJECTS[0],
            pool_id=pool_name(number),
            display_name="old",
            policy="idle",
            precondition=Precondition("2026-03-01T03:10:40Z", "f"),
            marked_at=now - timedelta(days=9),
            due_at=now + timedelta(days=number - 1, minutes=1),
            reason="idle for 40 d",
        )
        for number in range(3)
    ]
    await Marks(site.redis, ENDPOINT).put(marks)
    almanac = Almanac(site.redis, "leader")
    await site.redis.set(keys.SCHEDULER, "leader")
    night = Night("idle", now, NightState.DONE, "0 3 * * *", {PROJECTS[0]: run_id})
    await almanac.put(night, [night])
    await almanac.say({"next": {"idle": "2026-12-01T03:00:00.000Z"}, "rejected": ""})
    limiter = Limiter(site.redis, endpoint=ENDPOINT, rate=10, burst=1)
    await limiter.permit(PROJECTS[0])
    await site.redis.zadd(keys.workers(ENDPOINT), {"w1": await site.ledger.now_ms()})

    seen = await page(session, "/")
    assert f"Paused: project {PROJECTS[0]} , by jo since" in seen.said
    assert "an incident" in seen.said
    assert "3 marked, 1 of them due." in seen.said
    assert "2026-12-01 03:00Z" in seen.said
    assert ("a", {"class": "mono", "href": f"/runs/{run_id}"}) in seen.tags
    assert "1 alive" in seen.said
    limit = f"{10 * AIM:.1f}"
    assert re.search(rf"{PROJECTS[0]} {limit} of {limit} [0-9]+ 0 at limit", seen.said)


async def test_a_great_many_marks_are_counted_and_not_read(
    site: Site, session: ClientSession
) -> None:
    key = keys.marks(ENDPOINT, PROJECTS[0], "idle")
    count = overview.MOST_MARKS + 1
    await site.redis.hset(key, mapping={pool_name(number): "-" for number in range(count)})
    await site.redis.sadd(keys.MARKED, json.dumps([ENDPOINT, PROJECTS[0], "idle"]))
    assert f"{count:,} pools are marked" in (await page(session, "/")).said


async def test_a_run_tells_who_why_its_brakes_its_counts_and_what_its_plan_kept(
    site: Site, session: ClientSession
) -> None:
    kept = [Kept(PROJECTS[0], pool_name(9_000 + n), "prod", f"protected {n}") for n in range(12)]
    run_id = await site.run(
        new_jobs(3), kept=kept, policy="idle", max_failures=7, max_failure_percent=12.5
    )
    await site.end(run_id, [JobState.DELETED, JobState.SKIPPED])
    said = (await page(session, f"/runs/{run_id}")).said
    for sentence in (
        "2 of 3 jobs have ended",
        "Asked for by jo",
        "Why no use",
        "Policy idle",
        "more than 7 failed jobs, or more than 12.5 % of the jobs tried",
        "protected 0",
        "All 12 with their reasons",
    ):
        assert sentence in said
    assert "protected 11" not in said
    assert "protected 11" in (await page(session, f"/runs/{run_id}/kept")).said


async def test_failures_are_grouped_by_the_code_of_their_last_call(
    site: Site, session: ClientSession
) -> None:
    run_id = await site.run(new_jobs(6))
    await site.end(run_id, [JobState.FAILED] * 4, status=403, code="ModelArts.0104")
    await site.end(run_id, [JobState.FAILED], first=4, status=500)
    await site.end(run_id, [JobState.FAILED], first=5, status=0)
    said = (await page(session, f"/runs/{run_id}")).said
    assert f"ModelArts.0104 4 {pool_name(0)} was failed" in said
    assert f"HTTP 500 1 {pool_name(4)}" in said
    assert f"no answer 1 {pool_name(5)}" in said


async def test_a_job_tells_its_calls_its_precondition_and_how_it_ended(
    site: Site, session: ClientSession
) -> None:
    run_id = await site.run(new_jobs(2))
    await site.end(run_id, [JobState.FAILED], status=409, code="ModelArts.1", reason="busy")
    said = (await page(session, f"/runs/{run_id}/jobs/0")).said
    for sentence in (
        "HTTP 409 ModelArts.1",
        "took 123 ms, request req-7",
        "the pool is as it was when it was chosen",
        "Reason busy",
        "Chosen because older than 30 d and idle",
    ):
        assert sentence in said
    assert "No call was made." in (await page(session, f"/runs/{run_id}/jobs/1")).said


async def test_a_job_whose_record_is_damaged_is_shown_as_one(
    site: Site, session: ClientSession
) -> None:
    run_id = await site.run(new_jobs(2))
    await site.redis.hset(keys.jobs(run_id), "0", "no record")
    seen = await page(session, f"/runs/{run_id}")
    assert "not known" in seen.said
    assert "is damaged: no record" in seen.said
    assert pool_name(1) in seen.said
    said = (await page(session, f"/runs/{run_id}/jobs/0")).said
    assert "is damaged: no record" in said
    assert "Whether a call was made is not known." in said
    assert "Precondition not known" in said


async def test_of_a_failed_job_whose_record_is_damaged_no_call_is_denied(
    site: Site, session: ClientSession
) -> None:
    run_id = await site.run(new_jobs(2))
    await site.end(run_id, [JobState.FAILED], status=500)
    await site.redis.hset(keys.jobs(run_id), "0", "no record")
    said = (await page(session, f"/runs/{run_id}")).said
    assert "record_damaged 1 not known" in said
    assert "no call was made" not in said


@pytest.mark.parametrize(
    ("state", "status", "code", "mark"),
    [
        (JobState.ACCEPTED, 202, "", "good"),
        (JobState.ALREADY_DELETED, 404, "ModelArts.0201", "good"),
        (JobState.FAILED, 404, "APIGW.0101", "bad"),
        (JobState.FAILED, 200, "GET invalid_answer", "bad"),
        (JobState.FAILED, 0, "timeout", "bad"),
        # The call was accepted, and the deletion failed.
        (JobState.FAILED, 200, "", "good"),
    ],
)
async def test_a_call_is_marked_by_what_it_came_to(
    site: Site, session: ClientSession, state: JobState, status: int, code: str, mark: str
) -> None:
    run_id = await site.run(new_jobs(1))
    await site.end(run_id, [state], status=status, code=code)
    tags = (await page(session, f"/runs/{run_id}/jobs/0")).tags
    assert [
        attributes["class"] for tag, attributes in tags if attributes.get("class") in MARKS
    ] == [mark]


async def test_a_job_that_was_asked_for_by_name_has_no_precondition(
    site: Site, session: ClientSession
) -> None:
    run_id = await site.run([NewJob(PROJECTS[0], pool_name(0))])
    assert "asked for by name" in (await page(session, f"/runs/{run_id}/jobs/0")).said


# Jobs: filter, search, pages


async def test_jobs_are_filtered_by_outcome(site: Site, session: ClientSession) -> None:
    run_id = await site.run(new_jobs(4))
    await site.end(run_id, [JobState.DELETED, JobState.SKIPPED, JobState.DELETED])
    seen = await page(session, f"/runs/{run_id}?outcome=skipped")
    assert "1 to 1 of 1 that are skipped." in seen.said
    assert pool_name(1) in seen.said
    assert pool_name(0) not in seen.said


async def test_pages_show_every_job_once(site: Site, session: ClientSession) -> None:
    run_id = await site.run(new_jobs(2 * run_page.JOBS + 5))
    path, found = f"/runs/{run_id}", []
    while path:
        seen = await page(session, path)
        found += re.findall(r"pool-[0-9]{32}", seen.said)
        path = next(iter(seen.links("next")), "")
    assert found == [pool_name(number) for number in range(2 * run_page.JOBS + 5)]


async def test_a_list_is_gone_through_both_ways_and_to_its_end(
    site: Site, session: ClientSession
) -> None:
    run_id = await site.run(new_jobs(2 * run_page.JOBS + 5))
    await site.end(run_id, [JobState.SKIPPED] * (run_page.JOBS + 1))
    first = await page(session, f"/runs/{run_id}")
    assert first.links("prev") == []
    (after,) = first.links("next")
    (before,) = (await page(session, after)).links("prev")
    assert (await page(session, before)).said == first.said
    end = f"/runs/{run_id}?cursor={2 * run_page.JOBS}#jobs"
    assert ("a", {"href": end}) in first.tags
    last = await page(session, end)
    assert "101 to 105 of 105." in last.said
    assert last.links("next") == []
    (skipped,) = (await page(session, f"/runs/{run_id}?outcome=skipped")).links("next")
    assert "51 to 51 of 51 that are skipped." in (await page(session, skipped)).said


@pytest.mark.parametrize("query", ["team-1234", "TEAM-1234", pool_name(1234)[5:]])
async def test_a_search_finds_a_pool_by_its_id_or_its_name(
    site: Site, session: ClientSession, query: str
) -> None:
    run_id = await site.run(new_jobs(1300))
    seen = await page(session, f"/runs/{run_id}?q={query}")
    assert "Searched 1,300 of 1,300 jobs: 1 found." in seen.said
    assert pool_name(1234) in seen.said


async def test_a_search_that_finds_a_page_full_goes_on_where_it_stopped(
    site: Site, session: ClientSession
) -> None:
    run_id = await site.run(new_jobs(run_page.JOBS + 7))
    path, found = f"/runs/{run_id}?q=team", []
    while path:
        seen = await page(session, path)
        found += re.findall(r"pool-[0-9]{32}", seen.said)
        path = next(iter(seen.links("next")), "")
    assert found == [pool_name(number) for number in range(run_page.JOBS + 7)]


async def sent_by_redis(redis: Redis) -> int:
    return int((await redis.info("stats"))["total_net_output_bytes"])


async def test_a_page_of_a_hundred_thousand_jobs_reads_few_of_them(
    site: Site, session: ClientSession
) -> None:
    run_id = await site.run(new_jobs(100_000))
    await site.end(run_id, [JobState.FAILED] * 1_000)
    a_job = int(await site.redis.hstrlen(keys.jobs(run_id), "99999"))
    allowed = {
        # Jobs on the page, the failures that are grouped, and a little.
        "": run_page.JOBS + 1_000,
        "?cursor=99950": run_page.JOBS + 1_000,
        "?outcome=pending&cursor=90000": run_page.JOBS + 1_000,
        "?q=team-99999": run_page.SCAN + 1_000,
    }
    for query, jobs in allowed.items():
        before = await sent_by_redis(site.redis)
        seen = await page(session, f"/runs/{run_id}{query}")
        # A failed job's record is longer by its call and its reason.
        assert await sent_by_redis(site.redis) - before < 1.5 * a_job * (jobs + 100), query
    assert seen.links("next") == [f"/runs/{run_id}?q=team-99999&cursor={run_page.SCAN}#jobs"]
    assert "Continue the search" in seen.said
    assert f"a search looks at {run_page.SCAN:,} at a time" in seen.said
    last = await page(session, f"/runs/{run_id}?q=team-99999&cursor=95000")
    assert pool_name(99_999) in last.said


async def test_a_run_with_more_failures_than_are_grouped_says_so(
    site: Site, session: ClientSession
) -> None:
    count = run_page.FAILURES + 1
    run_id = await site.run(new_jobs(count))
    await site.end(run_id, [JobState.FAILED] * count, status=500)
    said = (await page(session, f"/runs/{run_id}")).said
    assert f"Of the first {run_page.FAILURES:,} of {count:,} failed jobs." in said


async def test_runs_have_pages_too(site: Site, session: ClientSession) -> None:
    made = [await site.run([]) for _ in range(overview.RUNS + 3)]
    path, found = "/runs", []
    while path:
        seen = await page(session, path)
        found += re.findall(r"[0-9]{8}-[0-9]{6}-[0-9a-f]{10}", seen.said)
        path = next(iter(seen.links("next")), "")
    assert sorted(found) == sorted(made)


# Versions that meet


@pytest.mark.parametrize("path", ["/", "/runs"])
async def test_runs_that_cannot_be_read_are_left_out_of_a_list_that_says_so(
    site: Site, session: ClientSession, path: str
) -> None:
    newer, known, newest = [await site.run(new_jobs(1)) for _ in range(3)]
    assert "cannot be read" not in (await page(session, path)).said
    await site.redis.hset(keys.run(newer), "schema", str(SCHEMA + 1))
    said = (await page(session, path)).said
    assert "1 run cannot be read: a newer poolsweep made it, or its record is damaged." in said
    assert newer not in said
    assert known in said
    assert newest in said
    await site.redis.hset(keys.run(newest), "created_ms", "no time")
    said = (await page(session, path)).said
    assert "2 runs cannot be read: a newer poolsweep made them, or their record is" in said
    for run_id, why in ((newer, "upgrade this process.<"), (newest, "its record is damaged")):
        async with session.get(f"/runs/{run_id}") as answer:
            text = await answer.text()
        assert answer.status == 500
        assert "The run cannot be read" in text
        assert why in text
        assert ".." not in text
        assert "oad it again" not in text


# What must not get through


async def test_what_comes_from_outside_is_text_and_nothing_else(
    site: Site, session: ClientSession
) -> None:
    hostile = f"{SCRIPT}\"'\u202e\x1b[31m&"
    pool, nodes = pool_name(0), {hostile: 1}
    job = NewJob(PROJECTS[0], pool, display_name=hostile, chosen=hostile, nodes=nodes)
    kept = [Kept(PROJECTS[0], hostile, hostile, hostile)]
    run_id = await site.run(
        [job, NewJob(PROJECTS[0], pool_name(1), nodes=nodes)],
        kept=kept,
        requester=hostile,
        reason=hostile,
        policy=hostile,
        client=hostile,
        selector=hostile,
    )
    await site.end(run_id, [JobState.FAILED], status=400, code=hostile, reason=hostile)
    await site.end(run_id, [JobState.DELETED], first=1)
    await pause.pause(site.redis, "*", by=hostile, reason=hostile)
    run = f"/runs/{run_id}"
    for path in ("/", "/runs", run, f"{run}/kept", f"{run}/jobs/0", f"{run}?q=%3Cscript%3E"):
        async with session.get(path) as answer:
            text = await answer.text()
        assert answer.status == 200
        assert SCRIPT not in text
        assert "&lt;script&gt;" in text, path
        assert not set("\u202e\x1b") & set(text)
        for tag, attributes in _Page(text).tags:
            assert not [name for name in attributes if name.startswith(("on", "style"))]
            assert tag != "script" or attributes == {"src": "/static/live.js", "defer": None}


@pytest.mark.parametrize(
    "path", ["/", "/runs", "/no/such/page", "/static/style.css", "/healthz", "/runs?x=1"]
)
async def test_every_answer_is_hardened(session: ClientSession, path: str) -> None:
    async with session.get(path) as answer:
        headers: Mapping[str, str] = answer.headers
        for name, value in HEADERS.items():
            assert headers[name] == value
        assert "Set-Cookie" not in headers
    policy = HEADERS["Content-Security-Policy"]
    assert policy.startswith("default-src 'none';")
    assert "unsafe" not in policy


async def test_nothing_is_asked_of_another_host(site: Site, session: ClientSession) -> None:
    run_id = await site.run(new_jobs(1))
    for path in ("/", "/runs", f"/runs/{run_id}", f"/runs/{run_id}/jobs/0"):
        for _, attributes in (await page(session, path)).tags:
            for name in ("href", "src", "action", "data-events"):
                assert (attributes.get(name) or "/").startswith(("/", "#"))
    for name in ("style.css", "live.js", "icon.svg"):
        async with session.get(f"/static/{name}") as answer:
            text = (await answer.text()).replace('xmlns="http://www.w3.org/2000/svg"', "")
        assert answer.status == 200
        assert "//" not in text.replace("// ", "")


@pytest.mark.parametrize("method", ["POST", "PUT", "PATCH", "DELETE", "OPTIONS"])
async def test_only_reading_is_accepted(site: Site, session: ClientSession, method: str) -> None:
    run_id = await site.run(new_jobs(1))
    for path in ("/", "/runs", f"/runs/{run_id}", f"/runs/{run_id}/events"):
        async with session.request(method, path) as answer:
            assert answer.status == 405
            assert set(answer.headers["Allow"].split(",")) <= {"GET", "HEAD"}
    assert (await site.ledger.run(run_id)).counts[JobState.PENDING] == 1


async def test_a_head_is_answered_as_a_get_without_the_page(session: ClientSession) -> None:
    async with session.get("/runs") as whole, session.head("/runs") as answer:
        assert answer.status == 200
        assert answer.headers["Content-Length"] == whole.headers["Content-Length"]
        assert await answer.read() == b""


@pytest.mark.parametrize(
    ("path", "status"),
    [
        ("/no/such/page", 404),
        ("/static/../app.py", 404),
        ("/static/nothing.css", 404),
        (f"/runs/{UNKNOWN_RUN}", 404),
        (f"/runs/{UNKNOWN_RUN}/jobs/0", 404),
        (f"/runs/{UNKNOWN_RUN}/events", 404),
        ("/runs/*", 404),
        ("/runs/%0d%0aSet-Cookie:x", 404),
        ("/runs?cursor=-1", 400),
        ("/runs?cursor=1&cursor=2", 400),
        ("/?x=1", 400),
    ],
)
async def test_what_is_not_there_or_not_understood_is_a_page_that_says_so(
    session: ClientSession, path: str, status: int
) -> None:
    async with session.get(path) as answer:
        text = await answer.text()
    assert answer.status == status
    assert answer.content_type == "text/html"
    assert f"HTTP {status}" in text
    assert "Traceback" not in text


async def test_a_parameter_is_named_as_it_is_written(session: ClientSession) -> None:
    async with session.get("/runs?cursor=x") as answer:
        assert "<p>cursor: " in await answer.text()


@pytest.mark.parametrize(
    ("rest", "status"),
    [
        ("?outcome=gone", 400),
        ("?q=" + "x" * 201, 400),
        ("?cursor=x", 400),
        ("/jobs/1", 404),
        ("/jobs/-1", 404),
        ("/jobs/01", 404),
        ("/jobs/99999999999999999999", 404),
        ("?outcome=&q=&cursor=", 400),
        ("?outcome=&q=", 200),
    ],
)
async def test_a_runs_parameters_are_checked(
    site: Site, session: ClientSession, rest: str, status: int
) -> None:
    run_id = await site.run(new_jobs(1))
    async with session.get(f"/runs/{run_id}{rest}") as answer:
        assert answer.status == status


async def test_without_redis_a_page_says_so(tmp_path_factory: pytest.TempPathFactory) -> None:
    missing = tmp_path_factory.mktemp("none") / "redis.sock"
    redis = Redis(unix_socket_path=str(missing), decode_responses=True, retry=Retry(NoBackoff(), 0))
    async with serving(redis) as away, ClientSession(away.url) as session:
        for path in ("/", "/runs", f"/runs/{UNKNOWN_RUN}", f"/runs/{UNKNOWN_RUN}/events"):
            async with session.get(path) as answer:
                text = await answer.text()
            assert answer.status == 503
            assert "The record of runs does not answer; load the page again in a moment." in text
            assert int(answer.headers["Retry-After"]) > 0
            assert str(missing) not in text
        async with session.get("/healthz") as answer:
            assert answer.status == 200
    await redis.aclose()


# Live


async def test_a_runs_progress_is_told_until_it_ends(site: Site, session: ClientSession) -> None:
    run_id = await site.run(new_jobs(2))
    async with session.get(f"/runs/{run_id}/events") as answer:
        assert answer.content_type == "text/event-stream"
        told = []
        async for line in answer.content:
            if line.startswith(b"data: "):
                told.append(json.loads(line[6:]))
                done = told[-1]["done"]
                if done < 2:
                    await site.end(run_id, [JobState.DELETED], first=done)
    assert [each["done"] for each in told] == [0, 1, 2]
    assert (told[-1]["state"], told[-1]["badge"]) == ("finished", "finished")
    assert told[-1]["counts"]["deleted"] == 2
