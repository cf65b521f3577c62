"""Reports out of runs and jobs, and what shows them: pure."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from markdown_it import MarkdownIt

from scheduler.prices import Prices
from scheduler.review import bars, figures, markdown
from scheduler.review.figures import Figures, Tally
from scheduler.review.html_report import html
from scheduler.review.remedies import remedy
from scheduler.review.sections import sections, span
from worker.ledger import Attempt, Job, JobState, Kept, NewJob, Run
from worker.ledger.records import DamagedRecordError
from worker.modelarts.answers import Failure, printable

if TYPE_CHECKING:
    from scheduler.review.report import Report

NOW = 1_767_323_045_678  # 2026-01-02T03:04:05.678Z
DAY = 86_400_000
RUN = Run.parse(
    "20260102-030405-0123456789",
    {
        "source": "schedule",
        "endpoint": "https://modelarts.example.com",
        "verify": "1",
        "state": "finished",
        "total": "1",
        "created_ms": str(NOW),
        "started_ms": str(NOW),
    },
)
JOB = replace(
    Job.parse(RUN.run_id, 0, NewJob("project", "pool-0").record()),
    state=JobState.DELETED,
    reason="the pool is gone",
    attempts=(Attempt(NOW, 40, 200, "", "request-1"),),
    done_ms=NOW + 60_000,
)
FAILED = replace(JOB, state=JobState.FAILED, reason="HTTP 500: the cloud has a fault")
GPU, CPU = "modelarts.bm.gpu.8a100", "modelarts.vm.cpu.4ud"


def report_of(*jobs: Job, nodes: dict[str, int] | None = None, **given: Any) -> Report:
    figures = Figures()
    figures.add_run(RUN)
    for job in jobs:
        figures.add_job(RUN, job, nodes)
    return figures.report(NOW, **({"run_id": RUN.run_id} | given))


# What is counted


def test_what_is_freed_is_told_in_nodes_and_in_money() -> None:
    prices = Prices(currency="EUR", per_node_hour={"modelarts.bm.*": 10})
    freed = report_of(JOB, JOB, nodes={CPU: 2, GPU: 1}, prices=prices).freed
    assert freed.pools == 2
    assert freed.nodes == {GPU: 2, CPU: 4}
    assert freed.node_hours_per_day == 144
    assert (freed.money_per_day, freed.currency) == (480, "EUR")
    assert freed.unpriced == (CPU,)
    assert freed.unsized == 0


def test_a_pool_whose_nodes_are_not_recorded_is_not_taken_for_an_empty_one() -> None:
    assert report_of(JOB, nodes={}).freed.unsized == 0
    freed = report_of(JOB).freed
    assert (freed.pools, freed.unsized) == (1, 1)
    said = sections(report_of(JOB))[0]
    assert "nodes freed" not in {row[0] for row in said.rows}
    assert "The nodes of 1 of the freed pools are not recorded." in said.note


@pytest.mark.parametrize(
    ("state", "verify", "freed"),
    [
        (JobState.DELETED, True, 1),
        (JobState.ACCEPTED, False, 1),
        (JobState.ACCEPTED, True, 0),
        (JobState.ALREADY_DELETED, True, 0),
        (JobState.FAILED, True, 0),
        (JobState.SKIPPED, True, 0),
    ],
)
def test_only_what_the_run_deleted_is_freed(state: JobState, verify: bool, freed: int) -> None:
    figures = Figures()
    figures.add_job(replace(RUN, verify=verify), replace(JOB, state=state), {CPU: 3})
    found = figures.report(NOW, run_id=RUN.run_id).freed
    assert (found.pools, found.nodes) == (freed, {CPU: 3} if freed else {})


def test_every_day_of_the_time_is_there_and_no_other() -> None:
    figures = Figures()
    figures.add_run(replace(RUN, created_ms=NOW - 2 * DAY))
    found = figures.report(NOW, since_ms=NOW - 3 * DAY)
    assert [(day.day, day.runs) for day in found.days] == [
        ("2025-12-30", 0),
        ("2025-12-31", 1),
        ("2026-01-01", 0),
        ("2026-01-02", 0),
    ]


@given(st.lists(st.sampled_from(list(JobState)), max_size=50))
def test_no_job_is_lost(states: list[JobState]) -> None:
    found = report_of(*(replace(JOB, state=state) for state in states))
    assert found.jobs == len(states)
    assert sum(found.outcomes.values()) == len(states)
    assert sum(sum(day.outcomes.values()) for day in found.days) == len(states)
    assert sum(group.count for group in found.failures) == states.count(JobState.FAILED)
    assert sum(each.count for each in found.skipped) == states.count(JobState.SKIPPED)


@given(st.lists(st.tuples(st.integers(0, 10**9), st.booleans()), max_size=60))
def test_the_slowest_are_those_that_took_longest(given_jobs: list[tuple[int, bool]]) -> None:
    jobs = [
        replace(JOB, number=n, done_ms=NOW + took, attempts=JOB.attempts if called else ())
        for n, (took, called) in enumerate(given_jobs)
    ]
    took = sorted((took + 40 for took, called in given_jobs if called), reverse=True)
    found = [each.took_ms for each in report_of(*jobs).slowest]
    assert found == took[: figures.MOST_SLOW]


def test_a_job_that_has_not_ended_has_taken_no_time_yet() -> None:
    assert figures.took_ms(replace(JOB, done_ms=0)) is None
    assert figures.took_ms(replace(JOB, done_ms=NOW - 5_000)) == 0, "the clocks are two"


def test_failures_with_the_same_answer_are_one_group_with_the_first_as_its_example() -> None:
    def failed(number: int, status: int, code: str) -> Job:
        attempts = (JOB.attempts[0], Attempt(NOW, 1, status, code, f"request-{number}"))
        return replace(FAILED, number=number, attempts=attempts)

    found = report_of(failed(0, 500, "A.1"), failed(1, 403, "A.1"), failed(2, 403, "A.1")).failures
    told = [(group.status, group.error_code, group.count) for group in found]
    assert told == [(403, "A.1", 2), (500, "A.1", 1)]
    assert found[0].example.job_id == f"{RUN.run_id}/1"
    assert found[0].example.request_id == "request-1"
    (uncalled,) = report_of(replace(FAILED, attempts=())).failures
    assert (uncalled.status, uncalled.error_code) == (None, None)
    assert uncalled.example.request_id is None


def test_of_a_job_whose_record_is_damaged_no_call_is_denied() -> None:
    damaged = Job.damaged(RUN.run_id, 1, JobState.FAILED, DamagedRecordError("no record"))
    report = report_of(replace(FAILED, attempts=()), damaged, damaged)
    lost, uncalled = report.failures
    assert (lost.error_code, lost.status, lost.count) == ("record_damaged", None, 2)
    assert (uncalled.error_code, uncalled.what_to_do) == (None, remedy(0, ""))
    (told,) = [each for each in sections(report) if each.title == "Failed, by error"]
    assert told.rows[0][1:4] == ("record_damaged", remedy(0, "record_damaged"), "not known")


def test_however_many_codes_and_reasons_there_are_what_is_held_is_bounded() -> None:
    many = figures.MOST_NAMES + 500
    collected = Figures()
    for n in range(many):
        attempt = Attempt(NOW, 1, 400, f"Code.{n}", "")
        collected.add_job(RUN, replace(FAILED, attempts=(attempt,)), None)
        collected.add_job(RUN, replace(JOB, state=JobState.SKIPPED, reason=f"reason {n}"), None)
        collected.add_kept(Kept("project", "pool", "", f"reason {n}: with more"))
        collected.add_run(replace(RUN, braked_ms=NOW))
    found = collected.report(NOW, run_id=RUN.run_id)
    assert len(found.failures) == figures.MOST_NAMES + 1
    assert found.failures[0].count == 500
    assert sum(group.count for group in found.failures) == many
    for reasons in (found.skipped, found.kept):
        assert len(reasons) == figures.MOST_TOLD + 1
        assert sum(each.count for each in reasons) == many
        assert reasons[-1].reason == figures.OTHERS
    assert (len(found.stopped), found.stopped_runs) == (figures.MOST_STOPPED, many)


@given(st.lists(st.text(max_size=3), max_size=200))
def test_a_tally_adds_up(names: list[str]) -> None:
    tally = Tally(figures.OTHERS)
    for name in names:
        tally.add(name)
    told = tally.most()
    assert sum(each.count for each in told) == len(names)
    assert [each.count for each in told[:-1]] == sorted(
        (each.count for each in told[:-1]), reverse=True
    )


def test_a_run_that_a_brake_stopped_midway_is_told_of() -> None:
    collected = Figures()
    for number, braked_ms in enumerate((0, NOW)):
        collected.add_run(replace(RUN, run_id=f"run-{number}", braked_ms=braked_ms))
    assert [run.run_id for run in collected.report(NOW, run_id="x").stopped] == ["run-1"]


# What to do


@pytest.mark.parametrize("failure", list(Failure))
def test_there_is_something_to_do_about_every_failure_of_a_call(failure: Failure) -> None:
    assert "defect" not in remedy(0, failure)
    assert remedy(0, failure) == remedy(0, f"GET {failure}"), "a read's is no other"


@given(st.integers(0, 599), st.text(max_size=10))
def test_there_is_something_to_do_about_every_answer(status: int, code: str) -> None:
    assert remedy(status, code).endswith(".")


@pytest.mark.parametrize(
    ("status", "code", "words"),
    [
        (401, "", "credentials"),
        (403, "APIGW.0302", "allow modelarts:pool:list"),
        (404, "APIGW.0101", "region"),
        (404, "", "proxy"),
        (409, "ModelArts.1", "busy"),
        (429, "", "POOLSWEEP_RATE_LIMIT"),
        (503, "", "request id"),
        (200, "", "in time"),
        (200, "ModelArts.1", "reason"),
        (0, "sign_in_failed", "credentials"),
        (0, "lease_expired", "lost"),
        (0, "KeyError", "job_crashed"),
        (0, "record_damaged", "not known"),
        (0, "", "No call was made"),
    ],
)
def test_what_to_do_fits_the_answer(status: int, code: str, words: str) -> None:
    assert words in remedy(status, code)


# The picture

DAYS = st.lists(
    st.dictionaries(st.sampled_from([*map(str, JobState)]), st.integers(0, 10**6)), max_size=40
)


@given(DAYS)
def test_bars_are_as_tall_as_their_counts_and_stay_in_the_field(days: list[dict[str, int]]) -> None:
    named = [(f"day {n}", counts) for n, counts in enumerate(days)]
    picture = bars.stacked(named)
    shown = {(piece.day, piece.kind): piece.count for piece in picture.pieces}
    assert shown == {
        (day, kind): count for day, counts in named for kind, count in counts.items() if count
    }
    zero, top = picture.ticks[0], picture.ticks[-1]
    unit = (zero.at - top.at) / int(top.text.replace(",", ""))
    edges: dict[str, float] = {}
    for piece in picture.pieces:
        assert piece.height >= bars.LEAST_HEIGHT
        assert piece.y + piece.height == pytest.approx(edges.get(piece.day, picture.bottom))
        edges[piece.day] = piece.y
        assert piece.y >= top.at - 1e-6
        assert picture.left <= piece.x <= piece.x + piece.width <= picture.right
    for day, counts in named:
        heights = {piece.kind: piece.height for piece in picture.pieces if piece.day == day}
        if not heights:
            continue
        exact = {kind: counts[kind] * unit for kind in heights}
        largest = max(exact, key=lambda kind: exact[kind])
        others = {kind: max(bars.LEAST_HEIGHT, exact[kind]) for kind in exact if kind != largest}
        assert others == pytest.approx({kind: heights[kind] for kind in others})
        # The largest gives what the small ones get too much.
        left = max(bars.LEAST_HEIGHT, sum(exact.values()) - sum(others.values()))
        assert heights[largest] == pytest.approx(left)
    assert 2 <= len(picture.ticks) <= 6
    assert len(picture.days) <= 9
    assert [each.text for each in picture.days][-1:] == [day for day, _ in named][-1:]


@given(st.integers(1, 400))
def test_bars_do_not_touch(count: int) -> None:
    picture = bars.stacked([(str(n), {"deleted": 1}) for n in range(count)])
    for left, right in pairwise(picture.pieces):
        assert left.x + left.width < right.x


# Markdown


PARSER = MarkdownIt("commonmark").enable(["table", "strikethrough"])


def _plain(text: str) -> str:
    return " ".join(text.split())


@given(
    st.lists(
        st.text() | st.text(alphabet="|\\`*_[]()<>&~!#:/.@$ w-1a\n", max_size=20),
        min_size=2,
        max_size=2,
    )
)
def test_any_text_is_a_cell_of_markdown_and_shows_as_it_is(texts: list[str]) -> None:
    table = markdown.header(("first", "second"), frozenset({"second"})) + markdown.row(texts)
    tokens = PARSER.parse(table)
    assert [token.type for token in tokens].count("tr_open") == 2
    cells = [
        after
        for token, after in pairwise(tokens)
        if token.type == "td_open" and after.type == "inline"
    ]
    assert len(cells) == 2
    for text, found in zip(texts, cells, strict=True):
        children = found.children or []
        assert {child.type for child in children} <= {"text", "text_special"}
        shown = "".join(child.content for child in children)
        assert _plain(shown) == _plain(printable(text, 4_000))


@pytest.mark.parametrize("text", ["https://evil.example.com", "WWW.evil.example.com", "@everyone"])
def test_no_text_becomes_a_link_or_a_mention_in_markdown(text: str) -> None:
    escaped = markdown.cell(text)
    assert not any(start in escaped.lower() for start in ("://", "www.", "@"))


# HTML


@given(st.text(), st.text())
def test_no_text_is_markup_in_html(name: str, reason: str) -> None:
    plain = html(report_of(FAILED))
    job = replace(FAILED, display_name=f"<{name}", reason=f'">{reason}&')
    text = html(report_of(job))
    assert text.count("<") == plain.count("<")
    assert text.count(">") == plain.count(">")
    assert text.count('"') == plain.count('"')


def test_a_report_of_nothing_has_no_picture() -> None:
    assert "<svg" not in html(Figures().report(NOW, since_ms=NOW - DAY))
    assert "<svg" in html(report_of(JOB))


def test_a_span_is_told_in_the_unit_that_fits() -> None:
    told = [span(ms) for ms in (0, 1_500, 90_000, 5_400_000)]
    assert told == ["0.0 s", "1.5 s", "1.5 min", "1.5 h"]
