"""Task orders: a bootstrap's signed word that one node shall run one request, once, in time.

Owns the record, its digest, and its form in the header ``Ngpu-Order``. Whether a node admits an order (trust, time,
session, replay) is the node's business; what a receipt for it must look like is `verification`'s.

An order binds every part of the request line it comes with, so a node compares method, target, port, workspace and
revision and lets nothing else through under it. The digest also covers the chain id, so it names the order on one
network only, and it is what `TaskReceipt.order_hash` holds.
"""

from __future__ import annotations

from dataclasses import field

from ngpu_protocol.errors import MalformedError
from ngpu_protocol.frozen import dataclass
from ngpu_protocol.identity import Account, Address, recover
from ngpu_protocol.typed_data import SignedType, from_text, to_text

ORDER_HEADER = "Ngpu-Order"

MAX_TARGET_CHARS = 8192
"""Longest request target an order can name; a bootstrap answers 414 to a client's longer one."""

MAX_ORDER_CHARS = 16 * 1024
"""Longest header value that is decoded: a target of the greatest length and everything else, in base64."""


@dataclass(frozen=True, slots=True)
class TaskOrder:
    """One attempt of one task on one node.

    Attributes:
        task_id: the task's id (`task_ids`).
        attempt: counts the task's attempts from 1.
        bootstrap: who orders, and signs.
        node: who shall run it; any other node refuses.
        session: the node's 32 random bytes of this run of its daemon, which void every order made before a restart.
        workspace: the public numeric id, as text.
        revision: the workspace's revision the order was made for.
        port: the workspace's port, 1 to 65535.
        method: the HTTP method, as sent.
        target: ``/path?query`` exactly as the workspace receives it.
        detach: whether the node finishes and keeps the answer when the stream is gone.
        issued_at_ms: UTC milliseconds by the bootstrap's clock.
        deadline_ms: UTC milliseconds by the bootstrap's clock after which the task must not start and is cut off.
    """

    task_id: str
    attempt: int
    bootstrap: Address
    node: Address
    session: bytes
    workspace: str
    revision: int
    port: int
    method: str
    target: str
    detach: bool
    issued_at_ms: int
    deadline_ms: int

    def struct_hash(self) -> bytes:
        """Return EIP-712's hashStruct of the order, without the network."""
        return ORDER_TYPE.struct_hash(self)

    def digest(self, chain_id: int) -> bytes:
        """Return the 32 bytes that the bootstrap signs, which are also the order's hash in its receipt."""
        return ORDER_TYPE.digest(self, chain_id)


ORDER_TYPE = SignedType(
    "TaskOrder(string taskId,uint32 attempt,address bootstrap,address node,bytes32 session,string workspace,"
    "uint32 revision,uint16 port,string method,string target,bool detach,uint64 issuedAtMs,uint64 deadlineMs)",
    TaskOrder,
    what="order",
    max_bytes=MAX_ORDER_CHARS * 3 // 4,
)


@dataclass(frozen=True, slots=True)
class SignedOrder:
    """An order and the bootstrap's signature.

    Attributes:
        order: the order.
        signature: 65 bytes; decoding does not judge them, `signer` does.
        wire: the msgpack map as it was made or received, so that fields a later version added survive being passed
            on.
    """

    order: TaskOrder
    signature: bytes
    wire: bytes = field(compare=False, repr=False)

    def encode(self) -> str:
        """Return the value of the header ``Ngpu-Order``."""
        return to_text(self.wire)

    @classmethod
    def decode(cls, text: str | bytes, max_bytes: int = MAX_ORDER_CHARS) -> SignedOrder:
        """Return the order in a header's value of at most *max_bytes* characters.

        Raises:
            MalformedError: whatever else *text* is.
        """
        return cls.from_bytes(from_text(text, what="order", max_bytes=max_bytes))

    @classmethod
    def from_bytes(cls, wire: bytes) -> SignedOrder:
        """Return the order in a msgpack map.

        Raises:
            MalformedError: whatever else *wire* is.
        """
        order, signature = ORDER_TYPE.unpack(wire)
        if len(order.target) > MAX_TARGET_CHARS:
            raise MalformedError("order", f"target is longer than {MAX_TARGET_CHARS} characters")
        return cls(order, signature, wire)

    def signer(self, chain_id: int) -> Address:
        """Return who signed; the caller compares it with `TaskOrder.bootstrap`.

        Raises:
            SignatureError: if no key recovers.
        """
        return recover(self.order.digest(chain_id), self.signature)


def sign_order(order: TaskOrder, account: Account, chain_id: int) -> SignedOrder:
    """Return *order* signed by *account* for one network.

    Raises:
        ValueError: if the account is not the order's bootstrap, or a field is out of range.
    """
    if account.address != order.bootstrap:
        raise ValueError(f"{account.address} cannot sign an order of {order.bootstrap}")
    if len(order.target) > MAX_TARGET_CHARS:
        raise ValueError(f"the target is longer than {MAX_TARGET_CHARS} characters")
    signature = account.sign(order.digest(chain_id))
    return SignedOrder(order, signature, ORDER_TYPE.pack(order, signature))
