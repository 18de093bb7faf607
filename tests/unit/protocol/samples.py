"""Valid records to start from, and hypothesis strategies for any record."""

from __future__ import annotations

import hashlib
from dataclasses import replace
from typing import Any

from hypothesis import strategies as st

from ngpu_protocol.acknowledgements import Acknowledgement, VerdictKind
from ngpu_protocol.identity import Account, gpu_id, parse_address
from ngpu_protocol.networks import network_named
from ngpu_protocol.orders import TaskOrder
from ngpu_protocol.receipts import RECEIPT_TYPE, Meter, Outcome, SignedReceipt, TaskReceipt
from ngpu_protocol.typed_data import MAX_NUMBER
from ngpu_protocol.verification import Observed

CHAIN_ID = network_named("local").chain_id
NODE = Account.from_key(bytes([1]) * 32)
BOOTSTRAP = Account.from_key(bytes([2]) * 32)
STRANGER = Account.from_key(bytes([3]) * 32)

REQUEST = b'{"prompt": "a red bicycle"}'
RESPONSE = b'{"image": "iVBORw0KGgo="}'
SENT_AT_MS = 1_750_000_000_000


def sha256(data: bytes) -> bytes:
    return hashlib.sha256(data).digest()


def an_order(**changes: Any) -> TaskOrder:
    order = TaskOrder(
        task_id="20250615_23_06_40_01234567890123456789",
        attempt=1,
        bootstrap=BOOTSTRAP.address,
        node=NODE.address,
        session=bytes(range(32)),
        workspace="1001",
        revision=3,
        port=8080,
        method="POST",
        target="/sdapi/v1/txt2img?steps=20",
        detach=False,
        issued_at_ms=SENT_AT_MS - 5,
        deadline_ms=SENT_AT_MS + 300_000,
    )
    return replace(order, **changes)


def a_receipt(order: TaskOrder | None = None, **changes: Any) -> TaskReceipt:
    order = order or an_order()
    receipt = TaskReceipt(
        order_hash=order.digest(CHAIN_ID),
        node=NODE.address,
        bootstrap=BOOTSTRAP.address,
        sequence=7,
        previous=sha256(b"receipt 6"),
        image_digest=sha256(b"image"),
        request_hash=sha256(REQUEST),
        request_bytes=len(REQUEST),
        status=200,
        response_hash=sha256(RESPONSE),
        response_bytes=len(RESPONSE),
        outcome=Outcome.COMPLETE,
        started_at_ms=SENT_AT_MS + 3,
        ended_at_ms=SENT_AT_MS + 903,
        duration_ms=900,
        gpus=(gpu_id(NODE.address, "GPU-0"), gpu_id(NODE.address, "GPU-1")),
        reserved_gpu_ms=1800,
        busy_gpu_ms=1234,
        meter=Meter.NVML_PROCESS,
    )
    return replace(receipt, **changes)


def an_acknowledgement(receipt: TaskReceipt | None = None, **changes: Any) -> Acknowledgement:
    receipt = receipt or a_receipt()
    acknowledgement = Acknowledgement(
        receipt_hash=receipt.digest(CHAIN_ID),
        node=receipt.node,
        bootstrap=BOOTSTRAP.address,
        sequence=receipt.sequence,
        verdict=VerdictKind.VERIFIED,
        reason="",
        at_ms=SENT_AT_MS + 910,
    )
    return replace(acknowledgement, **changes)


def everything_seen(**changes: Any) -> Observed:
    """What a bootstrap saw of the sample order's attempt."""
    seen = Observed(
        request_hash=sha256(REQUEST),
        request_bytes=len(REQUEST),
        status=200,
        response_hash=sha256(RESPONSE),
        response_bytes=len(RESPONSE),
        sent_at_ms=SENT_AT_MS,
        ended_at_ms=SENT_AT_MS + 905,
    )
    return replace(seen, **changes)


def nothing_seen() -> Observed:
    return Observed(None, None, None, None, None, None, None)


def signed_by(account: Account, receipt: TaskReceipt) -> SignedReceipt:
    """Sign without `sign_receipt`'s refusal to sign another node's receipt, as a forger would."""
    signature = account.sign(receipt.digest(CHAIN_ID))
    return SignedReceipt(receipt, signature, RECEIPT_TYPE.pack(receipt, signature))


_KINDS: dict[str, st.SearchStrategy[Any]] = {
    "uint16": st.integers(0, 2**16 - 1),
    "uint32": st.integers(0, 2**32 - 1),
    "uint64": st.integers(0, MAX_NUMBER),
    "bool": st.booleans(),
    "string": st.text(st.characters(codec="utf-8"), max_size=300),
    "address": st.binary(min_size=20, max_size=20).map(parse_address),
    "bytes32": st.binary(min_size=32, max_size=32),
    "bytes32[]": st.lists(st.binary(min_size=32, max_size=32), max_size=5).map(tuple),
}


def records_of(signed_type: Any) -> st.SearchStrategy[Any]:
    """Return any record of a `SignedType`."""
    return st.builds(signed_type.record, *(_KINDS[kind] for kind, _ in signed_type.fields))
