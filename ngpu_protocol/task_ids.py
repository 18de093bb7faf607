"""Task ids: ``YYYYMMDD_HH_MM_SS_<20 digits>``, the documented shape with digits no one can guess.

Clients poll by task id without a credential, so the id is itself the secret: its 20 digits hold 66 bits and must come
from a cryptographic source. The date is for people and sorting only, in the zone the gateway shows its times in.
"""

from __future__ import annotations

import re
from datetime import UTC, datetime, timedelta
from functools import lru_cache

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
    return f"{_date_part(now_ms // 1000, zone_offset_minutes)}_{random_digits:020d}"


@lru_cache(maxsize=8)
def _date_part(now_s: int, zone_offset_minutes: int) -> str:
    # once a second: it costs 3 of the 4 us that an id would take
    return f"{_EPOCH + timedelta(seconds=now_s, minutes=zone_offset_minutes):%Y%m%d_%H_%M_%S}"


def is_task_id(text: str) -> bool:
    """Return whether *text* has the shape of a task id; wildcards, other scripts' digits and long texts have not."""
    return _TASK_ID.fullmatch(text) is not None
