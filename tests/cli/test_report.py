"""`poolsweep report`: what runs came to, as every form shows it."""

from __future__ import annotations

import asyncio
import csv
import io
import json
import re
import stat
import subprocess
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta
from functools import partial
from html.parser import HTMLParser
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import typer
from markdown_it import MarkdownIt
from redis.asyncio import Redis

from scheduler.cli.errors import UsageError
from scheduler.cli.report import report
from scheduler.marks import Mark, Marks
from scheduler.review.records import RUN_COLUMNS
from tests.cli.conftest import CONTROL, ESCAPE, POOLSWEEP, Ended, User, one_sentence
from worker import embedded_redis
from worker.ledger import (
    Attempt,
    JobState,
    Kept,
    Ledger,
    Move,
    NewJob,
    NewRun,
    RunState,
    Source,
    keys,
    new_run_id,
)
from worker.modelarts import Precondition

if TYPE_CHECKING:
    from collections.abc import Iterator

ENDPOINT = "https://modelarts.example.com"
PROJECT = "0123456789abcdef0123456789abcdef"
DAY_MS = 86_400_000
EVIL = "<script>alert(1)</script>|**bold** [link](https://evil.example.com) \x1b[31m\u202e@all"
CLOSED = 20_000
PRICES = "currency: EUR\nper_node_hour: {'modelarts.vm.cpu.*': 0.5}\n"


def pool(number: int) -> str:
    return f"train-atlas-{number:02}-{number:032x}"


class Made:
    """The runs that a ledger was given, by what they are examples of."""

    swept: str
    unverified: str
    braked: str
    planned: str
    newer: str
    closed: str


async def _make(url: str) -> Made:
    made = Made()
    async with Redis.from_url(url, decode_responses=True) as redis:
        ledger = Ledger(redis)
        now_ms = await ledger.now_ms()
        order = count()

        async def run(days_ago: int, **given: Any) -> str:
            run_id = new_run_id(datetime.now(UTC))
            await ledger.create(NewRun(run_id, Source.SCHEDULE, ENDPOINT, **given))
            # The ledger goes by the server's clock, which no test can turn back.
            at_ms = now_ms - days_ago * DAY_MS - 1_000 + next(order)
            await redis.hset(keys.run(run_id), "created_ms", at_ms)
            await redis.zadd(keys.INDEX, {run_id: at_ms})
            return run_id

        def attempt(status: int, code: str = "", ago_ms: int = 0) -> Attempt:
            return Attempt(now_ms - ago_ms, 40, status, code, f"request-{status}")

        def move(number: int, to: JobState, reason: str, call: Attempt | None = None) -> Move:
            return Move(number, JobState.LEASED, to, "me", call, reason)

        made.swept = await run(2, policy="nightly", reason=EVIL, projects=(PROJECT,))
        kept = [*["protected: the tag keep is there"] * 3, "busy: 2 workloads"]
        await ledger.keep(
            made.swept, [Kept(PROJECT, pool(90 + n), EVIL, why) for n, why in enumerate(kept)]
        )
        jobs = [
            NewJob(PROJECT, pool(n), EVIL, "c", "f", nodes={"modelarts.vm.cpu.4ud": 2, "other": 1})
            for n in range(7)
        ]
        await ledger.add(made.swept, jobs)
        await ledger.start(made.swept, 7)
        await ledger.claim(made.swept, range(7), owner="me", lease_s=600)
        moves = [
            move(0, JobState.ACCEPTED, "the cloud accepted the deletion", attempt(200, "", 90_000)),
            move(1, JobState.ALREADY_DELETED, "the cloud says: pool not found"),
            move(2, JobState.SKIPPED, "changed since it was chosen: its tags"),
            move(3, JobState.SKIPPED, "changed since it was chosen: labels changed"),
            move(4, JobState.FAILED, f"HTTP 403: forbidden {EVIL}", attempt(403, "APIGW.0302")),
            move(5, JobState.FAILED, "HTTP 403: forbidden", attempt(403, "APIGW.0302")),
            move(6, JobState.FAILED, "HTTP 503: given up", attempt(503, "ModelArts.1")),
        ]
        assert all(await ledger.record(made.swept, moves))
        gone = Move(0, JobState.ACCEPTED, JobState.DELETED, reason="the pool is gone")
        assert all(await ledger.record(made.swept, [gone]))

        made.unverified = await run(1, verify=False)
        await ledger.add(made.unverified, [NewJob(PROJECT, pool(20))])
        await ledger.start(made.unverified, 1)
        await ledger.claim(made.unverified, [0], owner="me", lease_s=600)
        accepted = move(0, JobState.ACCEPTED, "the cloud accepted the deletion", attempt(200))
        assert all(await ledger.record(made.unverified, [accepted]))

        made.braked = await run(0, policy="nightly")
        await ledger.abort(made.braked, "60 deletions, more than 50", state=RunState.BRAKED)
        made.planned = await run(0)
        await ledger.add(made.planned, [NewJob(PROJECT, pool(30))])
        await ledger.abort(made.planned, "a dry run", state=RunState.PLANNED)
        made.newer = await run(0)
        await redis.hset(keys.run(made.newer), "schema", 99)

        made.closed = await run(40)
        await ledger.add(made.closed, (NewJob(PROJECT, pool(n)) for n in range(CLOSED)))
        await ledger.start(made.closed, CLOSED)
        await ledger.cancel(made.closed)

        now = datetime.now(UTC)
        marks = [
            Mark(PROJECT, pool(n), EVIL, "idle", Precondition("c", "f"), now, due, "idle for 9d")
            for n, due in enumerate([now - timedelta(hours=1), now + timedelta(days=1)])
        ]
        await Marks(redis, ENDPOINT).put(marks)
    return made


@pytest.fixture(scope="module")
def alice(tmp_path_factory: pytest.TempPathFactory) -> Iterator[User]:
    user = User(tmp_path_factory.mktemp("state"))
    with embedded_redis.join(user.state_dir):
        yield user


@pytest.fixture(scope="module")
def made(alice: User) -> Made:
    return asyncio.run(_make(embedded_redis.url(alice.state_dir)))


@pytest.fixture(scope="module")
def page(alice: User) -> Path:
    """Where the HTML report is written."""
    return alice.state_dir.parent / "report.html"


@pytest.fixture(scope="module")
def told(alice: User, made: Made, page: Path) -> dict[str, Ended]:
    """What the command tells; side by side, since each is mostly a program that loads."""
    prices = alice.state_dir.parent / "prices.yaml"
    prices.write_text(PRICES)
    week = ("report", "--since", "7d")
    commands = {
        "json": partial(alice.run, *week, "--json", "--prices", str(prices)),
        "jsonl": partial(alice.run, *week, "--jsonl"),
        "csv": partial(alice.run, *week, "--csv"),
        "markdown": partial(alice.run, *week, "--markdown"),
        "table": partial(alice.run, *week),
        "table of 80": partial(alice.run_on_terminal, *week, columns=80),
        "html": partial(alice.run, *week, "--html", str(page)),
        "run": partial(alice.run, "report", made.swept, "--json"),
        "run csv": partial(alice.run, "report", made.swept, "--csv"),
    }
    with ThreadPoolExecutor(3) as threads:
        ended = dict(zip(commands, threads.map(lambda run: run(), commands.values()), strict=True))
    assert {name: each.code for name, each in ended.items()} == dict.fromkeys(commands, 0), ended
    return ended


@pytest.fixture(scope="module")
def document(told: dict[str, Ended]) -> dict[str, Any]:
    """The week as JSON."""
    document: dict[str, Any] = json.loads(told["json"].out)
    return document


def test_what_a_week_came_to_is_summed_up(document: dict[str, Any], made: Made) -> None:
    assert document["run_id"] is None
    assert document["runs"] == 4
    assert document["runs_by_state"] == {"finished": 2, "braked": 1, "planned": 1}
    assert document["runs_unread"] == 1
    assert document["jobs"] == 8
    outcomes = {"accepted": 1, "deleted": 1, "already_deleted": 1, "skipped": 2, "failed": 3}
    assert document["outcomes"] == outcomes
    days = document["days"]
    assert len(days) == 8
    assert [day["day"] for day in days] == sorted({day["day"] for day in days})
    assert [day["runs"] for day in days] == [0, 0, 0, 0, 0, 1, 1, 2]
    assert days[6]["outcomes"] == {"accepted": 1}
    assert document["freed"]["pools"] == 2, "a pool that somebody else deleted is not freed by it"
    assert document["freed"] == {
        "pools": 2,
        "nodes": {"modelarts.vm.cpu.4ud": 2, "other": 1},
        "node_hours_per_day": 72,
        "money_per_day": 24.0,
        "currency": "EUR",
        "unpriced": ["other"],
        "unsized": 1,
    }
    assert document["kept"] == [
        {"reason": "protected", "count": 3},
        {"reason": "busy", "count": 1},
    ]
    assert document["skipped"] == [{"reason": "changed since it was chosen", "count": 2}]
    assert document["stopped_runs"] == 1
    (stopped,) = document["stopped"]
    assert (stopped["run_id"], stopped["state"]) == (made.braked, "braked")
    assert stopped["note"] == "60 deletions, more than 50"
    assert (document["marks"]["due"], document["marks"]["waiting"]) == (1, 1)
    assert [mark["pool_name"] for mark in document["marks"]["first"]] == [pool(0)]


def test_failures_are_told_by_error_with_an_example_and_what_to_do(
    document: dict[str, Any], made: Made
) -> None:
    first, second = document["failures"]
    assert (first["error_code"], first["status"], first["count"]) == ("APIGW.0302", 403, 2)
    assert first["example"]["job_id"] == f"{made.swept}/4"
    assert first["example"]["request_id"] == "request-403"
    assert "modelarts:pool:list" in first["what_to_do"]
    assert (second["error_code"], second["status"], second["count"]) == ("ModelArts.1", 503, 1)


def test_the_slowest_come_first(document: dict[str, Any], made: Made) -> None:
    slowest = document["slowest"]
    assert slowest[0]["job_id"] == f"{made.swept}/0"
    assert slowest[0]["took_ms"] >= 90_000
    took = [job["took_ms"] for job in slowest]
    assert took == sorted(took, reverse=True)


def test_a_report_of_one_run_tells_of_that_run_alone(told: dict[str, Ended], made: Made) -> None:
    document = json.loads(told["run"].out)
    assert document["run_id"] == made.swept
    assert (document["since"], document["marks"]) == (None, None)
    assert (document["runs"], document["jobs"]) == (1, 7)
    assert len(document["days"]) == 1
    (row,) = csv.DictReader(io.StringIO(told["run csv"].out, newline=""))
    assert row["run_id"] == made.swept


def test_the_runs_are_lines_of_json_and_of_csv(told: dict[str, Ended], made: Made) -> None:
    expected = [made.swept, made.unverified, made.braked, made.planned]
    lines = [json.loads(line) for line in told["jsonl"].lines]
    assert [line["run_id"] for line in lines] == expected
    rows = list(csv.DictReader(io.StringIO(told["csv"].out, newline="")))
    assert [row["run_id"] for row in rows] == expected
    assert tuple(rows[0]) == RUN_COLUMNS
    assert (rows[0]["failed"], rows[0]["skipped"], rows[0]["cancelled"]) == ("3", "2", "0")
    assert rows[2]["note"] == "60 deletions, more than 50"


def test_a_table_fits_80_columns_and_shows_every_id_whole(told: dict[str, Ended]) -> None:
    lines = ESCAPE.sub("", told["table of 80"].out).splitlines()
    assert max(map(len, lines)) <= 80
    text = "\n".join(lines)
    for number in (0, 4, 6, 20):
        assert pool(number) in text
    assert not CONTROL.search(told["table"].out)
    assert "\u202e" not in told["table"].out
    for words in ("HTTP 403 APIGW.0302", "changed since it was chosen", "60 deletions"):
        assert any(words in line for line in told["table"].lines)


def test_markdown_has_tables_of_text_alone(told: dict[str, Ended]) -> None:
    tokens = MarkdownIt("commonmark").enable(["table", "strikethrough"]).parse(told["markdown"].out)
    kinds = {token.type for token in tokens}
    assert kinds <= {
        *(f"heading_{end}" for end in ("open", "close")),
        *(f"paragraph_{end}" for end in ("open", "close")),
        *(
            f"{part}_{end}"
            for part in ("table", "thead", "tbody", "tr", "th", "td")
            for end in ("open", "close")
        ),
        "inline",
    }
    inline = [child for token in tokens for child in token.children or ()]
    assert {child.type for child in inline} <= {"text", "text_special"}
    shown = "\n".join("".join(child.content for child in token.children or ()) for token in tokens)
    assert f"{pool(4)} (<script>alert(1)</script>|**bold** [link]" in shown


class _Page(HTMLParser):
    """What a page is made of: its tags, their attributes, and its cells' texts."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: set[str] = set()
        self.attributes: list[tuple[str, str, str]] = []
        self.cells: list[str] = []
        self._open: list[str] = []
        self.feed(text)
        self.close()
        assert self._open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self.attributes += [(tag, name, value or "") for name, value in attrs]
        if tag != "meta":
            self._open.append(tag)
        if tag in {"td", "title"}:
            self.cells.append("")

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        self.handle_endtag(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self._open and self._open[-1] in {"td", "title"}:
            self.cells[-1] += data


def test_the_html_needs_nothing_else_and_runs_nothing(told: dict[str, Ended], page: Path) -> None:
    assert told["html"].out == f"Written to {page}\n"
    text = page.read_text()
    found = _Page(text)
    assert not found.tags & {"script", "link", "img", "iframe", "object", "embed", "a", "form"}
    assert {name for _, name, _ in found.attributes}.isdisjoint({"src", "href", "style", "action"})
    assert not any(name.startswith("on") for _, name, _ in found.attributes)
    assert not re.search(r"@import|url\((?!#)", text)
    assert "default-src 'none'" in text
    assert "prefers-color-scheme: dark" in text
    assert "@media print" in text
    assert any("<script>alert(1)</script>|**bold**" in cell for cell in found.cells)
    assert "<script>" not in text
    assert not any(mark in text for mark in ("\x1b", "\u202e"))


def test_the_html_shows_each_outcome_of_each_day(told: dict[str, Ended], page: Path) -> None:
    titles = [
        cell for cell in _Page(page.read_text()).cells if re.match(r"\d{4}-\d\d-\d\d: ", cell)
    ]
    assert [title.partition(": ")[2] for title in titles] == [
        "1 deleted",
        "1 already_deleted",
        "2 skipped",
        "3 failed",
        "1 accepted",
    ]


# Writing the file


def test_a_file_that_is_there_stays_unless_it_is_forced(
    alice: User, told: dict[str, Ended]
) -> None:
    file = alice.state_dir.parent / "kept.html"
    file.write_text("mine")
    command = ("report", "--since", "7d", "--html", str(file))
    refused = alice.run(*command)
    assert refused.code == 2
    assert one_sentence(refused) == (
        f"poolsweep: --html: {str(file)!r} is there already; accepted: a new name, or --force to "
        "write over it."
    )
    assert file.read_text() == "mine"
    assert alice.run(*command, "--force").code == 0
    assert file.read_text().endswith("</html>\n")
    beside = [each.name for each in file.parent.iterdir() if "html" in each.name]
    assert sorted(beside) == ["kept.html", "report.html"], "nothing is left beside it"
    assert stat.S_IMODE(file.stat().st_mode) & 0o600 == 0o600


def test_a_file_that_cannot_be_written_whole_is_not_there(
    alice: User, made: Made, tmp_path: Path
) -> None:
    """As on a disk that is full."""
    file = tmp_path / "report.html"
    arguments = [POOLSWEEP, "report", "--since", "7d", "--html", str(file)]
    done = subprocess.run(
        ["/bin/bash", "-c", 'ulimit -f 4; exec "$@"', "bash", *arguments],
        env=alice.environment(),
        capture_output=True,
        text=True,
        check=False,
    )
    ended = Ended(done.returncode, done.stdout, done.stderr)
    assert (ended.code, ended.out) == (2, "")
    assert "cannot be written: File too large" in one_sentence(ended)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ((), "RUN and --since: exactly one of them is accepted."),
        (("a-run", "--since", "7d"), "RUN and --since: exactly one of them is accepted."),
        (("--since", "7"), "--since: '7' is not accepted: a duration such as"),
        (("--since", "0d"), "--since: '0d' is not accepted: a duration such as"),
        (("--since", "999999w"), "--since: '999999w' is not accepted: a duration such as"),
        (("--since", "7d", "--json", "--csv"), "--json and --csv: only one of them is accepted."),
        (("--since", "7d", "--force"), "--force: it is accepted with --html only."),
        (("--since", "7d", "--html", "/no/such/report"), "its folder is not there."),
        (("--since", "7d", "--html", "/dev/null", "--force"), "is no regular file"),
        (("--since", "7d", "--html", "x" * 300), "cannot be written: File name too long"),
        (("--since", "7d", "--csv", "--prices", "x"), "--prices: it is not accepted with --csv"),
    ],
)
def test_what_cannot_be_reported_is_told_in_a_sentence(
    arguments: tuple[str, ...], words: str
) -> None:
    holder = typer.Typer()
    holder.command()(report)
    with pytest.raises(UsageError) as caught:
        typer.main.get_command(holder)(arguments, standalone_mode=False)
    assert words in str(caught.value)


def test_a_run_that_is_not_there_is_told_in_a_sentence(alice: User) -> None:
    ended = alice.run("report", "no-such-run")
    assert (ended.code, ended.out) == (2, "")
    assert "Run 'no-such-run' is not in the ledger" in one_sentence(ended)


# Many jobs


def test_memory_does_not_grow_with_the_jobs(alice: User, made: Made) -> None:
    """Twenty thousand jobs are 9 MB if they are held; reading them page by page takes 2."""
    program = (
        "import sys\n"
        "from scheduler.cli.commands import app\n"
        "app(sys.argv[1:], standalone_mode=False)\n"
        "print(open('/proc/self/status').read(), file=sys.stderr)\n"
    )

    def peak_kib(*arguments: str) -> int:
        python = Path(POOLSWEEP).with_name("python")
        command = [str(python), "-c", program, *arguments]
        done = subprocess.run(
            command, env=alice.environment(), capture_output=True, text=True, check=True, timeout=60
        )
        (peak,) = re.findall(r"^VmHWM:\s+([0-9]+) kB$", done.stderr, re.MULTILINE)
        return int(peak)

    small = peak_kib("report", made.swept, "--json")
    assert peak_kib("report", made.closed, "--json") - small < 5 * 1024
    lines = alice.run("results", made.closed, "--jsonl").lines
    assert len(lines) == CLOSED


# What the page says

REPORTS = (Path(__file__).parents[2] / "docs/reports.md").read_text()
TIME = re.compile(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z")
TYPES: dict[str, type | tuple[type, ...]] = {
    "text": str,
    "time": str,
    "number": (int, float),
    "boolean": bool,
    "list": list,
    "map": dict,
    "object": dict,
}


def documented(section: str) -> dict[str, str]:
    """The fields of a record and their types, as the page tells."""
    table = REPORTS.partition(f"\n### {section}\n")[2].partition("\n### ")[0]
    rows = re.findall(r"^\| `([^`]+)` \| ([a-z ]+) \|", table, re.MULTILINE)
    assert len(dict(rows)) == len(rows)
    return dict(rows)


def written(value: Any, fields: dict[str, str], path: str = "") -> set[str]:
    """The fields that a record has, each checked against the type that the page tells."""
    found = set()
    if path:
        found.add(path)
        kind = fields.get(path, "")
        assert kind, f"{path} is not documented"
        name = kind.removesuffix(" or null")
        if value is None:
            assert kind.endswith(" or null"), path
            return found
        assert isinstance(value, TYPES[name]), (path, value)
        if name == "time":
            assert TIME.fullmatch(str(value)), (path, value)
        if name == "map":
            return found
    if isinstance(value, dict):
        for key, each in value.items():
            found |= written(each, fields, f"{path}.{key}" if path else key)
    elif isinstance(value, list):
        for each in value:
            if isinstance(each, dict):
                for key, inner in each.items():
                    found |= written(inner, fields, f"{path}[].{key}")
            else:
                found |= written(each, fields, f"{path}[]")
    return found


def test_the_page_tells_of_every_field_of_a_report(document: dict[str, Any]) -> None:
    fields = documented("Report")
    assert written(document, fields) == fields.keys()


def test_the_page_tells_of_every_field_of_a_run_a_job_and_a_kept_pool(
    alice: User, told: dict[str, Ended], made: Made
) -> None:
    fields = documented("Run")
    runs = [json.loads(line) for line in told["jsonl"].lines]
    assert set.union(*(written(run, fields) for run in runs)) == fields.keys()
    fields = documented("Job")
    jobs = [json.loads(line) for line in alice.run("results", made.swept, "--jsonl").lines]
    assert set.union(*(written(job, fields) for job in jobs)) == fields.keys()
    fields = documented("Kept pool")
    kept = [
        json.loads(line) for line in alice.run("results", made.swept, "--kept", "--jsonl").lines
    ]
    assert set.union(*(written(each, fields) for each in kept)) == fields.keys()
