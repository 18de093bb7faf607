"""The hours an owner lends his machine: over midnight, on days, on the two odd nights of a year."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from zoneinfo import ZoneInfo

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ngpu_node.schedule import Span, is_open

BERLIN = ZoneInfo("Europe/Berlin")


def at(text: str) -> datetime:
    return datetime.fromisoformat(text)


def minutes_open(spans: list[Span], begin: datetime, hours: int) -> int:
    """Count the minutes that really pass while it is open, from *begin* (UTC)."""
    times = (begin + timedelta(minutes=minute) for minute in range(hours * 60))
    return sum(is_open(spans, time.astimezone(BERLIN)) for time in times)


@pytest.mark.parametrize(
    ("text", "inside", "outside"),
    [
        ("09:00-17:00", ["2026-11-26 09:00", "2026-11-26 16:59"], ["2026-11-26 08:59", "2026-11-26 17:00"]),
        (
            "22:00-08:00",
            ["2026-11-26 22:00", "2026-11-27 00:00", "2026-11-27 07:59"],
            ["2026-11-26 21:59", "2026-11-26 08:00"],
        ),
        ("00:00-24:00", ["2026-11-26 00:00", "2026-11-26 23:59"], []),
        ("sat,sun 00:00-24:00", ["2026-11-28 00:00", "2026-11-29 23:59"], ["2026-11-27 23:59", "2026-11-30 00:00"]),
        # the night from Friday to Saturday belongs to Friday
        ("mon-fri 22:00-06:00", ["2026-11-28 05:59", "2026-11-27 22:00"], ["2026-11-28 22:00", "2026-11-30 05:00"]),
        ("fri-mon 12:00-13:00", ["2026-11-27 12:30", "2026-11-30 12:30"], ["2026-12-01 12:30", "2026-11-26 12:30"]),
    ],
)
def test_spans_hold_the_clock_on_the_wall(text: str, inside: list[str], outside: list[str]) -> None:
    span = Span.parse(text)
    assert [time for time in inside if not span.holds(at(time))] == []
    assert [time for time in outside if span.holds(at(time))] == []


def test_without_spans_it_is_always_open_and_several_add_up() -> None:
    assert is_open([], at("2026-11-26 12:00"))
    spans = [Span.parse("08:00-09:00"), Span.parse("20:00-21:00")]
    assert [is_open(spans, at(f"2026-11-26 {hour}:30")) for hour in ("08", "12", "20")] == [True, False, True]


def test_a_night_with_a_change_of_time_is_shorter_or_longer() -> None:
    night = [Span.parse("22:00-08:00")]
    usual = datetime(2026, 6, 10, 12, tzinfo=UTC)
    assert minutes_open(night, usual, 24) == 10 * 60
    assert minutes_open(night, datetime(2026, 3, 28, 12, tzinfo=UTC), 24) == 9 * 60  # 02:00 is 03:00
    assert minutes_open(night, datetime(2026, 10, 24, 12, tzinfo=UTC), 24) == 11 * 60  # 02:00 to 03:00 comes twice


def test_a_span_in_the_skipped_hour_does_not_happen_and_one_in_the_doubled_hour_does_twice() -> None:
    odd = [Span.parse("02:15-02:45")]
    assert minutes_open(odd, datetime(2026, 3, 28, 12, tzinfo=UTC), 24) == 0
    assert minutes_open(odd, datetime(2026, 10, 24, 12, tzinfo=UTC), 24) == 60


@pytest.mark.parametrize(
    "text", ["", "22:00", "22:00-22:00", "24:00-01:00", "25:00-26:00", "10:60-11:00", "someday 10:00-11:00", "10-11"]
)
def test_what_is_no_span_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match=r"span of time|no time|write days"):
        Span.parse(text)


@given(st.integers(0, 1439), st.integers(1, 1440), st.integers(0, 7 * 1440 - 1))
def test_a_span_and_its_complement_never_hold_the_same_minute(start: int, end: int, minute: int) -> None:
    if start in (end, end % 1440):
        return

    def clock(m: int) -> str:
        return f"{m // 60:02}:{m % 60:02}"

    span, rest = Span.parse(f"{clock(start)}-{clock(end)}"), Span.parse(f"{clock(end % 1440)}-{clock(start or 1440)}")
    time = at("2026-11-23 00:00") + timedelta(minutes=minute)
    assert span.holds(time) != rest.holds(time)
