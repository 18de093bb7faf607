"""When an owner lends his machine: spans of local time such as `22:00-08:00` or `sat,sun 00:00-24:00`. Pure.

A span that ends before it begins goes on into the next day, and belongs to the day it begins on. What counts is the
clock on the wall: on a night with a change of time a span is an hour shorter or longer, and one that lies wholly in
the hour that is skipped does not happen. No spans at all means always.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime

DAYS = ("mon", "tue", "wed", "thu", "fri", "sat", "sun")
_SPAN = re.compile(r"(?:(?P<days>[a-z,-]+) +)?(?P<from>\d\d?:\d\d) ?- ?(?P<to>\d\d?:\d\d)")
_DAY_MINUTES = 24 * 60


@dataclass(frozen=True, slots=True)
class Span:
    """One span, in minutes of the day; *days* are those it begins on, 0 for Monday."""

    days: frozenset[int]
    from_minute: int
    to_minute: int

    @classmethod
    def parse(cls, text: str) -> Span:
        """Return the span *text* says.

        Raises:
            ValueError: it says none; the message has an example.
        """
        match = _SPAN.fullmatch(text.strip().lower())
        if match is None:
            raise ValueError(f"{text!r} is not a span of time such as 22:00-08:00 or sat,sun 00:00-24:00")
        from_minute, to_minute = _minute(match["from"], text), _minute(match["to"], text)
        if from_minute in (to_minute, _DAY_MINUTES):
            raise ValueError(f"{text!r} is no time at all; 00:00-24:00 is the whole day")
        return cls(_days(match["days"], text), from_minute, to_minute)

    def holds(self, local: datetime) -> bool:
        """Tell whether *local*, by the clock on the wall, is in it."""
        minute, day = local.hour * 60 + local.minute, local.weekday()
        if self.from_minute < self.to_minute:
            return day in self.days and self.from_minute <= minute < self.to_minute
        return (day in self.days and minute >= self.from_minute) or (
            (day - 1) % 7 in self.days and minute < self.to_minute
        )


def is_open(spans: Sequence[Span], local: datetime) -> bool:
    """Tell whether any of *spans* holds *local*; without spans it always is."""
    return not spans or any(span.holds(local) for span in spans)


def _minute(text: str, whole: str) -> int:
    hour, _, minute = text.partition(":")
    found = int(hour) * 60 + int(minute)
    if found > _DAY_MINUTES or int(minute) > 59:
        raise ValueError(f"{whole!r}: {text} is no time of day")
    return found


def _days(text: str | None, whole: str) -> frozenset[int]:
    if text is None:
        return frozenset(range(7))
    found: set[int] = set()
    for part in text.split(","):
        first, _, last = part.partition("-")
        if first not in DAYS or (last and last not in DAYS):
            raise ValueError(f"{whole!r}: write days as mon, tue, wed, thu, fri, sat, sun, or mon-fri")
        day, end = DAYS.index(first), DAYS.index(last or first)
        while day != end:
            found.add(day)
            day = (day + 1) % 7
        found.add(end)
    return frozenset(found)
