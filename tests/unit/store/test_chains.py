"""A chain known from receipts in any order: head, gaps, breaks; and the memory of the last links."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ngpu_bootstrap.store.chains import Chain, missing_between
from ngpu_bootstrap.store.recent_links import RecentLinks
from ngpu_bootstrap.store.records import BrokenLink, Gap
from ngpu_protocol.receipts import ReceiptLink
from tests.unit.store.builders import receipt_hash as h


def test_the_head_follows_receipts_in_order() -> None:
    chain = Chain()
    for sequence in (1, 2, 3):
        assert chain.add(sequence, h(sequence), h(sequence - 1)) == []
    assert (chain.sequence, chain.hash, chain.ahead) == (3, h(3), {})


def test_a_receipt_beyond_a_gap_waits_until_the_gap_closes() -> None:
    chain = Chain()
    chain.add(1, h(1), h(0))
    chain.add(4, h(4), h(3))
    chain.add(6, h(6), h(5))
    assert chain.sequence == 1
    assert chain.gaps() == [Gap(2, 3), Gap(5, 5)]
    chain.add(3, h(3), h(2))
    chain.add(2, h(2), h(1))
    assert (chain.sequence, chain.hash) == (4, h(4))
    assert chain.gaps() == [Gap(5, 5)]


def test_a_break_is_reported_where_it_is_and_the_head_goes_on() -> None:
    chain = Chain()
    chain.add(3, h(3), h(2))
    chain.add(2, h(2), h(9))
    assert chain.add(1, h(1), h(0)) == [BrokenLink(2, expected=h(1), actual=h(9))]
    assert chain.sequence == 3


def test_a_first_receipt_that_names_a_predecessor_is_a_break() -> None:
    assert Chain().add(1, h(1), h(7)) == [BrokenLink(1, expected=bytes(32), actual=h(7))]


def test_a_sequence_is_taken_once() -> None:
    chain = Chain()
    chain.add(1, h(1), h(0))
    chain.add(3, h(3), h(2))
    for taken in (0, 1, 3):
        assert chain.has(taken)
        with pytest.raises(ValueError, match="filed already"):
            chain.add(taken, h(taken), h(0))


@given(st.permutations(range(1, 20)), st.sets(st.integers(1, 19)))
def test_any_order_of_arrival_gives_the_same_chain(order: list[int], missing: set[int]) -> None:
    chain = Chain()
    for sequence in order:
        if sequence not in missing:
            before = chain.copy()
            assert chain.add(sequence, h(sequence), h(sequence - 1)) == []
            assert chain.sequence >= before.sequence
            assert not before.has(sequence)
    head = min(missing, default=20) - 1
    assert (chain.sequence, chain.hash) == (head, h(head))
    highest = max((s for s in range(1, 20) if s not in missing), default=0)
    listed = [s for gap in chain.gaps() for s in range(gap.from_sequence, gap.to_sequence + 1)]
    assert listed == sorted(s for s in missing if s < highest)


@given(st.integers(0, 50), st.sets(st.integers(51, 90)))
def test_gaps_and_receipts_tile_the_range(head: int, ahead: set[int]) -> None:
    covered = {s for gap in missing_between(head, ahead) for s in range(gap.from_sequence, gap.to_sequence + 1)}
    assert covered.isdisjoint(ahead)
    assert covered | ahead == set(range(head + 1, max(ahead, default=head) + 1))


def test_recent_links_answer_for_what_was_noted_and_forget_the_oldest() -> None:
    links = RecentLinks(per_chain=2)
    assert links.before("b", "n", 1) == ReceiptLink(0, bytes(32))
    assert links.before("b", "n", 2) is None
    for sequence in (1, 2, 3):
        links.note("b", "n", sequence, h(sequence))
    links.note("b", "n", 3, h(99))
    assert links.before("b", "n", 4) == ReceiptLink(3, h(3))
    assert links.before("b", "n", 2) is None
    assert links.before("b", "other", 4) is None
