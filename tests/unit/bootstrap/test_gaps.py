"""Which gaps are asked for, how old they are, and when they are disputed."""

from __future__ import annotations

from ngpu_bootstrap.dispatch.gaps import ANSWER_S, GAPS_ASKED, HELD_UP, asked_now, overdue, still_missing
from ngpu_bootstrap.store.records import AskedGap, Gap

HOUR_MS = 3_600_000


def test_what_is_missing_once_is_not_asked_for() -> None:
    assert still_missing([Gap(2, 3)], [], []) == []
    assert still_missing([Gap(2, 3), Gap(9, 9)], [Gap(2, 3)], []) == [Gap(2, 3)]
    # asked for on an earlier connection: at once
    assert still_missing([Gap(2, 3)], [], [AskedGap(Gap(1, 5), 0)]) == [Gap(2, 3)]


def test_what_is_left_of_a_gap_is_as_old_as_the_whole() -> None:
    asked = asked_now([Gap(2, 9)], [], 1_000)
    assert asked == [AskedGap(Gap(2, 9), 1_000)]
    # a node that gives one of them now and then gains no time
    assert asked_now([Gap(2, 4), Gap(6, 9), Gap(20, 20)], asked, 5_000) == [
        AskedGap(Gap(2, 4), 1_000),
        AskedGap(Gap(6, 9), 1_000),
        AskedGap(Gap(20, 20), 5_000),
    ]


def test_the_lowest_are_asked_for_first_and_not_all_at_once() -> None:
    gaps = [Gap(n, n) for n in range(2, 200, 2)]
    assert [one.gap for one in asked_now(gaps, [], 0)] == gaps[:GAPS_ASKED]


def test_a_gap_is_overdue_after_an_hour_in_which_the_node_could_answer() -> None:
    gap = AskedGap(Gap(2, 3), 1_000)
    late = 1_000 + HOUR_MS + 1
    assert not overdue(gap, now_ms=late - 1, answerable_s=10 * ANSWER_S, held_up=1)
    assert overdue(gap, now_ms=late, answerable_s=ANSWER_S, held_up=1)
    assert not overdue(gap, now_ms=late, answerable_s=ANSWER_S - 1, held_up=1), "it has only just come back"
    # a bootstrap does not remember without bound for one that withholds
    assert overdue(gap, now_ms=2_000, answerable_s=ANSWER_S, held_up=HELD_UP + 1)
    assert not overdue(gap, now_ms=2_000, answerable_s=1.0, held_up=HELD_UP + 1)
