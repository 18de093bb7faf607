"""Task ids: the documented shape, in the documented zone, with digits nobody can guess."""

from __future__ import annotations

from ngpu_bootstrap.front.routes import TaskIds
from ngpu_protocol.task_ids import RANDOM_LIMIT, is_task_id

NOON_UTC = 1_795_176_000_000  # 2026-11-20 12:00:00


def test_ids_carry_the_time_clients_see_and_never_repeat() -> None:
    new_id = TaskIds(lambda: NOON_UTC, 480)
    made = [new_id() for _ in range(2000)]
    assert all(is_task_id(one) and one.startswith("20261120_20_00_00_") for one in made)
    assert len(set(made)) == len(made)


def test_the_digits_are_spread_over_their_whole_range() -> None:
    new_id = TaskIds(lambda: NOON_UTC, 0)
    firsts = [int(new_id().rpartition("_")[2]) * 10 // RANDOM_LIMIT for _ in range(4000)]
    for digit in range(10):
        assert 300 < firsts.count(digit) < 500
