"""How commands end: the exit codes, in this one place. Pure."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from worker.ledger import Run

EXIT_DONE = 0
"""All that was asked for is done; of a run: every pool is gone."""
EXIT_FAILURES = 1
"""Some jobs failed."""
EXIT_USAGE = 2
"""The request or the configuration cannot be used."""
EXIT_HELD = 3
"""Pools were kept: by a brake, a cancellation or what protects them, by a dry run, or for want of
a yes."""
EXIT_UNREACHABLE = 4
"""Redis or the cloud cannot be reached."""
EXIT_INTERRUPTED = 130
EXIT_PIPE = 141
"""The reader of the output has gone, as a shell reports it of other programs."""


def exit_code(run: Run, *, refused: bool = False) -> int:
    """What a command says by its exit code about a run that has ended.

    Args:
        run: the run.
        refused: whether pools that somebody named were kept by its plan.
    """
    from worker.ledger import JobState, RunState  # not loaded for the codes alone

    # A brake that stopped a run is told before the failures that it stopped it for.
    if run.state in {RunState.BRAKED, RunState.PLANNED} or run.braked_ms:
        return EXIT_HELD
    if run.counts[JobState.FAILED]:
        return EXIT_FAILURES
    if run.state is RunState.ABORTED or run.counts[JobState.CANCELLED] or refused:
        return EXIT_HELD
    # A policy decides anew the next night; what somebody asked for by hand was not done.
    if run.counts[JobState.SKIPPED] and not run.policy:
        return EXIT_HELD
    return EXIT_DONE
