"""ethers.js verifies what we sign, and we verify what it signs."""

from __future__ import annotations

import json
import random
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from ngpu_protocol.acknowledgements import ACKNOWLEDGEMENT_TYPE
from ngpu_protocol.identity import Account, parse_address, recover
from ngpu_protocol.networks import network_named
from ngpu_protocol.orders import ORDER_TYPE
from ngpu_protocol.receipts import RECEIPT_TYPE
from ngpu_protocol.typed_data import SignedType, domain_separator
from tests.interop import npm
from tests.vectors import generate

FOLDER = Path(__file__).parent / "ethers"
CHAIN_ID = network_named("local").chain_id
US = Account.from_key(bytes.fromhex("11" * 32))
THEM = Account.from_key(bytes.fromhex("22" * 32))
TEXTS = ["", "POST", "/a?b=c&d=%20", "caf\u00e9 \u4e16\u754c \U0001f680", "\x00\x7f\u2028", "x" * 5000]

pytestmark = pytest.mark.needs_node


@dataclass(frozen=True)
class Case:
    """One record, our signature of it, and what ethers answered."""

    signed_type: SignedType[Any]
    record: Any
    signature: bytes
    answer: dict[str, str]


def random_value(kind: str, source: random.Random) -> Any:
    if kind.startswith("uint"):
        most = 2 ** int(kind[4:]) - 1
        return source.choice([0, 1, most, source.randint(0, most)])
    match kind:
        case "bool":
            return source.random() < 0.5
        case "string":
            return source.choice(TEXTS)
        case "address":
            return parse_address(source.randbytes(20))
        case "bytes32":
            return source.choice([bytes(32), source.randbytes(32)])
        case "bytes32[]":
            return tuple(source.randbytes(32) for _ in range(source.choice([0, 1, 2, 8])))
    raise AssertionError(kind)


def some_records() -> list[tuple[SignedType[Any], Any]]:
    """Return the golden records and twenty random ones of each type."""
    golden = [
        *((ORDER_TYPE, record) for record in generate.ORDERS.values()),
        *((RECEIPT_TYPE, record) for record in generate.RECEIPTS.values()),
        *((ACKNOWLEDGEMENT_TYPE, record) for record in generate.ACKNOWLEDGEMENTS.values()),
    ]
    source = random.Random(712)
    types: list[SignedType[Any]] = [ORDER_TYPE, RECEIPT_TYPE, ACKNOWLEDGEMENT_TYPE]
    made = [
        (signed_type, signed_type.record(*(random_value(kind, source) for kind, _ in signed_type.fields)))
        for signed_type in types
        for _ in range(20)
    ]
    return [*golden, *made]


@pytest.fixture(scope="module")
def answers() -> tuple[dict[str, Any], list[Case]]:
    npm.install(FOLDER)
    records = some_records()
    signatures = [US.sign(record.digest(CHAIN_ID)) for _, record in records]
    sent = []
    for (signed_type, record), signature in zip(records, signatures, strict=True):
        message = signed_type.to_json(record, signature)
        message.pop("signature")
        # a JavaScript number is exact to 2**53 only
        exact = {name: str(value) if type(value) is int else value for name, value in message.items()}
        sent.append({"type": signed_type.text, "message": exact, "signature": "0x" + signature.hex()})
    request = {"chainId": CHAIN_ID, "privateKey": "0x" + THEM.key_bytes.hex(), "records": sent}
    answer = json.loads(npm.run(FOLDER, "sign_and_verify.mjs", json.dumps(request)))
    assert len(answer["records"]) == len(records)
    cases = [
        Case(signed_type, record, signature, given)
        for (signed_type, record), signature, given in zip(records, signatures, answer["records"], strict=True)
    ]
    return answer, cases


def test_hashes_agree(answers: tuple[dict[str, Any], list[Case]]) -> None:
    answer, cases = answers
    assert answer["domainSeparator"] == "0x" + domain_separator(CHAIN_ID).hex()
    for case in cases:
        assert case.answer["structHash"] == "0x" + case.record.struct_hash().hex(), case.record
        assert case.answer["digest"] == "0x" + case.record.digest(CHAIN_ID).hex(), case.record


def test_ethers_verifies_our_signatures(answers: tuple[dict[str, Any], list[Case]]) -> None:
    for case in answers[1]:
        assert case.answer["signer"] == US.address


def test_we_verify_what_ethers_signs(answers: tuple[dict[str, Any], list[Case]]) -> None:
    for case in answers[1]:
        signature = bytes.fromhex(case.answer["signature"][2:])
        assert recover(case.record.digest(CHAIN_ID), signature) == THEM.address
        assert THEM.sign(case.record.digest(CHAIN_ID)) == signature  # both take the nonce by RFC 6979


def test_keys_and_addresses_agree(answers: tuple[dict[str, Any], list[Case]]) -> None:
    assert answers[0]["address"] == THEM.address
    assert answers[0]["publicKey"] == "0x" + THEM.public_key.hex()


def test_lock_pins_every_package_and_names_no_registry() -> None:
    lock = json.loads((FOLDER / "package-lock.json").read_text())
    for path, package in lock["packages"].items():
        assert path == "" or re.fullmatch(r"sha512-\S+", package["integrity"]), path
        assert "resolved" not in package, path
