"""Task receipts: a node's signed word on what one order came to, a link in its chain for that bootstrap.

Owns the record, its hash, and its form in the trailer ``Ngpu-Receipt``. Sequence numbers and `previous` are assigned
by the node's ledger; whether a receipt is right is judged in `verification`.

The receipts of one node for one bootstrap form a chain: `sequence` counts from 1, `previous` is the hash of the
receipt before it, 32 zero bytes for the first. A receipt's hash is its EIP-712 digest, so it covers the network and
never the signature.
"""

from __future__ import annotations

from dataclasses import field
from enum import StrEnum

from ngpu_protocol.frozen import dataclass
from ngpu_protocol.identity import Account, Address, recover
from ngpu_protocol.typed_data import MAX_LIST_ITEMS, ZERO32, SignedType, from_text, to_text

RECEIPT_HEADER = "Ngpu-Receipt"

FIRST_PREVIOUS = ZERO32
"""`TaskReceipt.previous` of the first receipt of a chain."""

MAX_RECEIPT_GPUS = MAX_LIST_ITEMS
MAX_RECEIPT_CHARS = 16 * 1024
"""Longest header or trailer value that is decoded: 256 GPUs and everything else, in base64."""


class Outcome(StrEnum):
    """How an attempt that was admitted ended."""

    COMPLETE = "complete"
    """The workspace's answer went out whole."""
    CLIENT_GONE = "client_gone"
    """The bootstrap's stream ended or was reset before the answer was out."""
    CANCELLED = "cancelled"
    """The bootstrap asked for it to stop."""
    DEADLINE = "deadline"
    """The order's deadline passed."""
    LIMIT = "limit"
    """A limit on size or time of this node was reached."""
    WORKSPACE_BROKE = "workspace_broke"
    """The workspace could not be reached, or its answer stopped short."""
    NODE_STOPPING = "node_stopping"
    """The node's daemon stopped and its grace period was over."""


class Meter(StrEnum):
    """How `TaskReceipt.busy_gpu_ms` was found."""

    NVML_PROCESS = "nvml-process"
    """From utilisation samples of the workspace's own processes."""
    NVML_DEVICE = "nvml-device"
    """From the whole device's utilisation, which the workspace had to itself."""
    NONE = "none"
    """Not at all: busy is 0 and reserved is what counts."""


@dataclass(frozen=True, slots=True)
class TaskReceipt:
    """What one order came to.

    Attributes:
        order_hash: the order's digest, 32 bytes.
        node: who ran it, and signs.
        bootstrap: who ordered it.
        sequence: position in the chain of this node and bootstrap, from 1.
        previous: hash of the receipt at the position before, 32 bytes.
        image_digest: SHA-256 of the workspace's image, 32 bytes; zero for a model server.
        request_hash: SHA-256 of the request's body as far as the node received it (of nothing, where there was none).
        request_bytes: how many bytes that covers.
        status: the workspace's HTTP status, 0 if it gave none.
        response_hash: SHA-256 of the workspace's body as far as the node sent it on.
        response_bytes: how many bytes that covers.
        outcome: an `Outcome`, or a later version's word.
        started_at_ms: UTC milliseconds by the node's clock when the order was admitted.
        ended_at_ms: UTC milliseconds by the node's clock.
        duration_ms: from admission to end by a monotonic clock, rounded down.
        gpus: names (keccak of node address and UUID, 32 bytes each) of the GPUs the workspace held, each once.
        reserved_gpu_ms: integral over the task of GPUs held divided by tasks running on them, rounded down.
        busy_gpu_ms: what of that the workspace's own processes used.
        meter: a `Meter`, or a later version's word.
    """

    order_hash: bytes
    node: Address
    bootstrap: Address
    sequence: int
    previous: bytes
    image_digest: bytes
    request_hash: bytes
    request_bytes: int
    status: int
    response_hash: bytes
    response_bytes: int
    outcome: str
    started_at_ms: int
    ended_at_ms: int
    duration_ms: int
    gpus: tuple[bytes, ...]
    reserved_gpu_ms: int
    busy_gpu_ms: int
    meter: str

    def struct_hash(self) -> bytes:
        """Return EIP-712's hashStruct of the receipt, without the network."""
        return RECEIPT_TYPE.struct_hash(self)

    def digest(self, chain_id: int) -> bytes:
        """Return the 32 bytes the node signs: the receipt's hash, named by the next receipt and the acknowledgement."""
        return RECEIPT_TYPE.digest(self, chain_id)

    def placed(self, sequence: int, previous: bytes) -> TaskReceipt:
        """Return the same receipt at another place of its chain."""
        # A third of what `dataclasses.replace` takes, which looks at every field.
        order_hash, node, bootstrap, _, _, *rest = RECEIPT_TYPE.values(self)
        return TaskReceipt(order_hash, node, bootstrap, sequence, previous, *rest)

    def billed_gpu_seconds(self) -> int:
        """Return the GPU time on clients' pages: whole seconds rounded up, busy where it was metered, else reserved."""
        billed_ms = self.reserved_gpu_ms if self.meter == Meter.NONE else self.busy_gpu_ms
        return -(-billed_ms // 1000)


RECEIPT_TYPE = SignedType(
    "TaskReceipt(bytes32 orderHash,address node,address bootstrap,uint64 sequence,bytes32 previous,bytes32 imageDigest,"
    "bytes32 requestHash,uint64 requestBytes,uint16 status,bytes32 responseHash,uint64 responseBytes,string outcome,"
    "uint64 startedAtMs,uint64 endedAtMs,uint64 durationMs,bytes32[] gpus,uint64 reservedGpuMs,uint64 busyGpuMs,"
    "string meter)",
    TaskReceipt,
    what="receipt",
    max_bytes=MAX_RECEIPT_CHARS * 3 // 4,
)


@dataclass(frozen=True, slots=True)
class ReceiptLink:
    """A place in a chain: the receipt at *sequence* has this 32-byte hash."""

    sequence: int
    hash: bytes


@dataclass(frozen=True, slots=True)
class SignedReceipt:
    """A receipt and the node's signature.

    Attributes:
        receipt: the receipt.
        signature: 65 bytes; decoding does not judge them, `signer` does.
        wire: the msgpack map as it was made or received, so that fields a later version added survive being passed
            on.
    """

    receipt: TaskReceipt
    signature: bytes
    wire: bytes = field(compare=False, repr=False)

    def encode(self) -> str:
        """Return the value of the trailer ``Ngpu-Receipt``."""
        return to_text(self.wire)

    @classmethod
    def decode(cls, text: str | bytes, max_bytes: int = MAX_RECEIPT_CHARS) -> SignedReceipt:
        """Return the receipt in a trailer's value of at most *max_bytes* characters.

        Raises:
            MalformedError: whatever else *text* is.
        """
        return cls.from_bytes(from_text(text, what="receipt", max_bytes=max_bytes))

    @classmethod
    def from_bytes(cls, wire: bytes) -> SignedReceipt:
        """Return the receipt in a msgpack map.

        Raises:
            MalformedError: whatever else *wire* is.
        """
        receipt, signature = RECEIPT_TYPE.unpack(wire)
        return cls(receipt, signature, wire)

    def signer(self, chain_id: int) -> Address:
        """Return who signed; the caller compares it with the node it asked.

        Raises:
            SignatureError: if no key recovers.
        """
        return recover(self.receipt.digest(chain_id), self.signature)

    def link(self, chain_id: int) -> ReceiptLink:
        """Return this receipt's place in its chain."""
        return ReceiptLink(self.receipt.sequence, self.receipt.digest(chain_id))


def sign_receipt(receipt: TaskReceipt, account: Account, chain_id: int) -> SignedReceipt:
    """Return *receipt* signed by *account* for one network.

    Raises:
        ValueError: if the account is not the receipt's node, it names more than `MAX_RECEIPT_GPUS` GPUs, or a field
            is out of range.
    """
    if account.address != receipt.node:
        raise ValueError(f"{account.address} cannot sign a receipt of {receipt.node}")
    if len(receipt.gpus) > MAX_RECEIPT_GPUS:
        raise ValueError(f"a receipt names at most {MAX_RECEIPT_GPUS} GPUs, not {len(receipt.gpus)}")
    signature = account.sign(receipt.digest(chain_id))
    return SignedReceipt(receipt, signature, RECEIPT_TYPE.pack(receipt, signature))
