"""Accounts, orders and receipts that node tests start from; each test changes the one thing it is about."""

from __future__ import annotations

import dataclasses
import hashlib
from typing import Any

from ngpu_protocol.identity import Account, Address
from ngpu_protocol.networks import network_named
from ngpu_protocol.orders import SignedOrder, TaskOrder, sign_order
from ngpu_protocol.receipts import FIRST_PREVIOUS, Meter, Outcome, TaskReceipt

NODE = Account.from_key(b"\x01" * 32)
BOOTSTRAP = Account.from_key(b"\x02" * 32)
SIBLING = Account.from_key(b"\x03" * 32)
STRANGER = Account.from_key(b"\x04" * 32)
CHAIN_ID = network_named("local").chain_id
SESSION = b"\x55" * 32
NOW_MS = 1_790_000_000_000
EMPTY_HASH = hashlib.sha256(b"").digest()


def task_id(number: int = 0) -> str:
    return f"20261120_18_00_00_{number:020d}"


def an_order(**changes: Any) -> TaskOrder:
    order = TaskOrder(
        task_id=task_id(),
        attempt=1,
        bootstrap=BOOTSTRAP.address,
        node=NODE.address,
        session=SESSION,
        workspace="7",
        revision=1,
        port=8080,
        method="POST",
        target="/echo?x=1",
        detach=False,
        issued_at_ms=NOW_MS - 10,
        deadline_ms=NOW_MS + 60_000,
    )
    return dataclasses.replace(order, **changes)


def signed_order(account: Account = BOOTSTRAP, **changes: Any) -> SignedOrder:
    return sign_order(an_order(**{"bootstrap": account.address, **changes}), account, CHAIN_ID)


def draft_receipt(order: TaskOrder, *, node: Address = NODE.address, **changes: Any) -> TaskReceipt:
    receipt = TaskReceipt(
        order_hash=order.digest(CHAIN_ID),
        node=node,
        bootstrap=order.bootstrap,
        sequence=0,
        previous=FIRST_PREVIOUS,
        image_digest=bytes(32),
        request_hash=EMPTY_HASH,
        request_bytes=0,
        status=200,
        response_hash=EMPTY_HASH,
        response_bytes=0,
        outcome=Outcome.COMPLETE,
        started_at_ms=NOW_MS,
        ended_at_ms=NOW_MS + 5,
        duration_ms=5,
        gpus=(),
        reserved_gpu_ms=0,
        busy_gpu_ms=0,
        meter=Meter.NONE,
    )
    return dataclasses.replace(receipt, **changes)
