"""What people and programs are told about runs and marks: pure.

A JSON channel gets a POST whose body is one object:

    id          names the notice; one that comes twice has the same id: drop it
    event       marked, started, braked, finished or failed
    policy      the policy's name; empty: the run carries out none
    project_id  the project's id; empty: the run is of none or of several
    at          when it happened: ISO 8601, UTC
    text        one sentence for people
    details     of a run: what `poolsweep results --json` has under `run`, and `projects`;
                of a sweep that failed before it had a run: `due_at`, `reason`;
                of marks: `total`, and of the first 20 `pools`: pool_id, name, due_at, reason;
                of runs and marks, where known: `freed` (nodes by flavor), `project_pools` (how
                many pools the project has)

More fields may come. The headers are `X-Poolsweep-Event` (as `event`), `X-Poolsweep-Delivery` (as
`id`), and for a channel with a secret `X-Poolsweep-Signature: t=<unix seconds>,v1=<hex>`. To check
it, over the body's bytes as they came:

    expected = hmac.new(secret, t + b"." + body, hashlib.sha256).hexdigest()
    genuine = hmac.compare_digest(expected, v1) and abs(time.time() - int(t)) < 300

The scheme is that of Stripe's webhooks: the signed time keeps a recorded POST from being sent
again later.
"""

from __future__ import annotations

import hashlib
import hmac
import json
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, Protocol

from scheduler.policy import Occasion
from scheduler.review.records import run_record, timestamp
from scheduler.selection import PROTECT_TAG
from worker.ledger import JobState, RunState
from worker.modelarts.answers import printable

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable, Mapping, Sequence
    from datetime import datetime

    from yarl import URL

    from scheduler.marks import Mark
    from worker.ledger import Run

MOST_NAMED = 20
"""No more pools than this are named in a notice."""
SLACK_TEXT_LIMIT = 3_000
_LONGEST_NAME = 100
_LONGEST_REASON = 300
_LONGEST_TEXT = 2_000
_SLACK_ESCAPES = {"&": "&amp;", "<": "&lt;", ">": "&gt;"}
_WORDS = {
    JobState.DELETED: "deleted",
    JobState.ACCEPTED: "accepted for deletion",
    JobState.ALREADY_DELETED: "already gone",
    JobState.SKIPPED: "skipped",
    JobState.FAILED: "failed",
    JobState.CANCELLED: "cancelled",
}


@dataclass(frozen=True, slots=True)
class Notice:
    """Something that channels are told.

    Attributes:
        notice_id: the same for the same happening, so that it is sent once however often posted.
        occasion: what happened.
        policy: the policy that it happened to; empty: none.
        project_id: the project; empty: none or several.
        at: when, ISO 8601 in UTC.
        text: one sentence for people.
        details: what programs may want to know; JSON.
    """

    notice_id: str
    occasion: Occasion
    policy: str
    project_id: str
    at: str
    text: str
    details: dict[str, Any]

    def record(self) -> str:
        """The JSON that it is held as, and sent as; all ASCII, so that any text passes."""
        return json.dumps(
            {
                "id": self.notice_id,
                "event": self.occasion,
                "policy": self.policy,
                "project_id": self.project_id,
                "at": self.at,
                "text": self.text,
                "details": self.details,
            },
            allow_nan=False,
        )

    @classmethod
    def parse(cls, text: str) -> Notice:
        """Read one back."""
        record = json.loads(text)
        return cls(
            notice_id=record["id"],
            occasion=Occasion(record["event"]),
            policy=record["policy"],
            project_id=record["project_id"],
            at=record["at"],
            text=record["text"],
            details=record["details"],
        )


class Destination(Protocol):
    """What there is to know of a channel to send it a notice."""

    @property
    def format(self) -> Literal["json", "slack"]:
        """The form that it takes notices in."""

    @property
    def on(self) -> Collection[Occasion]:
        """What it wants to be told."""

    def read(self) -> tuple[URL, str | None]:
        """Where it is, and the key that JSON is signed with, if any. Slow: it may read files.

        Raises:
            SettingsError: nothing may be sent there now; the reason says nothing that is secret.
        """


class Channels(Protocol):
    """The channels by name, as they are now: a dictionary, or what stands for one."""

    def get(self, name: str, /) -> Destination | None:
        """A channel; None: there is none of that name."""


def wanted(notify: Iterable[str], channels: Channels, notice: Notice) -> list[str]:
    """Which channels a notice goes to.

    Args:
        notify: the names that whoever is told goes by.
        channels: the channels by name.
        notice: what they would be told.

    Returns:
        The names, each once. A channel that is not there is among them: that its notices cannot
        be delivered is to be seen, rather than that nothing comes.
    """
    return [
        name
        for name in dict.fromkeys(notify)
        if (channel := channels.get(name)) is None or notice.occasion in channel.on
    ]


# What there is to tell


def marked(
    marks: Sequence[Mark],
    *,
    project_pools: int | None = None,
    freed: Mapping[str, int] | None = None,
) -> Notice:
    """A policy marked pools of a project.

    Args:
        marks: the new marks, at least one; all by one policy in one project.
        project_pools: how many pools the project has, if known.
        freed: how many nodes of each flavor the deletions will free, if known.

    Raises:
        ValueError: there are no marks, or they are of several policies or projects.
    """
    owners = {(mark.policy, mark.project_id) for mark in marks}
    if len(owners) != 1:
        raise ValueError(
            f"marks of {len(owners)} policies and projects; accepted: marks of exactly one"
        )
    ((policy, project_id),) = owners
    ordered = sorted(marks, key=lambda mark: (mark.due_at, mark.pool_id))
    first_due = _moment(ordered[0].due_at)
    # A pool that is marked again later is told of again, so the times are part of the id.
    made = [[mark.pool_id, _moment(mark.marked_at), _moment(mark.due_at)] for mark in ordered]
    digest = hashlib.sha256(json.dumps(made).encode()).hexdigest()[:16]
    count = _many(len(marks), project_pools)
    return Notice(
        notice_id=f"{policy}:{project_id}:{digest}:{Occasion.MARKED}",
        occasion=Occasion.MARKED,
        policy=policy,
        project_id=project_id,
        at=_moment(max(mark.marked_at for mark in marks)),
        text=_sentence(
            f"Policy {policy} marked {count} in project {project_id} for deletion"
            f"{_freeing(freed)}; the first is due at {first_due}; to keep a pool, give it the tag "
            f"{PROTECT_TAG}"
        ),
        details={
            "total": len(marks),
            "pools": [
                {
                    "pool_id": mark.pool_id,
                    "name": printable(mark.display_name, _LONGEST_NAME),
                    "due_at": _moment(mark.due_at),
                    "reason": printable(mark.reason, _LONGEST_REASON),
                }
                for mark in ordered[:MOST_NAMED]
            ],
            **_if_known(project_pools, freed),
        },
    )


def started(
    run: Run, *, project_pools: int | None = None, freed: Mapping[str, int] | None = None
) -> Notice:
    """A run started.

    Args:
        run: the run.
        project_pools: how many pools its project has, if known.
        freed: how many nodes of each flavor its deletions will free, if known.

    Raises:
        ValueError: it did not.
    """
    if not run.started_ms:
        raise ValueError(f"run {run.run_id} has not started")
    return _of_run(
        run,
        Occasion.STARTED,
        run.started_ms,
        f"started, to delete {_many(run.total, project_pools)}{_where(run)}{_freeing(freed)}",
        _if_known(project_pools, freed),
    )


def braked(run: Run) -> Notice:
    """A brake held a run before it started, or stopped one midway.

    Raises:
        ValueError: none did.
    """
    if not run.braked_ms:
        raise ValueError(f"run {run.run_id} is not braked")
    if run.state is RunState.BRAKED:
        what = f"was held by a brake and deletes nothing{_where(run)}: {_why(run)}"
    else:
        what = f"was stopped by a brake{_where(run)}: {_why(run)}; {_tally(run)}"
    return _of_run(run, Occasion.BRAKED, run.braked_ms, what)


def ended(run: Run, *, freed: Mapping[str, int] | None = None) -> Notice:
    """A run ended.

    Args:
        run: the run.
        freed: how many nodes of each flavor its deletions freed, if known.

    Returns:
        The notice: `failed` if a job failed, a brake stopped the run midway, or its maker stopped
        before it was whole; `braked`, as `braked` says it, if a brake held it before it started;
        else `finished`.

    Raises:
        ValueError: it has not ended.
    """
    if not run.ended:
        raise ValueError(f"run {run.run_id} is {run.state}; accepted: a run that has ended")
    if run.state is RunState.BRAKED:
        return braked(run)
    occasion = Occasion.FAILED
    outcome = f"{_where(run)}: {_tally(run)}{_freeing(freed)}"
    if run.state is RunState.PLANNED:
        occasion = Occasion.FINISHED
        what = (
            f"was planned only{_where(run)} ({_why(run)}): {_many(run.total)} would be deleted"
            f"{_freeing(freed)}"
        )
    elif run.state is RunState.ABORTED:
        what = f"was given up before it started{_where(run)}: {_why(run)}"
    elif run.braked_ms:
        what = f"ended, stopped by a brake ({_why(run)}){outcome}"
    elif run.counts.get(JobState.FAILED):
        what = f"{'was cancelled' if run.cancelled_ms else 'ended'}, with failures{outcome}"
    else:
        occasion = Occasion.FINISHED
        what = f"{'was cancelled' if run.cancelled_ms else 'finished'}{outcome}"
    return _of_run(run, occasion, run.finished_ms, what, _if_known(None, freed))


def lost(run_id: str, policy: str, at: datetime) -> Notice:
    """The records of a run are gone before its end was told.

    Args:
        run_id: the run.
        policy: the policy that it carried out; empty: none.
        at: when that was seen; an aware time.
    """
    return Notice(
        notice_id=f"{run_id}:{Occasion.FAILED}",
        occasion=Occasion.FAILED,
        policy=policy,
        project_id="",
        at=_moment(at),
        text=_sentence(
            f"{_subject(policy)}the records of run {run_id} are gone from Redis, so how it ended "
            "is not known; look at the project's pools in the cloud"
        ),
        details={"run_id": run_id},
    )


def not_swept(
    policy: str, project_id: str, night: datetime, reason: str, *, at: datetime
) -> Notice:
    """A policy's night came to no run in a project: its pools could not be listed, and the like.

    Args:
        policy: the policy.
        project_id: the project.
        night: when the sweep was due; an aware time.
        reason: why, in a sentence.
        at: when that was seen; an aware time.
    """
    due_at = _moment(night)
    why = printable(reason, _LONGEST_REASON).rstrip(".")
    return Notice(
        notice_id=f"{policy}:{project_id}:{due_at}:{Occasion.FAILED}",
        occasion=Occasion.FAILED,
        policy=policy,
        project_id=project_id,
        at=_moment(at),
        text=_sentence(
            f"{_subject(policy)}the sweep due at {due_at} in project {project_id} failed: {why}; "
            "look with: poolsweep schedule"
        ),
        details={"due_at": due_at, "reason": why},
    )


def _of_run(
    run: Run,
    occasion: Occasion,
    at_ms: int,
    what: str,
    more: Mapping[str, Any] | None = None,
) -> Notice:
    return Notice(
        notice_id=f"{run.run_id}:{occasion}",
        occasion=occasion,
        policy=run.policy,
        project_id=run.projects[0] if len(run.projects) == 1 else "",
        at=timestamp(at_ms) or "",
        text=_sentence(
            f"{_subject(run.policy)}run {run.run_id} {what}; "
            f"look with: poolsweep results {run.run_id}"
        ),
        details={**run_record(run), "projects": list(run.projects), **(more or {})},
    )


def _moment(at: datetime) -> str:
    return timestamp(round(at.timestamp() * 1000)) or ""


def _sentence(text: str) -> str:
    text = printable(text, _LONGEST_TEXT)
    return text[:1].upper() + text[1:]


def _subject(policy: str) -> str:
    return f"policy {policy}: " if policy else ""


def _many(pools: int, of: int | None = None) -> str:
    total = pools if of is None else of
    word = "pool" if total == 1 else "pools"
    return f"{pools} {word}" if of is None else f"{pools} of {of} {word}"


def _where(run: Run) -> str:
    if len(run.projects) == 1:
        return f" in project {run.projects[0]}"
    return f" in {len(run.projects)} projects" if run.projects else ""


def _freeing(freed: Mapping[str, int] | None) -> str:
    if not freed:
        return ""
    nodes = sum(freed.values())
    return f", freeing {nodes} {'node' if nodes == 1 else 'nodes'}"


def _why(run: Run) -> str:
    return printable(run.note, _LONGEST_REASON).removeprefix("braked: ") or "no reason was given"


def _tally(run: Run) -> str:
    """How many of how many, such as `10 of 13 pools deleted, 2 already gone, 1 failed`."""
    if not run.total:
        return "there was nothing to delete"
    aim = JobState.DELETED if run.verify else JobState.ACCEPTED
    parts = [f"{_many(run.counts.get(aim, 0), run.total)} {_WORDS[aim]}"]
    for state, word in _WORDS.items():
        count = run.counts.get(state, 0)
        if count and state not in {aim, JobState.ACCEPTED}:
            parts.append(f"{count} {word}")
    if under_way := run.total - run.done:
        parts.append(f"{under_way} not ended yet")
    return ", ".join(parts)


def _if_known(project_pools: int | None, freed: Mapping[str, int] | None) -> dict[str, Any]:
    known: dict[str, Any] = {}
    if project_pools is not None:
        known["project_pools"] = project_pools
    if freed is not None:
        known["freed"] = dict(freed)
    return known


# How it is sent


@dataclass(frozen=True, slots=True)
class Message:
    """A POST: its headers and its body."""

    headers: dict[str, str]
    body: bytes


def message(
    notice: Notice, form: Literal["json", "slack"], *, secret: str | None, now_s: int
) -> Message:
    """A notice as a channel takes it.

    Args:
        notice: what to say.
        form: the channel's format.
        secret: the key to sign JSON with; None: it is not signed.
        now_s: the time that is signed, in seconds since the epoch.
    """
    headers = {"Content-Type": "application/json"}
    if form == "slack":
        return Message(headers, json.dumps(slack_payload(notice)).encode())
    body = notice.record().encode()
    headers["X-Poolsweep-Event"] = notice.occasion
    headers["X-Poolsweep-Delivery"] = notice.notice_id
    if secret is not None:
        headers["X-Poolsweep-Signature"] = signature(secret, body, now_s)
    return Message(headers, body)


def signature(secret: str, body: bytes, now_s: int) -> str:
    """The header `X-Poolsweep-Signature`; see above for how it is checked.

    Args:
        secret: the key.
        body: the body as it is sent.
        now_s: seconds since the epoch.
    """
    signed = f"{now_s}.".encode() + body
    return f"t={now_s},v1={hmac.new(secret.encode(), signed, hashlib.sha256).hexdigest()}"


def slack_payload(notice: Notice) -> dict[str, Any]:
    """A notice as Slack's incoming webhooks take it: the text, and the pools that it names.

    Source: Slack's documents, Sending messages using incoming webhooks; Section block.
    """
    text = slack_text(notice.text)
    blocks = [_section(text)]
    if pools := notice.details.get("pools"):
        blocks.append(_section(_slack_list(pools, notice.details["total"])))
    return {"text": text, "blocks": blocks}


def slack_text(text: str, limit: int = SLACK_TEXT_LIMIT) -> str:
    """A text in which Slack takes nothing for a mention or a link, cut to its limit.

    Args:
        text: any text.
        limit: the longest that the result may be, in UTF-16 code units.

    Source: Slack's documents, Formatting text for app surfaces (Escaping text); Text object.
    """
    pieces = [_SLACK_ESCAPES.get(character, character) for character in text]
    if sum(map(_size, pieces)) <= limit:
        return "".join(pieces)
    kept, size = [], _size("…")
    for piece in pieces:
        size += _size(piece)
        if size > limit:
            break
        kept.append(piece)
    return "".join([*kept, "…"])


def _size(text: str) -> int:
    # Slack does not say what it counts; this is the most that it may be.
    return sum(2 if character > "\uffff" else 1 for character in text)


def _slack_list(pools: Sequence[Mapping[str, str]], total: int) -> str:
    lines: list[str] = []
    room = SLACK_TEXT_LIMIT - len(f"… and {total} more")
    for pool in pools:
        name = f"{pool['name']} ({pool['pool_id']})" if pool["name"] else pool["pool_id"]
        line = slack_text(f"• {name}, due {pool['due_at']}: {pool['reason']}")
        room -= _size(line) + 1
        if room < 0:
            break
        lines.append(line)
    if rest := total - len(lines):
        lines.append(f"… and {rest} more")
    return "\n".join(lines)


def _section(text: str) -> dict[str, Any]:
    # Verbatim: what looks like a mention or a channel in a name is left as it is.
    return {"type": "section", "text": {"type": "mrkdwn", "text": text, "verbatim": True}}
