"""Structured events: JSON lines under systemd or in a pipe, readable on a terminal, secrets taken out of both.

Code logs an event and fields with `structlog.get_logger(__name__)`; this module decides once, at start, how they look.
Everything goes to stderr, so that stdout stays a command's own. The redaction here is the second line of defence:
the first is to log no key, token or body in the first place.
"""

from __future__ import annotations

import io
import json
import logging
import os
import re
import sys
import time
from collections.abc import Mapping
from datetime import UTC, datetime
from functools import lru_cache
from typing import Any, Literal, TextIO, cast

import structlog
from structlog.typing import EventDict, Processor, WrappedLogger

REDACTED = "[redacted]"
LogFormat = Literal["auto", "json", "console"]

_SECRET_NAMES = re.compile(
    r"(^|_)(authorization|cookie|passphrase|password|passwd|private_?key|key_?bytes|secret|token|credential|api_?key)s?$"
)
_SECRET_TEXT = re.compile(
    r"""
    (?i:\bbearer\s+|\bbasic\s+)[A-Za-z0-9+/._~=-]+   # an Authorization header
    | (?:\bngpu_|\b)\d{1,20}-(?![0-9a-fA-F]{4}-)[A-Za-z0-9_~-]{16,}   # a workspace token <id>-<secret>, but no UUID
    | (?<=://)[^/\s:@]+:[^/\s@]+(?=@)                  # user:password@ in a URL
    """,
    re.VERBOSE,
)
# Every alternative above holds one of these characters: most texts are cleared by one short look.
_MAY_BE_SECRET = re.compile(r"[\s@-]")
# Control characters but tab and line feed, and the marks that turn the direction of writing.
_UNSEEN = re.compile("[\\x00-\\x08\\x0b-\\x1f\\x7f-\\x9f\\u2028-\\u202e\\u2066-\\u2069]")
_PLAIN = frozenset({str, int, bool, float, type(None)})
_MAX_DEPTH = 4


def configure_logging(level: str = "info", log_format: LogFormat = "auto", *, stream: TextIO | None = None) -> None:
    """Set up structlog and the standard library's logging for this process.

    Args:
        level: the lowest level shown: debug, info, warning or error.
        log_format: `auto` is readable on a terminal and JSON anywhere else, under systemd above all.
        stream: where lines go; stderr when None.
    """
    out = stream if stream is not None else cast(TextIO, _StandardError())
    as_json = log_format == "json" or (log_format == "auto" and not _is_for_people(out))
    number = logging.getLevelNamesMapping()[level.upper()]
    time_format = "iso" if as_json else "%H:%M:%S"
    shared: list[Processor] = [
        structlog.processors.add_log_level,
        structlog.processors.TimeStamper(time_format, utc=as_json),
    ]
    # tracebacks without local variables: a frame's locals hold keys and tokens
    ending: list[Processor]
    if as_json:
        render = structlog.processors.JSONRenderer(default=str)
        ending = [structlog.processors.format_exc_info, redact, _head_first, render]
    else:
        console = structlog.dev.ConsoleRenderer(
            colors=out.isatty(), exception_formatter=structlog.dev.plain_traceback, sort_keys=False
        )
        ending = [structlog.processors.format_exc_info, redact, _visible, console]
    structlog.configure(
        processors=[_JsonLine()] if as_json else [*shared, *ending],
        wrapper_class=structlog.make_filtering_bound_logger(number),
        logger_factory=structlog.WriteLoggerFactory(file=out),
        cache_logger_on_first_use=True,
    )
    handler = logging.StreamHandler(out)
    handler.setFormatter(
        structlog.stdlib.ProcessorFormatter(
            foreign_pre_chain=[*shared, structlog.stdlib.add_logger_name],
            processors=[structlog.stdlib.ProcessorFormatter.remove_processors_meta, *ending],
        )
    )
    logging.basicConfig(handlers=[handler], level=max(number, logging.WARNING), force=True)
    _quiet_libp2p()


class _StandardError(io.TextIOBase):
    """Whatever `sys.stderr` is when a line is written: loggers are kept for ever, and tests put others in its place."""

    def write(self, text: str, /) -> int:
        return sys.stderr.write(text)

    def flush(self) -> None:
        sys.stderr.flush()

    def isatty(self) -> bool:
        return sys.stderr.isatty()


def _is_for_people(out: TextIO) -> bool:
    # systemd sets JOURNAL_STREAM for what it connects to the journal
    return out.isatty() and "JOURNAL_STREAM" not in os.environ


def _quiet_libp2p() -> None:
    """Show libp2p's own errors only: it warns about every RPC a peer gets wrong, and our events say what matters.

    Importing it clears its logger's handlers and stops propagation, after which Python's handler of last resort
    prints every warning raw; whichever comes first, the import or this, nothing goes there any more.
    `LIBP2P_DEBUG` keeps the meaning libp2p gives it.
    """
    if os.environ.get("LIBP2P_DEBUG"):
        return
    logging.lastResort = logging.NullHandler()
    library = logging.getLogger("libp2p")
    library.setLevel(logging.ERROR)
    # It calls each handshake an error that a peer breaks off, as whoever only tries whether we are there does.
    logging.getLogger("libp2p.network.swarm").setLevel(logging.CRITICAL)
    library.propagate = True


class _JsonLine:
    """What the JSON processors do in a row, in one step: each attempt logs a line, and the row costs three times this.

    The row remains for the standard library's events.
    """

    def __init__(self) -> None:
        self._encode = json.JSONEncoder(default=str).encode
        self._second = 0
        self._second_text = ""

    def __call__(self, logger: WrappedLogger, method: str, event: EventDict) -> str:
        event = structlog.processors.add_log_level(logger, method, event)
        if "exc_info" in event:
            event = structlog.processors.format_exc_info(logger, method, event)
        line: dict[str, Any] = {
            "timestamp": self._now(),
            "level": event["level"],
            "event": event["event"],
        }
        if _is_harmless(event):
            return self._encode({**line, **event})
        for key, value in event.items():
            line[key] = REDACTED if _is_secret(key, value) else _clean(value, 0)
        return self._encode(line)

    def _now(self) -> str:
        """Return the time in ISO 8601; what is the same for a second is formatted once in it."""
        second, microseconds = divmod(time.time_ns() // 1000, 1_000_000)
        if second != self._second:
            self._second_text = datetime.fromtimestamp(second, UTC).strftime("%Y-%m-%dT%H:%M:%S")
            self._second = second
        return f"{self._second_text}.{microseconds:06d}Z"


def _is_harmless(event: EventDict) -> bool:
    """Return whether *event* is plain values under plain names; its texts are cleared by one look at all of them."""
    if not _names_no_secret(tuple(event)) or not _PLAIN.issuperset(map(type, event.values())):
        return False
    texts = [value for value in event.values() if type(value) is str]
    return _MAY_BE_SECRET.search("".join(texts)) is None


def redact(logger: WrappedLogger, method: str, event: EventDict) -> EventDict:
    """Replace the values of fields whose name says secret, and what looks like a credential in any text."""
    return {key: REDACTED if _is_secret(key, value) else _clean(value, 0) for key, value in event.items()}


def _visible(logger: WrappedLogger, method: str, event: EventDict) -> EventDict:
    """Escape what a terminal would obey and a reader not see, in texts that peers and clients may have chosen.

    JSON escapes them by itself. Line ends stay in tracebacks alone; those in fields the renderer escapes.
    """
    for key, value in event.items():
        if isinstance(value, str) and _UNSEEN.search(value):
            event[key] = _UNSEEN.sub(lambda found: ascii(found[0])[1:-1], value)
    event["event"] = str(event["event"]).replace("\n", "\\n")
    return event


def _head_first(logger: WrappedLogger, method: str, event: EventDict) -> EventDict:
    """Order a JSON line as it is read: when, how bad, what; then the fields."""
    return {key: event.pop(key) for key in ("timestamp", "level", "event") if key in event} | dict(event)


def redact_text(text: str) -> str:
    """Return *text* with everything that looks like a credential replaced."""
    return text if _MAY_BE_SECRET.search(text) is None else _SECRET_TEXT.sub(REDACTED, text)


def _is_secret(key: str, value: Any) -> bool:
    return value is not None and _is_secret_name(key)


@lru_cache(maxsize=1024)
def _names_no_secret(keys: tuple[str, ...]) -> bool:
    return not any(map(_is_secret_name, keys))


@lru_cache(maxsize=1024)
def _is_secret_name(key: str) -> bool:
    return _SECRET_NAMES.search(key.lower().replace("-", "_")) is not None


def _clean(value: Any, depth: int) -> Any:
    if isinstance(value, str):
        return redact_text(value)
    if isinstance(value, bool | int | float) or value is None:
        return value
    if isinstance(value, bytes | bytearray | memoryview):
        return f"<{len(value)} bytes>"
    if depth >= _MAX_DEPTH:
        return "..."
    if isinstance(value, Mapping):
        return {
            str(key): REDACTED if _is_secret(str(key), item) else _clean(item, depth + 1) for key, item in value.items()
        }
    if isinstance(value, list | tuple | set | frozenset):
        return [_clean(item, depth + 1) for item in value]
    return redact_text(str(value))
