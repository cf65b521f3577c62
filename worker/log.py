"""Logs through structlog: ours, and those of the libraries that use the standard logging."""

from __future__ import annotations

import json
import logging
import sys
from typing import TYPE_CHECKING, Any, TextIO
from urllib.parse import parse_qs, quote, unquote, urlsplit

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
    shared: list[Processor] = [
        structlog.contextvars.merge_contextvars,
        structlog.stdlib.add_log_level,
        structlog.stdlib.add_logger_name,
        structlog.processors.TimeStamper(fmt="iso", utc=True),
    ]
    render: list[Processor] = [
        *(
            [structlog.processors.format_exc_info, structlog.processors.JSONRenderer()]
            if is_json(settings, stream)
            # Its default shows the values of local variables: secrets, wrapped past all masking.
            else [structlog.dev.ConsoleRenderer(exception_formatter=structlog.dev.plain_traceback)]
        ),
        _masking(settings),
    ]
    handler = logging.StreamHandler(stream)
    handler.setFormatter(
        structlog.stdlib.ProcessorFormatter(
            foreign_pre_chain=shared,
            processors=[structlog.stdlib.ProcessorFormatter.remove_processors_meta, *render],
        )
    )
    logging.basicConfig(handlers=[handler], level=settings.log_level.upper(), force=True)
    logging.captureWarnings(True)
    # Ours go past the standard logging, which costs several times as much: a worker writes a line
    # for every pool.
    structlog.configure(
        processors=[*shared, *render],
        logger_factory=_Lines(stream),
        wrapper_class=structlog.make_filtering_bound_logger(settings.log_level),
        cache_logger_on_first_use=True,
    )


class _Lines:
    """Makes loggers that write to a stream, each under the name of its module."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def __call__(self, name: str = "", *_: Any) -> _Lines.Logger:
        return self.Logger(self._stream, name)

    class Logger(structlog.WriteLogger):
        """A logger that knows its name."""

        def __init__(self, stream: TextIO, name: str) -> None:
            super().__init__(stream)
            self.name = name


def is_json(settings: Settings, stream: TextIO) -> bool:
    """Whether logs are JSON lines: if that is set, or if nobody reads the stream on a terminal."""
    return settings.log_format == "json" or (settings.log_format == "auto" and not stream.isatty())


def _spellings(secret: str) -> set[str]:
    """How a secret may stand in a line: as it is, in JSON, in a URL, and in what repr makes."""
    return {
        secret,
        json.dumps(secret)[1:-1],
        json.dumps(repr(secret)[1:-1])[1:-1],
        repr(secret)[1:-1],
        quote(secret, safe=""),
    }


def _secrets(settings: Settings) -> set[str]:
    values = {name: getattr(settings, name) for name in type(settings).model_fields}
    found = {
        value.get_secret_value()
        for name, value in values.items()
        if isinstance(value, SecretStr) and name != "redis_url"
    }
    # Of a Redis URL only the password is secret; it may be spelt as in the URL.
    parts = urlsplit(settings.redis_location)
    password = parts.password or ""
    return found | {password, unquote(password), *parse_qs(parts.query).get("password", [])}


def _masking(settings: Settings) -> Callable[[Any, str, Any], str]:
    """Masks the secrets in a rendered line, so that none slips through in an exception's text."""
    spellings = {
        text
        for secret in _secrets(settings)
        if len(secret) >= _SHORTEST_SECRET
        for text in _spellings(secret)
    }
    # A secret that contains another goes first.
    secrets = sorted(spellings, key=len, reverse=True)

    def mask(_logger: Any, _method: str, rendered: Any) -> str:
        line = str(rendered)
        for secret in secrets:
            line = line.replace(secret, MASK)
        return line

    return mask
