"""Times as the documents write them: in one zone of the gateway's, and ranges of days that include their last one.

Inside, times are UTC milliseconds. On `/user/...` they are `YYYY-MM-DD HH:MM:SS` in the zone `wire_timezone` (UTC+8
in the documents), and so is what a client writes without a zone of its own. Pure.
"""

from __future__ import annotations

import re
from datetime import UTC, datetime, timedelta, timezone

from ngpu_bootstrap.errors import BadRequest

DEFAULT_START = "1970-01-01"
DEFAULT_END = "2099-01-01"

_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
# A `+` that nobody percent-encoded arrives as a space: the zone is taken with either.
_TIME = re.compile(
    r"(?P<date>[0-9]{4}-[0-9]{2}-[0-9]{2})"
    r"(?:[T ](?P<time>[0-9]{2}:[0-9]{2}(?P<seconds>:[0-9]{2}(?P<fraction>\.[0-9]{1,6})?)?)"
    r"(?P<zone>Z|[+ -][0-9]{2}:?[0-9]{2})?)?"
)
_ZONE = re.compile(r"UTC(?:(?P<sign>[+-])(?P<hours>[0-9]{1,2})(?::(?P<minutes>[0-9]{2}))?)?")


def parse_zone(text: str) -> int:
    """Return the offset in minutes east of UTC of `UTC`, `UTC+8` or `UTC-03:30`.

    Raises:
        ValueError: not such a text, or no zone of this planet.
    """
    matched = _ZONE.fullmatch(text)
    if matched is None:
        raise ValueError(f"{text[:32]!r} is not UTC, UTC+8 or UTC-03:30")
    minutes = int(matched["hours"] or 0) * 60 + int(matched["minutes"] or 0)
    minutes = -minutes if matched["sign"] == "-" else minutes
    if not -720 <= minutes <= 840 or int(matched["minutes"] or 0) > 59:
        raise ValueError(f"{text[:32]!r} is no zone: offsets go from -12:00 to +14:00")
    return minutes


def show_time(at_ms: int | None, zone_minutes: int) -> str:
    """Return `YYYY-MM-DD HH:MM:SS` in the zone; empty for None."""
    if at_ms is None:
        return ""
    return f"{_EPOCH + timedelta(milliseconds=at_ms, minutes=zone_minutes):%Y-%m-%d %H:%M:%S}"


def parse_range(start: str | None, end: str | None, zone_minutes: int) -> tuple[int, int]:
    """Return the milliseconds a list begins with and those it ends before.

    A date as *end* includes its whole day, a date-time all of the second (or fraction) it names. Missing or empty
    texts mean the documents' defaults.

    Raises:
        BadRequest: `bad_time` names the parameter that is no time, `times_reversed` says that nothing can lie between.
    """
    since = _parse("startTime", start or DEFAULT_START, zone_minutes)
    until = _parse("endTime", end or DEFAULT_END, zone_minutes)
    if since[0] >= until[1]:
        raise BadRequest("times_reversed", "startTime is after endTime; exchange them")
    return since[0], until[1]


def _parse(name: str, text: str, zone_minutes: int) -> tuple[int, int]:
    """Return the first millisecond that *text* covers, and the first after it."""
    matched = _TIME.fullmatch(text) if len(text) <= 40 else None
    if matched is None:
        raise _bad(name)
    zone: timezone = timezone(timedelta(minutes=zone_minutes))
    try:
        if (written := matched["zone"]) == "Z":
            zone = UTC
        elif written is not None:
            hours, minutes = int(written[1:3]), int(written[-2:])
            if minutes > 59:
                raise ValueError
            offset = timedelta(hours=hours, minutes=minutes)
            zone = timezone(-offset if written[0] == "-" else offset)
        moment = datetime.fromisoformat(matched["date"]).replace(tzinfo=zone)
        if matched["time"] is None:
            covers = timedelta(days=1)
        else:
            clock = datetime.fromisoformat(f"2000-01-01 {matched['time']}")
            moment = moment.replace(
                hour=clock.hour, minute=clock.minute, second=clock.second, microsecond=clock.microsecond
            )
            covers = timedelta(milliseconds=1) if matched["fraction"] else timedelta(seconds=1)
            if matched["seconds"] is None:
                covers = timedelta(minutes=1)
        first_ms = (moment - _EPOCH) // timedelta(milliseconds=1)
    except (ValueError, OverflowError):
        raise _bad(name) from None
    return first_ms, first_ms + covers // timedelta(milliseconds=1)


def _bad(name: str) -> BadRequest:
    return BadRequest("bad_time", f"{name} is no date or date-time; write 2024-04-11 or 2024-04-11 13:36:11")
