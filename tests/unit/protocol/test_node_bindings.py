"""Node bindings: any Ethereum library comes to the same digest, and only the node's own signature counts."""

from __future__ import annotations

import pytest
from eth_account import Account as EthAccount
from eth_account.messages import encode_typed_data

from ngpu_protocol.errors import SignatureError
from ngpu_protocol.identity import Account
from ngpu_protocol.node_bindings import NODE_BINDING_TYPE, NodeBinding, sign_node_binding

CHAIN_ID = 77
NODE = Account.from_key(b"\x01" * 32)
OTHER = Account.from_key(b"\x02" * 32)
BINDING = NodeBinding(NODE.address, OTHER.address, "acme \u7b97\u529b", 1_795_170_268_000)


def test_eth_account_makes_the_same_signature() -> None:
    message = encode_typed_data(
        full_message={
            "types": {
                "EIP712Domain": [
                    {"name": "name", "type": "string"},
                    {"name": "version", "type": "string"},
                    {"name": "chainId", "type": "uint256"},
                ],
                "NodeBinding": [
                    {"name": "node", "type": "address"},
                    {"name": "wallet", "type": "address"},
                    {"name": "orgName", "type": "string"},
                    {"name": "sequence", "type": "uint64"},
                ],
            },
            "primaryType": "NodeBinding",
            "domain": {"name": "NGPU", "version": "1", "chainId": CHAIN_ID},
            "message": {
                "node": BINDING.node,
                "wallet": BINDING.wallet,
                "orgName": BINDING.org_name,
                "sequence": BINDING.sequence,
            },
        }
    )
    theirs = EthAccount.sign_message(message, b"\x01" * 32).signature
    ours = sign_node_binding(BINDING, NODE, CHAIN_ID)
    assert bytes(theirs) == ours
    assert BINDING.is_signed_by_node(ours, CHAIN_ID)


@pytest.mark.parametrize(
    "changed",
    [
        NodeBinding(NODE.address, NODE.address, BINDING.org_name, BINDING.sequence),
        NodeBinding(NODE.address, OTHER.address, "acme", BINDING.sequence),
        NodeBinding(NODE.address, OTHER.address, BINDING.org_name, BINDING.sequence + 1),
        NodeBinding(OTHER.address, OTHER.address, BINDING.org_name, BINDING.sequence),
    ],
)
def test_a_changed_field_is_not_what_was_signed(changed: NodeBinding) -> None:
    assert not changed.is_signed_by_node(sign_node_binding(BINDING, NODE, CHAIN_ID), CHAIN_ID)


def test_a_signature_counts_on_its_network_only() -> None:
    assert not BINDING.is_signed_by_node(sign_node_binding(BINDING, NODE, CHAIN_ID), CHAIN_ID + 1)


def test_nobody_else_signs() -> None:
    with pytest.raises(ValueError, match="cannot sign a binding"):
        sign_node_binding(BINDING, OTHER, CHAIN_ID)
    with pytest.raises(SignatureError):
        BINDING.is_signed_by_node(b"short", CHAIN_ID)


def test_it_travels_as_one_map() -> None:
    signature = sign_node_binding(BINDING, NODE, CHAIN_ID)
    assert NODE_BINDING_TYPE.unpack(NODE_BINDING_TYPE.pack(BINDING, signature)) == (BINDING, signature)
