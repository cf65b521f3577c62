"""The ledger: runs, jobs and attempts in Redis, the source of truth.

Every move of a job is one atomic script that checks the state it comes from, so a message
delivered twice, late or never changes nothing that it should not. Reading never scans keys.
"""

from __future__ import annotations

import json
from importlib.resources import files
from itertools import chain, islice
from typing import TYPE_CHECKING, Any, TypeVar, cast

import structlog
from redis.exceptions import ResponseError

from worker.ledger import keys
from worker.ledger.records import (
    DamagedRecordError,
    Job,
    JobState,
    Kept,
    Move,
    NewJob,
    NewRun,
    Run,
    RunState,
)
from worker.ledger.schema import REPLY, SCHEMA, RunNotFoundError, SchemaError, refuse_newer

if TYPE_CHECKING:
    from collections.abc import (
        AsyncIterator,
        Awaitable,
        Callable,
        Iterable,
        Iterator,
        Mapping,
        Sequence,
    )

    from redis.asyncio import Redis

_T = TypeVar("_T")

SCRIPTS = files("worker.ledger") / "scripts"
ADD_CHUNK = 1_000
CANCEL_CHUNK = 1_000
PAGE = 1_000
HALF_MADE_S = 600.0
"""A run that is being created for longer than this was left behind by its maker."""

log = structlog.get_logger(__name__)


def _chunks(items: Iterable[_T], size: int) -> Iterator[list[_T]]:
    rest = iter(items)
    while chunk := list(islice(rest, size)):
        yield chunk


def _source(name: str) -> str:
    states, steps = ((SCRIPTS / f"{part}.lua").read_text() for part in ("states", name))
    return f"""local SCHEMA = {SCHEMA}
{states}
local function steps()
{steps}
end
return {{ steps(), damaged }}
"""


class Ledger:
    """Runs, jobs and attempts in Redis.

    Everything about one run raises a SchemaError if a newer version made that run, or its record is
    damaged; nothing is read of it or changed then.

    Args:
        redis: a connection that decodes responses.
        retention_days: for how many days the records of a finished run are kept.
    """

    def __init__(self, redis: Redis, *, retention_days: float = 90) -> None:
        self._redis = redis
        self._retention_s = round(retention_days * 86_400)
        self._unread: dict[str, set[str]] = {}
        self._note_schema = redis.register_script((SCRIPTS / "schema.lua").read_text())
        self._take_over = redis.register_script((SCRIPTS / "take_over.lua").read_text())
        self._scripts = {
            name: redis.register_script(_source(name))
            for name in (
                "create",
                "keep",
                "add",
                "start",
                "abort",
                "take",
                "claim",
                "renew",
                "record",
                "reclaim",
                "cancel",
                "write_off",
            )
        }

    async def _call(self, script: str, run_id: str, args: Iterable[Any]) -> Any:
        try:
            found = await self._scripts[script](keys=keys.of_run(run_id), args=list(args))
        except ResponseError as error:
            code, _, schema = str(error).partition(" ")
            if code == REPLY:
                raise SchemaError.of_run(run_id, schema) from None
            raise
        answer, damaged = found
        for number, reason in _chunks(damaged, 2):
            # Only the script that ends the job says so, so it is told once.
            log.error(
                "job_record_damaged", run_id=run_id, job_id=f"{run_id}/{number}", reason=reason
            )
        return answer

    async def _note_schema_of_this_version(self) -> None:
        """See that no newer version has opened a run here, and note that this one does."""
        refuse_newer(await self._note_schema(keys=[keys.SCHEMA], args=[SCHEMA]))

    # Making a run

    async def queue(self, run: NewRun) -> bool:
        """Note a run that is to be planned, so that it is seen from now on.

        Args:
            run: what is known of it by now.

        Returns:
            False if there is a run with this id already; it stays as it is.

        Raises:
            SchemaError: a newer version has opened runs here.
        """
        return await self._open(run, RunState.QUEUED, "")

    async def create(self, run: NewRun, *, maker: str = "") -> bool:
        """Open a run. It takes jobs, and executes none before `start`.

        A run that waits to be planned, or that another maker is at or was cut off at, is taken
        over: what the other has added is dropped, and it can add nothing more. So give the maker's
        name wherever two may be at the same run, each time another.

        Args:
            run: what is known of it.
            maker: who makes it; needed for every further step until it has started.

        Returns:
            False if there is a run with this id that is past its making, or was cancelled; it
            stays as it is.

        Raises:
            SchemaError: a newer version has opened runs here.
        """
        return await self._open(run, RunState.CREATING, maker)

    async def _open(self, run: NewRun, state: RunState, maker: str) -> bool:
        await self._note_schema_of_this_version()
        fields = run.fields() | {"retention_s": self._retention_s}
        # The indexes come first: a run that they name and that is not there is forgotten
        # in time, one that is there and that they do not name would be lost.
        now_ms = await self.now_ms()
        async with self._redis.pipeline(transaction=True) as pipe:
            pipe.zadd(keys.INDEX, {run.run_id: now_ms}, nx=True)
            pipe.sadd(keys.active(run.endpoint), run.run_id)
            await pipe.execute()
        args = [state, maker, *chain.from_iterable(fields.items())]
        made = await self._call("create", run.run_id, args)
        if made:
            # Again: somebody may have tidied the list while the run was not there yet.
            await self._redis.sadd(keys.active(run.endpoint), run.run_id)
        return bool(made)

    async def add(
        self, run_id: str, jobs: Iterable[NewJob], *, first: int = 0, maker: str = ""
    ) -> int:
        """Add jobs, numbered from `first`. Adding the same numbers again changes nothing.

        Returns:
            How many were given.

        Raises:
            RunNotFoundError: the run is not there, or takes no jobs any more from this maker.
        """
        number = first
        for chunk in _chunks(jobs, ADD_CHUNK):
            records = ((number + i, job.record()) for i, job in enumerate(chunk))
            if await self._call("add", run_id, [maker, *chain.from_iterable(records)]) == -1:
                raise RunNotFoundError(run_id)
            number += len(chunk)
        return number - first

    async def start(self, run_id: str, total: int, *, maker: str = "") -> bool:
        """Let the workers at the run.

        Returns:
            False unless exactly `total` jobs were added, and the maker still has the run.
        """
        return bool(await self._call("start", run_id, [maker, total]))

    async def keep(self, run_id: str, pools: Iterable[Kept], *, maker: str = "") -> None:
        """Note the pools that the run's plan keeps, so that the plan can be explained later.

        Raises:
            RunNotFoundError: the run is not there, or takes nothing any more from this maker.
        """
        noted = 0
        for chunk in _chunks(pools, ADD_CHUNK):
            args = [maker, noted, *(pool.record() for pool in chunk)]
            if await self._call("keep", run_id, args) == -1:
                raise RunNotFoundError(run_id)
            noted += len(chunk)

    async def abort(
        self,
        run_id: str,
        reason: str,
        *,
        state: RunState = RunState.ABORTED,
        min_age_s: float = 0,
        maker: str = "",
    ) -> bool:
        """End a run that was never started.

        Args:
            run_id: the run.
            reason: why, for the record.
            state: `ABORTED`, `BRAKED` if a brake held it, or `PLANNED` if no more was wanted: then
                its jobs stay, as what would have been deleted.
            min_age_s: leave it if it was planned less than so many seconds ago.
            maker: leave it if it is another maker's; empty: end it whoever makes it.

        Returns:
            Whether it was ended.
        """
        args = [maker, round(min_age_s * 1000), state, reason]
        return bool(await self._call("abort", run_id, args))

    async def hold_project(self, endpoint: str, project_id: str, run_id: str) -> str | None:
        """Have a project to itself for a run, until the run has ended. Create the run first.

        Args:
            endpoint: the base URL of the API.
            project_id: the project.
            run_id: the run that wants it.

        Returns:
            None: the run has it; else the id of the run that has it and has not ended, or of
            which a newer version alone knows whether it has.
        """
        key = keys.project(endpoint, project_id)
        while True:
            if await self._redis.set(key, run_id, nx=True):
                return None
            holder = cast("str | None", await self._redis.get(key))
            if holder is None:
                continue
            if holder == run_id:
                return None
            reason = "its maker stopped before all of its jobs were there; none was executed"
            try:
                await self.abort(holder, reason, min_age_s=HALF_MADE_S)
                if not (await self.run(holder)).ended:
                    return holder
            except SchemaError:
                return holder
            except RunNotFoundError:
                pass  # it has aged out, or was never made
            if await self._take_over(keys=[key], args=[holder, run_id]):
                return None

    # Executing it

    async def take(
        self, run_id: str, *, window: int, batch_size: int, resend_s: float
    ) -> list[int]:
        """Take due jobs to be sent to the workers.

        Args:
            run_id: the run.
            window: how many of its jobs may be sent or leased at once.
            batch_size: how many jobs one message carries.
            resend_s: after how many seconds a job that was sent and not claimed is taken again.

        Returns:
            The numbers of jobs that the caller must now send.
        """
        args = [window, batch_size, round(resend_s * 1000)]
        return [int(n) for n in await self._call("take", run_id, args)]

    async def claim(
        self, run_id: str, numbers: Sequence[int], *, owner: str, lease_s: float
    ) -> list[Job]:
        """Lease those of the jobs that are pending and due. Repeating it as `owner` is safe.

        Args:
            run_id: the run.
            numbers: the jobs wanted.
            owner: a name for this delivery that no other has: the fence against late writers.
            lease_s: for how many seconds.

        Returns:
            The jobs leased; the others are elsewhere in their life.
        """
        flat = await self._call("claim", run_id, [owner, round(lease_s * 1000), *numbers])
        return await self._sound(run_id, ((int(n), text) for n, text in _chunks(flat, 2)))

    async def renew(
        self, run_id: str, numbers: Sequence[int], *, owner: str, lease_s: float
    ) -> set[int]:
        """Prolong leases. Returns the jobs that `owner` holds no longer."""
        args = [owner, round(lease_s * 1000), *numbers]
        return {int(n) for n in await self._call("renew", run_id, args)}

    async def record(self, run_id: str, moves: Sequence[Move]) -> list[bool]:
        """Move jobs, each only if it is in the state, and leased to the owner, that its move says.

        Returns:
            For each move whether it was made.
        """
        wishes = json.dumps([move.packed() for move in moves], ensure_ascii=False)
        return [bool(made) for made in await self._call("record", run_id, [wishes])]

    async def reclaim(self, run_id: str, *, max_attempts: int, limit: int = 1_000) -> int:
        """Take back jobs whose lease ran out. Returns how many."""
        return int(await self._call("reclaim", run_id, [limit, max_attempts]))

    async def cancel(self, run_id: str) -> bool:
        """Cancel what no worker has claimed. Returns False if the run has ended."""
        first = left = await self._call("cancel", run_id, [CANCEL_CHUNK])
        while left > 0:
            left = await self._call("cancel", run_id, [CANCEL_CHUNK])
        return bool(first != -1)  # later on, somebody else may have been quicker

    async def _sound(self, run_id: str, records: Iterable[tuple[int, str | None]]) -> list[Job]:
        """The jobs that can be carried out; those whose record is damaged end here."""
        jobs, damaged = [], []
        for number, text in records:
            try:
                jobs.append(Job.parse(run_id, number, text))
            except DamagedRecordError:
                damaged.append(number)
        if damaged:
            await self._call("write_off", run_id, damaged)
        return jobs

    # Reading

    async def now_ms(self) -> int:
        """The server's clock, by which every time in the ledger goes: ms since the epoch."""
        seconds, micros = await self._redis.time()
        return int(seconds) * 1000 + int(micros) // 1000

    async def run(self, run_id: str) -> Run:
        """One run with its counts.

        Raises:
            RunNotFoundError: it is not there, or a newer version's or damaged (SchemaError).
        """
        fields = await cast("Awaitable[dict[str, str]]", self._redis.hgetall(keys.run(run_id)))
        if "state" not in fields:
            raise RunNotFoundError(run_id)
        return Run.parse(run_id, fields)

    async def cancelled(self, run_ids: Sequence[str]) -> set[str]:
        """Those of some runs that are cancelled, or are not there any more."""
        async with self._redis.pipeline(transaction=False) as pipe:
            for run_id in run_ids:
                pipe.hmget(keys.run(run_id), "state", "cancelled_ms")
            found = await pipe.execute()
        return {
            run_id
            for run_id, (state, cancelled_ms) in zip(run_ids, found, strict=True)
            if state is None or cancelled_ms is not None
        }

    async def runs(
        self,
        *,
        limit: int = 50,
        offset: int = 0,
        unread: Callable[[SchemaError], None] | None = None,
    ) -> list[Run]:
        """The runs, newest first; those whose records have aged out are left out.

        Args:
            limit: how many at most.
            offset: how many to pass over.
            unread: is called for each that a newer version made or that is damaged, which is left
                out then.

        Raises:
            SchemaError: there is one of these, and `unread` is not given.
        """
        ids = await self._redis.zrevrange(keys.INDEX, offset, offset + limit - 1)
        records = await self._read_records(cast("list[str]", ids))
        found = []
        for run_id, fields in records.items():
            try:
                found.append(Run.parse(run_id, fields))
            except SchemaError as error:
                if unread is None:
                    raise
                unread(error)
        return found

    async def active(self, endpoint: str) -> list[Run]:
        """The runs against an endpoint that are not finished, oldest first.

        Those that have ended are taken off the list in passing; those of a newer version, and
        damaged ones, stay on it and are left alone.
        """
        members = cast("Awaitable[set[str]]", self._redis.smembers(keys.active(endpoint)))
        ids = sorted(await members)
        records = await self._read_records(ids)
        open_runs = []
        unread: dict[str, SchemaError] = {}
        for run_id, fields in records.items():
            try:
                run = Run.parse(run_id, fields)
            except SchemaError as error:
                unread[run_id] = error
            else:
                if not run.ended:
                    open_runs.append(run)
        self._tell(endpoint, unread)
        gone = set(ids) - {run.run_id for run in open_runs} - unread.keys()
        if gone:
            gone -= await self._being_made(gone - records.keys())
        if gone:
            await self._redis.srem(keys.active(endpoint), *gone)
        return open_runs

    async def _being_made(self, ids: set[str]) -> set[str]:
        """Of runs that the indexes name and that are not there: those that may yet come."""
        seconds, _ = await self._redis.time()
        recent = await self._redis.zrangebyscore(keys.INDEX, (seconds - HALF_MADE_S) * 1000, "+inf")
        return ids & set(recent)

    def _tell(self, endpoint: str, unread: Mapping[str, SchemaError]) -> None:
        """Log each run that is left alone, once."""
        for run_id in sorted(unread.keys() - self._unread.get(endpoint, set())):
            log.error("run_left_alone", run_id=run_id, reason=str(unread[run_id]))
        self._unread[endpoint] = set(unread)

    async def _read_records(self, ids: Sequence[str]) -> dict[str, dict[str, str]]:
        """The hashes of those of some runs that are there."""
        async with self._redis.pipeline(transaction=False) as pipe:
            for run_id in ids:
                pipe.hgetall(keys.run(run_id))
            found = await pipe.execute()
        return {
            run_id: fields for run_id, fields in zip(ids, found, strict=True) if "state" in fields
        }

    async def jobs(
        self, run_id: str, *, outcome: JobState | None = None, offset: int = 0, limit: int = PAGE
    ) -> list[Job]:
        """A page of a run's jobs.

        Args:
            run_id: the run.
            outcome: only jobs in this state, final ones in the order in which they ended, others
                by when they are due; None: all, by number.
            offset: how many to pass over.
            limit: how many at most.

        Returns:
            The jobs. One whose record is missing or damaged says so in its reason, and without a
            state to be read it counts as failed.
        """
        if outcome is None:
            numbers: Sequence[int | str] = range(offset, offset + limit)
        else:
            numbers = await self._in_state(run_id, outcome, offset, limit)
        if not numbers:
            return []
        texts = await cast(
            "Awaitable[list[str | None]]",
            self._redis.hmget(keys.jobs(run_id), [str(n) for n in numbers]),
        )
        total = None
        if outcome is None and None in texts:
            found = self._redis.hget(keys.run(run_id), "total")
            total = int(await cast("Awaitable[str | None]", found) or 0)
        jobs = []
        for number, text in zip(numbers, texts, strict=True):
            if text is None and total is not None and int(number) >= total:
                continue  # the run has no more
            try:
                jobs.append(Job.parse(run_id, int(number), text))
            except DamagedRecordError as error:
                state = outcome or JobState.FAILED
                jobs.append(Job.damaged(run_id, int(number), state, error))
        return jobs

    async def accepted(self, run_id: str, *, offset: int = 0) -> list[tuple[Job, int]]:
        """Jobs that await verification, each with the ms when the cloud accepted it.

        A job whose record is damaged can no longer be verified: it ends here.

        Returns:
            Up to a page, those first that have waited longest.
        """
        accepted = keys.accepted(run_id)
        entries = cast(
            "list[tuple[str, float]]",
            await self._redis.zrange(accepted, offset, offset + PAGE - 1, withscores=True),
        )
        if not entries:
            return []
        texts = await cast(
            "Awaitable[list[str | None]]",
            self._redis.hmget(keys.jobs(run_id), [number for number, _ in entries]),
        )
        since_ms = {int(number): int(score) for number, score in entries}
        jobs = await self._sound(run_id, zip(since_ms, texts, strict=True))
        return [(job, since_ms[job.number]) for job in jobs]

    async def _in_state(
        self, run_id: str, state: JobState, offset: int, limit: int
    ) -> Sequence[str]:
        end = offset + limit - 1
        if state is JobState.LEASED:
            return cast("list[str]", await self._redis.zrange(keys.leased(run_id), offset, end))
        if state is JobState.PENDING:
            sent = cast("list[str]", await self._redis.zrange(keys.sent(run_id), offset, end))
            before = await self._redis.zcard(keys.sent(run_id))
            start, stop = max(0, offset - before), end - before
            if stop < 0:
                return sent
            return [*sent, *await self._redis.zrange(keys.waiting(run_id), start, stop)]
        if state is JobState.ACCEPTED:
            unverified = await self._redis.zrange(keys.accepted(run_id), offset, end)
            if unverified:
                return cast("list[str]", unverified)
        ended = self._redis.lrange(keys.outcome(run_id, state), offset, end)
        return await cast("Awaitable[list[str]]", ended)

    async def kept(self, run_id: str, *, offset: int = 0, limit: int = PAGE) -> list[Kept]:
        """A page of the pools that the run's plan keeps."""
        texts = self._redis.lrange(keys.kept(run_id), offset, offset + limit - 1)
        return [Kept.parse(text) for text in await cast("Awaitable[list[str]]", texts)]

    async def all_kept(self, run_id: str) -> AsyncIterator[Kept]:
        """Every pool that the run's plan keeps, read page by page."""
        offset = 0
        while page := await self.kept(run_id, offset=offset):
            for pool in page:
                yield pool
            offset += PAGE

    async def all_jobs(self, run_id: str, *, outcome: JobState | None = None) -> AsyncIterator[Job]:
        """Every job of a run, or every one in a state, read page by page."""
        offset = 0
        total = (await self.run(run_id)).total
        while page := await self.jobs(run_id, outcome=outcome, offset=offset):
            for job in page:
                yield job
            offset += PAGE
            if outcome is None and offset >= total:
                return
