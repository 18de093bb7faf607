"""Task ids: ``YYYYMMDD_HH_MM_SS_<20 digits>``, the documented shape with digits no one can guess.

Clients poll by task id without a credential, so the id is itself the secret: its 20 digits hold 66 bits and must come
from a cryptographic source. The date is for people and sorting only, in the zone the gateway shows its times in.
"""

from __future__ import annotations

import re
from datetime import UTC, datetime, timedelta

RANDOM_DIGITS = 20
RANDOM_LIMIT = 10**RANDOM_DIGITS
"""Random numbers for an id are drawn from 0 to below this."""

_TASK_ID = re.compile(r"[0-9]{8}_[0-9]{2}_[0-9]{2}_[0-9]{2}_[0-9]{20}")
_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)


def format_task_id(now_ms: int, zone_offset_minutes: int, random_digits: int) -> str:
    """Return a task id.

    Args:
        now_ms: UTC milliseconds.
        zone_offset_minutes: of the zone the date is written in; 480 is UTC+8.
        random_digits: a cryptographically random number from 0 to below `RANDOM_LIMIT`.

    Raises:
        ValueError: if *random_digits* is outside its range.
    """
    if not 0 <= random_digits < RANDOM_LIMIT:
        raise ValueError("random_digits must have at most 20 digits")
    local = _EPOCH + timedelta(milliseconds=now_ms, minutes=zone_offset_minutes)
    return f"{local:%Y%m%d_%H_%M_%S}_{random_digits:020d}"


def is_task_id(text: str) -> bool:
    """Return whether *text* has the shape of a task id; wildcards, other scripts' digits and long texts have not."""
    return _TASK_ID.fullmatch(text) is not None
