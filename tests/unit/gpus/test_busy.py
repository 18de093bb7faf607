"""What each task pays, from windows: exact on small cases, and never too much on any."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from ngpu_node.gpus.busy import BusyClock, Mark, Share

MS = 1_000_000


def test_a_task_pays_what_was_measured_while_it_ran() -> None:
    clock = BusyClock.at(0)
    mark = clock.start(0)
    clock.measured(0, 200 * MS, 150 * MS)
    clock.measured(200 * MS, 400 * MS, 200 * MS)
    assert clock.stop(mark, 400 * MS) == Share(400 * MS, 350 * MS, 0, 0)


def test_work_in_a_window_is_put_where_a_task_ran() -> None:
    clock = BusyClock.at(0)
    mark = clock.start(150 * MS)
    clock.measured(0, 200 * MS, 40 * MS)
    assert clock.stop(mark, 200 * MS).busy_ns == 40 * MS


def test_work_while_no_task_ran_is_nobodys_bill() -> None:
    clock = BusyClock.at(0)
    mark = clock.start(150 * MS)
    clock.measured(0, 200 * MS, 200 * MS)
    assert clock.stop(mark, 200 * MS).busy_ns == 50 * MS


def test_overlapping_tasks_share_alike() -> None:
    clock = BusyClock.at(0)
    first, second = clock.start(0), clock.start(0)
    clock.measured(0, 100 * MS, 100 * MS)
    assert clock.stop(second, 100 * MS).busy_ns == 50 * MS
    clock.measured(100 * MS, 200 * MS, 60 * MS)
    assert clock.stop(first, 200 * MS) == Share(150 * MS, 110 * MS, 0, 0)


def test_a_tail_is_unknown_when_its_task_ends() -> None:
    clock = BusyClock.at(0)
    mark = clock.start(0)
    clock.measured(0, 200 * MS, 200 * MS)
    assert clock.stop(mark, 330 * MS) == Share(330 * MS, 200 * MS, 0, 130 * MS)
    assert not clock.is_settled
    clock.measured(200 * MS, 400 * MS, 130 * MS)
    assert clock.is_settled


def test_the_next_task_exchanges_its_tail_for_the_one_before() -> None:
    clock = BusyClock.at(0)
    first = clock.start(0)
    clock.stop(first, 100 * MS)
    clock.measured(0, 200 * MS, 80 * MS)
    second = clock.start(200 * MS)
    assert clock.stop(second, 250 * MS) == Share(50 * MS, 40 * MS, 0, 0)
    third = clock.start(250 * MS)
    assert clock.stop(third, 350 * MS) == Share(100 * MS, 40 * MS, 0, 50 * MS)


def test_short_tasks_in_a_row_pay_the_rate_of_the_workspace() -> None:
    clock = BusyClock.at(0)
    paid: list[int] = []
    for number in range(100):
        begin = number * 10 * MS
        mark = clock.start(begin)
        paid.append(clock.stop(mark, begin + 10 * MS).busy_ns)
        if number % 20 == 19:
            clock.measured(begin - 190 * MS, begin + 10 * MS, 160 * MS)
    assert paid[:20] == [0] * 20
    assert set(paid[20:]) == {8 * MS}


def test_a_gap_is_missed_and_not_guessed() -> None:
    clock = BusyClock.at(0)
    mark = clock.start(0)
    clock.measured(0, 100 * MS, 100 * MS)
    clock.gap(300 * MS)
    clock.measured(350 * MS, 400 * MS, 50 * MS)
    assert clock.stop(mark, 400 * MS) == Share(400 * MS, 150 * MS, 250 * MS, 0)


def test_a_task_that_began_within_a_gap_missed_only_its_part() -> None:
    clock = BusyClock.at(0)
    clock.start(0)
    mark = clock.start(50 * MS)
    clock.gap(150 * MS)
    clock.measured(150 * MS, 250 * MS, 100 * MS)
    assert clock.stop(mark, 250 * MS) == Share(100 * MS, 50 * MS, 50 * MS, 0)


def test_windows_that_come_late_or_twice_change_nothing() -> None:
    clock = BusyClock.at(0)
    mark = clock.start(0)
    clock.measured(0, 200 * MS, 100 * MS)
    clock.measured(0, 200 * MS, 200 * MS)
    clock.measured(100 * MS, 150 * MS, 50 * MS)
    assert clock.stop(mark, 200 * MS).busy_ns == 100 * MS


def test_what_a_workspace_did_while_it_rested_is_not_the_next_tasks() -> None:
    clock = BusyClock.at(0)
    mark = clock.start(10_000 * MS)
    clock.measured(0, 10_200 * MS, 5_000 * MS)
    assert clock.stop(mark, 10_200 * MS).busy_ns <= 200 * MS
    assert clock.trace[0].at_ns == 10_200 * MS


def test_a_clock_that_steps_back_counts_no_time() -> None:
    clock = BusyClock.at(1000)
    mark = clock.start(1000)
    assert clock.stop(mark, 500) == Share(0, 0, 0, 0)


events = st.lists(
    st.tuples(
        st.integers(0, 400 * MS),  # how long after the one before
        st.sampled_from(["start", "stop", "measured", "gap"]),
        st.integers(0, 100),  # which task; how busy
    ),
    max_size=60,
)


@given(events, st.integers(0, 50 * MS))
def test_nobody_pays_more_than_he_held_and_all_together_no_more_than_was_measured(
    story: list[tuple[int, str, int]], late_ns: int
) -> None:
    clock = BusyClock.at(0)
    now, window = 0, 0
    running: list[Mark] = []
    shares: list[Share] = []
    measured = 0
    for after, what, number in story:
        now += after
        if what == "start":
            running.append(clock.start(now))
        elif what == "stop" and running:
            shares.append(clock.stop(running.pop(number % len(running)), now))
        elif what in ("measured", "gap") and now - late_ns > window:
            until = now - late_ns
            if what == "gap":
                clock.gap(until)
            else:
                busy = (until - window) * number // 100
                clock.measured(window, until, busy)
                measured += busy
            window = until
    for mark in running:
        shares.append(clock.stop(mark, now))
    assert sum(share.busy_ns for share in shares) <= measured
    assert sum(share.held_ns for share in shares) <= now
    for share in shares:
        assert 0 <= share.busy_ns <= share.held_ns
        assert share.missed_ns >= 0
        assert share.open_ns >= 0
        assert share.busy_ns + share.missed_ns + share.open_ns <= share.held_ns + 2
