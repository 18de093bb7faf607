"""A contract on an EVM agrees with what peers sign: each record there is, that a receipt is in a statement, that it was
acknowledged by one who may, and by which price list it is paid."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest

from ngpu_protocol.acknowledgements import ACKNOWLEDGEMENT_TYPE, VerdictKind
from ngpu_protocol.bills import BILL_TYPE
from ngpu_protocol.identity import Account, keccak
from ngpu_protocol.losses import LOSS_TYPE
from ngpu_protocol.merkle import inclusion_path, leaf_hash
from ngpu_protocol.networks import network_named
from ngpu_protocol.node_bindings import NODE_BINDING_TYPE
from ngpu_protocol.observations import OBSERVATION_TYPE
from ngpu_protocol.orders import ORDER_TYPE
from ngpu_protocol.prices import PRICE_LIST_TYPE
from ngpu_protocol.receipts import RECEIPT_TYPE, TaskReceipt, sign_receipt
from ngpu_protocol.stand_ins import STAND_IN_TYPE
from ngpu_protocol.statements import STATEMENT_TYPE, Statement, StatementLine, draw_up, line_of, sign_statement
from tests.interop import npm
from tests.support.signed_types import signed_types
from tests.vectors.generate import (
    AT_MS,
    BILL,
    BINDING,
    BOOTSTRAP,
    FIRST,
    LOSS,
    NODE,
    OBSERVATION,
    ORDER,
    PRICE_LIST,
    RECEIPTS,
    SIBLING,
    STAND_IN,
    VERIFIED,
)

FOLDER = Path(__file__).parent / "evm"
CHAIN_ID = network_named("local").chain_id
STRANGER = Account.from_key(keccak(b"stranger"))
SIZES = (1, 2, 3, 7, 8)
# the order of the curve: s and its twin (n - s) both verify in plain ECDSA
CURVE_ORDER = 0xFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFEBAAEDCE6AF48A03BBFD25E8CD0364141

pytestmark = pytest.mark.needs_node


@dataclass(frozen=True)
class Proof:
    """What `provenBilledMs` takes."""

    statement: Statement
    statement_signature: bytes
    index: int
    line: StatementLine
    path: tuple[bytes, ...]
    receipt: TaskReceipt
    receipt_signature: bytes

    def arguments(self) -> list[Any]:
        return [
            _fields(STATEMENT_TYPE, self.statement),
            _hex(self.statement_signature),
            self.index,
            _hex(self.line.encode()),
            [_hex(hash) for hash in self.path],
            _fields(RECEIPT_TYPE, self.receipt),
            _hex(self.receipt_signature),
        ]


def _hex(data: bytes) -> str:
    return "0x" + data.hex()


def _fields(signed_type: Any, record: Any) -> dict[str, Any]:
    document: dict[str, Any] = signed_type.to_json(record, bytes(65))
    del document["signature"]
    return document


def a_proof(size: int, index: int) -> Proof:
    receipts = [replace(FIRST, sequence=number, busy_gpu_ms=100 + number) for number in range(1, size + 1)]
    lines = [line_of(receipt, VerdictKind.VERIFIED, CHAIN_ID) for receipt in receipts]
    statement, _ = draw_up(
        lines, node=NODE.address, bootstrap=BOOTSTRAP.address, from_ms=AT_MS, to_ms=AT_MS + 10**6, at_ms=AT_MS + 10**6
    )
    return Proof(
        statement,
        sign_statement(statement, BOOTSTRAP, CHAIN_ID),
        index,
        lines[index],
        inclusion_path([leaf_hash(line.encode()) for line in lines], index),
        receipts[index],
        sign_receipt(receipts[index], NODE, CHAIN_ID).signature,
    )


def twin(signature: bytes) -> bytes:
    """The other signature that plain ECDSA takes for the same: it must not be a second proof."""
    s = int.from_bytes(signature[32:64], "big")
    return signature[:32] + (CURVE_ORDER - s).to_bytes(32, "big") + bytes([55 - signature[64]])


FORGERIES: dict[str, tuple[Callable[[Proof], Proof], str]] = {
    "a statement another signed": (
        lambda p: replace(p, statement_signature=STRANGER.sign(p.statement.digest(CHAIN_ID))),
        "statement signer",
    ),
    "a statement changed after it was signed": (
        lambda p: replace(p, statement=replace(p.statement, billed_gpu_ms=1)),
        "statement signer",
    ),
    "a statement of another network": (
        lambda p: replace(p, statement_signature=BOOTSTRAP.sign(p.statement.digest(CHAIN_ID + 1))),
        "statement signer",
    ),
    "the twin of a signature": (
        lambda p: replace(p, statement_signature=twin(p.statement_signature)),
        "statement signer",
    ),
    "a receipt the node did not sign": (
        lambda p: replace(p, receipt_signature=STRANGER.sign(p.receipt.digest(CHAIN_ID))),
        "receipt signer",
    ),
    "a receipt of another node": (
        lambda p: replace(p, receipt=replace(p.receipt, node=STRANGER.address)),
        "another account",
    ),
    "a line that bills more": (
        lambda p: replace(p, line=p.line._replace(billed_gpu_ms=10**9)),
        "not included",
    ),
    "another place": (lambda p: replace(p, index=p.index + 1), "not included"),
    "a path cut short": (lambda p: replace(p, path=p.path[:-1]), "not included"),
    "a path with one more": (lambda p: replace(p, path=(*p.path, bytes(32))), "not included"),
    "another receipt of the same node": (
        lambda p: replace(
            p, receipt=FIRST, receipt_signature=sign_receipt(FIRST, NODE, CHAIN_ID).signature
        ),
        "another receipt",
    ),
}  # fmt: skip


def signed(signed_type: Any, record: Any, account: Account, chain_id: int = CHAIN_ID) -> list[Any]:
    """A record and its signature, as the contract takes them."""
    return [_fields(signed_type, record), _hex(account.sign(record.digest(chain_id)))]


NO_STAND_IN = [{"bootstrap": "0x" + "00" * 20, "sibling": "0x" + "00" * 20, "atMs": 0}, "0x"]
RECEIPT = signed(RECEIPT_TYPE, FIRST, NODE)
BY_SIBLING = replace(VERIFIED, bootstrap=SIBLING.address)
LIST = PRICE_LIST.price_list
LATER = replace(LIST, session=keccak(b"a later session"), per_second="A100-80G=0.05\nRTX4090=0.012")

RECORDS: dict[str, tuple[Any, Any, Account]] = {
    "orderHash": (ORDER_TYPE, ORDER, BOOTSTRAP),
    "receiptHash": (RECEIPT_TYPE, FIRST, NODE),
    "acknowledgementHash": (ACKNOWLEDGEMENT_TYPE, VERIFIED, BOOTSTRAP),
    "standInHash": (STAND_IN_TYPE, STAND_IN.stand_in, BOOTSTRAP),
    "priceListHash": (PRICE_LIST_TYPE, LIST, NODE),
    "observationHash": (OBSERVATION_TYPE, OBSERVATION.observation, BOOTSTRAP),
    "jobLossHash": (LOSS_TYPE, LOSS.loss, BOOTSTRAP),
    "nodeBindingHash": (NODE_BINDING_TYPE, BINDING, NODE),
    "billHash": (BILL_TYPE, BILL.bill, BOOTSTRAP),
    "statementHash": (STATEMENT_TYPE, a_proof(3, 1).statement, BOOTSTRAP),
}

# what a contract is asked about receipts, and its answer: a value, or why it reverts
ASKED: dict[str, tuple[str, list[Any], dict[str, str]]] = {
    "acknowledged by the one that ordered": (
        "acknowledged",
        [*RECEIPT, *signed(ACKNOWLEDGEMENT_TYPE, VERIFIED, BOOTSTRAP), *NO_STAND_IN],
        {"value": "verified"},
    ),
    "acknowledged by a sibling with its word": (
        "acknowledged",
        [
            *RECEIPT,
            *signed(ACKNOWLEDGEMENT_TYPE, BY_SIBLING, SIBLING),
            *signed(STAND_IN_TYPE, STAND_IN.stand_in, BOOTSTRAP),
        ],
        {"value": "verified"},
    ),
    "acknowledged by a stranger": (
        "acknowledged",
        [*RECEIPT, *signed(ACKNOWLEDGEMENT_TYPE, BY_SIBLING, SIBLING), *NO_STAND_IN],
        {"reverted": "no stand-in"},
    ),
    "a stranger's word for himself": (
        "acknowledged",
        [
            *RECEIPT,
            *signed(ACKNOWLEDGEMENT_TYPE, BY_SIBLING, SIBLING),
            *signed(STAND_IN_TYPE, STAND_IN.stand_in, SIBLING),
        ],
        {"reverted": "stand-in signer"},
    ),
    "an acknowledgement the bootstrap did not sign": (
        "acknowledged",
        [*RECEIPT, *signed(ACKNOWLEDGEMENT_TYPE, VERIFIED, STRANGER), *NO_STAND_IN],
        {"reverted": "acknowledgement signer"},
    ),
    "an acknowledgement of another receipt": (
        "acknowledged",
        [
            *RECEIPT,
            *signed(ACKNOWLEDGEMENT_TYPE, replace(VERIFIED, receipt_hash=bytes(32)), BOOTSTRAP),
            *NO_STAND_IN,
        ],
        {"reverted": "another receipt"},
    ),
    "priced by the list of its session": (
        "pricedBy",
        [RECEIPT[0], *signed(ORDER_TYPE, ORDER, BOOTSTRAP), *signed(PRICE_LIST_TYPE, LIST, NODE)],
        {"value": LIST.per_second},
    ),
    "priced by a list published later": (
        "pricedBy",
        [RECEIPT[0], *signed(ORDER_TYPE, ORDER, BOOTSTRAP), *signed(PRICE_LIST_TYPE, LATER, NODE)],
        {"reverted": "list of another session"},
    ),
    "priced by a list and an order of that session": (
        "pricedBy",
        [
            RECEIPT[0],
            *signed(ORDER_TYPE, replace(ORDER, session=LATER.session), BOOTSTRAP),
            *signed(PRICE_LIST_TYPE, LATER, NODE),
        ],
        {"reverted": "another order"},
    ),
    "priced by a list the bootstrap made up": (
        "pricedBy",
        [RECEIPT[0], *signed(ORDER_TYPE, ORDER, BOOTSTRAP), *signed(PRICE_LIST_TYPE, LIST, BOOTSTRAP)],
        {"reverted": "list signer"},
    ),
    "priced by an order the bootstrap did not sign": (
        "pricedBy",
        [RECEIPT[0], *signed(ORDER_TYPE, ORDER, NODE), *signed(PRICE_LIST_TYPE, LIST, NODE)],
        {"reverted": "order signer"},
    ),
}


@pytest.fixture(scope="module")
def results() -> dict[str, dict[str, Any]]:
    """What the contract says to every call of this file, by the call's name: one compilation for all."""
    npm.install(FOLDER)
    calls: dict[str, tuple[str, list[Any]]] = {}
    for name, receipt in RECEIPTS.items():
        calls[f"hash of {name}"] = ("receiptHash", [_fields(RECEIPT_TYPE, receipt)])
    for size in SIZES:
        for index in range(size):
            calls[f"proof {index} of {size}"] = ("provenBilledMs", a_proof(size, index).arguments())
    for name, (forge, _) in FORGERIES.items():
        calls[f"forged: {name}"] = ("provenBilledMs", forge(a_proof(7, 3)).arguments())
    for method, (signed_type, record, account) in RECORDS.items():
        calls[method] = (method, [_fields(signed_type, record)])
        digest = _hex(record.digest(CHAIN_ID))
        calls[f"signer of {method}"] = ("signer", [digest, _hex(account.sign(record.digest(CHAIN_ID)))])
    for name, (method, arguments, _) in ASKED.items():
        calls[name] = (method, arguments)
    request = {
        "chainId": CHAIN_ID,
        "calls": [{"method": method, "arguments": arguments} for method, arguments in calls.values()],
    }
    answer = json.loads(npm.run(FOLDER, "verify.mjs", json.dumps(request), timeout_s=120))
    return dict(zip(calls, answer["results"], strict=True))


@pytest.mark.parametrize("name", list(RECEIPTS))
def test_a_contract_hashes_receipts_as_we_do(results: dict[str, dict[str, Any]], name: str) -> None:
    assert results[f"hash of {name}"]["value"] == _hex(RECEIPTS[name].digest(CHAIN_ID))


@pytest.mark.parametrize("size", SIZES)
def test_a_contract_finds_every_receipt_in_its_statement(results: dict[str, dict[str, Any]], size: int) -> None:
    for index in range(size):
        assert results[f"proof {index} of {size}"]["value"] == str(a_proof(size, index).line.billed_gpu_ms)


@pytest.mark.parametrize("name", list(FORGERIES))
def test_a_contract_refuses(results: dict[str, dict[str, Any]], name: str) -> None:
    assert results[f"forged: {name}"] == {"reverted": FORGERIES[name][1]}


@pytest.mark.parametrize("method", list(RECORDS))
def test_a_contract_hashes_each_signed_record_as_we_do_and_finds_its_signer(
    results: dict[str, dict[str, Any]], method: str
) -> None:
    _, record, account = RECORDS[method]
    assert results[method]["value"] == _hex(record.digest(CHAIN_ID))
    assert results[f"signer of {method}"]["value"] == account.address


def test_no_signed_record_is_left_out() -> None:
    solidity = (FOLDER / "NgpuVerifier.sol").read_text()
    checked = {signed_type.text for signed_type, _, _ in RECORDS.values()}
    assert checked == signed_types()
    assert all(f'"{text}"' in solidity for text in checked)


@pytest.mark.parametrize("name", list(ASKED))
def test_a_contract_says_who_acknowledged_and_what_prices_hold(results: dict[str, dict[str, Any]], name: str) -> None:
    answer = {key: value for key, value in results[name].items() if key != "gas"}
    assert answer == ASKED[name][2]


def test_lock_pins_every_package_and_names_no_registry() -> None:
    lock = json.loads((FOLDER / "package-lock.json").read_text())
    for path, package in lock["packages"].items():
        assert path == "" or re.fullmatch(r"sha512-\S+", package["integrity"]), path
        assert "resolved" not in package, path
