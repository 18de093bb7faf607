"""The documented shape of task ids."""

from __future__ import annotations

import pytest

from ngpu_protocol.task_ids import RANDOM_LIMIT, format_task_id, is_task_id

AT_MS = 1_750_003_600_999  # 2025-06-15 16:06:40.999 UTC


def test_id_shows_local_time_and_all_twenty_digits() -> None:
    assert format_task_id(AT_MS, 0, 42) == "20250615_16_06_40_00000000000000000042"
    assert format_task_id(AT_MS, 480, RANDOM_LIMIT - 1) == "20250616_00_06_40_99999999999999999999"
    assert format_task_id(AT_MS, -210, 0) == "20250615_12_36_40_00000000000000000000"
    assert is_task_id(format_task_id(AT_MS, 480, 7))


@pytest.mark.parametrize("digits", [-1, RANDOM_LIMIT])
def test_random_number_must_fit(digits: int) -> None:
    with pytest.raises(ValueError, match="20 digits"):
        format_task_id(AT_MS, 0, digits)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "%",
        "20250615_16_06_40_%",
        "20250615_16_06_40_0000000000000000004",
        "20250615_16_06_40_000000000000000000042",
        "20250615_16_06_40_00000000000000000042\n",
        " 20250615_16_06_40_00000000000000000042",
        "20250615-16-06-40-00000000000000000042",
        "20250615_16_06_40_" + "\u0661" * 20,
        "1" * 1_000_000,
    ],
)
def test_other_text_is_no_task_id(text: str) -> None:
    assert not is_task_id(text)
