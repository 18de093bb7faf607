"""Times as the documents write them, and the ranges they mean."""

from __future__ import annotations

from datetime import UTC, datetime

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ngpu_bootstrap.errors import BadRequest
from ngpu_bootstrap.front.wire_times import parse_range, parse_zone, show_time

UTC8 = 480
DAY_MS = 86_400_000


def ms(*parts: int) -> int:
    return int(datetime(*parts, tzinfo=UTC).timestamp() * 1000)  # type: ignore[misc,arg-type]


def test_dates_are_days_of_the_wire_zone_and_the_last_one_is_included() -> None:
    assert parse_range("2024-04-11", "2024-04-20", UTC8) == (ms(2024, 4, 10, 16), ms(2024, 4, 20, 16))


def test_the_same_day_twice_is_that_day() -> None:
    since, before = parse_range("2024-04-11", "2024-04-11", UTC8)
    assert before - since == DAY_MS


def test_what_is_missing_or_empty_is_the_documents_default() -> None:
    expected = (ms(1970, 1, 1) - 8 * 3_600_000, ms(2099, 1, 1, 16))
    assert parse_range(None, None, UTC8) == expected
    assert parse_range("", "", UTC8) == expected


@pytest.mark.parametrize(
    ("text", "first", "covers_ms"),
    [
        ("2024-04-11 13:36:11", ms(2024, 4, 11, 5, 36, 11), 1000),
        ("2024-04-11T13:36:11", ms(2024, 4, 11, 5, 36, 11), 1000),
        ("2024-04-11T13:36", ms(2024, 4, 11, 5, 36), 60_000),
        ("2024-04-11T13:36:11.250", ms(2024, 4, 11, 5, 36, 11) + 250, 1),
        ("2024-04-11T13:36:11Z", ms(2024, 4, 11, 13, 36, 11), 1000),
        ("2024-04-11T13:36:11+02:00", ms(2024, 4, 11, 11, 36, 11), 1000),
        ("2024-04-11T13:36:11 02:00", ms(2024, 4, 11, 11, 36, 11), 1000),  # a + nobody encoded
        ("2024-04-11T13:36:11-0330", ms(2024, 4, 11, 17, 6, 11), 1000),
    ],
)
def test_date_times_with_and_without_a_zone(text: str, first: int, covers_ms: int) -> None:
    assert parse_range(text, text, UTC8) == (first, first + covers_ms)


@pytest.mark.parametrize(
    "text",
    [
        "yesterday",
        "2024-13-01",
        "2024-02-30",
        "2024-04-11 25:00:00",
        "2024-04-11 13:36:11+99:00",
        "2024-04-11 13:36:11+02:70",
        "20240411",
        "2024-04-11' OR 1=1",
        "0000-01-01",
        "9" * 10_000,
        "\uff12024-04-11",
    ],
)
def test_what_is_no_time_is_refused_by_its_parameters_name(text: str) -> None:
    with pytest.raises(BadRequest) as refused:
        parse_range(None, text, UTC8)
    assert (refused.value.reason, "endTime" in refused.value.message) == ("bad_time", True)


def test_a_start_after_the_end_is_refused() -> None:
    with pytest.raises(BadRequest) as refused:
        parse_range("2024-04-12", "2024-04-11", UTC8)
    assert refused.value.reason == "times_reversed"


@given(st.text(max_size=60), st.text(max_size=60))
def test_any_text_is_a_range_or_a_refusal(start: str, end: str) -> None:
    try:
        since, before = parse_range(start, end, UTC8)
    except BadRequest:
        return
    assert since < before


@given(st.datetimes(datetime(1970, 1, 3), datetime(2098, 12, 31)), st.integers(-720, 840))
def test_what_is_shown_can_be_asked_for(moment: datetime, zone: int) -> None:
    at_ms = int(moment.replace(tzinfo=UTC).timestamp() * 1000)
    text = show_time(at_ms, zone)
    since, before = parse_range(text, text, zone)
    assert since <= at_ms < before


@pytest.mark.parametrize(("text", "minutes"), [("UTC", 0), ("UTC+8", 480), ("UTC-03:30", -210), ("UTC+14", 840)])
def test_zones(text: str, minutes: int) -> None:
    assert parse_zone(text) == minutes


@pytest.mark.parametrize("text", ["", "+8", "UTC+15", "UTC+1:75", "Asia/Shanghai", "UTC+8 "])
def test_what_is_no_zone(text: str) -> None:
    with pytest.raises(ValueError, match=r"zone|is not"):
        parse_zone(text)
