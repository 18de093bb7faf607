"""Receipts in the store: chains whole after any order of arrival, duplicates harmless, contradictions kept."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
from trio.testing import trio_test

from ngpu_bootstrap.store import group_commit
from ngpu_bootstrap.store.records import AskedGap, BrokenLink, FiledReceipt, Filing, Gap, Missing
from ngpu_bootstrap.store.store import Store
from ngpu_protocol.receipts import ReceiptLink
from tests.unit.store.builders import (
    BOOTSTRAP,
    NODE,
    OTHER_NODE,
    a_finish,
    a_receipt,
    a_start,
    a_store,
    a_task,
    receipt_hash,
    task_id,
)


@trio_test
async def test_receipts_out_of_order_leave_gaps_that_close(directory: Path) -> None:
    async with a_store(directory) as store:
        assert await store.chain_head(NODE) is None
        for number in (1, 2, 3, 4):
            await store.accept_and_begin(a_task(number), a_start(number))
        await store.finish(a_finish(3, a_receipt(3)))
        await store.finish(a_finish(1, a_receipt(1)))
        assert await store.chain_head(NODE) == ReceiptLink(1, receipt_hash(1))
        assert (await store.missing(NODE)).gaps == (Gap(2, 2),)
    async with a_store(directory) as store:
        filed = await store.late_receipt(a_receipt(2))
        assert filed == FiledReceipt(Filing.FILED, b"acknowledgement 2")
        assert await store.chain_head(NODE) == ReceiptLink(3, receipt_hash(3))
        assert (await store.missing(NODE)).gaps == ()
        assert await store.chain_head(OTHER_NODE) is None


@trio_test
async def test_the_same_receipt_again_gets_the_first_acknowledgement(directory: Path) -> None:
    async with a_store(directory) as store:
        await store.accept_and_begin(a_task(1), a_start(1))
        await store.finish(a_finish(1, a_receipt(1)))
        again = a_receipt(1, acknowledgement=b"a newer one", verdict="skew")
        assert await store.late_receipt(again) == FiledReceipt(Filing.DUPLICATE, b"acknowledgement 1")
        record = await store.receipt(task_id(1))
        assert record is not None
        assert record.receipt == a_receipt(1)
        found = await store.task(task_id(1))
        assert found is not None
        assert found.verdict == "verified"


@trio_test
async def test_a_receipt_that_came_before_its_answer_is_not_forgotten_by_it(directory: Path) -> None:
    async with a_store(directory) as store:
        await store.accept_and_begin(a_task(1), a_start(1))
        await store.late_receipt(a_receipt(1, verdict="skew", rule=""))
        assert await store.finish(a_finish(1)) is None
        found = await store.task(task_id(1))
        assert found is not None
        assert found.verdict == "skew"


@trio_test
async def test_a_second_receipt_for_a_sequence_is_evidence_and_replaces_nothing(directory: Path) -> None:
    async with a_store(directory) as store:
        for number in (1, 2):
            await store.accept_and_begin(a_task(number), a_start(number))
        await store.finish(a_finish(1, a_receipt(1)))
        second = a_receipt(1, 2, fork="x")
        filed = await store.finish(a_finish(2, second))
        assert filed == FiledReceipt(Filing.EQUIVOCATION, first_hash=receipt_hash(1))
        [fault] = await store.faults(NODE)
        assert (fault.kind, fault.sequence, fault.raw) == ("equivocation", 1, second.raw)
        assert (fault.expected, fault.actual) == (receipt_hash(1), receipt_hash(1, "x"))
        assert await store.receipt(task_id(2)) is None
        found = await store.task(task_id(2))
        assert found is not None
        assert (found.verdict, found.rule) == ("disputed", "equivocation")
        # said once more it is the same evidence
        assert (await store.late_receipt(second)).filing is Filing.EQUIVOCATION
        assert await store.faults(NODE) == [fault]


@trio_test
async def test_a_break_found_when_a_gap_closes_names_the_receipt_that_broke_it(directory: Path) -> None:
    async with a_store(directory) as store:
        liar = a_receipt(2, previous=receipt_hash(1, "x"))
        assert await store.late_receipt(liar) == FiledReceipt(Filing.FILED, liar.acknowledgement)
    async with a_store(directory) as store:
        filed = await store.late_receipt(a_receipt(1))
        assert filed.broken == (BrokenLink(2, expected=receipt_hash(1), actual=receipt_hash(1, "x")),)
        [fault] = await store.faults(NODE)
        assert (fault.kind, fault.sequence, fault.raw) == ("broken_link", 2, liar.raw)
        assert await store.chain_head(NODE) == ReceiptLink(2, receipt_hash(2))


@trio_test
async def test_a_forged_receipt_takes_no_place_in_the_chain(directory: Path) -> None:
    async with a_store(directory) as store:
        await store.accept_and_begin(a_task(1), a_start(1))
        forged = a_receipt(1, fork="x", verdict="disputed", rule="signer", authentic=False)
        assert await store.finish(a_finish(1, forged)) == FiledReceipt(Filing.FORGED)
        assert store.link_before(NODE, 2) is None
        assert await store.chain_head(NODE) is None
        [fault] = await store.faults(NODE)
        assert (fault.kind, fault.raw) == ("forged", forged.raw)
        found = await store.task(task_id(1))
        assert found is not None
        assert (found.verdict, found.rule) == ("disputed", "signer")
        assert (await store.late_receipt(a_receipt(1))).filing is Filing.FILED


@trio_test
async def test_an_earlier_attempts_late_receipt_does_not_change_the_tasks_verdict(directory: Path) -> None:
    async with a_store(directory) as store:
        await store.accept_and_begin(a_task(1), a_start(1))
        await store.begin_attempt(a_start(1, 2))
        await store.finish(a_finish(1, a_receipt(2, 1, attempt=2), attempt=2))
        await store.late_receipt(a_receipt(1, 1, attempt=1, verdict="disputed", rule="signer"))
        found = await store.task(task_id(1))
        assert found is not None
        assert (found.verdict, found.rule) == ("verified", "")
        first, last = (await store.detail(task_id(1))).receipts
        assert (first.receipt.verdict, last.receipt.verdict) == ("disputed", "verified")


@trio_test
async def test_chains_of_other_bootstraps_are_their_own(directory: Path) -> None:
    async with a_store(directory) as store:
        await store.late_receipt(a_receipt(1))
        await store.late_receipt(a_receipt(1, bootstrap=OTHER_NODE, fork="o"))
        await store.late_receipt(a_receipt(1, node=OTHER_NODE, fork="n"))
        assert await store.chain_head(NODE, BOOTSTRAP) == ReceiptLink(1, receipt_hash(1))
        assert await store.chain_head(NODE, OTHER_NODE) == ReceiptLink(1, receipt_hash(1, "o"))
        assert await store.chain_head(OTHER_NODE) == ReceiptLink(1, receipt_hash(1, "n"))
        assert await store.faults(NODE) == []


@trio_test
async def test_the_link_before_is_at_hand_while_receipts_flow_and_after_asking_for_the_head(directory: Path) -> None:
    async with a_store(directory) as store:
        assert store.link_before(NODE, 1) == ReceiptLink(0, bytes(32))
        await store.late_receipt(a_receipt(1))
        assert store.link_before(NODE, 2) == ReceiptLink(1, receipt_hash(1))
        assert store.link_before(NODE, 3) is None
    async with a_store(directory) as store:
        assert store.link_before(NODE, 2) is None
        await store.chain_head(NODE)
        assert store.link_before(NODE, 2) == ReceiptLink(1, receipt_hash(1))


@trio_test
async def test_receipts_owed_for_too_long_are_evidence_once(directory: Path) -> None:
    async with a_store(directory) as store:
        for number in (1, 4):
            await store.late_receipt(a_receipt(number))
        missing = await store.missing(NODE)
        assert missing == Missing((Gap(2, 3),), 1, {4: receipt_hash(3)})
        asked = AskedGap(Gap(2, 3), 4_000)
        await store.keep_asked_gaps(NODE, [asked])
        assert await store.asked_gaps(NODE) == [asked]
    async with a_store(directory) as store:
        assert await store.asked_gaps(NODE) == [asked], "a restart does not begin the hour anew"
        assert await store.chain_top(NODE) == ReceiptLink(4, receipt_hash(4))
        await store.write_off(NODE, asked, receipt_hash(3), b"claim", 5_000)
        [fault] = await store.faults(NODE)
        assert (fault.kind, fault.sequence, fault.found_at_ms) == ("withheld", 2, 5_000)
        assert (fault.expected, fault.raw, fault.hash) == (b"receipts 2 to 3", b"claim", receipt_hash(3))
        # the chain goes on without them, and nothing is missing any more
        assert await store.chain_head(NODE) == ReceiptLink(4, receipt_hash(4))
        assert (await store.missing(NODE)).gaps == ()
        await store.keep_asked_gaps(NODE, [])
        assert await store.asked_gaps(NODE) == [AskedGap(Gap(2, 3), 4_000, b"claim")]
    async with a_store(directory) as store:
        assert await store.late_receipt(a_receipt(5)) == FiledReceipt(Filing.FILED, a_receipt(5).acknowledgement)
        # late, they are taken all the same; one that does not fit shows it
        late = await store.late_receipt(a_receipt(2))
        assert (late.filing, late.broken) == (Filing.FILED, ())
        assert (await store.late_receipt(a_receipt(2))).filing is Filing.DUPLICATE
        assert len(await store.asked_gaps(NODE)) == 1
        odd = await store.late_receipt(a_receipt(3, fork="x"))
        assert odd.broken == (BrokenLink(4, expected=receipt_hash(3, "x"), actual=receipt_hash(3)),)
        assert await store.asked_gaps(NODE) == []
        assert {fault.kind for fault in await store.faults(NODE)} == {"broken_link", "withheld"}
        assert await store.chain_head(NODE) == ReceiptLink(5, receipt_hash(5))


@trio_test
async def test_a_gap_is_not_given_up_before_what_is_below_it_nor_when_it_was_filled(directory: Path) -> None:
    async with a_store(directory) as store:
        for number in (1, 3, 5):
            await store.late_receipt(a_receipt(number))
        await store.write_off(NODE, AskedGap(Gap(4, 4), 0), receipt_hash(4), b"claim", 1)
        assert await store.chain_head(NODE) == ReceiptLink(1, receipt_hash(1))
        await store.late_receipt(a_receipt(2))
        await store.write_off(NODE, AskedGap(Gap(2, 2), 0), receipt_hash(2), b"claim", 1)
        assert await store.chain_head(NODE) == ReceiptLink(3, receipt_hash(3))


@trio_test
async def test_a_chain_goes_on_beyond_a_gap_that_a_stranger_made_very_wide_and_shows_its_breaks(
    directory: Path,
) -> None:
    far = 2**62
    async with a_store(directory) as store:
        for receipt in (a_receipt(1), a_receipt(far), a_receipt(far + 1, previous=b"\x09" * 32)):
            await store.late_receipt(receipt)
        gap = AskedGap(Gap(2, far - 1), 0)
        await store.write_off(NODE, gap, receipt_hash(far - 1), b"claim", 1)
        assert await store.chain_head(NODE) == ReceiptLink(far + 1, receipt_hash(far + 1))
        broken = [fault for fault in await store.faults(NODE) if fault.kind == "broken_link"]
        assert [(fault.sequence, fault.actual) for fault in broken] == [(far + 1, b"\x09" * 32)]


@trio_test
async def test_an_offered_receipt_keeps_its_order_only_where_no_attempt_has_it(directory: Path) -> None:
    async with a_store(directory) as store:
        await store.accept_and_begin(a_task(1), a_start(1))
        await store.late_receipt(replace(a_receipt(1), order=b"an order"))
        await store.late_receipt(replace(a_receipt(2), order=b"another order"))
        kept = await store.receipt(task_id(1))
        assert kept is not None
        assert kept.order == a_start(1).order
        lost = await store.receipt(a_receipt(2).task_id)
        assert lost is not None
        assert lost.order == b"another order"


@trio_test
async def test_an_order_has_one_receipt_that_stands_whoever_hands_in_the_second(directory: Path) -> None:
    async with a_store(directory) as store:
        first, second = a_receipt(1), a_receipt(2, 1)
        assert (await store.late_receipt(first)).filing is Filing.FILED
        refused = await store.late_receipt(second)
        assert (refused.filing, refused.first_sequence, refused.first_hash) == (Filing.REPEATED, 1, first.hash)
        assert await store.chain_head(NODE) == ReceiptLink(1, first.hash)
        # as a dispute it takes its place: what comes after it is no gap
        disputed = a_receipt(2, 1, verdict="disputed", rule="once")
        assert (await store.late_receipt(disputed)).filing is Filing.FILED
        assert await store.chain_head(NODE) == ReceiptLink(2, second.hash)


@trio_test
async def test_evidence_against_one_node_has_an_end(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(group_commit, "FAULTS_KEPT", 3)
    async with a_store(directory) as store:
        await store.late_receipt(a_receipt(1))
        for number in range(6):
            forged = a_receipt(1, fork=f"f{number}", verdict="disputed", rule="signer", authentic=False)
            assert (await store.late_receipt(forged)).filing is Filing.FORGED
        for number in range(6):
            filed = await store.late_receipt(a_receipt(1, fork=f"{number}"))
            assert filed.filing is Filing.EQUIVOCATION
        for number in range(2, 8):  # each names another predecessor than there is
            filed = await store.late_receipt(a_receipt(number, previous=receipt_hash(number, "x")))
            assert [one.sequence for one in filed.broken] == [number]
        # what shows nothing does not crowd out what does
        assert Counter(fault.kind for fault in await store.faults(NODE)) == {
            "forged": 3,
            "equivocation": 3,
            "broken_link": 3,
        }


@trio_test
async def test_links_that_break_all_at_once_are_kept_within_the_same_bound(
    directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(group_commit, "FAULTS_KEPT", 3)

    async def held_up(store: Store, first: int) -> None:
        for number in range(first, first + 6):
            await store.late_receipt(a_receipt(number, previous=receipt_hash(number, "x")))

    async with a_store(directory) as store:
        await held_up(store, 2)
        assert await store.faults(NODE) == []
        assert len((await store.late_receipt(a_receipt(1))).broken) == 6  # a gap that closes shows them all
        assert len(await store.faults(NODE)) == 3
        await held_up(store, 10)
        await store.write_off(NODE, AskedGap(Gap(8, 9), 1), receipt_hash(10, "x"), b"claim", 2)  # as one given up does
        assert Counter(fault.kind for fault in await store.faults(NODE)) == {"broken_link": 3, "withheld": 1}
