"""Whom to challenge next, when, and what a finding means: plain values in, plain values out."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ngpu_bootstrap.challenges.policy import (
    FORGIVEN,
    NOTHING,
    RETRY_MS,
    Candidate,
    Past,
    Rules,
    consequence,
    due_at_ms,
    is_due,
    next_round,
)
from ngpu_bootstrap.scheduling.standing import Standing, with_dispute, with_good_word
from ngpu_protocol.challenge.verification import Finding
from ngpu_protocol.identity import Address

HOUR_MS = 3600_000
RULES = Rules(trusted_ms=24 * HOUR_MS, suspect_ms=HOUR_MS, at_once=4)
NOW_MS = 1_800_000_000_000


def node(number: int, model: str = "H200", *, gpus: int = 1, past: Past | None = None, **others: object) -> Candidate:
    names = [bytes([number, gpu]) + bytes(30) for gpu in range(gpus)]
    pasts = dict.fromkeys(names, past) if past is not None else {}
    return Candidate(
        Address(f"0x{number:040x}"),
        [(name, model) for name in names],
        pasts,
        **{"score": 1.0, **others},  # type: ignore[arg-type]
    )


def chosen(*candidates: Candidate, chance: float = 0.5) -> list[int]:
    return [int(found, 16) for found in next_round(candidates, RULES, NOW_MS, lambda gpu, past: chance)]


def good(passes: int, ago_ms: int = 0) -> Past:
    return Past(NOW_MS - ago_ms, Finding.GOOD.value, passes)


def test_a_gpu_that_was_never_challenged_is_due_at_once() -> None:
    assert chosen(node(1)) == [1]


def test_the_interval_grows_with_good_answers_and_falls_with_the_standing() -> None:
    def interval(passes: int, score: float) -> int:
        return due_at_ms(good(passes), score, RULES, 0.5) - NOW_MS

    assert interval(1, 1.0) < interval(3, 1.0) < interval(50, 1.0) < 24 * HOUR_MS
    assert interval(50, 0.5) < interval(50, 0.9) < interval(50, 1.0)
    assert interval(50, 0.0) == HOUR_MS


@given(st.integers(1, 100), st.floats(0, 1), st.floats(0, 0.999))
def test_no_interval_is_beyond_its_bounds(passes: int, score: float, chance: float) -> None:
    due_ms = due_at_ms(good(passes), score, RULES, chance) - NOW_MS
    assert 0.25 * HOUR_MS <= due_ms <= 1.75 * 24 * HOUR_MS


def test_chance_moves_the_day() -> None:
    assert due_at_ms(good(9), 1.0, RULES, 0.0) < due_at_ms(good(9), 1.0, RULES, 0.9)


def test_a_failed_one_comes_again_soon_and_a_silent_one_ever_later() -> None:
    failed = Past(NOW_MS, Finding.LATE.value)
    assert due_at_ms(failed, 1.0, RULES, 0.9) == NOW_MS + HOUR_MS
    waits = [due_at_ms(Past(NOW_MS, Finding.UNANSWERED.value, 0, n), 1.0, RULES, 0.5) - NOW_MS for n in (1, 2, 3, 99)]
    assert waits == [RETRY_MS, 2 * RETRY_MS, 4 * RETRY_MS, 64 * RETRY_MS]


def test_all_due_claims_are_challenged_at_one_moment_those_of_one_model_first() -> None:
    assert chosen(node(1), node(2, "T4"), node(3), node(4, past=good(50))) == [1, 3, 2]


def test_two_machines_of_one_network_are_kin_whatever_each_claims() -> None:
    """One H200 that says in one place that it is an H200 and in another that it is a T4."""
    beside = node(2, "T4", past=good(50), ip="2001:db8:1:2::9")
    elsewhere = node(3, "T4", past=good(50), ip="2001:db8:1:3::9")
    assert chosen(node(1, ip="2001:db8:1:2::1"), beside, elsewhere) == [1, 2]


def test_those_that_claim_the_same_and_are_due_soon_are_taken_along() -> None:
    """Two claims on one card under different owners and addresses would else have a day of their own each."""
    soon, late = good(50, ago_ms=20 * HOUR_MS), good(50, ago_ms=10 * HOUR_MS)
    assert chosen(node(1), node(2, past=late), node(3, past=soon), node(4, "T4", past=soon)) == [1, 3]
    silent = Past(NOW_MS, Finding.UNANSWERED.value, 0, 1)
    assert chosen(node(1), node(2, past=silent)) == [1], "one that was just asked in vain gets its time"


def test_a_claim_that_is_not_due_joins_when_it_may_be_the_same_card() -> None:
    beside, elsewhere = node(2, past=good(9), ip="192.0.2.1"), node(3, past=good(9), ip="192.0.2.3")
    paid_alike = node(4, past=good(9), wallet="0xaa")
    assert chosen(node(1, ip="192.0.2.1", wallet="0xaa"), beside, elsewhere, paid_alike) == [1, 2, 4]
    assert chosen(node(1), node(2, past=good(9))) == [1], "that neither says where it is makes them no kin"


def test_no_more_than_so_many_at_once_and_kin_go_first() -> None:
    many = [node(number) for number in range(2, 9)]
    kin = node(9, past=good(3), ip="192.0.2.1")
    found = chosen(node(1, ip="192.0.2.1"), *many, kin)
    assert len(found) == RULES.at_once
    assert found[:2] == [1, 9]


def test_what_could_not_begin_waits() -> None:
    assert chosen(node(1, not_before_ms=NOW_MS + 1)) == []
    assert chosen(node(1, not_before_ms=NOW_MS)) == [1]


def test_the_longest_due_gpu_of_any_model_decides_the_round() -> None:
    older = Past(NOW_MS - 9 * HOUR_MS, Finding.LATE.value)
    newer = Past(NOW_MS - 2 * HOUR_MS, Finding.LATE.value)
    assert chosen(node(1, "T4", past=newer), node(2, past=older), node(3, past=newer)) == [2, 3, 1]


def test_a_wrong_answer_ends_a_new_nodes_trust_and_a_late_one_does_not() -> None:
    def after(finding: Finding) -> Standing:
        standing = Standing()
        for _ in range(consequence(finding, NOTHING).disputes):
            standing = with_dispute(standing, rule="challenge", task_id="", now_ms=NOW_MS)
        return standing

    assert after(Finding.LATE).is_trusted(NOW_MS)
    for finding in (Finding.WRONG_PRODUCT, Finding.NOT_COMMITTED, Finding.WRONG_CHAIN, Finding.WRONG_DIGEST):
        assert not after(finding).is_trusted(NOW_MS)


def test_good_answers_do_not_wash_disputes_away() -> None:
    standing = Standing()
    for _ in range(4):
        standing = with_dispute(standing, rule="response_hash", task_id="", now_ms=NOW_MS)
    for _ in range(5):
        standing = with_good_word(standing, consequence(Finding.GOOD, NOTHING).good, NOW_MS)
    assert not standing.is_trusted(NOW_MS)
    assert (standing.verified, standing.disputed) == (0, 4)


def test_silence_is_forgiven_so_often_in_a_row() -> None:
    past = NOTHING
    weighed = []
    for _ in range(FORGIVEN + 2):
        weighed.append(consequence(Finding.UNANSWERED, past).disputes)
        past = past.after(Finding.UNANSWERED, NOW_MS)
    assert weighed == [0] * FORGIVEN + [1, 1]
    for _ in range(3):
        past = past.after(Finding.GOOD, NOW_MS)
    assert (past.silences, consequence(Finding.UNANSWERED, past).disputes) == (2, 1)
    past = past.after(Finding.GOOD, NOW_MS)
    assert consequence(Finding.UNANSWERED, past).disputes == 0


def test_a_card_cannot_be_had_for_the_challenge_after_a_silent_one_alone() -> None:
    """That one comes after ten minutes: were silence forgotten for it, who is silent at all others would do."""
    past, disputes = good(40), 0
    for _ in range(10):
        disputes += consequence(Finding.UNANSWERED, past).disputes
        past = past.after(Finding.UNANSWERED, NOW_MS).after(Finding.GOOD, NOW_MS)
        assert past.passes == 1, "and it is as suspect as a new one each time"
    assert disputes == 10 - FORGIVEN


def test_silence_does_not_make_a_past_better() -> None:
    failed = NOTHING.after(Finding.LATE, 1).after(Finding.UNANSWERED, 2)
    assert failed.passes == 0
    assert good(4).after(Finding.UNANSWERED, 2).passes == 0


@pytest.mark.parametrize("finding", list(Finding))
def test_every_finding_has_a_consequence(finding: Finding) -> None:
    found = consequence(finding, NOTHING)
    assert (found.good > 0) == (finding is Finding.GOOD)
    assert not (found.good and found.disputes)


def test_whether_a_node_is_due_does_not_ask_when_it_may_be_tried_again() -> None:
    assert is_due(node(1, not_before_ms=NOW_MS + 1), RULES, NOW_MS, lambda gpu, past: 0.5)
    good = Past(NOW_MS, Finding.GOOD.value, 1)
    assert not is_due(node(1, past=good), RULES, NOW_MS, lambda gpu, past: 0.5)
    assert not is_due(node(1, gpus=0), RULES, NOW_MS, lambda gpu, past: 0.5)
