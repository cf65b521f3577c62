"""Logs through structlog: ours, and those of the libraries that use the standard logging."""

from __future__ import annotations

import logging
import sys
from typing import TYPE_CHECKING, Any, TextIO

import structlog
from pydantic import SecretStr

if TYPE_CHECKING:
    from collections.abc import Callable

    from structlog.typing import Processor

    from worker.settings import Settings

MASK = "**********"
_SHORTEST_SECRET = 4  # masking shorter texts would garble ordinary words


def configure(settings: Settings, stream: TextIO | None = None) -> None:
    """Send every log of this process to one stream: JSON lines, or colours on a terminal.

    Args:
        settings: level, format, and the secrets that are masked wherever they turn up.
        stream: where to; stderr by default.
    """
    stream = stream or sys.stderr
    as_json = settings.log_format == "json" or (
        settings.log_format == "auto" and not stream.isatty()
    )
    shared: list[Processor] = [
        structlog.contextvars.merge_contextvars,
        structlog.stdlib.add_log_level,
        structlog.stdlib.add_logger_name,
        structlog.processors.TimeStamper(fmt="iso", utc=True),
        structlog.stdlib.PositionalArgumentsFormatter(),
    ]
    render: list[Processor] = (
        [structlog.processors.format_exc_info, structlog.processors.JSONRenderer()]
        if as_json
        else [structlog.dev.ConsoleRenderer()]
    )
    handler = logging.StreamHandler(stream)
    handler.setFormatter(
        structlog.stdlib.ProcessorFormatter(
            foreign_pre_chain=shared,
            processors=[
                structlog.stdlib.ProcessorFormatter.remove_processors_meta,
                *render,
                _masking(settings),
            ],
        )
    )
    logging.basicConfig(handlers=[handler], level=settings.log_level.upper(), force=True)
    logging.captureWarnings(True)
    structlog.configure(
        processors=[
            structlog.stdlib.filter_by_level,
            *shared,
            structlog.stdlib.ProcessorFormatter.wrap_for_formatter,
        ],
        logger_factory=structlog.stdlib.LoggerFactory(),
        wrapper_class=structlog.stdlib.BoundLogger,
        cache_logger_on_first_use=True,
    )


def _masking(settings: Settings) -> Callable[[Any, str, Any], str]:
    """Masks the secrets in a rendered line, so that none slips through in an exception's text."""
    values = (getattr(settings, name) for name in type(settings).model_fields)
    secrets = [
        text
        for value in values
        if isinstance(value, SecretStr)
        and len(text := value.get_secret_value()) >= _SHORTEST_SECRET
    ]

    def mask(_logger: Any, _method: str, rendered: Any) -> str:
        line = str(rendered)
        for secret in secrets:
            line = line.replace(secret, MASK)
        return line

    return mask
