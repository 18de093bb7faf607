"""Receipts in the store: chains whole after any order of arrival, duplicates harmless, contradictions kept."""

from __future__ import annotations

from pathlib import Path

import pytest
from trio.testing import trio_test

from ngpu_bootstrap.store import group_commit
from ngpu_bootstrap.store.records import BrokenLink, FiledReceipt, Filing, Gap
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
        assert await store.gaps(NODE) == [Gap(2, 2)]
    async with a_store(directory) as store:
        filed = await store.late_receipt(a_receipt(2))
        assert filed == FiledReceipt(Filing.FILED, b"acknowledgement 2")
        assert await store.chain_head(NODE) == ReceiptLink(3, receipt_hash(3))
        assert await store.gaps(NODE) == []
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
        [gap] = await store.gaps(NODE)
        assert await store.note_withheld(NODE, gap, 5_000)
        assert not await store.note_withheld(NODE, gap, 6_000)
    async with a_store(directory) as store:
        assert not await store.note_withheld(NODE, gap, 7_000)
        [fault] = await store.faults(NODE)
        assert (fault.kind, fault.sequence, fault.found_at_ms) == ("withheld", 2, 5_000)
        assert fault.expected == b"receipts 2 to 3"


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
            filed = await store.late_receipt(a_receipt(1, fork=f"{number}"))
            assert filed.filing is Filing.EQUIVOCATION
        assert len(await store.faults(NODE)) == 3
