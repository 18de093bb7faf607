"""What a client may ask of a task beside the call itself, in fields of its own that no workspace sees.

    Ngpu-Priority   0 to 9, higher first among the waiting tasks of its workspace; 0 without it
    Ngpu-Timeout    seconds the task may wait and run altogether, at most what the operator allows
    Ngpu-Webhook    URL that is told of the end of an asynchronous task

Pure.
"""

from __future__ import annotations

import math
from collections.abc import Callable

from ngpu_bootstrap.errors import BadRequest
from ngpu_protocol.frozen import dataclass
from ngpu_protocol.http1 import Headers

PRIORITY_MAX = 9
MAX_URL_CHARS = 2048

_PREFIX = b"ngpu-"


@dataclass(frozen=True, slots=True)
class TaskOptions:
    """What was asked for; *timeout_s* None leaves the limit that holds anyway."""

    priority: int = 0
    timeout_s: float | None = None
    webhook: str = ""


NONE = TaskOptions()


def task_options(headers: Headers, check_webhook: Callable[[str], str]) -> TaskOptions:
    """Return the options among *headers*.

    Args:
        check_webhook: returns what is wrong with a URL to call back, empty when nothing is.

    Raises:
        BadRequest: one of them cannot be understood, or is given twice.
    """
    given: dict[bytes, str] = {}
    for name, value in headers:
        if name.startswith(_PREFIX) and name in (b"ngpu-priority", b"ngpu-timeout", b"ngpu-webhook"):
            if name in given:
                raise BadRequest("duplicate_header", f"{name.decode().title()} is given twice; send it once")
            given[name] = value.decode("latin-1").strip()
    if not given:
        return NONE
    return TaskOptions(
        priority=_priority(given.get(b"ngpu-priority")),
        timeout_s=_timeout_s(given.get(b"ngpu-timeout")),
        webhook=_webhook(given.get(b"ngpu-webhook"), check_webhook),
    )


def _priority(text: str | None) -> int:
    if text is None:
        return 0
    if len(text) != 1 or not (text.isascii() and text.isdigit()):
        raise BadRequest("bad_priority", f"Ngpu-Priority must be a digit from 0 to {PRIORITY_MAX}")
    return int(text)


def _timeout_s(text: str | None) -> float | None:
    if text is None:
        return None
    try:
        seconds = float(text) if len(text) <= 16 and text.isascii() else math.nan
    except ValueError:
        seconds = math.nan
    if not (math.isfinite(seconds) and seconds > 0):
        raise BadRequest("bad_timeout", "Ngpu-Timeout must be a number of seconds above 0")
    return seconds


def _webhook(text: str | None, check: Callable[[str], str]) -> str:
    if text is None:
        return ""
    problem = check(text) if len(text) <= MAX_URL_CHARS else f"it has more than {MAX_URL_CHARS} characters"
    if problem:
        raise BadRequest("bad_webhook", f"Ngpu-Webhook cannot be called: {problem}")
    return text
