"""The golden vectors: the code makes them, and reads them back."""

from __future__ import annotations

import json
from typing import Any

import pytest

from ngpu_protocol.acknowledgements import ACKNOWLEDGEMENT_TYPE, SignedAcknowledgement
from ngpu_protocol.control import UnknownMessage, decode_control, decode_receipts, encode_message
from ngpu_protocol.dispute_file import Finding, check_dispute_file, from_document
from ngpu_protocol.identity import address_of_peer_id, address_of_public_key
from ngpu_protocol.orders import ORDER_TYPE, SignedOrder
from ngpu_protocol.receipt_file import ReceiptFile, check_receipt_file
from ngpu_protocol.receipts import RECEIPT_TYPE, SignedReceipt
from ngpu_protocol.statements import STATEMENT_TYPE, StatementFile, check_statement_file
from tests.support.signed_types import signed_types
from tests.vectors import generate


def stored(name: str) -> Any:
    return json.loads((generate.FOLDER / name).read_text())


@pytest.mark.parametrize("name", list(generate.documents()))
def test_vectors_are_what_the_code_makes(name: str) -> None:
    made = json.loads(json.dumps(generate.documents()[name]))
    assert made == stored(name), "the wire changed; if that is meant, run python -m tests.vectors.generate"


def test_no_vector_file_is_forgotten() -> None:
    with_numpy = {"challenge.json"}  # the prover's numbers, held by tests/unit/challenge
    assert {path.name for path in generate.FOLDER.glob("*.json")} == set(generate.documents()) | with_numpy


@pytest.mark.parametrize(
    ("name", "signed", "signed_type"),
    [
        ("orders.json", SignedOrder, ORDER_TYPE),
        ("receipts.json", SignedReceipt, RECEIPT_TYPE),
        ("acknowledgements.json", SignedAcknowledgement, ACKNOWLEDGEMENT_TYPE),
    ],
)
def test_stored_records_decode_to_their_fields_and_signer(name: str, signed: Any, signed_type: Any) -> None:
    document = stored(name)
    for vector in document["vectors"]:
        received = signed.decode(vector["text"])
        record, signature = signed_type.from_json(vector["record"])
        assert (getattr(received, signed_type.what), received.signature) == (record, signature)
        assert "0x" + record.digest(document["chainId"]).hex() == vector["digest"]
        assert received.signer(document["chainId"]) == document["signer"]


def test_stored_messages_decode_and_encode_to_the_same_bytes() -> None:
    for vector in stored("messages.json"):
        data = bytes.fromhex(vector["msgpack"][2:])
        message = decode_control(data)
        if isinstance(message, UnknownMessage):
            message = decode_receipts(data)  # type: ignore[assignment]
        assert type(message).__name__ == vector["type"]
        assert encode_message(message) == data  # type: ignore[arg-type]


def test_messages_of_the_first_version_are_still_read() -> None:
    for vector in stored("earlier/messages-1.json"):
        data = bytes.fromhex(vector["msgpack"][2:])
        message = decode_control(data)
        if isinstance(message, UnknownMessage):
            message = decode_receipts(data)  # type: ignore[assignment]
        assert type(message).__name__ == vector["type"]


def test_stored_identities_follow_from_key_and_peer_id() -> None:
    for vector in stored("identity.json"):
        assert address_of_peer_id(vector["peerId"]) == vector["address"]
        assert address_of_public_key(bytes.fromhex(vector["publicKey"][2:])) == vector["address"]


def test_well_known_address_of_the_key_one() -> None:
    assert stored("identity.json")[0]["address"] == "0x7E5F4552091A69125d5DfCb7b8C2659029395Bdf"


@pytest.mark.parametrize("name", ["receipt-file.json", "receipt-file-by-sibling.json"])
def test_stored_receipt_files_hold_in_every_rule(name: str) -> None:
    file = ReceiptFile.from_document(stored(name))
    assert all(result.holds for result in check_receipt_file(file))


@pytest.mark.parametrize(
    ("kind", "shows"), [("dispute", Finding.STATED), ("equivocation", Finding.PROVEN), ("withheld", Finding.STATED)]
)
def test_stored_dispute_files_show_what_they_show(kind: str, shows: Finding) -> None:
    results, finding = check_dispute_file(from_document(stored("dispute-files.json")[kind]))
    assert (finding, [one for one in results if not one.holds]) == (shows, [])


def test_a_stored_statement_with_its_bill_holds_in_every_rule() -> None:
    results = check_statement_file(StatementFile.from_document(stored("bills.json")["file"]))
    assert [one for one in results if not one.holds] == []
    assert {"root", "bill_root", "amounts"} <= {one.rule for one in results}


def test_every_signed_type_has_vectors() -> None:
    """A type that is signed and not written down cannot be checked by anybody else's program."""
    written = {document["type"] for path in generate.FOLDER.glob("*.json")
               if isinstance(document := json.loads(path.read_text()), dict) and "type" in document}  # fmt: skip
    written.add(STATEMENT_TYPE.text)  # statements.json, whose file has no such key
    types = signed_types()
    assert types == written
    assert len(types) == 10
