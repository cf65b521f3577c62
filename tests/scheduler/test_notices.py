"""What notices say, and how they are worded for programs and for Slack."""

from __future__ import annotations

import hashlib
import hmac
import html
import json
import re
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from scheduler.marks import Mark
from scheduler.notices import (
    MOST_NAMED,
    SLACK_TEXT_LIMIT,
    Notice,
    braked,
    ended,
    lost,
    marked,
    message,
    signature,
    slack_payload,
    slack_text,
    started,
    wanted,
)
from scheduler.policy import Channel, Occasion
from worker.ledger import JobState, Run, RunState
from worker.modelarts import Precondition
from worker.projects import SecretRef

PROJECT = "0123456789abcdef0123456789abcdef"
RUN_ID = "20260102-030405-0123456789"
LOOK = f"; look with: poolsweep results {RUN_ID}"
NOW = datetime(2026, 1, 2, 3, 4, 5, tzinfo=UTC)
NOW_MS = round(NOW.timestamp() * 1000)
FEW_FAILED = "braked: 21 of 40 jobs tried failed, more than max_failures=20"


def run_of(state: RunState = RunState.FINISHED, /, **changes: Any) -> Run:
    """A run of the policy `stale`; counts are given by the state's name."""
    counts = {state: changes.pop(state, 0) for state in JobState}
    return replace(
        Run(
            run_id=RUN_ID,
            source="schedule",
            endpoint="https://modelarts.example.com",
            requester="",
            reason="",
            verify=True,
            policy="stale",
            client="",
            selector="",
            projects=(PROJECT,),
            state=state,
            total=sum(counts.values()),
            created_ms=NOW_MS - 2_000,
            planned_ms=NOW_MS - 2_000,
            started_ms=NOW_MS - 1_000,
            finished_ms=NOW_MS,
            cancelled_ms=0,
            braked_ms=0,
            note="",
            counts=counts,
        ),
        **changes,
    )


def mark_of(number: int = 0, **changes: Any) -> Mark:
    mark = Mark(
        project_id=PROJECT,
        pool_id=f"pool-{number:02}",
        display_name=f"Pool {number}",
        policy="stale",
        precondition=Precondition("2021-11-01T03:49:41Z", "f"),
        marked_at=NOW,
        due_at=NOW + timedelta(days=7, minutes=number),
        reason="idle for 30d",
    )
    return replace(mark, **changes)


def channel_on(*occasions: Occasion) -> Channel:
    return Channel(url=SecretRef(env="HOOK"), on=list(occasions or Occasion))


# Runs


def test_a_start_tells_how_many_of_how_many_go_what_that_frees_and_how_to_look() -> None:
    run = run_of(RunState.RUNNING, pending=12)
    notice = started(run, project_pools=80, freed={"modelarts.vm.cpu.4ud": 3, "npu": 2})
    assert notice.text == (
        f"Policy stale: run {RUN_ID} started, to delete 12 of 80 pools in project {PROJECT}, "
        f"freeing 5 nodes{LOOK}"
    )
    assert (notice.notice_id, notice.occasion) == (f"{RUN_ID}:started", Occasion.STARTED)
    assert (notice.policy, notice.project_id) == ("stale", PROJECT)
    assert notice.at == "2026-01-02T03:04:04.000Z"
    assert notice.details["run_id"] == RUN_ID
    assert notice.details["counts"] == {"pending": 12}
    assert notice.details["projects"] == [PROJECT]
    assert notice.details["project_pools"] == 80
    assert notice.details["freed"] == {"modelarts.vm.cpu.4ud": 3, "npu": 2}


def test_what_is_not_known_is_not_told() -> None:
    notice = started(run_of(RunState.RUNNING, pending=1, policy="", projects=()))
    assert notice.text == f"Run {RUN_ID} started, to delete 1 pool{LOOK}"
    assert not {"project_pools", "freed"} & notice.details.keys()
    assert (notice.policy, notice.project_id) == ("", "")


def test_a_run_of_several_projects_names_none_of_them_as_its_own() -> None:
    notice = started(run_of(RunState.RUNNING, pending=2, projects=("a", "b")))
    assert "2 pools in 2 projects" in notice.text
    assert (notice.project_id, notice.details["projects"]) == ("", ["a", "b"])


def test_a_run_that_a_brake_held_deletes_nothing_and_says_why() -> None:
    why = "60 deletions are more than max_deletions=50 allows"
    run = run_of(RunState.BRAKED, note=why, braked_ms=NOW_MS, started_ms=0)
    notice = braked(run)
    assert notice.text == (
        f"Policy stale: run {RUN_ID} was held by a brake and deletes nothing in project "
        f"{PROJECT}: {why}{LOOK}"
    )
    assert (notice.notice_id, notice.at) == (f"{RUN_ID}:braked", "2026-01-02T03:04:05.000Z")
    assert notice.details["note"] == why
    assert ended(run) == notice


def test_a_brake_midway_tells_how_far_the_run_got() -> None:
    run = run_of(
        RunState.RUNNING,
        deleted=10,
        accepted=9,
        failed=21,
        pending=20,
        note=FEW_FAILED,
        braked_ms=NOW_MS,
        cancelled_ms=NOW_MS,
    )
    assert braked(run).text == (
        f"Policy stale: run {RUN_ID} was stopped by a brake in project {PROJECT}: 21 of 40 jobs "
        "tried failed, more than max_failures=20; 10 of 60 pools deleted, 21 failed, 29 not ended "
        f"yet{LOOK}"
    )


@pytest.mark.parametrize(
    ("changes", "occasion", "words"),
    [
        ({"deleted": 3}, Occasion.FINISHED, "finished in project P: 3 of 3 pools deleted"),
        ({"deleted": 1}, Occasion.FINISHED, "finished in project P: 1 of 1 pool deleted"),
        ({}, Occasion.FINISHED, "finished in project P: there was nothing to delete"),
        (
            {"deleted": 3, "already_deleted": 2, "skipped": 1},
            Occasion.FINISHED,
            "finished in project P: 3 of 6 pools deleted, 2 already gone, 1 skipped",
        ),
        (
            {"accepted": 2, "deleted": 1, "verify": False},
            Occasion.FINISHED,
            "finished in project P: 2 of 3 pools accepted for deletion, 1 deleted",
        ),
        (
            {"deleted": 3, "cancelled": 4, "cancelled_ms": 1},
            Occasion.FINISHED,
            "was cancelled in project P: 3 of 7 pools deleted, 4 cancelled",
        ),
        (
            {"deleted": 3, "failed": 1},
            Occasion.FAILED,
            "ended, with failures in project P: 3 of 4 pools deleted, 1 failed",
        ),
        (
            {"failed": 1, "skipped": 1, "cancelled_ms": 1},
            Occasion.FAILED,
            "was cancelled, with failures in project P: 0 of 2 pools deleted, 1 skipped, 1 failed",
        ),
        (
            {"failed": 1, "deleted": 1, "cancelled_ms": 1, "braked_ms": 1, "note": "braked: why"},
            Occasion.FAILED,
            "ended, stopped by a brake (why) in project P: 1 of 2 pools deleted, 1 failed",
        ),
    ],
)
def test_an_end_tells_how_many_of_how_many_went(
    changes: dict[str, Any], occasion: Occasion, words: str
) -> None:
    notice = ended(run_of(projects=("P",), **changes))
    assert notice.text == f"Policy stale: run {RUN_ID} {words}{LOOK}"
    assert notice.occasion is occasion
    assert notice.notice_id == f"{RUN_ID}:{occasion}"
    assert notice.at == "2026-01-02T03:04:05.000Z"


def test_an_end_tells_what_was_freed_if_that_is_known() -> None:
    notice = ended(run_of(deleted=1), freed={"npu": 1})
    assert "1 of 1 pool deleted, freeing 1 node;" in notice.text
    assert notice.details["freed"] == {"npu": 1}


def test_a_run_whose_maker_stopped_has_failed() -> None:
    notice = ended(run_of(RunState.ABORTED, note="its maker\nstopped", started_ms=0))
    assert notice.occasion is Occasion.FAILED
    assert "was given up before it started in project" in notice.text
    assert "its maker stopped;" in notice.text


def test_an_end_of_a_dry_run_is_finished_and_says_that_it_was_planned_only() -> None:
    why = "a dry run: nothing was deleted; a brake would hold it: too many"
    notice = ended(run_of(RunState.PLANNED, pending=3, policy="", note=why, started_ms=0))
    assert notice.occasion is Occasion.FINISHED
    assert notice.text == (
        f"Run {RUN_ID} was planned only in project {PROJECT} ({why}): 3 pools would be deleted"
        f"{LOOK}"
    )
    assert notice.details["state"] == "planned"


def test_a_run_that_redis_lost_has_failed_and_says_so() -> None:
    notice = lost(RUN_ID, "stale", NOW)
    assert (notice.notice_id, notice.occasion) == (f"{RUN_ID}:failed", Occasion.FAILED)
    assert f"Policy stale: the records of run {RUN_ID} are gone from Redis" in notice.text
    assert notice.details == {"run_id": RUN_ID}


def test_what_did_not_happen_is_not_told() -> None:
    with pytest.raises(ValueError, match="has not started"):
        started(run_of(RunState.CREATING, started_ms=0))
    with pytest.raises(ValueError, match="is not braked"):
        braked(run_of(RunState.RUNNING))
    with pytest.raises(ValueError, match="is running; accepted: a run that has ended"):
        ended(run_of(RunState.RUNNING, pending=1))


FINAL = [state for state in JobState if state not in {JobState.PENDING, JobState.LEASED}]


@st.composite
def ended_runs(draw: st.DrawFn) -> Run:
    verify = draw(st.booleans())
    states = [state for state in FINAL if not (verify and state is JobState.ACCEPTED)]
    counts = {str(state): draw(st.integers(0, 5_000)) for state in states}
    return run_of(
        RunState.FINISHED,
        **counts,
        verify=verify,
        policy=draw(st.sampled_from(["", "stale"])),
        cancelled_ms=draw(st.sampled_from([0, NOW_MS])),
        braked_ms=draw(st.sampled_from([0, NOW_MS])),
        note=draw(st.text(max_size=3_000)),
    )


@given(ended_runs())
def test_an_end_is_failed_if_a_job_failed_or_a_brake_stopped_it_and_else_finished(
    run: Run,
) -> None:
    failed = bool(run.counts[JobState.FAILED] or run.braked_ms)
    assert ended(run).occasion is (Occasion.FAILED if failed else Occasion.FINISHED)


@given(ended_runs())
def test_every_job_of_a_run_is_in_the_tally_once(run: Run) -> None:
    # The reason of a brake has numbers of its own; nothing else has a colon and a space.
    tally = ended(replace(run, note="")).text.removesuffix(LOOK).rpartition(": ")[2]
    counts = [int(number) for number in re.findall(r"(\d+) (?!of|pool)", tally)]
    aim = re.match(r"(\d+) of (\d+) pools? (deleted|accepted)", tally)
    if run.total == 0:
        assert tally == "there was nothing to delete"
    else:
        assert aim is not None
        assert int(aim[2]) == run.total
        assert int(aim[1]) + sum(counts) == run.total


@given(ended_runs())
def test_a_text_is_one_line_that_ends_with_how_to_look(run: Run) -> None:
    notice = ended(run)
    assert notice.text.splitlines() == [notice.text]
    assert notice.text.endswith(LOOK)
    assert len(notice.text) < 1_000


@given(ended_runs(), st.dictionaries(st.text(), st.integers(0, 1_000)))
def test_a_notice_is_read_back_as_it_was_held(run: Run, freed: dict[str, int]) -> None:
    notice = ended(run, freed=freed)
    assert notice.record().isascii()
    assert Notice.parse(notice.record()) == notice


# Marks


def test_marks_tell_how_many_of_how_many_and_when_the_first_goes() -> None:
    notice = marked([mark_of(2), mark_of(1)], project_pools=80, freed={"npu": 4})
    assert notice.text == (
        f"Policy stale marked 2 of 80 pools in project {PROJECT} for deletion, freeing 4 nodes; "
        "the first is due at 2026-01-09T03:05:05.000Z; to keep a pool, give it the tag "
        "poolsweep/protect"
    )
    assert (notice.occasion, notice.at) == (Occasion.MARKED, "2026-01-02T03:04:05.000Z")
    assert (notice.policy, notice.project_id) == ("stale", PROJECT)
    assert notice.details["total"] == 2
    assert notice.details["project_pools"] == 80
    assert notice.details["pools"] == [
        {
            "pool_id": f"pool-0{number}",
            "name": f"Pool {number}",
            "due_at": f"2026-01-09T03:0{4 + number}:05.000Z",
            "reason": "idle for 30d",
        }
        for number in (1, 2)
    ]


def test_of_many_marks_those_that_are_due_first_are_named_and_all_are_counted() -> None:
    marks = [mark_of(number) for number in reversed(range(MOST_NAMED + 5))]
    details = marked(marks).details
    assert details["total"] == MOST_NAMED + 5
    assert [pool["pool_id"] for pool in details["pools"]] == [
        f"pool-{number:02}" for number in range(MOST_NAMED)
    ]


@given(st.permutations([mark_of(number) for number in range(4)]))
def test_the_same_marks_are_the_same_notice_in_whatever_order(marks: list[Mark]) -> None:
    assert marked(marks) == marked([mark_of(number) for number in range(4)])


@pytest.mark.parametrize(
    "changes",
    [
        {"pool_id": "other"},
        {"policy": "other"},
        {"project_id": "other"},
        {"marked_at": NOW + timedelta(days=1)},
        {"due_at": NOW + timedelta(days=9)},
    ],
)
def test_other_marks_are_another_notice(changes: dict[str, Any]) -> None:
    assert marked([mark_of(**changes)]).notice_id != marked([mark_of()]).notice_id


def test_marks_of_two_policies_or_none_are_not_one_notice() -> None:
    with pytest.raises(ValueError, match="marks of 2 policies and projects"):
        marked([mark_of(), mark_of(policy="other")])
    with pytest.raises(ValueError, match="marks of 0"):
        marked([])


# Who is told


def test_a_notice_goes_to_the_channels_that_are_on_for_it() -> None:
    channels = {
        "all": channel_on(),
        "bad": channel_on(Occasion.FAILED, Occasion.BRAKED),
        "unasked": channel_on(),
    }
    good, bad = ended(run_of(deleted=1)), ended(run_of(failed=1))
    assert wanted(["bad", "all"], channels, good) == ["all"]
    assert wanted(["bad", "all", "bad"], channels, bad) == ["bad", "all"]
    assert wanted([], channels, bad) == []


def test_a_channel_that_is_not_there_is_not_passed_over() -> None:
    assert wanted(["gone"], {}, ended(run_of(deleted=1))) == ["gone"]


@given(
    st.lists(st.sampled_from("abcdef")),
    st.dictionaries(
        st.sampled_from("abcd"), st.lists(st.sampled_from(Occasion), min_size=1, unique=True)
    ),
    st.sampled_from(Occasion),
)
def test_nobody_is_told_twice_or_without_wanting_it(
    notify: list[str], on: dict[str, list[Occasion]], occasion: Occasion
) -> None:
    channels = {name: channel_on(*occasions) for name, occasions in on.items()}
    names = wanted(notify, channels, replace(ended(run_of(deleted=1)), occasion=occasion))
    assert len(names) == len(set(names))
    assert set(names) == {name for name in notify if occasion in on.get(name, Occasion)}


# JSON


def genuine(header: str, body: bytes, secret: bytes, now_s: float) -> bool:
    """The recipe that is documented for receivers."""
    parts = dict(part.split("=", 1) for part in header.split(","))
    expected = hmac.new(secret, parts["t"].encode() + b"." + body, hashlib.sha256).hexdigest()
    return hmac.compare_digest(expected, parts["v1"]) and abs(now_s - int(parts["t"])) < 300


def test_a_json_message_has_the_documented_fields_and_headers() -> None:
    notice = ended(run_of(deleted=1))
    sent = message(notice, "json", secret="s3cret", now_s=1_700_000_000)
    assert json.loads(sent.body) == {
        "id": f"{RUN_ID}:finished",
        "event": "finished",
        "policy": "stale",
        "project_id": PROJECT,
        "at": "2026-01-02T03:04:05.000Z",
        "text": notice.text,
        "details": notice.details,
    }
    signed = sent.headers.pop("X-Poolsweep-Signature")
    assert sent.headers == {
        "Content-Type": "application/json",
        "X-Poolsweep-Event": "finished",
        "X-Poolsweep-Delivery": f"{RUN_ID}:finished",
    }
    assert re.fullmatch(r"t=1700000000,v1=[0-9a-f]{64}", signed)
    assert genuine(signed, sent.body, b"s3cret", 1_700_000_010)


def test_without_a_secret_nothing_is_signed() -> None:
    sent = message(ended(run_of(deleted=1)), "json", secret=None, now_s=1)
    assert "X-Poolsweep-Signature" not in sent.headers


def test_the_signature_is_the_one_that_others_compute() -> None:
    # From: printf '1700000000.{"a":1}' | openssl dgst -sha256 -hmac key
    assert (
        signature("key", b'{"a":1}', 1_700_000_000)
        == "t=1700000000,v1=a438e398bfafc57e4396bb7fc2304422f0f768e965d073ca313cb52e22e6ad03"
    )


@given(st.text(min_size=1), st.binary(), st.integers(0, 2**40))
def test_a_signature_holds_for_its_body_time_and_secret_alone(
    secret: str, body: bytes, now_s: int
) -> None:
    key = secret.encode()
    signed = signature(secret, body, now_s)
    assert genuine(signed, body, key, now_s)
    assert not genuine(signed, body + b" ", key, now_s)
    assert not genuine(signed, body, key + b"x", now_s)
    assert not genuine(signed, body, key, now_s + 300)
    assert not genuine(signed.replace("t=", "t=1"), body, key, int(f"1{now_s}"))


# Slack


def test_slack_gets_the_text_and_the_marked_pools_and_takes_no_name_for_a_mention() -> None:
    notice = marked([mark_of(display_name="<!channel> & <@U1>", reason="a > b"), mark_of(1)])
    payload = json.loads(message(notice, "slack", secret="unused", now_s=1).body)
    pools = (
        "• &lt;!channel&gt; &amp; &lt;@U1&gt; (pool-00), due 2026-01-09T03:04:05.000Z: a &gt; b\n"
        "• Pool 1 (pool-01), due 2026-01-09T03:05:05.000Z: idle for 30d"
    )
    assert payload == {
        "text": notice.text,
        "blocks": [
            {"type": "section", "text": {"type": "mrkdwn", "text": text, "verbatim": True}}
            for text in (notice.text, pools)
        ],
    }


def test_slack_gets_no_header_that_it_does_not_know() -> None:
    sent = message(ended(run_of(deleted=1)), "slack", secret="s3cret", now_s=1)
    assert sent.headers == {"Content-Type": "application/json"}


def test_slack_is_told_how_many_pools_are_not_named() -> None:
    payload = slack_payload(marked([mark_of(number) for number in range(MOST_NAMED + 5)]))
    lines = payload["blocks"][1]["text"]["text"].splitlines()
    assert len(lines) == MOST_NAMED + 1
    assert lines[-1] == "… and 5 more"


def units(text: str) -> int:
    return len(text.encode("utf-16-le", "surrogatepass")) // 2


@given(st.sampled_from("&😀x"), st.integers(90, 100), st.integers(200, 300))
def test_pools_that_do_not_fit_in_slacks_limit_are_counted_instead(
    character: str, name: int, reason: int
) -> None:
    marks = [
        mark_of(number, display_name=character * name, reason=character * reason)
        for number in range(MOST_NAMED)
    ]
    text = slack_payload(marked(marks))["blocks"][1]["text"]["text"]
    *named, last = text.splitlines()
    assert 1 <= len(named) < MOST_NAMED
    assert len({line.partition("due")[2].partition("Z: ")[2] for line in named}) == 1  # none is cut
    assert last == f"… and {MOST_NAMED - len(named)} more"
    assert units(text) <= SLACK_TEXT_LIMIT < units(f"{text}\n{named[0]}")


hostile = st.text(st.one_of(st.sampled_from("<>&!@#😀\n"), st.characters()), max_size=150)


@given(hostile)
def test_slack_shows_any_text_as_it_is(text: str) -> None:
    shown = slack_text(text)
    assert not set("<>") & set(shown)
    assert html.unescape(shown) == text


@given(hostile, st.integers(1, 60))
def test_a_text_that_is_too_long_is_cut_between_characters(text: str, limit: int) -> None:
    shown = slack_text(text, limit)
    assert units(shown) <= limit
    if shown != slack_text(text):
        assert shown.endswith("…")
        start = shown.removesuffix("…")
        assert slack_text(text).startswith(start)
        assert re.sub(r"&(amp|lt|gt);", "", start).count("&") == 0


@given(st.lists(st.tuples(hostile, hostile), min_size=1, max_size=30))
def test_whatever_pools_are_called_slacks_limits_hold(pools: list[tuple[str, str]]) -> None:
    marks = [
        mark_of(number, display_name=name, reason=reason * 3)
        for number, (name, reason) in enumerate(pools)
    ]
    payload = slack_payload(marked(marks))
    for block in payload["blocks"]:
        text = block["text"]["text"]
        assert 1 <= units(text) <= SLACK_TEXT_LIMIT
        assert not set("<>") & set(text)
    *named, last = payload["blocks"][1]["text"]["text"].splitlines()
    rest = re.fullmatch(r"… and (\d+) more", last)
    assert len(named) + (int(rest[1]) if rest else 1) == len(marks)
