"""A contract on an EVM agrees with what peers sign: receipts, statements, and that a receipt is in a statement."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest

from ngpu_protocol.acknowledgements import VerdictKind
from ngpu_protocol.identity import Account, keccak
from ngpu_protocol.merkle import inclusion_path, leaf_hash
from ngpu_protocol.networks import network_named
from ngpu_protocol.receipts import RECEIPT_TYPE, TaskReceipt, sign_receipt
from ngpu_protocol.statements import STATEMENT_TYPE, Statement, StatementLine, draw_up, line_of, sign_statement
from tests.interop import npm
from tests.vectors.generate import AT_MS, BOOTSTRAP, FIRST, NODE, RECEIPTS

FOLDER = Path(__file__).parent / "evm"
CHAIN_ID = network_named("local").chain_id
STRANGER = Account.from_key(keccak(b"stranger"))
SIZES = (1, 2, 3, 7, 8)
# the order of the curve: s and its twin (n - s) both verify in plain ECDSA
ORDER = 0xFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFEBAAEDCE6AF48A03BBFD25E8CD0364141

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
    return signature[:32] + (ORDER - s).to_bytes(32, "big") + bytes([55 - signature[64]])


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


def test_lock_pins_every_package_and_names_no_registry() -> None:
    lock = json.loads((FOLDER / "package-lock.json").read_text())
    for path, package in lock["packages"].items():
        assert path == "" or re.fullmatch(r"sha512-\S+", package["integrity"]), path
        assert "resolved" not in package, path
