"""Node bindings: a node's signed word on who is paid for its work.

Owns the record and its EIP-712 form, signed by the node's own key and by nobody else: a wallet is named, not asked. A
later binding of a node has a higher sequence (UTC milliseconds do) and replaces the one before.
"""

from __future__ import annotations

from ngpu_protocol.frozen import dataclass
from ngpu_protocol.identity import Account, Address, recover
from ngpu_protocol.typed_data import SignedType

MAX_ORG_NAME_CHARS = 128


@dataclass(frozen=True, slots=True)
class NodeBinding:
    """Who is paid.

    Attributes:
        node: whose work it is, and who signs.
        wallet: the account that is paid.
        org_name: who the owner says they are; at most `MAX_ORG_NAME_CHARS` characters.
        sequence: counts a node's bindings; the highest holds.
    """

    node: Address
    wallet: Address
    org_name: str
    sequence: int

    def digest(self, chain_id: int) -> bytes:
        """Return the 32 bytes that the node signs."""
        return NODE_BINDING_TYPE.digest(self, chain_id)

    def is_signed_by_node(self, signature: bytes, chain_id: int) -> bool:
        """Return whether *signature* (65 bytes) is the node's.

        Raises:
            SignatureError: no key recovers from it.
        """
        return recover(self.digest(chain_id), signature) == self.node


NODE_BINDING_TYPE = SignedType(
    "NodeBinding(address node,address wallet,string orgName,uint64 sequence)",
    NodeBinding,
    what="node binding",
    max_bytes=1024,
)


def sign_node_binding(binding: NodeBinding, account: Account, chain_id: int) -> bytes:
    """Return the node's signature over *binding* for one network.

    Raises:
        ValueError: if the account is not the binding's node.
    """
    if account.address != binding.node:
        raise ValueError(f"{account.address} cannot sign a binding of {binding.node}")
    return account.sign(binding.digest(chain_id))
