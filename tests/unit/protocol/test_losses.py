"""Losses: what a bootstrap signs about a job whose node is gone, and what of a file a reader may believe."""

from __future__ import annotations

from dataclasses import replace

import pytest
from eth_account import Account as EthAccount
from eth_account.messages import encode_typed_data

from ngpu_protocol.errors import MalformedError
from ngpu_protocol.identity import Account
from ngpu_protocol.losses import LOSS_TYPE, LossFile, SignedLoss, check_loss_file, sign_loss
from tests.vectors.generate import BOOTSTRAP, LOSS, NETWORK, SIBLING, STAND_IN, documents

FILE = LossFile.from_document(documents()["loss-file.json"])
CHAIN = NETWORK.chain_id


def broken(file: LossFile, siblings: tuple[str, ...] = ()) -> list[str]:
    return [one.rule for one in check_loss_file(file, siblings=siblings) if not one.holds]


def signed(by: Account = BOOTSTRAP, **changes: object) -> LossFile:
    loss = replace(FILE.loss.loss, bootstrap=by.address, **changes)  # type: ignore[arg-type]
    return replace(FILE, loss=sign_loss(loss, by, CHAIN))


def test_eth_account_makes_the_same_signature() -> None:
    types = [{"name": name, "type": kind} for kind, name in LOSS_TYPE.fields]
    message = encode_typed_data(
        full_message={
            "types": {
                "EIP712Domain": [
                    {"name": "name", "type": "string"},
                    {"name": "version", "type": "string"},
                    {"name": "chainId", "type": "uint256"},
                ],
                "JobLoss": types,
            },
            "primaryType": "JobLoss",
            "domain": {"name": "NGPU", "version": "1", "chainId": CHAIN},
            "message": {
                name: value for (_, name), value in zip(LOSS_TYPE.fields, LOSS_TYPE.values(LOSS.loss), strict=True)
            },
        }
    )
    assert EthAccount.recover_message(message, signature=LOSS.signature) == BOOTSTRAP.address


def test_a_file_comes_back_from_its_text_and_holds() -> None:
    assert LossFile.from_document(FILE.to_document()) == FILE
    assert SignedLoss.from_bytes(FILE.loss.wire) == FILE.loss
    assert FILE.is_of_its_order
    assert broken(FILE) == []
    assert broken(replace(FILE, receipt=None)) == []


def test_each_rule_is_broken_by_what_it_is_about() -> None:
    loss = FILE.loss.loss
    cases = [
        (signed(order_hash=b"\1" * 32), ["loss_order"]),
        (signed(task_id="20260101_00_00_00_00000000000000000001"), ["loss_task"]),
        (signed(node=SIBLING.address), ["loss_node"]),
        (signed(away_since_ms=loss.at_ms + 1), ["loss_times"]),
        (signed(away_since_ms=FILE.order.order.issued_at_ms - 1), ["loss_times"]),
        (replace(FILE, loss=replace(FILE.loss, signature=signed(job_id="x").loss.signature)), ["loss_signer"]),
        (replace(FILE, order=replace(FILE.order, signature=FILE.loss.signature)), ["order_signer"]),
    ]
    for file, rules in cases:
        assert broken(file) == rules
    assert "receipt_signer" in broken(replace(FILE, chain_id=CHAIN + 1))


def test_a_sibling_signs_where_the_one_that_ordered_says_so_or_the_reader() -> None:
    file = signed(SIBLING)
    assert broken(file) == ["loss_bootstrap"]
    assert broken(file, (SIBLING.address,)) == []
    with_word = replace(file, stand_in=STAND_IN)
    assert broken(with_word) == []
    assert LossFile.from_document(with_word.to_document()) == with_word
    with pytest.raises(ValueError, match="cannot sign"):
        sign_loss(FILE.loss.loss, SIBLING, CHAIN)


def test_what_is_no_loss_file_is_said() -> None:
    for document in ({}, [], {**FILE.to_document(), "version": 2}, {**FILE.to_document(), "chainId": "1"}):
        with pytest.raises(MalformedError):
            LossFile.from_document(document)
    for text in ("{", "x" * 300_000):
        with pytest.raises(MalformedError):
            LossFile.from_json(text)
