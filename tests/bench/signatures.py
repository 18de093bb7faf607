"""Measures what orders and receipts cost on one core: `python -m tests.bench.signatures [--json FILE]`.

Goals: signing with encoding, and verifying with recovery, each under 0.15 ms. The last line puts eth-account's general
encoder beside ours.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from ngpu_protocol.identity import keccak, recover
from ngpu_protocol.orders import SignedOrder, sign_order
from ngpu_protocol.receipts import SignedReceipt, sign_receipt
from ngpu_protocol.verification import Observed, verify_receipt
from tests.vectors.generate import AT_MS, BOOTSTRAP, FIRST, NETWORK, NODE, ORDER

GOAL_US = 150.0


def microseconds(action: Callable[[int], object], *, rounds: int = 5, calls: int = 1000) -> float:
    """Return the best mean over *rounds* of *calls*; *action* gets a number, never the same twice."""
    best = float("inf")
    for number in range(rounds):
        start = time.perf_counter()
        for call in range(calls):
            action(number * calls + call)
        best = min(best, time.perf_counter() - start)
    return best / calls * 1e6


def measure() -> dict[str, float]:
    """Return microseconds a call by what is called."""
    chain_id = NETWORK.chain_id
    orders = [replace(ORDER, task_id=f"20250615_23_06_40_{number:020d}", issued_at_ms=number) for number in range(5000)]
    receipts = [replace(FIRST, order_hash=keccak(b"%d" % number), sequence=number + 1) for number in range(5000)]
    order_texts = [sign_order(order, BOOTSTRAP, chain_id).encode() for order in orders]
    matching = [replace(FIRST, order_hash=order.digest(chain_id)) for order in orders]
    receipt_texts = [sign_receipt(receipt, NODE, chain_id).encode() for receipt in matching]
    seen = Observed(
        FIRST.request_hash, FIRST.request_bytes, 200, FIRST.response_hash, FIRST.response_bytes, AT_MS, AT_MS + 905
    )
    digests = [keccak(b"digest %d" % number) for number in range(5000)]
    signatures = [NODE.sign(digest) for digest in digests]

    def admit(number: int) -> None:
        signed = SignedOrder.decode(order_texts[number])
        assert signed.signer(chain_id) == signed.order.bootstrap

    def judge(number: int) -> None:
        verdict = verify_receipt(
            SignedReceipt.decode(receipt_texts[number]), orders[number], seen, last=None, chain_id=chain_id
        )
        assert not verdict.rule, verdict

    return {
        "keccak of 100 bytes": microseconds(lambda number: keccak(b"%0100d" % number)),
        "sign a digest": microseconds(lambda number: NODE.sign(digests[number])),
        "recover a signer": microseconds(lambda number: recover(digests[number], signatures[number])),
        "sign an order: hash, sign, encode": microseconds(
            lambda number: sign_order(orders[number], BOOTSTRAP, chain_id).encode()
        ),
        "sign a receipt: hash, sign, encode": microseconds(
            lambda number: sign_receipt(receipts[number], NODE, chain_id).encode()
        ),
        "admit an order: decode, hash, recover": microseconds(admit),
        "verify a receipt: decode, hash, recover, rules": microseconds(judge),
    }


def measure_eth_account() -> float:
    """Return microseconds that eth-account takes to encode and sign the same receipt."""
    from eth_account import Account as ForeignAccount
    from eth_account.messages import encode_typed_data

    from ngpu_protocol.receipts import RECEIPT_TYPE

    document = RECEIPT_TYPE.to_json(FIRST, bytes(65))
    document.pop("signature")
    types = {FIRST.__class__.__name__: [{"name": name, "type": kind} for kind, name in RECEIPT_TYPE.fields]}
    domain = {"name": "NGPU", "version": "1", "chainId": NETWORK.chain_id}
    account = ForeignAccount.from_key(NODE.key_bytes)

    def sign(number: int) -> None:
        message = {**document, "sequence": number}
        account.sign_message(encode_typed_data(domain_data=domain, message_types=types, message_data=message))

    return microseconds(sign, rounds=2, calls=100)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=Path, help="also write the figures to this file")
    arguments = parser.parse_args()
    figures = measure()
    figures["eth-account: hash and sign a receipt"] = measure_eth_account()
    for name, value in figures.items():
        print(f"{name:48} {value:8.1f} us")
    slowest = max(value for name, value in figures.items() if not name.startswith("eth-account"))
    print(
        f"{'slowest of ours':48} {slowest:8.1f} us, goal under {GOAL_US:g}: {'met' if slowest < GOAL_US else 'MISSED'}"
    )
    if arguments.json is not None:
        arguments.json.write_text(json.dumps({"microseconds": figures, "goal_us": GOAL_US}, indent=2) + "\n")


if __name__ == "__main__":
    main()
