"""The schema of the ledger: which form its records have, and which forms this version knows.

Versions meet in one Redis: during an upgrade old and new processes run side by side, and after a
rollback an old one finds what a newer has left. So a look at the start would prove nothing. Each
run bears the schema that it was made with, to its end; whatever reads or changes it checks that in
the same step, and leaves it alone if it is a newer one's. What is not of one run (marks, vetoes,
nights) has the schema of the whole Redis, which is checked before a run is opened: nothing is
deleted without one.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final, cast

from worker.ledger import keys

if TYPE_CHECKING:
    from redis.asyncio import Redis

SCHEMA: Final = 1
"""The newest schema that this version knows, and the one that it writes. It knows all older ones.

To be raised by whatever an older version would misread: another form of a record, another state,
another meaning of a field. A field more, which may be ignored, needs no other schema.
"""
FIELD: Final = "schema"
"""The field of a run's hash. A run without it was made before there were schemas: it has 1."""
REPLY: Final = "SCHEMA"
"""How a script's refusal begins; behind it stands the schema that it found."""


class RunNotFoundError(LookupError):
    """There is no such run, or its records have aged out, or Redis lost them."""

    def __init__(self, run_id: str) -> None:
        super().__init__(
            f"Run {run_id!r} is not in the ledger: mistyped, past its retention, or lost by Redis."
        )


class SchemaError(RunNotFoundError):
    """A newer version wrote it, or it is damaged. It is left alone, as if it were not there."""

    def __init__(self, what: str, found: str) -> None:
        LookupError.__init__(
            self,
            f"{what} was written by a newer poolsweep (schema {found}, this one knows up to "
            f"{SCHEMA}): upgrade this process.",
        )

    @classmethod
    def of_run(cls, run_id: str, found: str) -> SchemaError:
        """A run is a newer version's."""
        return cls(f"Run {run_id!r}", found)


class DamagedRunError(SchemaError):
    """A run has a form that no version writes."""

    def __init__(self, run_id: str, why: Exception) -> None:
        LookupError.__init__(
            self, f"Run {run_id!r} cannot be read, its record is damaged: {why!r:.200}."
        )


def is_newer(found: str) -> bool:
    """Whether this version does not know a schema, as a record has it: pure."""
    return not (found.isdecimal() and int(found) <= SCHEMA)


async def check(redis: Redis) -> None:
    """See that no newer version decides what is deleted here.

    Args:
        redis: a connection that decodes responses.

    Raises:
        SchemaError: one does. What it notes may not be understood, so nothing is to be decided by
            this version.
    """
    refuse_newer(cast("str | None", await redis.get(keys.SCHEMA)))


def refuse_newer(noted: str | None) -> None:
    """See that the schema noted for the whole Redis is one that this version knows: pure.

    Raises:
        SchemaError: it is not.
    """
    if noted is not None and is_newer(noted):
        raise SchemaError("The ledger", noted)
