"""Bills: what receipts cost follows from the file alone, and whatever is altered in one breaks a rule."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import replace
from decimal import Decimal
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ngpu_daemon.accounts import DraftBill, Entry, GpuModels, PriceLists, draw_bill
from ngpu_protocol.acknowledgements import VerdictKind, sign_acknowledgement
from ngpu_protocol.bills import Basis, BillPart, amounts_of, amounts_text, shared, sign_bill
from ngpu_protocol.errors import MalformedError
from ngpu_protocol.orders import sign_order
from ngpu_protocol.prices import Prices, cost, sign_price_list, total
from ngpu_protocol.receipt_file import ReceiptFile
from ngpu_protocol.receipts import TaskReceipt, sign_receipt
from ngpu_protocol.statements import (
    StatementFile,
    check_held,
    check_statement_file,
    draw_up,
    line_of,
    prove,
    sign_statement,
)
from tests.unit.protocol.samples import (
    BOOTSTRAP,
    CHAIN_ID,
    NODE,
    SENT_AT_MS,
    STRANGER,
    a_receipt,
    an_acknowledgement,
    an_order,
)

ONE, TWO = a_receipt().gpus
MODELS = GpuModels({ONE: "RTX4090", TWO: "H100-80G"})
SESSIONS = (an_order().session, b"2" * 32, b"3" * 32)
LISTS = (
    Prices.of_models("USD", {"RTX 4090": "0.001", "H100": "0.01"}),
    Prices.of_models("EUR", {"RTX 4090": "0.003"}),
)
SIGNED = [sign_price_list(one, session, NODE, CHAIN_ID) for one, session in zip(LISTS, SESSIONS, strict=False)]


def receipts() -> list[TaskReceipt]:
    held = ((ONE, TWO), (ONE,), (TWO,), ())
    return [
        a_receipt(
            sequence=number,
            previous=bytes(32) if number == 1 else a_receipt().previous,
            gpus=held[number % 4],
            reserved_gpu_ms=900 if held[number % 4] else 0,
            busy_gpu_ms=100 * number + 1 if held[number % 4] else 0,
        )
        for number in range(1, 9)
    ]


def session_of(receipt: TaskReceipt) -> bytes:
    return SESSIONS[receipt.sequence % 3]


def verdict_of(receipt: TaskReceipt) -> VerdictKind:
    return VerdictKind.DISPUTED if receipt.sequence == 5 else VerdictKind.VERIFIED


def entries() -> list[Entry]:
    return [
        Entry(line_of(one, verdict_of(one), CHAIN_ID), one.gpus, "task", one.ended_at_ms, session=session_of(one))
        for one in receipts()
    ]


def whole() -> tuple[StatementFile, DraftBill, list[bytes]]:
    lines = tuple(entry.line for entry in entries())
    statement, leaves = draw_up(
        lines,
        node=NODE.address,
        bootstrap=BOOTSTRAP.address,
        from_ms=SENT_AT_MS,
        to_ms=SENT_AT_MS + 1000,
        at_ms=SENT_AT_MS + 2000,
    )
    draft = draw_bill(entries(), statement, CHAIN_ID, MODELS, PriceLists(one.wire for one in SIGNED))
    file = StatementFile(statement, sign_statement(statement, BOOTSTRAP, CHAIN_ID), CHAIN_ID, lines=lines)
    return replace(file, bill=draft.whole(sign_bill(draft.bill, BOOTSTRAP, CHAIN_ID))), draft, leaves


def receipt_file(index: int) -> ReceiptFile:
    receipt = receipts()[index]
    order = replace(an_order(), session=session_of(receipt))
    receipt = replace(receipt, order_hash=order.digest(CHAIN_ID))
    verdict = verdict_of(receipt)
    ack = an_acknowledgement(receipt, verdict=verdict, reason="" if verdict is VerdictKind.VERIFIED else "busy")
    return ReceiptFile(
        order=sign_order(order, BOOTSTRAP, CHAIN_ID),
        receipt=sign_receipt(receipt, NODE, CHAIN_ID),
        acknowledgement=sign_acknowledgement(ack, BOOTSTRAP, CHAIN_ID),
        chain_id=CHAIN_ID,
    )


def proof() -> StatementFile:
    file, draft, leaves = whole()
    assert file.bill is not None
    assert file.lines is not None
    index = 2  # receipt 3, whose order is `an_order` as it is
    return prove(file, leaves, file.lines[index], index, receipt_file(index), draft.of_line(file.bill.signature, index))


def broken(file: StatementFile) -> list[str]:
    return [result.rule for result in check_statement_file(file) if not result.holds]


def bill_of(file: StatementFile) -> BillPart:
    assert file.bill is not None
    return file.bill


def signed_again(file: StatementFile, part: BillPart, **changes: Any) -> StatementFile:
    """The file as a bootstrap would sign it that says something else."""
    bill = replace(part.bill, **changes)
    return replace(file, bill=replace(part, bill=bill, signature=sign_bill(bill, BOOTSTRAP, CHAIN_ID)))


def test_amounts_are_those_of_each_receipt_by_its_sessions_list() -> None:
    totals: dict[str, Decimal] = {}
    for entry in entries():
        prices = dict(zip(SESSIONS, LISTS, strict=False)).get(entry.session or b"")
        for gpu, share in shared(entry.line.billed_gpu_ms, entry.gpus) if entry.gpus else ():
            price = prices.of(MODELS[gpu]) if prices is not None else None
            if price is not None:
                assert prices is not None
                totals = total(totals, prices.currency, cost(price, share))
    assert bill_of(whole()[0]).bill.amounts == amounts_text(totals)
    assert set(totals) == {"USD", "EUR"}


@given(st.lists(st.tuples(st.integers(0, 2**40), st.integers(0, 3)), max_size=20))
def test_sums_of_bases_are_sums_of_lines_exactly(billed: list[tuple[int, int]]) -> None:
    bases = [Basis(SESSIONS[0], tuple((bytes([n]) * 32, "H100-80G") for n in range(held))) for held in range(4)]
    each: dict[str, Decimal] = {}
    for line in billed:
        for currency, amount in amounts_of([line], bases, {SESSIONS[0]: LISTS[0]}).items():
            each = total(each, currency, amount)
    together = amounts_of(billed, bases, {SESSIONS[0]: LISTS[0]})
    assert {key: value for key, value in together.items() if value} == {k: v for k, v in each.items() if v}


def test_files_survive_json_and_every_rule_holds() -> None:
    for file in (whole()[0], proof()):
        again = StatementFile.from_json(json.dumps(file.to_document()))
        assert again.to_document() == file.to_document()
        assert broken(again) == []
        assert [one.rule for one in check_statement_file(again)][-3:] in (
            ["bill_lines", "bill_root", "amounts"],
            ["price_lists", "bill_inclusion", "bill_receipt"],
        )


def test_a_file_of_an_earlier_version_is_judged_without_prices() -> None:
    document = whole()[0].to_document()
    del document["bill"]
    earlier = StatementFile.from_document(document)
    assert broken(earlier) == []
    assert "amounts" not in {one.rule for one in check_statement_file(earlier)}


def leaves_in(document: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[tuple[Any, ...], Any]]:
    if isinstance(document, dict | list):
        for key, value in document.items() if isinstance(document, dict) else enumerate(document):
            yield from leaves_in(value, (*path, key))
    else:
        yield path, document


def altered(value: Any) -> Any:
    if isinstance(value, str):
        if value.startswith("0x") and len(value) > 2:
            # the last digit but three: of a signature, s and not v; of an address, whatever its checksum then says
            return value[:-4] + ("0" if value[-4] != "0" else "1") + value[-3:]
        return value + "1"
    return not value if isinstance(value, bool) else (value or 0) + 1


@pytest.mark.parametrize("make", [lambda: whole()[0], proof])
def test_whatever_is_altered_in_a_file_breaks_a_rule(make: Any) -> None:
    document = make().to_document()
    unfound = []
    for path, value in leaves_in(document):
        changed = json.loads(json.dumps(document))
        part = changed
        for key in path[:-1]:
            part = part[key]
        part[path[-1]] = altered(value)
        try:
            if not broken(StatementFile.from_document(changed)):
                unfound.append((path, value))
        except MalformedError:
            pass
    # nothing in a file is without somebody's signature over it
    assert [one for one in unfound if "standIn" not in one[0]] == []


@pytest.mark.parametrize("key", ["priceLists", "bases", "lines"])
def test_what_is_left_out_of_a_bill_breaks_a_rule(key: str) -> None:
    document = whole()[0].to_document()
    for number in range(len(document["bill"][key])):
        changed = json.loads(json.dumps(document))
        del changed["bill"][key][number]
        with suppress(MalformedError):
            assert broken(StatementFile.from_document(changed)), (key, number)


def test_a_bootstrap_that_signs_other_amounts_is_told_apart() -> None:
    file, _, _ = whole()
    part = bill_of(file)
    assert broken(signed_again(file, part, amounts="EUR=0.1\nUSD=0.1")) == ["amounts"]
    assert broken(signed_again(file, part, statement_hash=bytes(32))) == ["bill_statement"]
    assert broken(signed_again(file, part, root=bytes(32))) == ["bill_root"]
    assert broken(signed_again(file, part, node=STRANGER.address)) == ["bill_account"]
    foreign = replace(part, signature=STRANGER.sign(part.bill.digest(CHAIN_ID)))
    assert broken(replace(file, bill=foreign)) == ["bill_signer"]


def test_a_list_that_the_node_did_not_sign_or_signed_for_another_session_is_told_apart() -> None:
    file, _, _ = whole()
    part = bill_of(file)
    cheap = Prices.of_models("USD", {"RTX 4090": "0.0001", "H100": "0.0001"})
    own = sign_price_list(cheap, SESSIONS[0], STRANGER, CHAIN_ID)
    assert "price_lists" in broken(replace(file, bill=replace(part, lists=(own, SIGNED[1]))))
    # two lists for one session: which of them holds is not for the file to say
    twice = (*SIGNED, sign_price_list(cheap, SESSIONS[0], NODE, CHAIN_ID))
    assert "price_lists" in broken(replace(file, bill=replace(part, lists=twice)))


def test_a_receipt_says_by_which_session_and_gpus_it_is_priced() -> None:
    """A bootstrap can state a cheaper session or card and sign it; who holds the receipt shows it."""
    file, _, _ = whole()
    part = bill_of(file)
    index = 2
    assert file.lines is not None
    line = file.lines[index]._replace(receipt_hash=receipt_file(index).receipt.receipt.digest(CHAIN_ID))
    file = replace(file, lines=(*file.lines[:index], line, *file.lines[index + 1 :]))

    def held(part: BillPart) -> list[str]:
        results = check_held(replace(file, bill=part), receipt_file(index))
        return [one.rule for one in results if not one.holds and one.rule.startswith("held_b")]

    assert part.lines is not None
    assert held(part) == []
    bases = list(part.bases)
    place = part.lines[index]
    bases[place] = bases[place]._replace(session=SESSIONS[2])
    assert held(replace(part, bases=tuple(bases))) == ["held_basis"]
    bases[place] = part.bases[place]._replace(gpus=((TWO, "RTX4090"),))
    assert held(replace(part, bases=tuple(bases))) == ["held_basis"]
    assert held(replace(part, lines=None)) == ["held_basis"]


def test_amounts_without_what_they_follow_from_are_not_taken_beside_all_lines() -> None:
    file, _, _ = whole()
    assert "bill_lines" in broken(signed_again(file, replace(bill_of(file), lines=None), amounts="USD=0.1"))


@pytest.mark.parametrize(
    "change",
    [
        {"bill": None},
        {"bases": {}},
        {"bases": [["0x00", []]]},
        {"bases": [["0x" + "00" * 32, [["0x" + "00" * 32, 7]]]]},
        {"bases": [["0x" + "00" * 32, [["0x" + "00" * 32, "x" * 200]]]]},
        {"bases": [["0x" + "00" * 32, [["0x" + "00" * 32, "\ud800"]]]]},
        {"bases": [["0x" + "00" * 32, [["0x" + "00" * 32, "x"]] * 300]]},
        {"lines": [99]},
        {"lines": [True]},
        {"lines": "0"},
        {"path": ["0x" + "00" * 32] * 65},
        {"priceLists": [{}]},
        {"priceLists": None},
    ],
)
def test_a_malformed_bill_is_refused(change: dict[str, Any]) -> None:
    document = whole()[0].to_document()
    document["bill"] |= change
    with pytest.raises(MalformedError):
        StatementFile.from_document(document)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=4),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=10,
)


@given(st.sampled_from(["bill", "priceLists", "bases", "lines", "path"]), JSON)
def test_any_json_is_a_bill_or_malformed(key: str, value: object) -> None:
    document = whole()[0].to_document()
    document["bill"] = {**document["bill"], key: value}
    try:
        file = StatementFile.from_document(document)
    except MalformedError:
        return
    assert check_statement_file(file)
